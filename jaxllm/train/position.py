"""Where a run stands beyond its arrays: in its data, and in a series of bad steps."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Position:
    """Travels in the meta of every checkpoint, but for `tripped`."""

    data_offset: int = 0
    """Step s reads batch s + data_offset."""
    bad_in_a_row: int = 0
    """Bad steps that ended with the newest step whose figures were read."""
    reason: str = ""
    """Why the first of them was bad."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Each with the step it went back `to`, the `first_batch` and `last_batch` of the
    bad ones (indices into the data), and `reason`."""
    tripped: tuple[int, int] | None = None
    """First and last of the bad steps in a row that were too many."""

    def observe(self, step: int, *, bad: str, limit: int) -> None:
        """Notes why `step` was bad, if it was; `limit` in a row trip, 0 never does."""
        self.reason = self.reason or bad if bad else ""
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if limit and self.bad_in_a_row >= limit:
            self.tripped = (step + 1 - self.bad_in_a_row, step)

    def to_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        values = asdict(self)
        del values["tripped"]
        return values

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Position":
        """Reads the meta of a checkpoint; one of before there was a position stands at
        its step in the data."""
        return cls(**meta.get("position", {}))
