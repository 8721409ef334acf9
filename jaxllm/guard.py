"""What a run does about steps that would harm it."""

import math
from dataclasses import dataclass

from jaxllm.fields import require_int


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are bad, and what follows. A bad step leaves the weights as they were
    and is counted; a step whose loss or gradient is not finite is always one."""

    spike_factor: float = 0.0
    """Typical deviations by which the loss, or the gradient norm, may exceed its recent
    median before a step is bad; 0 sets no bound (see jaxllm/train/guard.py)."""
    bad_steps: int = 10
    """Bad steps in a row after which the run goes back to the last checkpoint before
    them and on with the data after them; 0 never goes back."""
    rollbacks: int = 3
    """How often a run goes back before it stops with a diagnosis instead."""

    def __post_init__(self):
        if not (math.isfinite(self.spike_factor) and self.spike_factor >= 0):
            raise ValueError(
                f"guard.spike_factor={self.spike_factor} must be a number >= 0"
            )
        for name in ("bad_steps", "rollbacks"):
            require_int(f"guard.{name}", getattr(self, name), at_least=0)
