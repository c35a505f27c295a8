"""What a float8 linear is made of: casts of its operands, settings of its GEMMs, and the recipes.

A linear Y = X Wᵀ with X (M, K), W (N, K), Y (M, N) runs three GEMMs, and each names its two operands:

    output      (M, N) = X  (M, K) @ Wᵀ (K, N)   cast_config_input,  cast_config_weight
    grad_input  (M, K) = dY (M, N) @ W  (N, K)   cast_config_grad_output,  cast_config_weight_for_grad_input
    grad_weight (N, K) = dYᵀ(N, M) @ X  (M, K)   cast_config_grad_output_for_grad_weight,
                                                 cast_config_input_for_grad_weight

Both operands of a GEMM are float8, or both are DISABLED and that GEMM runs in high precision. One operand's
cast is `converters.float8.cast_config`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from converters.float8.cast_config import E5M2, CastConfig, ScalingGranularity, ScalingType, float8_dtypes
from kernels.support import gpu_casts_to_float8


@dataclass(frozen=True)
class Float8GemmConfig:
    """Settings of one GEMM."""

    use_fast_accum: bool = False
    """Let tensor cores keep partial sums in fewer bits (NVIDIA): faster, less accurate over long sums."""


@dataclass(frozen=True)
class DelayedScalingConfig:
    """Settings of delayed scaling."""

    history_len: int = 16
    """Steps in the rolling window of amaxes."""
    scale_fn_name: str = "max"
    """How the window becomes one amax; only ``max``."""

    def __post_init__(self) -> None:
        if self.history_len < 1:
            raise ValueError(f"DelayedScalingConfig: history_len is {self.history_len}, allowed: 1 and above")
        if self.scale_fn_name != "max":
            raise ValueError(f"DelayedScalingConfig: scale_fn_name is {self.scale_fn_name!r}, allowed: 'max'")


class Float8LinearRecipeName(str, Enum):
    """Names of the ready-made configs; `docs/float8.md` has their equations and says which when."""

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"


_GEMMS = {
    "output": ("cast_config_input", "cast_config_weight"),
    "grad_input": ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
    "grad_weight": ("cast_config_grad_output_for_grad_weight", "cast_config_input_for_grad_weight"),
}
SECOND_USE = {
    "cast_config_input": "cast_config_input_for_grad_weight",
    "cast_config_weight": "cast_config_weight_for_grad_input",
    "cast_config_grad_output": "cast_config_grad_output_for_grad_weight",
}
"""Field of a tensor's cast in its first GEMM -> field of its cast in the second."""

CAST_KERNELS = ("auto", "torch", "triton")
SAVED_INPUT = ("auto", "high_precision", "float8")


