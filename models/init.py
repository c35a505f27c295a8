"""Initial weights that do not depend on how the model is sharded.

Each parameter is drawn from a stream of random numbers of its own, seeded by the run's seed and the
parameter's FQN. A sharded parameter is drawn whole, and the rank keeps its shard: so one CPU, one GPU
and any layout of FSDP, tensor and pipeline parallelism start from the same weights on the same kind of
device. The price is room for one whole parameter in fp32 while it is drawn, and every rank drawing all
its parameters, which takes seconds for the largest flavor.

All ranks must have the same torch seed when they draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Initializer:
    """Fills parameters in place; advances torch's CPU generator by one number when made.

    Args:
        draw_on: Device whose generator draws; each parameter's own when unset. For weights that lie in host
            memory but belong to a GPU's run, since the two kinds draw different numbers.
    """

    def __init__(self, draw_on: torch.device | None = None) -> None:
        self.draw_on = draw_on
        self.seed = int(torch.randint(2**31, (), device="cpu"))

    def normal_(self, parameter: Tensor, fqn: str, std: float) -> None:
        """Fill with N(0, std^2)."""
        self._fill(parameter, fqn, lambda full, rng: nn.init.normal_(full, std=std, generator=rng))

    def truncated_normal_(self, parameter: Tensor, fqn: str, std: float) -> None:
        """Fill with N(0, std^2) cut at three standard deviations."""
        bound = 3 * std  # trunc_normal_ takes its bounds as values, not as multiples of std
        self._fill(
            parameter,
            fqn,
            lambda full, rng: nn.init.trunc_normal_(full, 0.0, std, -bound, bound, generator=rng),
        )

    def _fill(self, parameter: Tensor, fqn: str, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        device = self.draw_on or parameter.device
        rng = torch.Generator(device=device)
        # A hash and not a sum: on a CPU torch uses only the low 32 bits of a seed.
        digest = hashlib.blake2b(f"{self.seed} {fqn}".encode(), digest_size=8).digest()
        rng.manual_seed(int.from_bytes(digest, "little") >> 1)
        with torch.no_grad():
            full = draw(torch.empty(parameter.shape, dtype=torch.float32, device=device), rng)
            if not isinstance(parameter, DTensor):
                parameter.copy_(full)
                return
            # src_data_rank=None: every rank has drawn the same tensor, so nothing is sent.
            sharded = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(sharded.to_local())
