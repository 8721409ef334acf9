"""What went wrong in a run, and what it cost: kept over restarts, told at the end."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

from jaxllm.train.metrics import append_jsonl, read_jsonl
from jaxllm.train.processes import is_first

KINDS = {
    "resumed": "restarts from a checkpoint",
    "fell_back": "damaged checkpoints passed over",
    "rolled_back": "rollbacks",
    "failed_save": "failed saves",
    "hung": "hangs",
    "tracker_failed": "tracker failures",
    "plot_failed": "plot failures",
    "sample_failed": "failed text samples",
}
"""Every kind of incident, and how the summary names them."""


class Incidents:
    """Appends to incidents.jsonl, a line each, at once; safe from several threads.

    Notes nothing but on the first process. A disk that does not take it stops nothing:
    what this process has noted is remembered in memory too.
    """

    def __init__(self, path: Path):
        self.path = path
        self._here: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._earlier = [i for i in read_jsonl(path) if i.get("what") in [*KINDS]]
        self._lock = threading.Lock()

    def note(self, what: str, *, lost_s: float = 0.0, **details: Any) -> None:
        """Keeps an incident of one of KINDS and the seconds of training it cost."""
        assert what in KINDS, what
        incident = {"what": what, "time": time.strftime("%FT%T%z")} | details
        incident["lost_s"] = round(max(0.0, lost_s), 3)
        with self._lock:
            self._here.append(incident)
            self._unwritten.append(incident)
            self._write()

    def report(self) -> dict[str, Any]:
        """Counts all incidents of the run by kind, and adds up the seconds lost."""
        with self._lock:
            self._write()
            all_of_them = self._earlier + self._here
        found: dict[str, Any] = dict.fromkeys(KINDS, 0)
        for incident in all_of_them:
            found[incident["what"]] += 1
        found["lost_s"] = round(sum(i.get("lost_s", 0.0) for i in all_of_them), 3)
        return found

    def _write(self) -> None:
        if is_first() and self._unwritten:
            with contextlib.suppress(OSError):  # the next one tries again
                append_jsonl(self.path, self._unwritten)
                self._unwritten.clear()


def describe(report: dict[str, Any]) -> list[str]:
    """Puts a report into lines for people; one line when nothing happened."""
    names = {"skipped_steps": "steps skipped"} | KINDS
    lines = [
        f"  {name}: {report[kind]}" for kind, name in names.items() if report.get(kind)
    ]
    if report["lost_s"]:
        lines.append(f"  training lost: {report['lost_s']:.1f} s")
    return lines or ["  nothing out of the ordinary"]
