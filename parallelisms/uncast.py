"""A shard that is wider than what travels: it is cast straight into what a gather sends.

FSDP2 (torch.distributed.fsdp, 2.11 to 2.13) casts the shards of a unit into one buffer, weight by weight, and
then copies that into the input of the gather (its operator ``fsdp::all_gather_copy_in``, or one of ours,
`parallelisms.fsdp_copies`). A weight has been written twice by then. An `UncastShard` is given to FSDP2
instead: it says what the shard will be, and when it is to be copied it is cast, with the others of its unit
in one launch::

    fp32 shard 4 --> buffer of the unit 2 --> input of the gather 2     bytes of an fp32 weight in bf16: 10
    fp32 shard 4 --------------------------> input of the gather 2                                        6

Who makes one:

- A weight that travels in float8 (`converters.float8.fsdp`), for what it gives FSDP2 is its own affair: it is
  a tensor with ``fsdp_pre_all_gather``.
- Any other weight whose dtype is not that of the computation: FSDP2's own object for it, an `UncastParam`.

FSDP2 would ask a plain tensor too that had ``fsdp_pre_all_gather``. But an attribute of a tensor is lost with
it (`to_empty` makes new ones, and so may a load) and pickled with it, and a class of its own is met by the
optimizer, by checkpoints, by whoever else reads a shard. FSDP2's object outlives its tensors, and nobody else
meets it.

Left to FSDP2: shards on the host, which it moves to the device one by one and casts there, and units that
travel as bytes because dtypes differ. There a shard is cast when it is asked for its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

# What `fully_shard` makes of a parameter has no public home (torch 2.13).
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.utils import _pytree as pytree

from kernels.cast import cast_each_into, cast_each_into_reference

aten, fsdp = torch.ops.aten, torch.ops.fsdp


class _Kind(NamedTuple):
    """What one launch has in common."""

    dtype: torch.dtype
    source_dtype: torch.dtype
    by_kernels: bool


class UncastShard(torch.Tensor):
    """What a shard will be in `dtype`, flat.

    Args:
        source: The shard, of any shape, contiguous.
        dtype: What it is cast to.
        scale: () fp32, with a float8 format.
        travels_as: A dtype to see its bytes as, which they are a multiple of; None: `dtype`.
        by_kernels: `kernels.cast.cast_each_into` casts; otherwise torch.
    """

    _source: Tensor
    _scale: Tensor | None
    _kind: _Kind

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        source: Tensor,
        dtype: torch.dtype,
        *,
        scale: Tensor | None = None,
        travels_as: torch.dtype | None = None,
        by_kernels: bool = True,
    ) -> UncastShard:
        travels_as = travels_as or dtype
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (source.numel() * dtype.itemsize // travels_as.itemsize,),
            dtype=travels_as,
            device=source.device,
        )
        self._source, self._scale = source, scale
        self._kind = _Kind(dtype, source.dtype, by_kernels)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"UncastShard({tuple(self.shape)}, {self.dtype})"

    def view(self, *size: Any) -> Tensor:  # type: ignore[override]
        """Itself, where it is asked for what it is, as FSDP2 does: a view's detour costs the host time."""
        return self if size in ((-1,), (self.dtype,)) else super().view(*size)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(t, (cls, FakeTensor)) or t is torch.Tensor for t in types):
            return NotImplemented  # a buffer that is not one, which knows where the shards go
        if func is aten._foreach_copy_.default:
            copy_shards(*args[:2])
            return None
        if func is aten.copy_.default and args[0].dtype == args[1].dtype:  # FSDP2's, where nothing travels
            out, shard = args[:2]
            if shard._scale is None:  # a launch of torch's costs the host less
                return out.copy_(shard._source.view(-1))
            copy_shards([out], [shard])
            return out
        if func is fsdp.all_gather_copy_in.default:
            shards, output, sizes, numel, rank = args
            own = output.narrow(0, numel * rank, numel)
            copy_shards(own.split(sizes), shards)
            return own, output
        args, kwargs = pytree.tree_map_only(UncastShard, lambda t: t.cast(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def cast(self) -> Tensor:
        """The plain tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self._source.device)
        copy_shards([out], [self])
        return out


def copy_shards(outs: Sequence[Tensor], shards: Sequence[Tensor]) -> None:
    """Copy plain shards, and cast others, each to its place."""
    pairs = list(zip(outs, shards, strict=True))
    plain = [pair for pair in pairs if not isinstance(pair[1], UncastShard)]
    if plain:
        torch._foreach_copy_([out for out, _ in plain], [shard for _, shard in plain])
    uncast = [(out, shard) for out, shard in pairs if isinstance(shard, UncastShard)]
    for kind in dict.fromkeys(shard._kind for _, shard in uncast):
        alike = [pair for pair in uncast if pair[1]._kind == kind]
        (cast_each_into if kind.by_kernels else cast_each_into_reference)(
            [out for out, _ in alike],
            [shard._source for _, shard in alike],
            [shard._scale for _, shard in alike if shard._scale is not None],
            kind.dtype,
        )


class UncastParam(FSDPParam):
    """FSDP2's object for a weight whose shard is on the device, and is cast when it is copied."""

    param_dtype: torch.dtype | None
    _travels_as: torch.dtype | None

    def init_dtype_attrs(self, mp_policy: MixedPrecisionPolicy) -> None:
        """To FSDP2 there is nothing to cast (`param_dtype` None), so it asks for what shall travel."""
        super().init_dtype_attrs(mp_policy)
        self._travels_as, self.param_dtype = self.param_dtype, None

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        """What travels, flat."""
        shards: list[Tensor] = super().all_gather_inputs
        dtype = self._travels_as
        if dtype is None:
            return shards
        return [shard if shard.dtype == dtype else UncastShard(shard, dtype) for shard in shards]


def cast_when_copied(module: FSDPModule) -> None:
    """Have the shards of an FSDP unit on the device cast where they are copied to, but for float8 ones."""
    group = module._get_fsdp_state()._fsdp_param_group
    for parameter in [] if group is None else group.fsdp_params:
        if not hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather"):
            parameter.__class__ = UncastParam
