"""What the benchmark's probes share.

A probe asks what a step is made of, and times that part by itself. Each job is a
process of its own and says each item as soon as it is measured, so that a failure, a
crash or a time limit loses only what was not yet said:

    python scripts/bench_probe_ours.py '{"job": "matmul_ours", "shape": "tiny"}'
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench_common import SHAPES, median, one_line, say, timed_blocks  # isort: skip

# Which of the eight probes a job belongs to, and the seconds it may take on a GPU.
JOBS: dict[str, tuple[str, int]] = {
    "versions_ours": ("1 versions", 60),
    "versions_torch": ("1 versions", 60),
    "matmul_ours": ("2 matrix products", 75),
    "matmul_torch": ("2 matrix products", 60),
    "attention_ours": ("3 attention", 75),
    "attention_torch": ("3 attention", 75),
    "scatter_ours": ("4 embedding gradient", 75),
    "scatter_torch": ("4 embedding gradient", 45),
    "step_ours": ("5 step, scanned and unrolled", 150),
    "ablation_ours": ("6 step without a part", 200),
    "twin_torch": ("7 torch twin", 150),
    "flags_ours": ("8 compiler options", 200),
}

Item = tuple[str, Callable[[], dict[str, Any]]]


def measure(items: Iterator[Item]) -> None:
    """Says the result, or the error, of each item."""
    for name, run in items:
        began = time.perf_counter()
        try:
            result = run()
        except Exception as error:  # the next item may work all the same
            result = {"error": one_line(error)}
        say(item=name, **result, wall_s=round(time.perf_counter() - began, 2))


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], flops: float = 0.0):
    """Times a call that the device may take while the host goes on."""
    wait(call())

    def run(n):
        out = None
        for _ in range(n):
            out = call()
        wait(out)

    [first] = timed_blocks(run, 1, 2)
    # About 0.1 s a block, so that small kernels are not measured by the host's clock.
    ms = median(timed_blocks(run, 5, int(np.clip(100 / max(first, 1e-3), 1, 200))))
    rate = {"tflops": flops / ms / 1e9} if flops else {}
    return {"ms": ms, **rate}


def products(shape: str) -> dict[str, tuple[int, int]]:
    """The matrix products of a token: name to (in, out)."""
    model = SHAPES[shape]
    assert model.head_dim is not None and model.hidden_dim is not None
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return {
        "wq": (model.dim, q),
        "wqkv joined": (model.dim, q + 2 * kv),
        "wk": (model.dim, kv),
        "wo": (q, model.dim),
        "w1": (model.dim, model.hidden_dim),
        "w1 w3 joined": (model.dim, 2 * model.hidden_dim),
        "w2": (model.hidden_dim, model.dim),
        "head": (model.dim, model.vocab_size),
    }


PASSES = {"forward": ("MI,IO->MO", 0), "dgrad": ("MO,IO->MI", 1),
          "wgrad": ("MI,MO->IO", 2)}  # fmt: skip
