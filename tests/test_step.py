"""The step: one trace, no transfer, state donated; what is said when memory is full."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxllm.config import ComputeConfig, ModelConfig, RunConfig, TrainConfig
from jaxllm.train import step as step_module
from jaxllm.train.device import out_of_memory
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build, to_device

MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, max_seq_len=16
)


def run(accumulate=1, **compute) -> RunConfig:
    return RunConfig(
        model=MODEL,
        compute=ComputeConfig(**compute),
        train=TrainConfig(batch_size=8, accumulate=accumulate),
    )


def host_batch(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, MODEL.vocab_size, (2, 8, 16), dtype=np.int32)
    return {
        "inputs": ids[0],
        "targets": ids[1],
        "loss_mask": np.ones((8, 16), np.int32),
    }


def test_a_cpus_step_copies_no_moments():
    """XLA would, if the weights were computed from the moments before the step."""
    config = run()
    program = build(
        config, make_mesh(config.parallel, jax.devices()[:1]), total_steps=9
    )
    batch = to_device(program, host_batch(0), parts=1)
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    entry = text[text.index("ENTRY") :]
    state = r"%state__opt____[mv]__"
    assert len(re.findall(rf"{state}\S+ = \S+ parameter\(", entry)) == 22, "not it"
    assert not re.findall(rf"\S+ = \S+ copy\({state}\S+", entry)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("layer", ["plain", "fused"])
def test_steps_are_traced_once_and_transfer_nothing(monkeypatch, layer, accumulate):
    traces = []
    real = step_module.update_state

    def counted(*args, **kwargs):
        traces.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(step_module, "update_state", counted)
    config = run(accumulate, layer=layer)
    program = build(
        config, make_mesh(config.parallel, jax.devices()[:1]), total_steps=9
    )
    batches = [
        to_device(program, host_batch(seed), parts=accumulate) for seed in range(4)
    ]
    state = program.init()
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = program.train_step(state, batch)
    assert len(traces) == 1
    assert int(metrics["skipped"]) == 0 and int(state["step"]) == 4


def test_the_state_is_donated():
    config = run()
    program = build(
        config, make_mesh(config.parallel, jax.devices()[:1]), total_steps=9
    )
    state = program.init()
    program.train_step(state, to_device(program, host_batch(0), parts=1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_change_only_rounding_in_the_fast_forms(accumulate):
    def losses(parts):
        config = run(parts, layer="fused", cross_entropy="chunked", loss_chunk=24)
        program = build(
            config, make_mesh(config.parallel, jax.devices()[:1]), total_steps=9
        )
        state, seen = program.init(), []
        for seed in range(3):
            batch = to_device(program, host_batch(seed), parts=parts)
            state, metrics = program.train_step(state, batch)
            seen.append(float(metrics["loss"]))
        return seen

    assert np.allclose(losses(accumulate), losses(1), rtol=2e-6)


def test_out_of_memory_says_what_to_change():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")
    said = out_of_memory(error, run())
    assert said is not None
    assert "--train.accumulate 2 (micro-batches of 4 rows instead of 8" in said
    assert "--compute.remat products" in said
    assert out_of_memory(RuntimeError("something else"), run()) is None
    small = run(accumulate=8, remat="layer", cross_entropy="chunked", loss_chunk=2048)
    said = out_of_memory(error, small)
    assert said is not None and "--compute.loss-chunk 1024" in said
    assert "accumulate" not in said


def test_advice_knows_what_auto_is():
    error = RuntimeError("RESOURCE_EXHAUSTED")
    for goal, stronger in (("accurate", "products"), ("lean", "layer")):
        said = out_of_memory(error, run(goal=goal))
        assert said is not None and f"--compute.remat {stronger}" in said


def test_a_step_that_does_not_fit_names_its_own_size():
    config = dataclasses.replace(run(2))
    said = out_of_memory(RuntimeError("RESOURCE_EXHAUSTED"), config)
    assert said is not None and "micro-batches of 4 x 16 tokens" in said


@pytest.mark.parametrize("layer", ["plain", "fused"])
def test_highest_precision_reaches_every_product_of_both_passes(layer):
    def precisions(**compute):
        config = run(layer=layer, cross_entropy="chunked", **compute)
        mesh = make_mesh(config.parallel, jax.devices()[:1])
        program = build(config, mesh, total_steps=9)
        batch = to_device(program, host_batch(0), parts=1)
        with jax.default_matmul_precision("default"):
            text = program.train_step.lower(program.abstract_state, batch).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) > 20
        return ["HIGHEST, HIGHEST" in line for line in products]

    assert all(precisions(matmul_precision="highest"))
    assert not any(precisions())
