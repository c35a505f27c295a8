"""What FSDP2's float8 all-gather gives (`converters.float8.fsdp`): a weight that is float8 already.

A `GatheredFloat8` stands where a linear's weight does and is one of the compute dtype to autograd; its data
and scale are what `gathered_float8` reads for the GEMMs. Anything else that reads it sees the values that its
elements stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from converters.float8.gemm import Float8Operand

aten = torch.ops.aten


class Wrapper(torch.Tensor):
    """A tensor whose data is in attributes; its own storage is never read."""

    @staticmethod
    def _make(cls: Any, like: Tensor, dtype: torch.dtype, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            like.size(),
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=dtype,
            layout=like.layout,
            device=like.device,
            requires_grad=requires_grad,
        )


class GatheredFloat8(Wrapper):
    """A whole float8 weight with its scale; to autograd a tensor of the compute dtype."""

    _data: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype) -> GatheredFloat8:  # noqa: D102
        self = Wrapper._make(cls, data, dtype)
        self._data, self._scale = data, scale
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredFloat8({self._data!r}, scale={self._scale!r})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_data", "_scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> GatheredFloat8:
        return GatheredFloat8(inner["_data"], inner["_scale"], meta)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self = args[0]
        if func in (aten.detach.default, aten.alias.default):
            return GatheredFloat8(func(self._data), self._scale, self.dtype)
        if func in (aten.as_strided.default, aten.view.default):
            return GatheredFloat8(func(self._data, *args[1:], **(kwargs or {})), self._scale, self.dtype)
        # Anything else sees the values that the float8 elements stand for.
        args, kwargs = pytree.tree_map_only(GatheredFloat8, lambda t: t.dequantize_hp(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def renew(self, shard: Any) -> None:
        """Take over the values of `shard`, an `FSDPFloat8Shard` that is the whole weight, in place."""
        self._scale = shard.cast_whole_into(self._data)

    def is_gathered(self) -> bool:
        """False where FSDP2 has freed it."""
        return self._data.untyped_storage().size() > 0

    def dequantize_hp(self) -> Tensor:
        """x8 / s in the compute dtype."""
        return (self._data.to(torch.float32) / self._scale).to(self.dtype)


def gathered_float8(weight: Tensor) -> Float8Operand | None:
    """The float8 data and scale of a weight that FSDP2 gathered in float8; None for any other weight."""
    if isinstance(weight, GatheredFloat8):
        return Float8Operand(weight._data, weight._scale)
    return None
