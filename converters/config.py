"""The ``[quantize.*]`` sections: plain dataclasses, no torch, read by the config loader.

The string under each field is its ``--help`` text. A section's `problems` yields (key, message) for
settings that cannot work together; the loader reports all of them at once, before a model exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

CastKernels = Literal["auto", "torch", "triton"]
SavedInput = Literal["auto", "high_precision", "float8", "least"]
ScalingTypeName = Literal["dynamic", "delayed", "static"]
_TENSORS = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class Float8SectionConfig:
    """``[quantize.linear.float8]``: float8 training of `nn.Linear` layers."""

    enable_fsdp_float8_all_gather: bool = False
    """Cast weight shards to float8 before FSDP gathers them: 1 byte an element travels (tensorwise only)."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute all weight scales with one all-reduce after an optimizer step; needs the float8 all-gather."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """One scale a tensor, or one a row; unset means tensorwise. docs/float8.md says which when."""
    filter_fqns: list[str] = field(default_factory=list)
    """Substrings of FQNs of linears to keep; `auto_filter_small_kn` adds all that are too small to gain."""
    emulate: bool = False
    """Float8 numerics from dequantised operands and fp32 products, for devices without float8 GEMMs: slow."""
    calibration: str | None = None
    """File of `octavo calibrate`: convert the linears whose shape it measured to gain, keep the others."""
    log_stats_freq: int = field(default=0, metadata={"min": 0})
    """Log amax, saturated and flushed share and SQNR of every float8 layer each this many steps; 0 is off."""
    scaling_type_input: ScalingTypeName = "dynamic"
    """Scale of the input: from its own amax, from the amaxes of past steps (delayed), or fixed (static)."""
    scaling_type_weight: ScalingTypeName = "dynamic"
    """Scale of the weight: dynamic, delayed or static."""
    scaling_type_grad_output: ScalingTypeName = "dynamic"
    """Scale of the output's gradient: dynamic, delayed or static."""
    delayed_history_len: int = field(default=16, metadata={"min": 1})
    """Steps of amax history that delayed scaling takes the maximum of."""
    static_scale_input: float | None = field(default=None, metadata={"min": 0.0})
    """The fixed input scale, which multiplies values before the cast; needs scaling_type_input = static."""
    static_scale_weight: float | None = field(default=None, metadata={"min": 0.0})
    """The fixed weight scale; needs scaling_type_weight = static."""
    static_scale_grad_output: float | None = field(default=None, metadata={"min": 0.0})
    """The fixed scale of the output's gradient; needs scaling_type_grad_output = static."""
    round_scales_to_power_of_2: bool | None = None
    """Round scales down to powers of two; unset leaves it to the recipe (rowwise on, tensorwise off)."""
    pad_inner_dim: bool = False
    """Convert layers whose sizes are not divisible by 16 too, padding them with zeros inside the GEMM."""
    force_recompute_fp8_weight_in_bwd: bool | Literal["auto"] = "auto"
    """Under compile, cast the weight again in backward rather than keep the cast, 1 byte a parameter. `auto`:
    with Triton's casts, of weights that do not come in float8."""
    cast_kernels: CastKernels = "auto"
    """Casts as PyTorch ops that a compiler fuses, or Triton kernels that write both layouts in one read;
    `auto` takes these on a GPU."""
    saved_input: SavedInput = "auto"
    """What backward keeps of a linear's input: the input, its float8 cast at 1 byte an element, or `least`:
    no cast where compiled backward has or makes the input (wo, w2). `auto`: with Triton's casts, `least` in
    compiled blocks and `float8` elsewhere."""
    keep_float8_shards: bool | Literal["auto"] = "auto"
    """Cast a shard once a step for all its float8 all-gathers, and keep it: 1 byte an element. `auto`: on
    GPUs that gather a weight more than once a step, without CPU offload."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Settings that cannot work together, as (key, message)."""
        rowwise = self.recipe_name in ("rowwise", "rowwise_with_gw_hp")
        if self.enable_fsdp_float8_all_gather and rowwise:
            yield (
                "enable_fsdp_float8_all_gather",
                f"cannot work with recipe_name = {self.recipe_name!r}: each GEMM scales the weight along "
                "another dim, so one gathered float8 copy cannot serve both; use tensorwise or turn it off",
            )
        if self.precompute_float8_dynamic_scale_for_fsdp and not self.enable_fsdp_float8_all_gather:
            yield (
                "precompute_float8_dynamic_scale_for_fsdp",
                "has no effect without enable_fsdp_float8_all_gather = true",
            )
        if self.enable_fsdp_float8_all_gather and self.scaling_type_weight != "dynamic":
            yield (
                "enable_fsdp_float8_all_gather",
                f"needs scaling_type_weight = 'dynamic', got {self.scaling_type_weight!r}",
            )
        yield from self._kernel_problems()
        for tensor in _TENSORS:
            yield from self._scaling_problems(tensor, rowwise)
        for entry in self.filter_fqns:
            if not entry.strip():
                yield "filter_fqns", "has an empty entry, which would match every linear"
        if self.calibration is not None and "auto_filter_small_kn" in self.filter_fqns:
            yield (
                "filter_fqns",
                "auto_filter_small_kn guesses what calibration measures; leave one of them out",
            )
        if self.calibration is not None and self.emulate:
            yield "calibration", "is of float8 GEMMs, which emulate does without; leave one of them out"

    def _kernel_problems(self) -> Iterator[tuple[str, str]]:
        in_float8 = self.saved_input in ("float8", "least")
        if in_float8 and self.cast_kernels == "torch":
            yield (
                "saved_input",
                f"{self.saved_input!r} needs cast_kernels = 'triton': what is kept of PyTorch's casts is the "
                "compiler's choice",
            )
        if in_float8 and self.recipe_name == "rowwise_with_gw_hp":
            yield (
                "saved_input",
                f"{self.saved_input!r} has no effect with recipe_name = 'rowwise_with_gw_hp', whose backward "
                "reads the input in high precision",
            )
        if self.keep_float8_shards is True and not self.enable_fsdp_float8_all_gather:
            yield "keep_float8_shards", "has no effect without enable_fsdp_float8_all_gather = true"

    def _scaling_problems(self, tensor: str, rowwise: bool) -> Iterator[tuple[str, str]]:
        kind = getattr(self, f"scaling_type_{tensor}")
        scale = getattr(self, f"static_scale_{tensor}")
        if kind != "dynamic" and rowwise:
            yield (
                f"scaling_type_{tensor}",
                f"{kind!r} keeps one scale a tensor; recipe_name = {self.recipe_name!r} has one a row",
            )
        if kind == "static" and not scale:
            yield f"scaling_type_{tensor}", f"'static' needs static_scale_{tensor} > 0, got {scale}"
        if kind != "static" and scale is not None:
            yield f"static_scale_{tensor}", f"has no effect with scaling_type_{tensor} = {kind!r}"


