"""Which dtype computes what, read off the traced program: no tolerance can hide it.

A statistic taken in bfloat16 costs less than the noise of a bfloat16 run, so that no
comparison of results would notice; here it is a different program.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.config import ComputeConfig
from jaxllm.model import Transformer
from jaxllm.train import step
from parity_tests import cases, sides
from parity_tests.cases import TINY
from parity_tests.precision import FP32, FP64, Precision

STATISTICS = ("exp", "log", "rsqrt", "sqrt", "reduce_sum", "reduce_max")


def traced(compute: ComputeConfig) -> list:
    """Every equation of the loss, those of inner programs included."""
    config = sides.run_config(TINY, compute, rows=2)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(TINY, config.compute, rngs=nnx.Rngs(0)))
    )
    params = cases.spread(TINY, 0, FP32)
    micro = {k: x[0] for k, x in cases.batch(0, (1, 2, 16), TINY.vocab_size).items()}

    def loss(params):
        cast = step.cast_matrices(params, config.compute)
        return step.summed_loss(graphdef, cast, micro)

    return list(_equations(jax.make_jaxpr(loss)(params).jaxpr))


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _dtypes(variables) -> tuple[str, ...]:
    return tuple(str(v.aval.dtype) for v in variables)


def bfloat16(**changes) -> ComputeConfig:
    settings: dict = {"compute_dtype": "bfloat16", "residual_dtype": "float32"}
    return FP32.compute(**(settings | changes))


def test_statistics_are_computed_in_float32():
    for equation in traced(bfloat16()):
        if equation.primitive.name in STATISTICS:
            floats = {d for d in _dtypes(equation.invars) if "float" in d}
            assert floats <= {"float32"}, equation


def test_products_take_bfloat16_and_scores_and_logits_leave_in_float32():
    """Seven projections and attention's two products in a layer, and the head."""
    found = Counter(
        (_dtypes(e.invars), _dtypes(e.outvars)[0])
        for e in traced(bfloat16())
        if e.primitive.name == "dot_general"
    )
    halves = ("bfloat16", "bfloat16")
    assert found == {(halves, "bfloat16"): 8, (halves, "float32"): 2}


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_the_residual_stream_has_its_own_dtype(residual):
    scans = [
        e for e in traced(bfloat16(residual_dtype=residual))
        if e.primitive.name == "scan"
    ]  # fmt: skip
    assert len(scans) == 1
    streams = [v.aval for v in scans[0].outvars if v.aval.ndim == 3]
    assert [str(aval.dtype) for aval in streams] == [residual]


@pytest.mark.parametrize("layer", ["plain", "fused"])
def test_gradients_and_loss_leave_in_the_parameters_dtype(layer):
    for precision, half in ((FP32, "bfloat16"), (FP64, "float64")):
        compute = precision.compute(compute_dtype=half, layer=layer)
        _assert_leaves(precision, compute)


def _assert_leaves(precision: Precision, compute: ComputeConfig) -> None:
    config = sides.run_config(TINY, compute, rows=2, accumulate=2)
    functions = sides.ours(config)
    params = cases.spread(TINY, 0, precision)
    batch = cases.batch(0, (2, 2, 16), TINY.vocab_size)
    with precision.active():
        loss, grads = jax.eval_shape(
            functions.loss_and_grads, params, batch, np.int32(0)
        )
    for leaf in (loss, *jax.tree.leaves(grads)):
        assert leaf.dtype == jnp.dtype(precision.dtype)


def test_the_default_on_a_gpu_is_what_the_figures_are_about():
    resolved = ComputeConfig().resolve(
        n_layers=18, vocab_size=6144, platform="gpu", compute_capability=9.0
    )
    assert (resolved.param_dtype, resolved.compute_dtype) == ("float32", "bfloat16")
    cpu = ComputeConfig().resolve(n_layers=18)
    assert {cpu.param_dtype, cpu.compute_dtype, cpu.residual_dtype} == {"float32"}
