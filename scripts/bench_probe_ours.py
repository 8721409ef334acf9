"""The benchmark's probes of jaxllm; bench_probe.py says how they are run."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench_common import (  # isort: skip
    BATCHES,
    SHAPES,
    median,
    read_spec,
    restrict_threads,
    run_config,
    timed_blocks,
    token_ids,
)
from bench_probe import PASSES, Item, measure, products, timed  # isort: skip
from jaxllm.kernels.heads import join, split  # isort: skip
from jaxllm.kernels.product import product  # isort: skip
from jaxllm.train.compiler import compiler_options  # isort: skip
from jaxllm.train.step import resolve_compute  # isort: skip

KINDS = {"MI,IO->MO": "nn", "MO,IO->MI": "nt", "MI,MO->IO": "tn"}
"""The passes' products, as product() names them."""


class Ours:
    """Probes in JAX."""

    def __init__(self, spec: dict[str, Any]):
        self.gpu = jax.devices()[0].platform != "cpu"
        self.dtype = jnp.bfloat16 if self.gpu else jnp.float32
        self.shape, self.model = spec["shape"], SHAPES[spec["shape"]]
        self.head_dim = self.model.head_dim or 0
        self.batch = BATCHES[self.shape][0 if self.gpu else 1][0]
        self.tokens = self.batch * self.model.max_seq_len

    def random(self, *shape: int, seed: int = 0):
        """Normal numbers in the compute dtype."""
        return jax.random.normal(jax.random.key(seed), shape, self.dtype)

    def versions(self) -> Iterator[Item]:
        """What is installed."""

        def run():
            import importlib.metadata as metadata

            names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
                     "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13",
                     "nvidia-cudnn-cu12", "nvidia-cublas")  # fmt: skip
            found = {}
            for name in names:
                with contextlib.suppress(metadata.PackageNotFoundError):
                    found[name] = metadata.version(name)
            device = jax.devices()[0]
            return {
                "versions": found,
                "device": device.device_kind,
                "compute_capability": getattr(device, "compute_capability", None),
            }

        yield "jax", run

    def matmul(self) -> Iterator[Item]:
        """Each product of the step, forward and both gradients, by what it takes."""
        device = jax.devices()[0]
        chosen = resolve_compute(run_config(self.shape, self.batch), device)
        options = compiler_options(chosen, device)
        ours = chosen.ours
        for name, (i, o) in products(self.shape).items():
            operands = {"MI": (self.tokens, i), "IO": (i, o), "MO": (self.tokens, o)}
            for label, (form, _) in PASSES.items():

                def run(form=form, operands=operands, i=i, o=o):
                    a, b = (
                        self.random(*operands[term], seed=number)
                        for number, term in enumerate(form.split("->")[0].split(","))
                    )
                    multiply = functools.partial(product, KINDS[form], ours=ours)
                    call = jax.jit(multiply, compiler_options=options)
                    flops = 2.0 * self.tokens * i * o
                    return timed(lambda: call(a, b), self.wait, flops)

                yield f"{name} {label}", run

    def attention(self) -> Iterator[Item]:
        """Causal attention at three lengths, the same number of tokens."""
        from jaxllm.kernels.attention import attention

        lengths = (512, 1024, 2048) if self.gpu else (self.model.max_seq_len,)
        for length in lengths:
            for kind in ("cudnn", "plain") if self.gpu else ("plain",):

                def both(q, k, v, do, kind=kind):
                    out, vjp = jax.vjp(
                        functools.partial(attention, implementation=kind), q, k, v
                    )
                    return out, vjp(do)

                def run(both=both, kind=kind, length=length, backward=True):
                    m = self.model
                    rows = max(1, self.tokens // length)
                    q, do = (
                        self.random(rows, length, m.n_heads, self.head_dim, seed=s)
                        for s in (0, 1)
                    )
                    k, v = (
                        self.random(rows, length, m.n_kv_heads, self.head_dim, seed=s)
                        for s in (2, 3)
                    )
                    half = 2.0 * rows * length * length * m.n_heads * self.head_dim
                    if backward:
                        call = jax.jit(both)
                        return timed(lambda: call(q, k, v, do), self.wait, 3 * half)
                    call = jax.jit(functools.partial(attention, implementation=kind))
                    return timed(lambda: call(q, k, v), self.wait, half)

                yield (
                    f"{kind} T={length} forward",
                    functools.partial(run, backward=False),
                )
                yield f"{kind} T={length} forward+backward", run

    def scatter(self) -> Iterator[Item]:
        """The embedding's gradient in each of our forms, for ids that collide."""
        from jaxllm.kernels.embedding import embed

        kinds = ("plain", "one_hot", "sorted") if self.gpu else (
            "plain", "one_hot", "sorted", "rows",
        )  # fmt: skip
        for vocab in sorted({6144, 49152} if self.gpu else {self.model.vocab_size}):
            for ids_kind in ("zipf", "uniform"):
                for kind in kinds:

                    def run(vocab=vocab, ids_kind=ids_kind, kind=kind):
                        rng = np.random.default_rng(0)
                        ids = jnp.asarray(
                            token_ids(ids_kind, rng, vocab, (1, self.tokens))
                        )
                        table = jnp.zeros((vocab, self.model.dim))
                        dh = self.random(1, self.tokens, self.model.dim)

                        def gradient(table, ids, dh):
                            _, vjp = jax.vjp(
                                lambda t: embed(
                                    t, ids, dtype=dh.dtype, implementation=kind
                                ),
                                table,
                            )
                            return vjp(dh)

                        call = jax.jit(gradient)
                        return timed(lambda: call(table, ids, dh), self.wait)

                    yield f"{kind} V={vocab} {ids_kind}", run

    def step(self) -> Iterator[Item]:
        """The train step as chosen, scanned, unrolled, and with other choices."""
        variants: list[dict[str, Any]] = [
            {}, {"unroll": 1}, {"goal": "lean"}, {"residual_dtype": "bfloat16"},
            {"remat": "products"}, {"layer": "plain"},
            {"gemm": "triton" if self.gpu else "ynnpack"},
            {"loss_chunk": 8192}, {"loss_chunk": 16384}, {"cross_entropy": "plain"},
            {"cross_entropy": "chunked"}, {"layer": "fused"},
            {"unroll": self.model.n_layers},
        ]  # fmt: skip
        device, seen = jax.devices()[0], set()
        for variant in variants:
            config = run_config(self.shape, self.batch, compute=variant)
            resolved = resolve_compute(config, device)
            if resolved in seen:  # what is chosen anyway
                continue
            seen.add(resolved)
            name = ", ".join(f"{k}={v}" for k, v in variant.items()) or "as chosen"
            yield name, functools.partial(self.time_step, compute=variant)

    def ablation(self) -> Iterator[Item]:
        """The step with one part replaced by next to nothing: the gap is its cost."""
        import jaxllm.kernels.layer as layer
        import jaxllm.model as model
        import jaxllm.train.optim as optim
        import jaxllm.train.step as step

        def no_attention(q, k, v, **_):
            group = q.shape[2] // k.shape[2]
            return q + jnp.repeat(k, group, axis=2) + jnp.repeat(v, group, axis=2)

        def no_attend(n, k, _, qkv, *factors):
            return jax.vjp(no_attention, *split(n, k, qkv, *factors))

        def no_attend_backward(_, kept, *factors_and_dout):
            *factors, dout = factors_and_dout
            return join(kept(dout), *factors)

        def no_loss(h, head, *_, **__):
            # The head's gradient is needed in some form, or its update goes too.
            return jnp.sum(h.astype(jnp.float32)) * 1e-6 + jnp.sum(head) * 0.0

        def no_update(config, params, grads, opt, lr, clip, good):
            return params, opt

        def stopped(table, tokens, *, dtype, **how):
            return jax.lax.stop_gradient(table)[tokens].astype(dtype)

        yield "whole step", self.time_step
        for name, patches in {
            "without embedding gradient": [(model, "embed", stopped)],
            "without loss": [(step, "cross_entropy", no_loss)],
            "without optimizer": [(optim, "update", no_update)],
            "without attention": [(model, "attention", no_attention),
                                  (layer, "attend", no_attend),
                                  (layer, "attend_backward", no_attend_backward)],
        }.items():  # fmt: skip

            def run(patches=patches):
                with contextlib.ExitStack() as stack:
                    for module, attribute, value in patches:
                        stack.enter_context(mock.patch.object(module, attribute, value))
                    return self.time_step()

            yield name, run

    def flags(self) -> Iterator[Item]:
        """The step under other compiler options."""
        gpu_options: list[dict[str, Any]] = [
            {},
            {"xla_gpu_enable_triton_gemm": True},
            {"xla_gpu_enable_latency_hiding_scheduler": True},
            {"xla_disable_hlo_passes": "rematerialization"},
            {"xla_gpu_cudnn_gemm_fusion_level": 2},
            {"xla_gpu_exhaustive_tiling_search": True},
            {"xla_gpu_enable_while_loop_double_buffering": True},
        ]
        cpu_options: list[dict[str, Any]] = [
            {},
            {"xla_cpu_enable_concurrency_optimized_scheduler": False},
        ]
        for options in gpu_options if self.gpu else cpu_options:
            name = ", ".join(f"{k}={v}" for k, v in options.items()) or "as they are"
            yield name, functools.partial(self.time_step, compiler_options=options)

    def time_step(self, compute=None, compiler_options=None) -> dict[str, Any]:
        """Builds and times a step."""
        from bench_ours import Stepper

        began = time.perf_counter()
        stepper = Stepper(
            self.shape, self.batch, compute=compute, compiler_options=compiler_options
        )
        loss = stepper.run(1)
        compile_s = time.perf_counter() - began
        stepper.run(1)
        ms = median(timed_blocks(stepper.run, 4, 5 if self.gpu else 1))
        return {
            "ms": ms, "tokens_per_s": 1e3 * self.tokens / ms, "compile_s": compile_s,
            "first_loss": loss,
        }  # fmt: skip

    def wait(self, out) -> None:
        """Waits for arrays."""
        jax.block_until_ready(out)


def main() -> None:
    """Runs one job."""
    spec = read_spec()
    restrict_threads(spec.get("threads", 0))
    measure(getattr(Ours(spec), spec["job"].split("_")[0])())


if __name__ == "__main__":
    main()
