"""What a comparison runs, read from the environment, and each variant as flags of a run.

The best settings of each recipe are the table `VARIANTS`: one row a variant, the flags in which it differs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models import MODELS
from trainer.config.errors import nearest
from trainer.launch import processes

RECIPE = "FLOAT8_RECIPE_WITH_BEST_SETTINGS"
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
_FLOAT8 = "--quantize.linear.float8"
_COMPILE = ("--compile.enable", "--optimizer.implementation=one_pass")
"""Of every variant but the eager one: the blocks compiled, and the faster optimizer."""
_CONVERT = ("--model.converters=quantize.linear.float8", f"{_FLOAT8}.filter_fqns=output")
_GATHER = (
    f"{_FLOAT8}.enable_fsdp_float8_all_gather",
    f"{_FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
)
_ROPE = "--model.overrides.rope_kernel=fused"
_KERNELS = ("--model.overrides.norm_kernel=fused", "--model.overrides.swiglu_kernel=fused", _ROPE)
_BEST_TENSORWISE = (*_KERNELS, "--parallelism.fsdp_reshard_after_forward=never")
"""As in train_configs/llama3_8b_float8.toml."""
BASELINE = "bf16"
_NAMES = (
    *("NGPU", "FLAVOR", "N_LAYERS", "SEQ_LEN", "LOCAL_BATCH_SIZE", "ACCUMULATION", "STEPS", "WARMUP_STEPS"),
    *("AC", "VARIANTS", "EXTRA_ARGS", "PEER", "PEER_EXTRA_ARGS", "TIMEOUT"),
)


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    scaling: str
    """What the table calls it."""
    flags: tuple[str, ...]


VARIANTS: dict[str, Variant] = {
    "eager": Variant("none (bf16, eager)", ()),
    "bf16": Variant("none (bf16)", (*_COMPILE, *_KERNELS)),
    "tensorwise": Variant(
        "tensorwise with float8 all-gather", (*_COMPILE, *_CONVERT, *_GATHER, *_BEST_TENSORWISE)
    ),
    "tensorwise_bf16_gather": Variant("tensorwise with bf16 all-gather", (*_COMPILE, _ROPE, *_CONVERT)),
    "rowwise": Variant(
        "rowwise with bf16 all-gather", (*_COMPILE, _ROPE, *_CONVERT, f"{_FLOAT8}.recipe_name=rowwise")
    ),
    "rowwise_with_gw_hp": Variant(
        "rowwise_with_gw_hp with bf16 all-gather",
        (*_COMPILE, _ROPE, *_CONVERT, f"{_FLOAT8}.recipe_name=rowwise_with_gw_hp"),
    ),
}

_AC: dict[str, tuple[str, ...]] = {
    "none": ("--activation_checkpoint.mode=none",),
    "op": ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    "full": ("--activation_checkpoint.mode=full",),
    "auto": ("--activation_checkpoint.mode=auto",),
}
_PEER_AC = ("none", "op", "full")


@dataclass(frozen=True)
class Settings:
    """The environment, checked."""

    recipe: str
    ngpu: int
    flavor: str
    n_layers: int | None
    """In place of the flavor's own, to fit a smaller device."""
    seq_len: int
    local_batch_size: int
    accumulation: int
    steps: int
    warmup_steps: int
    ac: str
    variants: tuple[str, ...]
    extra_args: tuple[str, ...]
    peer: bool
    peer_extra_args: tuple[str, ...]
    timeout_seconds: int | None
    """Of one variant."""
    out: Path
    dry_run: bool
    given: Mapping[str, str]
    """The variables that were set, and the recipe."""

    @property
    def model(self) -> str:
        """As the table names it."""
        layers = f" ({self.n_layers} layers)" if self.n_layers else ""
        return f"Llama3-{self.flavor}{layers}"

    @property
    def log_freq(self) -> int:
        """Steps that one throughput is the mean of."""
        return 5 if self.steps >= 20 else 1

    @property
    def global_batch_size(self) -> int:
        """Sequences a step, where each process has data of its own."""
        return self.local_batch_size * self.ngpu * self.accumulation

    def flags(self, variant: str) -> list[str]:
        """Flags of that variant's run."""
        found = [
            "--model.name=llama3",
            f"--model.flavor={self.flavor}",
            "--training.dataset=python_sources",
            f"--training.seq_len={self.seq_len}",
            f"--training.local_batch_size={self.local_batch_size}",
            f"--training.steps={self.steps}",
            "--optimizer.lr=3e-4",
            f"--lr_scheduler.warmup_steps={min(20, self.steps)}",
            f"--metrics.log_freq={self.log_freq}",
            "--debug.seed=1",
            *_AC[self.ac],
            *VARIANTS[variant].flags,
            f"--job.dump_folder={self.out / variant}",
        ]
        if self.n_layers:
            found.append(f"--model.overrides.n_layers={self.n_layers}")
        if self.accumulation > 1:
            found.append(f"--training.global_batch_size={self.global_batch_size}")
        if self.dry_run:
            found.append("--comm.mode=fake_backend")
        return [*found, *self.extra_args]


