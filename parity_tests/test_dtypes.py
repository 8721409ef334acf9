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
from jaxllm.kernels.embedding import embed
from jaxllm.model import Transformer
from jaxllm.train import optim, step
from parity_tests import cases, rungs_bf16, sides
from parity_tests.cases import TINY
from parity_tests.precision import FP32, FP64, Precision

STATISTICS = ("exp", "log", "rsqrt", "sqrt", "reduce_sum", "reduce_max")


_HALF = ("bfloat16", "bfloat16")
_WIDER, _WIDE = ("bfloat16", "float32"), ("float32", "float32")
PRODUCTS = {
    "fused, chunked, one-hot": {_HALF: 14, _WIDER: 6, _WIDE: 2},
    "fused, recomputed, bfloat16 logits": {_HALF: 42, _WIDER: 9, _WIDE: 4},
    "a CPU's, bfloat16 stream": {_HALF: 15, _WIDER: 7, _WIDE: 2},
}
ARITHMETIC = ("add", "add_any", "div", "integer_pow", "logistic", "max", "mul", "neg",
              "sub")  # fmt: skip
# What is done in bfloat16 beside products, forward and with the backward pass.
IN_HALF: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    # The gate, as in the reference; the gradients of gate, dropped mask and weights.
    "plain": (
        {"logistic": 1, "mul": 2},
        {"logistic": 1, "mul": 8, "sub": 1, "add_any": 1},
    ),
    # The gradients of hidden states and head, scaled by that of the loss, and products
    # that are added to the stream's gradient; the last layer is in two pieces.
    "fused, chunked, one-hot": ({}, {"mul": 2, "add": 1}),
    "fused, recomputed, bfloat16 logits": ({}, {"mul": 2, "add": 6}),
    # The scale of the queries, and sums into a stream that is bfloat16 itself.
    "a CPU's, bfloat16 stream": ({"mul": 1, "add": 2}, {"mul": 1, "add": 2}),
}
FAST: dict[str, dict] = {
    "plain": {},
    "fused, chunked, one-hot": {
        "layer": "fused", "gate_up": "joined", "cross_entropy": "chunked",
        "embedding": "one_hot",
    },
    "fused, recomputed, bfloat16 logits": {
        "layer": "fused", "cross_entropy": "chunked", "embedding": "sorted",
        "remat": "products", "logits_dtype": "bfloat16",
    },
    "a CPU's, bfloat16 stream": {
        "layer": "fused", "attention": "blocked", "embedding": "rows",
        "residual_dtype": "bfloat16",
    },
}  # fmt: skip


def traced(compute: ComputeConfig, *, backward: bool = False) -> list:
    """Every equation of the loss, or of its gradient, those of inner programs too."""
    config = sides.run_config(TINY, compute, rows=2)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(TINY, config.compute, rngs=nnx.Rngs(0)))
    )
    params = cases.spread(TINY, 0, FP32)
    batch = cases.batch(0, (1, 2, 16), TINY.vocab_size)
    micro = {k: jnp.asarray(x[0]) for k, x in batch.items()}

    def loss(params):
        cast = step.cast_matrices(params, config.compute)
        return step.summed_loss(graphdef, cast, micro)

    function = jax.value_and_grad(loss) if backward else loss
    return list(_equations(jax.make_jaxpr(function)(params).jaxpr))


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


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FAST)
def test_statistics_are_computed_in_float32(form, backward):
    for equation in traced(bfloat16(**FAST[form]), backward=backward):
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


@pytest.mark.parametrize("form", FAST)
def test_the_embedding_is_read_in_its_own_dtype(form):
    gathered = [
        _dtypes(e.invars)[0] for e in traced(bfloat16(**FAST[form]))
        if e.primitive.name == "gather" and e.invars[0].aval.shape == (97, 32)
    ]  # fmt: skip
    assert gathered == ["float32"]


@pytest.mark.parametrize("form", PRODUCTS)
def test_fast_products_take_bfloat16_and_sums_over_the_vocabulary_stay_wide(form):
    """Forward and backward: scores, logits, the head's and the embedding's gradient."""
    found = Counter(
        (_dtypes(e.invars)[0], _dtypes(e.outvars)[0])
        for e in traced(bfloat16(**FAST[form]), backward=True)
        if e.primitive.name == "dot_general"
    )
    assert found == PRODUCTS[form]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FAST)
