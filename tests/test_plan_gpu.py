"""What the real step is on an H100, compiled for one: a change that costs, fails here.

Needs the gpu-compile extra, in an environment of its own:
    python -m pytest tests/test_plan_gpu.py -m gpu_compile
A gate is the figure of the day plus 1 %; tighten it when the figure falls.
"""

import dataclasses
import functools
import importlib.util

import pytest

from jaxllm.presets import preset

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in PLUGINS),
        reason="the gpu-compile extra is not installed",
    ),
]


@functools.cache
def h100(name: str, devices=1, rows=0, target="h100", depth=0, **compute):
    from jaxllm.plan.compile import plan
    from jaxllm.plan.targets import TARGETS

    config = preset(name)
    rows = rows or config.train.batch_size
    if depth:
        model = dataclasses.replace(config.model, n_layers=depth)
        config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, **compute),
        train=dataclasses.replace(
            config.train, batch_size=rows * devices, accumulate=1
        ),
    )
    return plan(config, TARGETS[target], count=devices)


def rest(plan) -> float:
    """KiB a token moved by kernels that are neither matmul nor attention."""
    return plan.per_token() - plan.per_token("matmul", "attention")


# Preset, compute settings; gates in KiB a token: temporary memory, moved by kernels
# that are neither matmul nor attention, moved by all.
HALF = {"residual_dtype": "bfloat16"}
LEAN = {"goal": "lean"}
FIGURES = [
    ("k-215m", {}, 496, 1850, 4183),
    ("k-215m", {"remat": "products"}, 400, 1948, 4455),
    ("k-215m", HALF, 496, 1693, 3881),
    ("k-215m", HALF | {"remat": "products"}, 409, 1790, 4124),
    ("k-215m", LEAN, 398, 1750, 4095),
    ("k-259m", LEAN, 407, 2065, 4768),
]


@pytest.mark.parametrize("name, compute, temporary, moved_rest, moved_all", FIGURES)
def test_the_step_stays_as_lean_as_it_is(
    name, compute, temporary, moved_rest, moved_all
):
    from jaxllm.plan.compile import attention_calls

    plan = h100(name, **compute)
    layers = plan.program.config.model.n_layers
    assert plan.copies == []
    assert attention_calls(plan.text) == (layers, layers)
    assert plan.temp_bytes / plan.tokens / 1024 < temporary
    assert rest(plan) < moved_rest
    assert plan.per_token() < moved_all
    assert plan.alias_bytes > 0.99 * plan.output_bytes  # the state is donated


def test_an_odd_number_of_tokens_runs_in_cudnn_too():
    from jaxllm.plan.compile import attention_calls

    # The lineage's rows: 512 tokens are 511 inputs.
    plan = h100("reference", depth=1)
    assert plan.program.config.seq_len == 511
    assert attention_calls(plan.text) == (1, 1)


def test_the_seeds_batch_of_64_fits_a_24_gb_card():
    from jaxllm.plan.report import RESERVED_BYTES
    from jaxllm.plan.targets import TARGETS

    plan = h100(
        "k-215m", rows=64, target="rtx4090", residual_dtype="bfloat16",
        remat="products",
    )  # fmt: skip
    assert plan.peak_bytes + RESERVED_BYTES < TARGETS["rtx4090"].memory_bytes


def test_eight_devices_reduce_gradients_behind_the_backward_pass():
    plan = h100("k-215m", devices=8, residual_dtype="bfloat16")
    collectives = [k for k in plan.kernels if k.kind == "collective"]
    assert collectives and all(k.overlaps for k in collectives)
    # The gradients of 215M weights, once, most of them in bfloat16.
    assert 0.43e9 < sum(k.written * k.runs for k in collectives) < 0.49e9
    assert plan.copies == []


@functools.cache
def exchanges(*mesh: int, **compute):
    """What the step of 4 layers of k-215m exchanges, but for scalars."""
    from jaxllm.parallel import ParallelConfig
    from jaxllm.plan import hlo
    from jaxllm.plan.compile import plan
    from jaxllm.plan.targets import TARGETS

    config = preset("k-215m")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_layers=4),
        compute=dataclasses.replace(config.compute, **compute),
        parallel=ParallelConfig(*mesh),
        train=dataclasses.replace(config.train, batch_size=512, accumulate=1),
    )
    text = plan(config, TARGETS["h100"], count=8).text
    found = [one for one in hlo.Program(text).collectives() if one.bytes > 2e5]
    return config.model, found


def test_data_parallel_gpus_reduce_in_the_dtype_of_the_products():
    model, found = exchanges(8, 1, 1, residual_dtype="bfloat16")
    assert {one.kind for one in found} == {"all-reduce"}
    assert all(one.asynchronous for one in found)
    # All but the last of the backward pass has products behind it.
    assert [one.behind > 0 for one in found] == [True] * (len(found) - 1) + [False]
    table = 4 * model.vocab_size * model.dim
    projections = 2 * (model.n_params - model.vocab_size * model.dim)
    volume = {
        dtype: sum(one.bytes for one in found if one.dtypes == (dtype,))
        for dtype in ("bf16", "f32")
    }
    # The tied table twice, as embedding and as head.
    assert volume["f32"] == pytest.approx(2 * table, rel=0.01)
    assert volume["bf16"] == pytest.approx(projections, rel=0.01)


def test_fsdp_gpus_gather_weights_and_scatter_gradients():
    model, found = exchanges(1, 8, 1, residual_dtype="bfloat16")
    assert {one.kind for one in found} == {"all-gather", "reduce-scatter"}
    assert all(one.asynchronous and one.group == 8 for one in found)
    gathered = sum(one.bytes for one in found if one.kind == "all-gather")
    scattered = sum(one.bytes for one in found if one.kind == "reduce-scatter")
    table = 4 * model.vocab_size * model.dim
    projections = 2 * (model.n_params - model.vocab_size * model.dim)
    assert gathered == pytest.approx(table + projections, rel=0.01)
    assert scattered == pytest.approx(2 * table + projections, rel=0.01)