def read_settings(env: Mapping[str, str], root: Path) -> Settings:
    """The comparison that the environment describes.

    Raises:
        ValueError: with everything that is wrong, one line each.
    """
    wrong: list[str] = []

    def number(name: str, default: int | None, least: int = 1) -> int:
        text = env.get(name, "").strip()
        if not text:
            return default or 0
        if not text.isdecimal() or int(text) < least:
            wrong.append(f"{name}: got {text!r}; allowed: an integer >= {least}")
            return max(default or 0, least)
        return int(text)

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = env.get(name, "").strip() or default
        if value not in allowed:
            hint = f"; did you mean {nearest(value, allowed)!r}?"
            wrong.append(f"{name}: got {value!r}{hint} (known: {', '.join(allowed)})")
        return value

    recipe = choice(RECIPE, "tensorwise", RECIPES)
    names = tuple(env.get("VARIANTS", "").replace(",", " ").split()) or (BASELINE, recipe)
    for name in names:
        if name not in VARIANTS and name not in RECIPES:
            hint = f"; did you mean {nearest(name, VARIANTS)!r}?"
            wrong.append(f"VARIANTS: unknown variant {name!r}{hint} (known: {', '.join(VARIANTS)})")
    steps = number("STEPS", 40)
    warmup = number("WARMUP_STEPS", min(10, steps // 2), least=0)
    if warmup >= steps:
        wrong.append(f"WARMUP_STEPS: {warmup} leaves none of STEPS = {steps} to measure")
    flavor = choice("FLAVOR", "8B", tuple(MODELS["llama3"].flavors))
    ac = choice("AC", "op", tuple(_AC))
    peer = choice("PEER", "0", ("0", "1")) == "1"
    if peer and ac not in _PEER_AC:
        wrong.append(f"AC: {ac!r} is Octavo's own; with PEER=1 one of {', '.join(_PEER_AC)}")
    settings = Settings(
        recipe=recipe,
        ngpu=processes(env),
        flavor=flavor,
        n_layers=number("N_LAYERS", None) or None,
        seq_len=number("SEQ_LEN", 8192),
        local_batch_size=number("LOCAL_BATCH_SIZE", 1),
        accumulation=number("ACCUMULATION", 1),
        steps=steps,
        warmup_steps=warmup,
        ac=ac,
        variants=tuple(dict.fromkeys(names)),
        extra_args=tuple(shlex.split(env.get("EXTRA_ARGS", ""))),
        peer=peer,
        peer_extra_args=tuple(shlex.split(env.get("PEER_EXTRA_ARGS", ""))),
        timeout_seconds=number("TIMEOUT", None) or None,
        out=Path(env.get("OUT") or root / "outputs" / "benchmarks" / f"llama3_{flavor}").resolve(),
        dry_run=choice("DRY_RUN", "0", ("0", "1")) == "1",
        given={RECIPE: recipe, **{name: env[name] for name in _NAMES if env.get(name)}},
    )
    if settings.peer_extra_args and not peer:
        wrong.append("PEER_EXTRA_ARGS: has no effect without PEER=1")
    if wrong:
        raise ValueError("\n".join(f"error: {line}" for line in wrong))
    return settings
