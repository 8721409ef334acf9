"""The benchmark's worker for the PyTorch reference, given its best."""

import gc
import sys
import time
from typing import Any

import torch

from bench_common import (  # isort: skip
    TOTAL_STEPS,
    make_batches,
    peak_rss_bytes,
    read_spec,
    restrict_threads,
    run_config,
    serve,
    timed_blocks,
)
from bench_transformers import stand_in  # isort: skip
from jaxllm.train.allocator import keep_memory  # isort: skip

stand_in()
from torch_ref import ddp_pretrain as ref  # noqa: E402  # isort: skip


class Stepper:
    """The reference's train step: autocast, fused AdamW, the loss compiled with it."""

    def __init__(
        self,
        shape: str,
        batch: int,
        *,
        device: str,
        dtype: str,
        compiled: bool,
        sdpa: str = "default",
        tokens: str = "zipf",
    ):
        self.config = run_config(shape, batch)
        self.dtype, self.device = dtype, torch.device(device)
        self.model = ref.make_model(
            self.config.model, dtype=dtype, device=device, sdpa=sdpa
        )
        self.optimizer = ref.make_optimizer(self.model, self.config.optim)
        self.loss_module = ref.SummedLoss(self.model)
        if compiled:
            self.loss_module.compile(fullgraph=True, dynamic=False)
        self.pool = make_batches(self.config, tokens)
        self.taken, self.loss = 0, float("nan")

    def run(self, steps: int) -> float:
        """Takes `steps` updates without waiting in between; returns the last loss."""
        metrics: dict[str, Any] = {}
        for _ in range(steps):
            batch = self.pool[self.taken % len(self.pool)]
            metrics = ref.train_step(
                self.loss_module, self.optimizer, batch,
                config=self.config, step=self.taken, total_steps=TOTAL_STEPS,
                dtype=self.dtype,
            )  # fmt: skip
            self.taken += 1
        wait(self.device)
        self.loss = metrics["loss"].item()
        return self.loss


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Worker:
    """The commands of bench.py."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.device = torch.device(spec["device"])
        self.stepper: Stepper | None = None

    def describe(self) -> dict[str, Any]:
        """Says what this process computes with."""
        import transformers

        gpu = self.device.type == "cuda"
        return {
            "device_kind": torch.cuda.get_device_name() if gpu else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version() if gpu else None,
                "python": sys.version.split()[0],
            },
        }

    def build(self, batch: int) -> dict[str, Any]:
        """Builds, and where wanted compiles, the step for `batch` rows."""
        self.stepper = None
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        spec = self.spec
        self.stepper = Stepper(
            spec["shape"], batch, device=spec["device"], dtype=spec["dtype"],
            compiled=spec["compiled"], sdpa=spec["sdpa"], tokens=spec["tokens"],
        )  # fmt: skip
        began = time.perf_counter()
        loss = self.stepper.run(1)
        return {
            "first_step_s": time.perf_counter() - began,
            "first_loss": loss,
            "dtype": spec["dtype"],
            "settings": {name: spec[name] for name in ("compiled", "sdpa")},
        }

    def time(self, blocks: int, steps: int) -> dict[str, Any]:
        """Times the step."""
        assert self.stepper is not None
        ms = timed_blocks(self.stepper.run, blocks, steps)
        return {"ms": ms, "loss": self.stepper.loss, "peak_bytes": self.peak_bytes()}

    def peak_bytes(self) -> int:
        """The device's peak memory; on a CPU the process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_rss_bytes()

    def matmul(self) -> dict[str, Any]:
        """The rate of a large product in the dtype that the device trains in."""
        return {"flops_per_s": matmul_rate(self.device)}


def matmul_rate(device: torch.device, repeats: int = 20) -> float:
    """FLOP/s of a square product: 8192 in bfloat16 on a GPU, 2048 in float32 else."""
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    wait(device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeats if gpu else 3):
            torch.mm(a, b)
        wait(device)
        best = min(best, (time.perf_counter() - began) / (repeats if gpu else 3))
    return 2 * n**3 / best


def main() -> None:
    """Serves the parent."""
    spec = read_spec()
    if spec.get("keep_memory"):
        keep_memory()
    restrict_threads(spec.get("threads", 0))
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
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
