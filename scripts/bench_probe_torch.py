"""The benchmark's probes of PyTorch; bench_probe.py says how they are run."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench_common import (  # isort: skip
    BATCHES,
    SHAPES,
    median,
    read_spec,
    restrict_threads,
    timed_blocks,
    token_ids,
)
from bench_probe import PASSES, Item, measure, products, timed  # isort: skip


class Torch:
    """Probes in PyTorch."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.device = torch.device(spec["device"])
        self.gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.shape, self.model = spec["shape"], SHAPES[spec["shape"]]
        self.head_dim = self.model.head_dim or 0
        self.batch = BATCHES[self.shape][0 if self.gpu else 1][0]
        self.tokens = self.batch * self.model.max_seq_len

    def random(self, *shape: int, grad: bool = False):
        """Normal numbers in the compute dtype."""
        return torch.randn(
            *shape, device=self.device, dtype=self.dtype, requires_grad=grad
        )

    def wait(self, _=None) -> None:
        """Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def versions(self) -> Iterator[Item]:
        """What is installed, and which attention PyTorch picks for our shape."""

        def run():
            found: dict[str, Any] = {"torch": torch.__version__}
            if not self.gpu:
                return {"versions": found, "device": "cpu"}
            found |= {
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
            return {
                "versions": found,
                "device": torch.cuda.get_device_name(),
                "sdpa_kernel": self.sdpa_kernel(),
            }

        yield "torch", run

    def sdpa_kernel(self) -> str:
        """The name of the kernel that the default attention launches."""
        m = self.model
        q = self.random(4, m.n_heads, m.max_seq_len, self.head_dim)
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(q, q, q, is_causal=True)
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            attend(q, q, q, is_causal=True)
            self.wait()
        return ", ".join(event.key[:80] for event in profile.key_averages())

    def matmul(self) -> Iterator[Item]:
        """Each product of the step, forward and both gradients."""
        for name, (i, o) in products(self.shape).items():
            for label in PASSES:

                def run(i=i, o=o, label=label):
                    shapes = (self.tokens, i), (o, i), (self.tokens, o)
                    x, w, dy = (self.random(*shape) for shape in shapes)
                    call = {
                        "forward": lambda: x @ w.T,
                        "dgrad": lambda: dy @ w,
                        "wgrad": lambda: dy.T @ x,
                    }[label]
                    return timed(call, self.wait, 2.0 * self.tokens * i * o)

                yield f"{name} {label}", run

    def attention(self) -> Iterator[Item]:
        """scaled_dot_product_attention as it chooses, and pinned."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths = (512, 1024, 2048) if self.gpu else (self.model.max_seq_len,)
        names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        pinned = {
            name: getattr(SDPBackend, name)
            for name in names
            if self.gpu and hasattr(SDPBackend, name)
        }
        for length in lengths:
            for name in ("default", *pinned):
                for gqa in (False, True):

                    def run(length=length, name=name, gqa=gqa, backward=True):
                        m = self.model
                        rows = max(1, self.tokens // length)
                        heads = m.n_kv_heads if gqa else m.n_heads
                        h = self.head_dim
                        q = self.random(rows, m.n_heads, length, h, grad=True)
                        k, v = (
                            self.random(rows, heads, length, h, grad=True)
                            for _ in range(2)
                        )
                        do = self.random(rows, m.n_heads, length, h)
                        attend = torch.nn.functional.scaled_dot_product_attention

                        def forward():
                            return attend(q, k, v, is_causal=True, enable_gqa=gqa)

                        def both():
                            return torch.autograd.grad(forward(), (q, k, v), do)

                        half = 2.0 * rows * length * length * m.n_heads * self.head_dim
                        context = (
                            sdpa_kernel(pinned[name])
                            if name in pinned
                            else contextlib.nullcontext()
                        )
                        with context:
                            if backward:
                                return timed(both, self.wait, 3 * half)
                            return timed(forward, self.wait, half)

                    label = f"{name.lower()}{' gqa' if gqa else ''} T={length}"
                    yield f"{label} forward", functools.partial(run, backward=False)
                    yield f"{label} forward+backward", run

    def scatter(self) -> Iterator[Item]:
        """The embedding's gradient."""
        for vocab in sorted({6144, 49152} if self.gpu else {self.model.vocab_size}):
            for ids_kind in ("zipf", "uniform"):

                def run(vocab=vocab, ids_kind=ids_kind):
                    rng = np.random.default_rng(0)
                    ids = torch.from_numpy(
                        token_ids(ids_kind, rng, vocab, (1, self.tokens))
                    ).to(self.device)
                    table = torch.zeros(
                        vocab, self.model.dim, device=self.device, requires_grad=True
                    )
                    dh = torch.randn(1, self.tokens, self.model.dim, device=self.device)

                    def call():
                        h = torch.nn.functional.embedding(ids, table)
                        return torch.autograd.grad(h, table, dh)

                    return timed(call, self.wait)

                yield f"V={vocab} {ids_kind}", run

    def twin(self) -> Iterator[Item]:
        """The reference's step, compiled and eager."""
        from bench_torch import Stepper

        variants = [(True, "default"), (True, "flash")] if self.gpu else [
            (False, "default"), (True, "default"),
        ]  # fmt: skip
        for compiled, sdpa in variants:

            def run(compiled=compiled, sdpa=sdpa):
                began = time.perf_counter()
                stepper = Stepper(
                    self.shape, self.batch, device=self.spec["device"],
                    dtype="bfloat16" if self.gpu else "float32", compiled=compiled,
                    sdpa=sdpa,
                )  # fmt: skip
                stepper.run(1)
                compile_s = time.perf_counter() - began
                stepper.run(1)
                ms = median(timed_blocks(stepper.run, 4, 5 if self.gpu else 1))
                return {
                    "ms": ms,
                    "tokens_per_s": 1e3 * self.tokens / ms,
                    "compile_s": compile_s,
                }

            yield f"{'compiled' if compiled else 'eager'}, sdpa {sdpa}", run


def main() -> None:
    """Runs one job."""
    spec = read_spec()
    restrict_threads(spec.get("threads", 0))
    measure(getattr(Torch(spec), spec["job"].split("_")[0])())


if __name__ == "__main__":
    main()
