"""Where kernels run, and that Triton is not needed before one does."""

import subprocess
import sys

import torch

from kernels.support import runs_triton


def test_kernels_run_on_cuda_devices_alone():
    assert not runs_triton(torch.device("cpu"))
    assert not runs_triton(torch.device("meta"))


def test_importing_kernels_does_not_import_triton():
    code = "import sys, kernels, kernels.support; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
