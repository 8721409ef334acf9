"""What both workers of the benchmark share: shapes, tokens, and how they are driven.

A worker is a process that builds a training step and times it on command. It reads a
JSON object a line on stdin and answers each with one line on stdout that begins with
MARK; everything else that libraries print is noise.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout, where nothing is installed

from jaxllm.config import (  # noqa: E402
    ComputeConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from jaxllm.presets import preset  # noqa: E402

MARK = "@bench "
POOL = 4  # batches that are made beforehand and used in turn
TOTAL_STEPS = 10_000  # of the learning-rate schedule; no run gets there

SHAPES: dict[str, ModelConfig] = {
    "A": preset("k-215m").model,
    "B": preset("k-259m").model,
    "small": ModelConfig(
        dim=512, n_layers=8, n_heads=8, n_kv_heads=4, hidden_dim=1408, max_seq_len=256
    ),
    # For trying out the benchmark itself.
    "tiny": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=32
    ),
}
# Rows of a step to choose the best from: on a GPU, and on a CPU.
BATCHES = {
    "A": ((128, 192, 256), (4,)),
    "B": ((32, 48, 64), (1,)),
    "small": ((128, 256), (8,)),
    "tiny": ((16, 32), (4,)),
}


def run_config(
    shape: str, batch: int, *, compute: dict[str, Any] | None = None
) -> RunConfig:
    """The run that is timed: `batch` rows a step, the optimizer of preset k-215m.

    Raises: ValueError for a value that a field does not have.
    """
    return RunConfig(
        model=SHAPES[shape],
        compute=ComputeConfig(**(compute or {})),
        optim=preset("k-215m").optim,
        train=TrainConfig(batch_size=batch),
    )


def token_ids(kind: str, rng: np.random.Generator, vocab: int, shape) -> np.ndarray:
    """Random int32 ids: "uniform", or "zipf", where id r has a weight of 1 / (r + 1).

    Never constants: matrix products run faster on zeros, and scatters on distinct ids.
    """
    if kind == "uniform":
        return rng.integers(0, vocab, shape, dtype=np.int32)
    weights = 1.0 / np.arange(1, vocab + 1)
    edges = np.cumsum(weights / weights.sum())
    ids = np.searchsorted(edges, rng.random(shape))
    return np.minimum(ids, vocab - 1).astype(np.int32)


def make_batches(config: RunConfig, kind: str) -> list[dict[str, np.ndarray]]:
    """POOL different batches of inputs, targets (int32) and loss_mask (bool) (B, T)."""
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.seq_len + 1)
    batches = []
    for _ in range(POOL):
        ids = token_ids(kind, rng, config.model.vocab_size, shape)
        batches.append(
            {
                "inputs": np.ascontiguousarray(ids[:, :-1]),
                "targets": np.ascontiguousarray(ids[:, 1:]),
                "loss_mask": np.ones(ids[:, 1:].shape, bool),
            }
        )
    return batches


def read_spec() -> dict[str, Any]:
    """The worker's description: the JSON object that is its only argument."""
    return json.loads(sys.argv[1])


def say(**answer: Any) -> None:
    """Writes one line to the parent."""
    print(MARK + json.dumps(answer), flush=True)


def serve(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Runs commands from stdin until it ends. A failure is an answer, not an end."""
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        try:
            answer = commands[request.pop("do")](**request)
        except Exception as error:  # whatever a library raises belongs in the record
            answer = {"error": one_line(error)}
        say(**answer, wall_s=round(time.perf_counter() - began, 3))


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's kind and the beginning of its text, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def timed_blocks(run: Callable[[int], Any], blocks: int, steps: int) -> list[float]:
    """Times `blocks` times `steps` steps; returns the milliseconds of one step of each.

    `run(n)` takes n steps and waits for the last.
    """
    times = []
    for _ in range(blocks):
        began = time.perf_counter()
        run(steps)
        times.append(1e3 * (time.perf_counter() - began) / steps)
    return times


def peak_rss_bytes() -> int:
    """The largest amount of memory that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def restrict_threads(threads: int) -> None:
    """Keeps this process on its first `threads` CPUs; 0 leaves it as it is."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return float(np.median(values)) if values else math.nan