def test_arithmetic_is_done_in_bfloat16_only_where_it_is_meant(form, backward):
    found = Counter(
        e.primitive.name
        for e in traced(bfloat16(**FAST[form]), backward=backward)
        if e.primitive.name in ARITHMETIC and "bfloat16" in _dtypes(e.invars)
    )
    assert found == IN_HALF[form][backward]


@pytest.mark.parametrize(("layer", "count"), [("plain", 7), ("fused", 0)])
def test_a_stack_is_rounded_once_and_never_before_norms_are_folded_in(layer, count):
    """Rounded twice, a folded matrix is off by half a unit more in the last place."""
    rounded = [
        e for e in traced(bfloat16(layer=layer))
        if e.primitive.name == "convert_element_type"
        and e.invars[0].aval.ndim == 3 and e.invars[0].aval.shape[0] == TINY.n_layers
        and _dtypes(e.outvars) == ("bfloat16",) and e.invars[0].aval.shape[1] >= 32
    ]  # fmt: skip
    assert len(rounded) == count


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_an_update_leaves_parameters_and_moments_in_their_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        tree = {
            "norm": {"weight": jnp.ones(3, dtype)},
            "wq": {"kernel": jnp.ones((2, 2), dtype)},
        }
        opt = optim.init(tree)
        config = sides.run_config(TINY, FP32.compute()).optim
        norm = optim.global_norm(tree)
        clip = optim.clip_coefficient(config, norm)
        lr = optim.learning_rate(config, jnp.int32(2), total_steps=9)
        params, opt = optim.update(config, tree, tree, opt, lr, clip)
    leaves = jax.tree.leaves((params, opt["m"], opt["v"]))
    assert len(leaves) == 6 and {str(x.dtype) for x in leaves} == {dtype}
    assert opt["count"].dtype == jnp.int32


@pytest.mark.parametrize("form", ["plain", "one_hot", "sorted", "rows"])
def test_many_bfloat16_gradients_of_one_token_add_up(form):
    """In bfloat16, 256 + 1 is 256."""
    tokens = jnp.full((3, 331), 2)

    def total(table):
        h = embed(table, tokens, dtype=jnp.bfloat16, implementation=form)
        return jnp.sum(h.astype(jnp.float32))

    sums = jax.grad(total)(jnp.zeros((5, 4), jnp.float32))
    assert np.array_equal(sums, [[0] * 4, [0] * 4, [993] * 4, [0] * 4, [0] * 4])


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32():
    norm = optim.global_norm({"a": jnp.ones(1001, jnp.bfloat16)})
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(1001**0.5, rel=1e-6)


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
    params = cases.spread(TINY, 0, precision)
    for accumulate in (1, 2):
        config = sides.run_config(TINY, compute, rows=2, accumulate=accumulate)
        batch = cases.batch(0, (accumulate, 2, 16), TINY.vocab_size)
        with precision.active():
            loss, grads = jax.eval_shape(
                sides.ours(config).loss_and_grads, params, batch, np.int32(0)
            )
        for leaf in (loss, *jax.tree.leaves(grads)):
            assert leaf.dtype == jnp.dtype(precision.dtype)


def test_the_defaults_are_what_the_figures_are_about():
    def dtypes(**device):
        found = ComputeConfig().resolve(n_layers=18, vocab_size=6144, **device)
        names = ("param_dtype", "compute_dtype", "residual_dtype", "logits_dtype")
        return [getattr(found, name) for name in names]

    wide = ["float32"] * 4
    assert dtypes() == dtypes(platform="gpu", compute_capability=7.5) == wide
    hopper = dtypes(platform="gpu", compute_capability=9.0)
    assert hopper == ["float32", "bfloat16", "float32", "float32"]
    assert rungs_bf16.VARIANTS[rungs_bf16.CHOSEN]["residual_dtype"] == hopper[2]
    lean = ComputeConfig(goal="lean").resolve(
        n_layers=2, platform="gpu", compute_capability=9.0
    )
    told = rungs_bf16.VARIANTS["goal lean: residual, logits bfloat16, fused"]
    assert {name: getattr(lean, name) for name in told} == told
    double = ComputeConfig(compute_dtype="float64").resolve(n_layers=2)
    assert (double.residual_dtype, double.logits_dtype) == ("float64", "float64")
