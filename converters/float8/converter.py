"""The ``float8`` converter of a run: section of the config -> linears swapped, reported and kept up.

Per step it does what the recipe needs, so that no training loop has to know: the sync of delayed
scales after backward, the precomputed scales of the float8 all-gather after the optimizer step, and
health statistics on the steps that `log_stats_freq` asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from converters.base import ConversionReport, Converter, ConverterContext
from converters.config import Float8SectionConfig
from converters.float8 import stats
from converters.float8.calibration import Calibration, read_calibration, speed_settings
from converters.float8.cast_config import CastConfig, ScalingType
from converters.float8.config import (
    DelayedScalingConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    recipe_fields,
)
from converters.float8.convert import Decision, decide, swap
from converters.float8.delayed import (
    delayed_layers,
    delayed_state_dict,
    load_delayed_state_dict,
    sync_float8_amax_and_scale_history,
)
from converters.float8.filters import auto_filter_for_recipe
from converters.float8.gemm import CPU_HAS_ROW_SCALES, check_device
from converters.float8.linear import CASTS_TO_SAVE, OPS_TO_SAVE, Float8Linear
from converters.float8.report import LinearsOfRun, conversion_rows
from converters.float8.weight_scales import (
    gathered_in_float8,
    precompute_float8_dynamic_scale_for_fsdp,
    read_amaxes_of_changed_weights,
)
from kernels.support import runs_triton

logger = logging.getLogger(__name__)


def linear_config(section: Float8SectionConfig) -> Float8LinearConfig:
    """The `Float8LinearConfig` that a config section describes; `rowwise_config` has that of rowwise linears.

    Raises:
        ValueError: settings that cannot work together.
    """
    fields = recipe_fields(section.recipe_name or Float8LinearRecipeName.TENSORWISE)
    for tensor in ("input", "weight", "grad_output"):
        kind = ScalingType(getattr(section, f"scaling_type_{tensor}"))
        if kind is ScalingType.DYNAMIC:
            continue
        scale = getattr(section, f"static_scale_{tensor}")
        static = (
            torch.tensor(scale, dtype=torch.float32, device="cpu") if kind is ScalingType.STATIC else None
        )
        fields[f"cast_config_{tensor}"] = CastConfig(scaling_type=kind, static_scale=static)
    if section.round_scales_to_power_of_2 is not None:
        fields["round_scales_to_power_of_2"] = section.round_scales_to_power_of_2
    return Float8LinearConfig(
        **fields,
        enable_fsdp_float8_all_gather=section.enable_fsdp_float8_all_gather,
        pad_inner_dim=section.pad_inner_dim,
        emulate=section.emulate,
        force_recompute_fp8_weight_in_bwd=section.force_recompute_fp8_weight_in_bwd is True,
        delayed_scaling_config=DelayedScalingConfig(history_len=section.delayed_history_len),
        cast_kernels=section.cast_kernels,
        saved_input="float8" if section.saved_input == "least" else section.saved_input,
        keep_float8_shards=section.keep_float8_shards is True,
    )


def rowwise_config(section: Float8SectionConfig) -> Float8LinearConfig:
    """That of linears that end a part of a block: ``saved_input = "least"`` keeps nothing for them.

    Their inputs are attention's output, which its backward keeps anyway, and a product that a compiler makes
    again. The others read a norm's output, which nothing else keeps; several read one, so they share a cast.
    """
    config = linear_config(section)
    if section.saved_input != "least":
        return config
    return replace(config, saved_input="high_precision", force_recompute_fp8_input_in_bwd=True)


class Float8Converter(Converter):
    """See the module."""

    name = "float8"

    def __init__(self, section: Float8SectionConfig, context: ConverterContext) -> None:
        problems = list(section.problems())
        if problems:
            raise ValueError("\n".join(f"quantize.linear.float8.{key}: {why}" for key, why in problems))
        self.section = section
        self.context = context
        self.recipe = Float8LinearRecipeName(section.recipe_name or "tensorwise")
        self.config, self.rowwise_config = linear_config(section), rowwise_config(section)
        self.linears = LinearsOfRun(context)
        self._collected = False
        self._amaxes: dict[Tensor, Tensor] | None = None
        """Parameter -> amax of this rank's part, as the optimizer found it; None where it finds none."""
        index = (
            torch.cuda.current_device()
            if context.device_type == "cuda" and torch.cuda.is_available()
            else None
        )
        if context.device_type != "cuda" or index is not None:
            check_device(
                context.device_type, index, axiswise=self.config.axiswise, emulate=self.config.emulate
            )
        old_cpu = context.device_type == "cpu" and not CPU_HAS_ROW_SCALES
        if old_cpu and self.config.axiswise and context.compile_model:
            raise ValueError(
                f"torch {torch.__version__} compiles row-scaled float8 on a CPU to wrong values\n"
                "use torch 2.13 or later, or leave compile.enable off there"
            )
        if self.config.cast_kernels == "triton" and not runs_triton(torch.device(context.device_type)):
            logger.warning(
                "quantize.linear.float8.cast_kernels = 'triton' runs as plain PyTorch here: Triton needs a "
                "CUDA device and its package; the numbers are the same"
            )
        if (
            context.device_type == "cuda"
            and not context.compile_model
            and self.config.cast_kernels == "torch"
        ):
            logger.warning(
                "float8 without compile.enable runs each cast as several kernels and is slower than bf16; "
                "set compile.enable = true"
            )
        self.calibration = (
            None if section.calibration is None else self._calibration(section.calibration, index)
        )

    def _calibration(self, path: str, index: int | None) -> Calibration:
        """The calibration of that file, where it applies to this run."""
        calibration, device = read_calibration(path), None
        if not self.context.dry_run:
            here = None if index is None else torch.cuda.get_device_name(index)
            # Without the GPU that a plan is made for, its name is not known.
            device = here if self.context.device_type == "cuda" else self.context.device_type
        try:
            calibration.check(self.recipe.value, device)
        except ValueError as error:
            raise ValueError(f"calibration: {path} {error}") from None
        mine = {"compiled": self.context.compile_model, **speed_settings(self.section)}
        its = {"compiled": calibration.compiled, **calibration.settings}
        if mine != its and device is not None:
            logger.warning("calibration: %s was made with %s, this run has %s", path, its, mine)
        return calibration

    def convert(self, model: nn.Module) -> ConversionReport:
        """Swap the linears of `model` and report each decision.

        Raises:
            ValueError: an entry of `filter_fqns` matches no linear, or the calibration lacks a shape.
        """
        chosen = auto_filter_for_recipe(
            self.recipe,
            self.section.filter_fqns,
            pad_inner_dim=self.section.pad_inner_dim,
            calibration=self.calibration,
            local_sizes=self.linears.local_sizes,
        )
        decisions = decide(model, chosen, self.config)
        rows = conversion_rows(decisions, self.linears, self.config, self.recipe, self.calibration)
        report = ConversionReport(self.name, rows)
        swap(
            model,
            decisions,
            lambda fqn: self.rowwise_config if self.linears.role(fqn) == "rowwise" else self.config,
        )
        self._warn_of_least(decisions)
        if report.converted == 0:
            logger.warning(
                "%s\n%s: NOTHING WAS CONVERTED: this run trains in high precision (%d linears seen)\n%s",
                "!" * 80,
                self.name,
                report.total,
                "!" * 80,
            )
        if self.section.log_stats_freq:
            for layer in self._layers(model).values():
                stats.register_stats(layer, layer.weight.device)
        return report

    def _warn_of_least(self, decisions: list[Decision]) -> None:
        if self.section.saved_input != "least":
            return
        if not any(each.reason is None and self.linears.role(each.fqn) == "rowwise" for each in decisions):
            logger.info(  # what `auto` may have chosen too
                "quantize.linear.float8.saved_input = 'least' is as 'float8' here: no rowwise linear was "
                "converted"
            )
        elif not self.context.compile_model:
            logger.warning(
                "quantize.linear.float8.saved_input = 'least' keeps more than 'float8' without "
                "compile.enable, wherever nothing else holds the input of a rowwise linear"
            )

    @staticmethod
    def _layers(model: nn.Module) -> dict[str, Float8Linear]:
        return {
            name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): module
            for name, module in model.named_modules()
            if isinstance(module, Float8Linear)
        }

    def parallel_style(self, fqn: str, module: nn.Module, role: str) -> Any | None:
        """The float8 style of a linear that was converted; a kept one has the plain style of its role."""
        if not isinstance(module, Float8Linear):
            return None
        from torch.distributed.tensor import Shard

        from converters.float8.tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel

        if role in ("columnwise", "output"):
            return Float8ColwiseParallel()
        return Float8RowwiseParallel(output_layouts=Shard(1)) if role == "rowwise" else None

    def ops_to_save(self) -> tuple[Any, ...]:
        """The scaled GEMM, the amax and, where asked for, casts: see `linear.OPS_TO_SAVE`."""
        return OPS_TO_SAVE + (CASTS_TO_SAVE if self.config.saved_input == "float8" else ())

    def optimizer_built(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Have an optimizer that can (`trainer.optim.one_pass`) find weights' amaxes as it writes them."""
        amaxes: dict[Tensor, Tensor] | None = getattr(optimizer, "amaxes", None)
        if amaxes is None or not self.section.precompute_float8_dynamic_scale_for_fsdp:
            return
        for parameter in gathered_in_float8(model):
            amaxes[parameter] = torch.zeros((), device=parameter.device)
        self._amaxes = amaxes

    def before_step(self, model: nn.Module, step: int) -> None:
        """Scales of weights that are new or were loaded; statistics on for a logged step and off after it."""
        if self._amaxes is not None:
            read_amaxes_of_changed_weights(model, self._amaxes)
        freq = self.section.log_stats_freq
        wanted = bool(freq) and (step == 1 or step % freq == 0)
        if wanted or self._collected:
            for layer in self._layers(model).values():
                layer.collect_stats = wanted
                if wanted:
                    stats.record_gathered_weight(layer)
        self._collected = wanted

    def after_backward(self, model: nn.Module) -> None:
        """Renew delayed scales."""
        if self.config.uses_delayed_scaling:
            layers = delayed_layers(model)
            if layers:
                sync_float8_amax_and_scale_history(model, layers.values(), group=self.context.layer_group)

    def after_optimizer_step(self, model: nn.Module) -> None:
        """Compute the weights' scales for the next step's float8 all-gathers."""
        if self.section.precompute_float8_dynamic_scale_for_fsdp:
            precompute_float8_dynamic_scale_for_fsdp(model, self._amaxes)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Health of every float8 layer on steps that collected it; of the last micro-batch, on this rank.

        Of all stages of a pipeline: layers lie on the ranks of `stage_group`.
        """
        if not self._collected:
            return {}
        return stats.collect(dict(self._layers(model)), self.context.stage_group)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Delayed scaling's amaxes, scales and histories."""
        return dict(delayed_state_dict(model))

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: they are of another model or history length.
        """
        load_delayed_state_dict(model, state)
