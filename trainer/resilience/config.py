"""The [resilience] section. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about bad steps and hangs. A bad step has a loss or gradient that is not finite."""

    skip_bad_steps: bool = True
    """Leave parameters and optimizer as they were in a bad step, count it and name its batch and module."""
    loss_spike_factor: float = field(default=0.0, metadata={"min": 0.0})
    """A loss above this many times the running mean of good ones is a bad step too; 0 is off."""
    max_bad_steps: int = field(default=10, metadata={"min": 0})
    """Bad steps in a row after which `after_bad_steps` happens; 0 is never."""
    after_bad_steps: Literal["stop", "roll_back"] = "stop"
    """End the run, or go back to the newest checkpoint and on with the data that follows."""
    max_roll_backs: int = field(default=3, metadata={"min": 1})
    """Times that a run goes back; the next time it ends."""
    watch_ranks: bool = True
    """End the run when a rank is silent for a collective's timeout, and say which."""
    dry_batch: bool = False
    """Before step 1, run forward, backward and optimizer once and undo it: what fails there fails early."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        if 0 < self.loss_spike_factor <= 1:
            yield "loss_spike_factor", f"got {self.loss_spike_factor}; allowed: 0 (off) or more than 1"
