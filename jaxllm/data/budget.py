"""How much of the input may be damaged, and when it is plainly more."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxllm.data.merging import FinishedPart, write_quarantine
from jaxllm.data.parts import Plan

_FEW = 10
"""Damaged records that a small corpus may have, while they are the minority."""
_EVIDENCE = 1000
"""Damaged records before a run is stopped on the way."""


@dataclass(frozen=True)
class Budget:
    """The damage that is tolerated: a share of the records below 1, or a number."""

    bad_lines: float

    def __post_init__(self):
        if not self.bad_lines >= 0:
            raise ValueError(
                f"bad_lines={self.bad_lines} must be a share or a number >= 0"
            )

    def allowed(self, records: float) -> float:
        """Damaged records that so many records may have among them."""
        if self.bad_lines >= 1:
            return self.bad_lines
        allowed = self.bad_lines * records
        return max(allowed, min(_FEW, records // 2)) if self.bad_lines else 0

    def is_hopeless(self, damaged: int, records: int, share_done: float) -> bool:
        """Tells on the way that the whole will have more damage than is allowed.

        A number that is exceeded stays so. For a share the rest of the input is taken
        to have records of the length seen so far, and no more damage; and what was
        seen must be twice as bad as allowed, lest a bad beginning decides.
        """
        if self.bad_lines >= 1 or not self.bad_lines:
            return damaged > self.bad_lines
        if damaged < _EVIDENCE or damaged < 2 * self.bad_lines * records:
            return False
        return damaged > self.allowed(records / max(share_done, 1e-9))

    def check(self, parts: list[FinishedPart], plan: Plan, work: Path) -> None:
        """Looks at the finished whole.

        Raises: ValueError if there is more damage than is allowed, with the first and
        where all of it is listed.
        """
        records, damaged = _count(parts)
        if damaged > self.allowed(records):
            first, path = _listed(parts, plan, work)
            raise ValueError(
                f"{damaged} of {records} records are damaged, more than --bad-lines "
                f"{self.bad_lines:g} allows; the first: {first}; all are in {path}; "
                f"repair the input or raise --bad-lines"
            )

    def give_up(
        self, parts: list[FinishedPart], plan: Plan, work: Path, share_done: float
    ) -> NoReturn:
        """Ends a run on the way, with what it met so far.

        Raises: ValueError, always.
        """
        records, damaged = _count(parts)
        first, path = _listed(parts, plan, work)
        raise ValueError(
            f"stopped after {share_done:.0%} of the input: {damaged} of {records} "
            f"records are damaged, more than --bad-lines {self.bad_lines:g} allows "
            f"even if all the rest is good; the first: {first}; those so far are in "
            f"{path}; repair the input, or raise --bad-lines and go on from here with "
            f"the same command"
        )


def _count(parts: list[FinishedPart]) -> tuple[int, int]:
    records = sum(part.counts["records"] for part in parts)
    return records, sum(len(part.counts["damaged"]) for part in parts)


def _listed(parts: list[FinishedPart], plan: Plan, work: Path) -> tuple[str, Path]:
    """Writes the list of damage; gives its first entry in words, and its path."""
    path = work / "quarantine.jsonl"
    write_quarantine(path, parts, plan)
    with open(path, encoding="utf-8") as file:
        first = json.loads(file.readline())
    return f"{first['file']} line {first['line']}: {first['reason']}", path