@dataclass(frozen=True)
class Float8LinearConfig:
    """All about one float8 linear.

    After construction no cast config is None, all dtypes are set, and nothing is ``auto``.
    """

    cast_config_input: CastConfig = field(default_factory=CastConfig)
    """X in the output GEMM."""
    cast_config_input_for_grad_weight: CastConfig | None = None
    """X in the grad_weight GEMM; None means as cast_config_input."""
    cast_config_weight: CastConfig = field(default_factory=CastConfig)
    """W in the output GEMM."""
    cast_config_weight_for_grad_input: CastConfig | None = None
    """W in the grad_input GEMM; None means as cast_config_weight."""
    cast_config_grad_output: CastConfig = field(default_factory=CastConfig)
    """dY in the grad_input GEMM."""
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    """dY in the grad_weight GEMM; None means as cast_config_grad_output."""
    gemm_config_output: Float8GemmConfig = Float8GemmConfig(use_fast_accum=True)
    """The output GEMM."""
    gemm_config_grad_input: Float8GemmConfig = Float8GemmConfig()
    """The grad_input GEMM."""
    gemm_config_grad_weight: Float8GemmConfig = Float8GemmConfig()
    """The grad_weight GEMM."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP2 gathers weights in float8: one byte an element travels (tensorwise dynamic weights only)."""
    pad_inner_dim: bool = False
    """Convert layers whose K or N is not divisible by 16 too, padding operands with zeros inside the GEMM."""
    emulate: bool = False
    """Dequantised operands and fp32 products in place of float8 GEMMs, for devices that lack them."""
    force_recompute_fp8_weight_in_bwd: bool = False
    """Under compile, keep the compiler from saving the float8 weight from forward to backward."""
    round_scales_to_power_of_2: bool = False
    """Round every computed scale down to a power of two, which makes scaling itself exact."""
    delayed_scaling_config: DelayedScalingConfig = field(default_factory=DelayedScalingConfig)
    """Settings of delayed scaling, where a cast config asks for it."""
    cast_kernels: str = "auto"
    """``torch``: casts as PyTorch ops, which a compiler fuses; ``triton``: one kernel writes both layouts;
    ``auto`` becomes the latter where there is a GPU for it."""
    saved_input: str = "auto"
    """What backward keeps of the input: itself (``high_precision``), cast again; or ``float8``, its
    transposed cast (1 byte); ``auto`` becomes the latter with Triton's casts, where backward reads it."""
    force_recompute_fp8_input_in_bwd: bool = False
    """With ``high_precision``, under compile: keep the compiler from casting X for backward in forward. For a
    linear that shares X with no other: each casts it for itself."""
    keep_float8_shards: bool = False
    """Keep a shard cast for the float8 all-gather until the weight changes: 1 byte an element of it."""

    def __post_init__(self) -> None:
        # The user's cast configs are never written to: a default becomes a copy held by this object.
        for first, second in SECOND_USE.items():
            default = float8_dtypes().e5m2 if first == "cast_config_grad_output" else float8_dtypes().e4m3
            base = _with_dtype(getattr(self, first), default)
            object.__setattr__(self, first, base)
            given = getattr(self, second)
            object.__setattr__(self, second, base if given is None else _with_dtype(given, default))
        self._check_gemms()
        self._check_delayed()
        self._check_kernels()
        if self.enable_fsdp_float8_all_gather:
            self._check_all_gather()

    def _check_gemms(self) -> None:
        for gemm, names in _GEMMS.items():
            left, right = (self.cast(name) for name in names)
            if left.enabled != right.enabled:
                off = names[0] if not left.enabled else names[1]
                raise ValueError(
                    f"Float8LinearConfig: the {gemm} GEMM has one float8 operand only: {off} is DISABLED.\n"
                    f"Disable both of {names[0]} and {names[1]}, or neither"
                )
            if left.enabled and not self.emulate and left.dtype in E5M2 and right.dtype in E5M2:
                raise ValueError(
                    f"Float8LinearConfig: the {gemm} GEMM multiplies e5m2 by e5m2, which no hardware does.\n"
                    f"Make one of {names[0]} and {names[1]} e4m3, or set emulate"
                )

    def _check_delayed(self) -> None:
        for first, second in SECOND_USE.items():
            base, other = self.cast(first), self.cast(second)
            if other.scaling_type is ScalingType.DELAYED and base.short() != other.short():
                raise ValueError(
                    f"Float8LinearConfig: {second} is {other.short()} but {first} is {base.short()};\n"
                    "a tensor has one delayed scale, so both must be DELAYED with one dtype"
                )

    def _check_kernels(self) -> None:
        if self.saved_input == "least":
            raise ValueError(
                "Float8LinearConfig: saved_input='least' goes by the role that each linear has in its model, "
                "and a config\nof linears knows none: take 'float8', or for those whose input backward has "
                "anyway\n'high_precision' with force_recompute_fp8_input_in_bwd"
            )
        for name, allowed in (("cast_kernels", CAST_KERNELS), ("saved_input", SAVED_INPUT)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Float8LinearConfig: {name} is {getattr(self, name)!r}, allowed: {allowed}")
        reads_input = self.cast(SECOND_USE["cast_config_input"]).enabled
        if self.cast_kernels == "auto":
            wanted = self.saved_input == "float8" or (gpu_casts_to_float8() and not self.emulate)
            object.__setattr__(self, "cast_kernels", "triton" if wanted else "torch")
        if self.saved_input == "auto":
            saved = "float8" if self.cast_kernels == "triton" and reads_input else "high_precision"
            object.__setattr__(self, "saved_input", saved)
        if self.saved_input == "float8" and self.cast_kernels != "triton":
            raise ValueError(
                "Float8LinearConfig: saved_input='float8' needs cast_kernels='triton':\n"
                "what is kept of PyTorch's casts is the compiler's choice"
            )
        if self.saved_input == "float8" and not reads_input:
            raise ValueError(
                "Float8LinearConfig: saved_input='float8' has no effect where the grad_weight GEMM, which "
                "reads the input in backward, is in high precision"
            )
        if self.force_recompute_fp8_input_in_bwd and (
            self.saved_input != "high_precision" or self.cast_kernels != "triton" or not reads_input
        ):
            raise ValueError(
                "Float8LinearConfig: force_recompute_fp8_input_in_bwd needs saved_input='high_precision', "
                "cast_kernels='triton'\nand a grad_weight GEMM in float8: elsewhere it has no effect"
            )
        if self.keep_float8_shards and not self.enable_fsdp_float8_all_gather:
            raise ValueError(
                "Float8LinearConfig: keep_float8_shards has no effect without enable_fsdp_float8_all_gather"
            )

    def _check_all_gather(self) -> None:
        for name in ("cast_config_weight", "cast_config_weight_for_grad_input"):
            cast = self.cast(name)
            if cast.scaling_type is not ScalingType.DYNAMIC or cast.axiswise:
                raise ValueError(
                    f"Float8LinearConfig: float8 all-gather needs {name} DYNAMIC and TENSORWISE,\n"
                    f"got {cast.short()}: one gathered float8 copy has one scale and must serve both GEMMs"
                )
        if self.cast("cast_config_weight").dtype != self.cast("cast_config_weight_for_grad_input").dtype:
            raise ValueError(
                "Float8LinearConfig: enable_fsdp_float8_all_gather needs one weight dtype for both GEMMs"
            )

    def cast(self, name: str) -> CastConfig:
        """The resolved cast config of that field (typed: never None)."""
        cast = getattr(self, name)
        assert isinstance(cast, CastConfig)
        return cast

    def shares_cast(self, tensor: str) -> bool:
        """True where ``input``, ``weight`` or ``grad_output`` is cast alike for both of its GEMMs."""
        first = self.cast(f"cast_config_{tensor}")
        second = self.cast(SECOND_USE[f"cast_config_{tensor}"])
        # Not ==, which would compare scale tensors by value and so break a compiled graph.
        return first.short() == second.short() and first.static_scale is second.static_scale

    @property
    def uses_delayed_scaling(self) -> bool:
        """True where a sync after backward is needed."""
        return any(self.cast(name).scaling_type is ScalingType.DELAYED for name in SECOND_USE)

    @property
    def axiswise(self) -> bool:
        """True where any cast has one scale per row (needs SM 9.0 on NVIDIA)."""
        return any(self.cast(name).axiswise for names in _GEMMS.values() for name in names)

    @staticmethod
    def from_recipe_name(recipe_name: Float8LinearRecipeName | str) -> Float8LinearConfig:
        """The config of a recipe, by enum or by name.

        Raises:
            ValueError: no recipe has that name.
        """
        return Float8LinearConfig(**recipe_fields(recipe_name))


def _with_dtype(cast: CastConfig, dtype: torch.dtype) -> CastConfig:
    return cast if cast.target_dtype is not None else dataclasses.replace(cast, target_dtype=dtype)


def recipe_fields(recipe_name: Float8LinearRecipeName | str) -> dict[str, Any]:
    """The fields in which a recipe differs from the defaults, to combine with a user's own.

    Raises:
        ValueError: no recipe has that name.
    """
    names = [name.value for name in Float8LinearRecipeName]
    value = recipe_name.value if isinstance(recipe_name, Float8LinearRecipeName) else recipe_name
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"float8 recipe {value!r} does not exist{hint}\nallowed: {', '.join(names)}")
    if value == "tensorwise":
        return {}
    e4m3 = float8_dtypes().e4m3
    row = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=e4m3)
    fields: dict[str, Any] = {
        "cast_config_input": row,
        "cast_config_weight": row,
        "cast_config_grad_output": row,
        "round_scales_to_power_of_2": True,
    }
    if value == "rowwise_with_gw_hp":
        off = CastConfig(scaling_type=ScalingType.DISABLED)
        fields["cast_config_weight_for_grad_input"] = CastConfig(target_dtype=e4m3)
        fields["cast_config_input_for_grad_weight"] = off
        fields["cast_config_grad_output_for_grad_weight"] = off
    return fields
