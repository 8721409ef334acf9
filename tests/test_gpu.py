"""What only a GPU can show, on a machine that has one:

    python -m pytest -o addopts='' -m gpu tests/test_gpu.py

The option leaves out what pyproject.toml asks for: two processes would each take most
of the GPU's memory, and pytest-xdist may not be there.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ComputeConfig, ModelConfig, RunConfig, TrainConfig
from jaxllm.kernels.embedding import embed
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here"),
]
ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=128
)
ROWS = 8


def program(**compute):
    config = RunConfig(
        model=MODEL,
        compute=ComputeConfig(**compute),
        train=TrainConfig(batch_size=ROWS, accumulate=1),
    )
    return build(config, make_mesh(config.parallel, jax.devices()[:1]), total_steps=100)


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.3, (ROWS, MODEL.max_seq_len + 1)) % MODEL.vocab_size
    ids = ids.astype(np.int32)
    mask = np.ones((ROWS, MODEL.max_seq_len), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": mask}


def test_the_step_that_is_chosen_runs_cudnn_attention_in_every_layer():
    from jaxllm.plan.compile import attention_calls

    made = program()
    assert made.config.compute.attention == "cudnn"
    inputs = to_device(made, batch(0), parts=1)
    text = made.train_step.lower(made.abstract_state, inputs).compile().as_text()
    assert attention_calls(text) == (MODEL.n_layers, MODEL.n_layers)


def test_the_step_learns_without_a_transfer_and_in_the_memory_of_its_plan():
    made = program()
    state = made.init()
    batches = [to_device(made, batch(seed), parts=1) for seed in range(30)]
    losses = []
    with jax.transfer_guard("disallow"):
        for inputs in batches:
            state, metrics = made.train_step(state, inputs)
            losses.append(metrics["loss"])
    losses = [float(loss) for loss in losses]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5
    assert made.train_step._cache_size() == 1


@pytest.mark.parametrize("length", [127, 128])
def test_cudnn_attention_is_the_plain_one_at_any_length(length):
    from jaxllm.kernels.attention import attention

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (
        jax.random.normal(key, (2, length, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    )

    def both(implementation, dtype):
        args = [x.astype(dtype) for x in (q, k, v)]
        f = functools.partial(attention, implementation=implementation)
        out, vjp = jax.vjp(f, *args)
        return [np.asarray(x, np.float64) for x in (out, *vjp(do.astype(dtype)))]

    truth, fast = both("plain", jnp.float32), both("cudnn", jnp.bfloat16)
    for a, b in zip(fast, truth, strict=True):
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


FAST: dict[str, Any] = {
    "attention": "cudnn", "layer": "fused", "embedding": "one_hot",
    "cross_entropy": "chunked",
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "attention": "plain", "layer": "plain", "embedding": "plain",
    "cross_entropy": "plain",
}  # fmt: skip


def params_after_a_step(**compute):
    made = program(**compute)
    state, metrics = made.train_step(made.init(), to_device(made, batch(1), parts=1))
    moments = [np.asarray(x, np.float64) for x in jax.tree.leaves(state["opt"]["m"])]
    return float(metrics["loss"]), moments


def test_fast_forms_in_bfloat16_are_no_worse_than_plain_ones():
    truth = params_after_a_step(
        **PLAIN, compute_dtype="float32", matmul_precision="highest"
    )
    plain = params_after_a_step(**PLAIN, compute_dtype="bfloat16")
    fast = params_after_a_step(**FAST, compute_dtype="bfloat16")
    assert abs(fast[0] - truth[0]) < 1e-2 * truth[0]
    for a, b, c in zip(fast[1], plain[1], truth[1], strict=True):
        assert np.linalg.norm(a - c) < 1.5 * np.linalg.norm(b - c)


@pytest.mark.parametrize("form", ["one_hot", "sorted"])
def test_embedding_gradients_equal_a_scatter_on_the_host(form):
    rng = np.random.default_rng(3)
    tokens = (rng.zipf(1.2, (4, 512)) % 1000).astype(np.int32)
    dh = rng.normal(size=(4, 512, 64)).astype(np.float32)
    expected = np.zeros((1000, 64))
    np.add.at(expected, tokens.ravel(), dh.reshape(-1, 64).astype(np.float64))

    def summed(table):
        h = embed(table, jnp.asarray(tokens), dtype="float32", implementation=form)
        return jnp.sum(h * dh)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(summed))(jnp.zeros((1000, 64)))
    error = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
    assert error < 1e-6


@pytest.mark.parametrize("rung", ["logits", "gradients", "fast forms", "update"])
def test_parity_holds_on_the_gpu_in_float64(rung):
    from parity_tests.precision import FP64
    from parity_tests.rungs import RUNGS, measure

    assert measure(rung, FP64, 0).error <= RUNGS[rung].limits["fp64"]


def test_two_deterministic_runs_end_in_the_same_bits(tmp_path):
    """The digests of both runs' last checkpoints, from their manifests."""
    for name in ("tyro", "grain", "datatrove"):
        pytest.importorskip(name, reason="a whole run needs the installation")

    def last(name: str) -> dict[str, str]:
        out = tmp_path / name
        command = [
            sys.executable, str(ROOT / "scripts/pretrain.py"), "demo",
            "--out", str(out), "--train.steps", "12", "--deterministic",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        manifests = [json.loads(p.read_text()) for p in out.rglob("meta/metadata")]
        newest = max(manifests, key=lambda m: m["step"])
        return {path: entry["digest"] for path, entry in newest["arrays"].items()}

    assert last("a") == last("b")
