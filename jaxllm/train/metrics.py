"""Meters and log lines: tokens per second, utilisation, waiting, time left."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.config import ModelConfig

# Peaks in FLOP/s of matrix products of 16-bit operands, accumulated in float32, without
# sparsity. Source: NVIDIA's data sheet of each card; RTX 4090: the Ada white paper.
PEAK_16BIT_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("RTX 4090", 165.2e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products on a device, or None where we have no source."""
    if dtype not in ("bfloat16", "float16"):
        return None
    words = device_kind.replace("-", " ").split()
    for name, peak in PEAK_16BIT_FLOPS:
        if all(word in words for word in name.split()):
            return peak
    return None


def flops_per_token(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """FLOPs of one trained token: causal attention counted half, and in full.

    6 per weight of a matrix product (2 forward, 4 backward), and 12 L N H T for the two
    products of attention. Norms, rotations and the optimizer are left out, as usual.
    """
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.dim
    norms = (2 * model.n_layers + 1) * model.dim
    weights = model.n_params - embeddings - norms + model.vocab_size * model.dim
    assert model.head_dim is not None
    attention = 12.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
    return 6.0 * weights + attention / 2, 6.0 * weights + attention


class Meter:
    """Counts tokens over time that was spent training.

    `pause` stops the clock for what is not training (evaluation, samples, saves).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.trained_s = 0.0
        self._since = clock()
        self._paused = False
        self._forget()

    def _forget(self) -> None:
        self._tokens = self._steps = 0
        self._seconds = self._waited_s = 0.0

    def _tick(self) -> None:
        now = self.clock()
        if not self._paused:
            self._seconds += now - self._since
            self.trained_s += now - self._since
        self._since = now

    def pause(self) -> None:
        """Stops the clock."""
        self._tick()
        self._paused = True

    def resume(self) -> None:
        """Lets the clock go on."""
        self._tick()
        self._paused = False

    def waited(self, seconds: float) -> None:
        """Notes time in which the loop waited for data."""
        self._waited_s += seconds

    def stepped(self, tokens: int, steps: int = 1) -> None:
        """Notes finished steps and their tokens."""
        self._tokens += tokens
        self._steps += steps

    def read(self) -> dict[str, float]:
        """Returns the figures since the last read, and begins anew."""
        self._tick()
        seconds = max(self._seconds, 1e-9)
        figures = {
            "tokens_per_s": self._tokens / seconds,
            "step_ms": 1e3 * seconds / max(self._steps, 1),
            "data_wait": self._waited_s / seconds,
        }
        self._forget()
        return figures


def utilisation(
    tokens_per_s: float,
    model: ModelConfig,
    seq_len: int,
    *,
    device_kind: str,
    dtype: str,
    n_devices: int,
) -> dict[str, float]:
    """Model FLOP utilisation, attention half and full; {} for unknown devices."""
    peak = peak_flops(device_kind, dtype)
    if peak is None:
        return {}
    half, full = flops_per_token(model, seq_len)
    share = tokens_per_s / (peak * n_devices)
    return {"mfu": half * share, "mfu_full": full * share}


def seed_line(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    loss: float,
    lr: float,
    left_s: float,
) -> str:
    """The log line of the seed's run; `step` counts updates from 0."""
    epoch, at = divmod(step, steps_per_epoch)
    return (
        f"Epoch:[{epoch + 1}/{epochs}]({at}/{steps_per_epoch}) loss:{loss:.3f} "
        f"lr:{lr:.7f} epoch_Time:{left_s / 60:.1f}min;"
    )


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Appends records as JSON lines; what is not finite is written as a string.

    A line that a kill or a full disk has torn is ended first, so that it takes no
    record with it.
    """

    def plain(value):
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else str(value)

    lines = [
        json.dumps({name: plain(value) for name, value in record.items()}) + "\n"
        for record in records
    ]
    with path.open("a+b") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            lines.insert(0, "" if file.read(1) == b"\n" else "\n")
        file.write("".join(lines).encode())


def read_jsonl(path: Path, *, before_step: int | None = None) -> list[dict[str, Any]]:
    """Reads JSON lines, without torn or damaged ones and without steps from a limit on.

    Step s is the step after s updates; an evaluation at s is that of the state before.
    """
    records = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # also where it is no text
                continue
            if not isinstance(record, dict):
                continue
            step = record.get("step", -1)
            if not isinstance(step, int):
                continue
            evaluation = "val_loss" in record and step == before_step != 0
            if before_step is None or step < before_step or evaluation:
                records.append(record)
    return records


def seconds_of(records: list[dict[str, Any]], step: int) -> float:
    """Estimates the seconds that the recorded steps from `step` on have taken, by the
    median of the rates that were logged; no clock of another start is asked."""
    rates = [r["step_ms"] for r in records if "step_ms" in r]
    count = sum("loss" in r and r.get("step", -1) >= step for r in records)
    return count * statistics.median(rates) / 1e3 if rates else 0.0


def rewrite_jsonl(path: Path, *, before_step: int) -> None:
    """Drops damaged lines and the records of steps from a limit on, all at once or not
    at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    unfinished.touch()
    append_jsonl(unfinished, read_jsonl(path, before_step=before_step))
    unfinished.replace(path)