@dataclass(frozen=True)
class MXLinearSectionConfig:
    """``[quantize.linear.mx]``: MXFP8 training of `nn.Linear` layers."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel that casts along dim 1 to MXFP8."""
    recipe_name: str = "mxfp8_cublas"
    """MX recipe."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Substrings of FQNs of linears to keep in high precision."""


@dataclass(frozen=True)
class Float8GroupedMMSectionConfig:
    """``[quantize.grouped_mm.float8]``: float8 grouped GEMMs of MoE experts."""

    fqns: list[str] = field(default_factory=list)
    """Substrings of FQNs of the MoE modules to convert."""


@dataclass(frozen=True)
class MXGroupedMMSectionConfig:
    """``[quantize.grouped_mm.mx]``: MXFP8 grouped GEMMs of MoE experts."""

    recipe_name: str = "mxfp8"
    """MX recipe for grouped GEMMs."""
    fqns: list[str] = field(default_factory=list)
    """Substrings of FQNs of the MoE modules to convert."""


@dataclass(frozen=True)
class LinearConfig:
    """``[quantize.linear]``: low-precision linears."""

    float8: Float8SectionConfig = field(default_factory=Float8SectionConfig)
    """Float8 linears."""
    mx: MXLinearSectionConfig = field(default_factory=MXLinearSectionConfig)
    """MXFP8 linears."""


@dataclass(frozen=True)
class GroupedMMConfig:
    """``[quantize.grouped_mm]``: low-precision grouped GEMMs."""

    float8: Float8GroupedMMSectionConfig = field(default_factory=Float8GroupedMMSectionConfig)
    """Float8 grouped GEMMs."""
    mx: MXGroupedMMSectionConfig = field(default_factory=MXGroupedMMSectionConfig)
    """MXFP8 grouped GEMMs."""


@dataclass(frozen=True)
class QuantizeConfig:
    """``[quantize]``: one section a converter."""

    linear: LinearConfig = field(default_factory=LinearConfig)
    """Low-precision linears."""
    grouped_mm: GroupedMMConfig = field(default_factory=GroupedMMConfig)
    """Low-precision grouped GEMMs."""
