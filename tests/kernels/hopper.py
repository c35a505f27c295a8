"""Compile a Triton kernel for Hopper on any machine, and read what it takes of the chip.

Triton's own ptxas does it, without a GPU, and nvdisasm reads what it made: ptxas can lose a value and use an
undefined register in its place (`kernels.triton.cast` tells how). It names that register R1, the stack
pointer's, which nothing but addresses and its own changes should read.

As a script (`python -m tests.kernels.hopper`) it reads one request as JSON from stdin; tests call
`compile_for_hopper`, which runs it in a process without the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


def compile_for_hopper(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    aligned: tuple[str, ...] = (),
    fp_fusion: bool = True,
) -> dict[str, Any]:
    """Compile ``module:kernel`` for compute capability 9.0.

    Args:
        kernel: Its place, for example ``kernels.triton.cast:cast_tiles_kernel``.
        signature: Every argument in order -> Triton's type: ``*bf16``, ``*fp32``, ``*fp8e4nv``, ``*fp8e5``,
            ``i32``, ``fp32``, ``constexpr``.
        constants: Values of the constexpr arguments.
        num_warps: Warps of a program.
        aligned: Arguments (pointers, sizes) that are multiples of 16, as most are in a run.
        fp_fusion: Whether it may fuse products with additions (`enable_fp_fusion` of a launch).

    Returns:
        registers (a thread), stack (bytes a thread: spills show here), shared (bytes a program), and of its
        PTX the distinct global loads and stores (accesses) and, in their order, the waits for the kernel
        before and the leave for the next one to begin (neighbours). Fails where the machine code reads an
        undefined register.
    """
    request = {
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "num_warps": num_warps,
        "aligned": aligned,
        "fp_fusion": fp_fusion,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hopper"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    undefined = found.pop("undefined")
    assert not undefined, f"undefined registers are read: {undefined[:5]}"
    return found


def reads_undefined(instruction: str) -> bool:
    """Whether a line of nvdisasm reads what nothing has written."""
    return bool(re.search(r"\bR1\b", instruction)) and not re.search(r"\[R1\b|LDC R1,|R1, R1,", instruction)


def _main() -> None:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    request = json.loads(sys.stdin.read())
    module, name = request["kernel"].split(":")
    function = getattr(importlib.import_module(module), name)
    function = getattr(function, "fn", function) if not hasattr(function, "arg_names") else function
    names = list(request["signature"])
    source = ASTSource(
        function,
        signature=request["signature"],
        constexprs=request["constants"],
        attrs={(names.index(name),): _DIVISIBLE_BY_16 for name in request["aligned"]},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": request["num_warps"], "enable_fp_fusion": request["fp_fusion"]},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True
        ).stdout
        code = subprocess.run(
            [tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    accesses = sorted(set(re.findall(r"(?:ld|st|atom|red)\.global[.:\w]*", compiled.asm["ptx"])))
    print(
        json.dumps(
            {
                "registers": int(found[1]),
                "stack": int(found[2]),
                "shared": compiled.metadata.shared,
                "accesses": accesses,
                "neighbours": re.findall(r"griddepcontrol\.(\w+)", compiled.asm["ptx"]),
                "undefined": [line.strip() for line in code.splitlines() if reads_undefined(line)],
            }
        )
    )


if __name__ == "__main__":
    _main()
