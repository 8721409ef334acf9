"""How far the workers are, read off the work folder while they run."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxllm.data.parts import Plan

EVERY_S = 1.0
"""Seconds between two looks."""
_KEYS = ("consumed", "records", "damaged", "documents", "tokens", "text_bytes")


@dataclass(frozen=True)
class Progress:
    """How far the tokenising is."""

    seconds: float
    share: float
    """Share of the bytes of the input files that is done, those of an earlier run
    included."""
    records: int
    damaged: int
    documents: int
    tokens: int
    text_bytes: int
    text_bytes_per_s: float
    """Rate of this run."""
    seconds_left: float
    done: bool


@contextmanager
def reporting(
    work: Path, plan: Plan, report: Callable[[Progress], None]
) -> Iterator[None]:
    """Calls `report` with what the finished parts add up to: at once, every EVERY_S
    seconds, and at the end."""
    stop = threading.Event()
    total = sum(source.bytes for source in plan.sources)
    began = time.monotonic()
    seen: dict[str, dict[str, int]] = {}

    def look() -> tuple[int, ...]:
        for path in (work / "parts").glob("*.json"):
            if path.name not in seen and not path.name.startswith("."):
                counts = json.loads(path.read_bytes())
                counts["damaged"] = len(counts["damaged"])
                seen[path.name] = {key: counts[key] for key in _KEYS}
        return tuple(sum(c[key] for c in seen.values()) for key in _KEYS)

    before = look()

    def tell() -> None:
        consumed, records, damaged, documents, tokens, text_bytes = look()
        seconds = max(time.monotonic() - began, 1e-6)
        rate = (consumed - before[0]) / seconds
        report(
            Progress(
                seconds,
                min(consumed / total, 1.0),
                records,
                damaged,
                documents,
                tokens,
                text_bytes,
                (text_bytes - before[-1]) / seconds,
                max(total - consumed, 0) / rate if rate else float("inf"),
                stop.is_set(),
            )
        )

    def repeat() -> None:
        while not stop.wait(EVERY_S):
            tell()

    tell()
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    tell()
