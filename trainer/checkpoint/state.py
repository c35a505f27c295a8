"""The state of a run, as named tensors and plain values, and back.

    model.<FQN>                  parameters and persistent buffers, without wrapper prefixes; a tied one once
    optimizer.<FQN>.<field>      exp_avg, exp_avg_sq (sharded as the parameter), step
    converter.<name>.<key>       what a converter keeps beside the model (delayed scales, say)

Hyperparameters of the optimizer are no state: a resumed run has those of its own configuration. The
schedule's state is the number of steps it took, the data's a position in the stream, the generators' the
seed and the step: each step seeds them anew (`parallelisms.distributed.seed_step`). Older checkpoints hold
``rng.<rank>.<device>`` too, which is not read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from converters.base import Converter
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.manifest import FULL, MODEL_ONLY, Manifest
from trainer.checkpoint.reader import check_shapes, empty_like_entry, read_tensors
from trainer.checkpoint.remote import Place
from trainer.data.loader import DataLoader

if TYPE_CHECKING:
    from trainer.resilience.bad_steps import BadSteps

log = logging.getLogger(__name__)

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class RunState:
    """The objects whose state is saved, on one rank."""

    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    data: DataLoader
    converters: list[Converter]
    fqns: frozenset[str]
    """FQNs of the whole model's tensors, also of those on other pipeline stages."""
    seed: int
    rank: int
    world_size: int
    config: dict[str, Any]
    """Every setting, flat."""
    bad_steps: BadSteps | None = None
    """Its counts are part of the state: a resumed run judges a loss as the unbroken one does."""

    def tensors(self, content: str) -> dict[str, Tensor]:
        """All tensors of a full or model-only checkpoint, by key; they share memory with the run's."""
        # First: state_dict makes FSDP show its shards again, which a validation leaves gathered.
        model = self._model_by_key()
        if content == MODEL_ONLY:
            return model
        names = {id(p): fqn for fqn, p in _parameters(self.model).items()}
        moments = {
            f"optimizer.{names[id(parameter)]}.{field}": value
            for parameter, fields in self.optimizer.state.items()
            for field, value in fields.items()
        }
        return self._with(model, moments)

    def expected_tensors(self) -> dict[str, Tensor]:
        """Those of a full checkpoint; before there are moments, others of their sizes stand for them."""
        if self.optimizer.state:
            return self.tensors(FULL)
        model = self._model_by_key()
        names = {id(p): fqn for fqn, p in _parameters(self.model).items()}
        trained = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        plain, count = model_tensors(self.model), torch.zeros(())
        moments = {
            f"optimizer.{fqn}.{field}": value
            for fqn in trained
            for field, value in {"step": count, "exp_avg": plain[fqn], "exp_avg_sq": plain[fqn]}.items()
        }
        return self._with(model, moments)

    def _with(self, model: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
        converters = {
            f"converter.{converter.name}.{key}": value
            for converter in self.converters
            for key, value in converter.state_dict(self.model).items()
        }
        return {**model, **moments, **converters}

    def updated_keys(self) -> set[str]:
        """Keys of the tensors that the optimizer's step changes, and nothing else does."""
        parameters = _parameters(self.model)
        moments = {field for fields in self.optimizer.state.values() for field in fields}
        return {f"model.{fqn}" for fqn in parameters} | {
            f"optimizer.{fqn}.{field}" for fqn in parameters for field in moments
        }

    def full_sizes(self) -> dict[str, int]:
        """Key -> bytes of what this rank knows of a full checkpoint, also before there are moments.

        A sharded tensor counts whole, on each of its ranks; those of other pipeline stages are unknown here.
        """
        return {key: t.numel() * t.element_size() for key, t in self.expected_tensors().items()}

    def manifest(self, step: int, tokens_seen: int, content: str) -> Manifest:
        """Everything else."""
        counts: dict[str, Any] = {
            "step": step,
            "tokens_seen": tokens_seen,
            "seed": self.seed,
            "world_size": self.world_size,
        }
        if self.bad_steps is not None:
            counts["bad_steps"] = self.bad_steps.state_dict()
        schedule = {"step": self.lr_scheduler.last_epoch}
        return Manifest(step, content, counts, schedule, self.data.state_dict(), self.config)

    def load(self, folder: Place, manifest: Manifest, excluded: Collection[str]) -> tuple[int, int]:
        """Take over the state of a checkpoint, but for the data's and what is `excluded`.

        Returns:
            (step, tokens seen) to go on from.

        Raises:
            CheckpointError: it does not fit this run.
        """
        self.load_model(folder, manifest)
        if manifest.content != FULL:
            return 0, 0
        if "optimizer" not in excluded:
            self._load_optimizer(folder, manifest)
        self._load_converters(folder, manifest)
        if "lr_scheduler" not in excluded:
            set_schedule(self.lr_scheduler, manifest.lr_scheduler["step"])
        if "train_state" in excluded:
            return 0, 0
        if self.bad_steps is not None and "bad_steps" in manifest.train_state:
            try:
                self.bad_steps.load_state_dict(manifest.train_state["bad_steps"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"the counts of bad steps are malformed ({error!r})") from None
        return manifest.step, manifest.train_state["tokens_seen"]

    def load_data(self, manifest: Manifest) -> None:
        """Go on in the data where the checkpoint was.

        Raises:
            CheckpointError: the position is malformed.
            ValueError: it is of other data, another tokenizer or another seed.
        """
        try:
            self.data.load_state_dict(manifest.dataloader)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the position in the data is malformed ({error!r})") from None

    def load_model(self, folder: Place, manifest: Manifest) -> None:
        """Take over the parameters alone.

        Raises:
            CheckpointError: they are of another model.
        """
        self.check_model(manifest)
        read_tensors(folder, manifest, self._model_by_key())

    def check_model(self, manifest: Manifest) -> None:
        """Check that the parameters are those of this model, in name and shape; nothing is read.

        Raises:
            CheckpointError: they are not.
        """
        mine = self._model_by_key()
        extra = sorted(set(manifest.under("model")) - self.fqns)
        if extra:
            raise CheckpointError(f"has model.{extra[0]}, which this model has not")
        check_shapes(manifest, mine)

    def _model_by_key(self) -> dict[str, Tensor]:
        return {f"model.{fqn}": tensor for fqn, tensor in model_tensors(self.model).items()}

    def _load_optimizer(self, folder: Place, manifest: Manifest) -> None:
        """Fill the optimizer's state; it is made here, since an optimizer has none before its first step."""
        plain, trained = model_tensors(self.model), _parameters(self.model)
        on_device = any(
            group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups
        )
        targets: dict[str, Tensor] = {}
        for name in manifest.under("optimizer"):
            fqn, _, field = name.rpartition(".")
            if fqn not in self.fqns:
                raise CheckpointError(f"has moments of {fqn}, which this model has not")
            if fqn not in trained:
                continue  # it is on another pipeline stage
            key = f"optimizer.{name}"
            if manifest.tensors[key].shape == tuple(plain[fqn].shape):
                value = torch.zeros_like(plain[fqn])
            else:
                device = plain[fqn].device if on_device else "cpu"
                value = empty_like_entry(manifest, key, device)
            targets[key] = value
            self.optimizer.state[trained[fqn]][field] = value
        if not targets and manifest.step > 0:
            raise CheckpointError("has no optimizer state")
        read_tensors(folder, manifest, targets)

    def _load_converters(self, folder: Place, manifest: Manifest) -> None:
        saved = {name.partition(".")[0] for name in manifest.under("converter")}
        elsewhere = {fqn.rpartition(".")[0] for fqn in self.fqns - set(model_tensors(self.model))}
        for converter in self.converters:
            keys = [
                key
                for key in manifest.under(f"converter.{converter.name}")
                if key.rpartition(".")[0] not in elsewhere
            ]
            mine = converter.state_dict(self.model)
            if bool(keys) != bool(mine):
                fate = "starts anew" if mine else "is not needed any more"
                log.warning(
                    "%s: its state %s: the recipe is another than the checkpoint's", converter.name, fate
                )
                continue
            start = f"converter.{converter.name}."
            state = {key: empty_like_entry(manifest, start + key) for key in keys}
            read_tensors(folder, manifest, {start + key: value for key, value in state.items()})
            try:
                converter.load_state_dict(self.model, state)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
        for name in sorted(saved - {converter.name for converter in self.converters}):
            log.warning(
                "the state of converter %s in the checkpoint is not used: it is off in this run", name
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """FQN -> parameter or persistent buffer; shared memory, wrappers' prefixes removed, a tied one once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    repeated = every - {name for name, _ in model.named_parameters()}
    # state_dict and not named_parameters: there, a converter's own parameter types come out as plain tensors.
    return {clean_fqn(name): value for name, value in model.state_dict().items() if name not in repeated}


def clean_fqn(name: str) -> str:
    """An FQN as it was before anything wrapped the model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def set_schedule(scheduler: LambdaLR, step: int) -> None:
    """Put the schedule where it is after `step` steps, with the rates of this run's configuration."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {clean_fqn(name): parameter for name, parameter in model.named_parameters()}
