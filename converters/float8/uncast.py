"""A float8 shard that is yet to be cast: it is cast straight into what a gather sends.

FSDP2 asks each weight for what shall travel, and copies all of it into one buffer (its operator
``fsdp::all_gather_copy_in``, or one of ours that calls `torch._foreach_copy_`). A weight that was cast by
then has been written twice, and each has cost the host a launch of its own. An `UncastShard` is given
instead; when it is to be copied it is cast, with the other ones of its unit, in one launch.

Asked for anything but its shape and a copy it is cast to memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from converters.float8.gathered import Wrapper
from converters.float8.scaling import cast_each_into


class UncastShard(Wrapper):
    """What a shard will be in float8, flat, its bytes seen as `travels_as`.

    Args:
        source: The shard, of any shape, contiguous.
        scale: () fp32.
        dtype: The float8 format.
        travels_as: A dtype that as many bytes as `source` has elements are a multiple of.
        cast_kernels: Who casts.
    """

    _source: Tensor
    _scale: Tensor
    _format: torch.dtype
    _cast_kernels: str

    @staticmethod
    def __new__(  # noqa: D102
        cls, source: Tensor, scale: Tensor, dtype: torch.dtype, travels_as: torch.dtype, cast_kernels: str
    ) -> UncastShard:
        self = torch.Tensor._make_wrapper_subclass(
            cls, (source.numel() // travels_as.itemsize,), dtype=travels_as, device=source.device
        )
        self._source, self._scale, self._format, self._cast_kernels = source, scale, dtype, cast_kernels
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
        if func is torch.ops.aten._foreach_copy_.default:
            outs, shards = args[:2]
            copy_shards(outs, shards)
            return None
        if func._schema.name == "fsdp::all_gather_copy_in":
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
    for dtype, source_dtype, cast_kernels in {_kind(shard) for _, shard in uncast}:
        alike = [pair for pair in uncast if _kind(pair[1]) == (dtype, source_dtype, cast_kernels)]
        cast_each_into(
            [out for out, _ in alike],
            [shard._source for _, shard in alike],
            [shard._scale for _, shard in alike],
            dtype,
            cast_kernels,
        )


def _kind(shard: UncastShard) -> tuple[torch.dtype, torch.dtype, str]:
    """What one launch has in common."""
    return shard._format, shard._source.dtype, shard._cast_kernels
