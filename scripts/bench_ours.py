"""The benchmark's worker for jaxllm: builds the real train step and times it."""

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from bench_common import (  # isort: skip
    TOTAL_STEPS,
    make_batches,
    read_spec,
    restrict_threads,
    run_config,
    serve,
    timed_blocks,
)
from jaxllm.compute import OURS  # isort: skip
from jaxllm.kernels.native import has_native  # isort: skip
from jaxllm.kernels.product import product  # isort: skip
from jaxllm.train.allocator import keep_memory  # isort: skip
from jaxllm.train.device import peak_bytes  # isort: skip
from jaxllm.train.sharding import make_mesh  # isort: skip
from jaxllm.train.step import build  # isort: skip


class Stepper:
    """A compiled train step, its state, and batches to feed it."""

    def __init__(
        self,
        shape: str,
        batch: int,
        *,
        tokens: str = "zipf",
        compute: dict[str, Any] | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        config = run_config(shape, batch, compute=compute)
        mesh = make_mesh(config.parallel, jax.devices()[:1])
        began = time.perf_counter()
        self.program = build(config, mesh, total_steps=TOTAL_STEPS)
        self.state = jax.block_until_ready(self.program.init())
        self.init_s = time.perf_counter() - began
        self.pool = make_batches(config, tokens)
        self.taken, self.loss = 0, float("nan")
        self.step = self.program.train_step
        if compiler_options is not None:
            lowered = self.step.lower(self.state, self._batch())
            self.step = lowered.compile(compiler_options=compiler_options)

    def _batch(self) -> dict[str, jax.Array]:
        host = self.pool[self.taken % len(self.pool)]
        return {
            name: jax.device_put(rows[None], self.program.batch_sharding)
            for name, rows in host.items()
        }

    def run(self, steps: int) -> float:
        """Takes `steps` updates without waiting in between; returns the last loss."""
        metrics = None
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self._batch())
            self.taken += 1
        assert metrics is not None
        jax.block_until_ready(self.state)
        self.loss = float(metrics["loss"])
        return self.loss


class Worker:
    """The commands of bench.py."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.stepper: Stepper | None = None
        if spec.get("cache"):
            jax.config.update("jax_compilation_cache_dir", spec["cache"])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def describe(self) -> dict[str, Any]:
        """Says what this process computes with."""
        device = jax.devices()[0]
        import importlib.metadata

        version = importlib.metadata.version
        return {
            "platform": "cpu" if device.platform == "cpu" else "gpu",
            "device_kind": device.device_kind,
            "versions": {
                "jax": jax.__version__,
                "jaxlib": version("jaxlib"),
                "flax": version("flax"),
                "python": sys.version.split()[0],
            },
        }

    def build(self, batch: int) -> dict[str, Any]:
        """Compiles the step for `batch` rows, in place of the one before."""
        self.stepper = None  # frees its memory first
        self.stepper = Stepper(
            self.spec["shape"], batch, tokens=self.spec["tokens"],
            compute=self.spec.get("compute"),
        )  # fmt: skip
        began = time.perf_counter()
        loss = self.stepper.run(1)
        compute = self.stepper.program.config.compute
        return {
            "first_step_s": time.perf_counter() - began,
            "init_s": self.stepper.init_s,
            "first_loss": loss,
            "dtype": compute.compute_dtype,
            "settings": {name: getattr(compute, name) for name in vars(compute)},
        }

    def time(self, blocks: int, steps: int) -> dict[str, Any]:
        """Times the step."""
        assert self.stepper is not None
        ms = timed_blocks(self.stepper.run, blocks, steps)
        peak = peak_bytes(jax.devices()[:1])
        return {"ms": ms, "loss": self.stepper.loss, "peak_bytes": peak}

    def matmul(self) -> dict[str, Any]:
        """The rate of a large product in the dtype that the device trains in."""
        return {"flops_per_s": matmul_rate()}


def matmul_rate(repeats: int = 20) -> float:
    """FLOP/s of a square product: 8192 in bfloat16 on a GPU, 2048 in float32 else, by
    our own kernels where there are any."""
    device = jax.devices()[0]
    gpu = device.platform != "cpu"
    ours = next((name for name in OURS if has_native(device, name)), "")
    n, dtype = (8192, jnp.bfloat16) if gpu else (2048, jnp.float32)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (n, n), dtype) for key in keys)
    multiply = jax.jit(functools.partial(product, "nn", ours=ours))
    multiply(a, b).block_until_ready()
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        out = None
        for _ in range(repeats if gpu else 3):
            out = multiply(a, b)
        assert out is not None
        out.block_until_ready()
        each = (time.perf_counter() - began) / (repeats if gpu else 3)
        best = min(best, each)
    return 2 * n**3 / best


def main() -> None:
    """Serves the parent."""
    spec = read_spec()
    keep_memory()  # as pretrain.py does
    restrict_threads(spec.get("threads", 0))
    worker = Worker(spec)
    serve(
        {
            "describe": worker.describe,
            "build": worker.build,
            "time": worker.time,
            "matmul": worker.matmul,
        }
    )


if __name__ == "__main__":
    main()
