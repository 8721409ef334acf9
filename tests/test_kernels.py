"""Fast forms against plain ones: in float64 to rounding, in bfloat16 against the truth.

Every gate stands beside the largest value seen over the seeds below.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import ComputeConfig, ModelConfig, ParallelConfig
from jaxllm.kernels.cross_entropy import cross_entropy
from jaxllm.kernels.embedding import embed
from jaxllm.model import Transformer
from jaxllm.train.sharding import make_mesh, shardings
from jaxllm.train.step import summed_loss

MODEL = ModelConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=98, max_seq_len=32
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def relative(a, b) -> float:
    """Norm of the difference over the norm, in float64."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def loss_inputs(seed, m=300, d=64, vocab=999):
    """A head that predicts: logits of standard deviation 3, targets often on top."""
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(vocab, d)) * 0.4
    targets = rng.integers(0, vocab, m)
    h = rng.normal(size=(m, d)) + head[targets] * rng.uniform(0, 1.5, size=(m, 1))
    mask = rng.random(m) > 0.2
    return jnp.asarray(h), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(mask)


def loss_and_grads(inputs, dtype, **kwargs):
    h, head, targets, mask = inputs

    def loss(h, head):
        return cross_entropy(h.astype(dtype), head, targets, mask, **kwargs) * 0.7

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(h, head)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunk", [7, 100, 4096])
def test_chunked_loss_equals_plain_in_float64(x64, seed, chunk):
    inputs = loss_inputs(seed)
    plain = loss_and_grads(inputs, "float64")
    fast = loss_and_grads(inputs, "float64", implementation="chunked", chunk=chunk)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert relative(a, b) < 1e-13  # 6e-16


def test_loss_without_gradient_equals_loss_with(x64):
    inputs = loss_inputs(0)
    h, head, targets, mask = inputs
    alone = cross_entropy(h, head, targets, mask, implementation="chunked", chunk=77)
    value, _ = loss_and_grads(inputs, "float64", implementation="chunked", chunk=77)
    assert relative(alone * 0.7, value) < 1e-14


@pytest.mark.parametrize("seed", range(3))
def test_chunked_loss_in_bfloat16_is_better_than_autocast(x64, seed):
    """PyTorch's autocast rounds the logits to bfloat16; neither form of ours does.

    Against the plain form: 1.11x its error at most, from the logits' gradient, which
    enters its two products in bfloat16 here and in float32 there.
    """
    inputs = loss_inputs(seed)
    truth = loss_and_grads(inputs, "float64")
    wide = [x.astype("float32") for x in inputs[:2]]
    plain = loss_and_grads((*wide, *inputs[2:]), "bfloat16")
    fast = loss_and_grads(
        (*wide, *inputs[2:]), "bfloat16", implementation="chunked", chunk=64
    )
    cast = autocast_loss_and_grads(wide[0], wide[1], inputs[2], inputs[3])
    for a, b, c, d in zip(
        *map(jax.tree.leaves, (fast, plain, cast, truth)), strict=True
    ):
        assert relative(a, d) < 1.15 * relative(b, d) + 1e-5
        if d.ndim:  # the loss itself is one number: which is nearer is chance
            assert relative(a, d) < relative(c, d)


def autocast_loss_and_grads(h, head, targets, mask):
    """The loss as PyTorch's autocast has it: bfloat16 logits and their gradient."""
    half = jnp.bfloat16
    h, head = h.astype(half), head.astype(half)
    z = (h @ head.T).astype("float32")
    lse = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(targets, head.shape[0])
    dz = ((jnp.exp(z - lse) - one_hot) * mask[:, None] * 0.7).astype(half)
    loss = 0.7 * jnp.sum((lse[:, 0] - jnp.sum(z * one_hot, axis=-1)) * mask)
    return loss, ((dz @ head).astype("float32"), (dz.T @ h).astype("float32"))


def test_chunked_loss_needs_no_memory_that_grows_with_the_vocabulary():
    m, d, chunk = 4096, 64, 256

    def temporary(vocab, implementation):
        def loss(h, head, targets, mask):
            return cross_entropy(
                h, head, targets, mask, implementation=implementation, chunk=chunk
            )

        shapes = (
            jax.ShapeDtypeStruct((m, d), jnp.float32),
            jax.ShapeDtypeStruct((vocab, d), jnp.float32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
            jax.ShapeDtypeStruct((m,), jnp.int32),
        )
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        memory = step.lower(*shapes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # Of what does grow, an array of tokens x vocabulary, there is none: the growth is
    # that of a chunk's logits and of the head's own gradient.
    grown = temporary(8192, "chunked") - temporary(2048, "chunked")
    assert grown < 6144 * (4 * chunk * 4 + 4 * d * 4)
    assert temporary(8192, "chunked") < temporary(8192, "plain") / 5


@pytest.mark.parametrize("implementation", ["one_hot", "sorted", "rows"])
@pytest.mark.parametrize("seed", range(2))
def test_embedding_gradient_equals_scatter_add(x64, implementation, seed):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(301, 16)))
    tokens = jnp.asarray(np.minimum(rng.zipf(1.3, size=(7, 123)), 301) - 1)
    out = jnp.asarray(rng.normal(size=(7, 123, 16)))

    def gradient(name):
        return jax.jit(
            jax.grad(
                lambda table: jnp.sum(
                    out * embed(table, tokens, dtype="float64", implementation=name)
                )
            )
        )(table)

    assert relative(gradient(implementation), gradient("plain")) < 1e-14  # 2e-16


def params_and_batch(seed, dtype):
    """Weights with norms away from 1, so that a norm left out or doubled shows."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(MODEL, settled(), rngs=nnx.Rngs(0)))
    )

    def draw(x):
        if x.ndim >= 2 and x.shape[-2:] != (MODEL.n_layers, MODEL.dim):
            return jnp.asarray(rng.normal(size=x.shape) * 0.1, dtype)
        return jnp.asarray(1 + 0.3 * rng.normal(size=x.shape), dtype)

    params = jax.tree.map(draw, nnx.to_pure_dict(state))
    ids = rng.integers(0, MODEL.vocab_size, (2, 8, MODEL.max_seq_len))
    mask = rng.random(ids.shape[1:]) > 0.2
    batch = {"inputs": ids[0], "targets": ids[1], "loss_mask": mask}
    return params, jax.tree.map(jnp.asarray, batch)


def settled(**changes) -> ComputeConfig:
    plain = {"attention": "plain", "layer": "plain", "embedding": "plain"}
    plain |= {"cross_entropy": "plain"} | changes
    return ComputeConfig(**plain).resolve(n_layers=MODEL.n_layers)  # type: ignore[arg-type]


def model_loss_and_grads(params, batch, mesh: Mesh | None = None, **changes):
    compute = settled(**changes)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(MODEL, compute, rngs=nnx.Rngs(0)))
    )

    def f(params, batch):
        if mesh is None:
            return summed_loss(graphdef, params, batch)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return summed_loss(graphdef, params, batch)

    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, params))
        batch = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
    return jax.jit(jax.value_and_grad(f))(params, batch)


DOUBLE: dict[str, Any] = {
    "param_dtype": "float64", "compute_dtype": "float64", "residual_dtype": "float64",
}  # fmt: skip
FAST: dict[str, Any] = {
    "layer": "fused", "gate_up": "joined", "embedding": "sorted",
    "cross_entropy": "chunked",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "changes",
    [
        {"layer": "fused"},
        {"layer": "fused", "gate_up": "joined"},
        {"layer": "fused", "remat": "products"},
        {"layer": "fused", "remat": "products", "unroll": 3},
        {"layer": "plain", "remat": "products", "unroll": 3},
        {"layer": "fused", "remat": "layer", "unroll": 3},
        FAST | {"loss_chunk": 48},
    ],
    ids=str,
)
def test_fast_model_equals_plain_in_float64(x64, seed, changes):
    params, batch = params_and_batch(seed, "float64")
    plain = model_loss_and_grads(params, batch, **DOUBLE)
    fast = model_loss_and_grads(params, batch, **DOUBLE, **changes)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert relative(a, b) < 1e-13  # 4e-15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate_up", ["joined", "apart"])
def test_fused_layer_in_bfloat16_is_no_worse_than_plain(x64, seed, residual, gate_up):
    params, batch = params_and_batch(seed, "float64")
    truth = model_loss_and_grads(params, batch, **DOUBLE)[1]
    narrow = jax.tree.map(lambda x: x.astype("float32"), params)
    half: dict[str, Any] = {"compute_dtype": "bfloat16", "residual_dtype": residual}
    plain = model_loss_and_grads(narrow, batch, **half)[1]
    form = {"layer": "fused", "gate_up": gate_up}
    fast = model_loss_and_grads(narrow, batch, **half, **form)[1]
    for a, b, c in zip(*map(jax.tree.leaves, (fast, plain, truth)), strict=True):
        assert relative(a, c) < 1.5 * relative(b, c)


@pytest.mark.parametrize(
    "shape, embedding",
    [((8, 1, 1), "sorted"), ((2, 2, 2), "one_hot"), ((1, 4, 2), "sorted")],
)
def test_fast_forms_on_a_mesh_equal_one_device(x64, shape, embedding):
    params, batch = params_and_batch(0, "float64")
    mesh = make_mesh(
        ParallelConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    )
    changes = DOUBLE | FAST | {"loss_chunk": 10, "embedding": embedding}
    alone = model_loss_and_grads(params, batch, **changes)
    many = model_loss_and_grads(params, batch, mesh, **changes)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
        assert relative(a, b) < 1e-13


def test_rows_that_are_not_plain_run_plain(x64):
    """Segments and caches have no fused form: the result is the plain layer's."""
    params, batch = params_and_batch(0, "float64")
    segments = jnp.asarray(np.arange(32)[None] // 9 * np.ones((8, 1), int))
    batch = batch | {"segment_ids": segments}
    plain = model_loss_and_grads(params, batch, **DOUBLE)
    fused = model_loss_and_grads(params, batch, **DOUBLE, layer="fused")
    assert float(plain[0]) == float(fused[0])


def test_a_dropped_norm_gradient_is_seen(x64, monkeypatch):
    """The comparison above can fail: without the path through rstd it does."""
    from jaxllm.kernels import layer

    monkeypatch.setattr(
        layer, "_add_norm_gradient", lambda dh, x, rstd, drstd, dx=0: dh + dx
    )
    params, batch = params_and_batch(0, "float64")
    plain = model_loss_and_grads(params, batch, **DOUBLE)
    wrong = model_loss_and_grads(params, batch, **DOUBLE, layer="fused")
    worst = max(
        relative(a, b)
        for a, b in zip(jax.tree.leaves(wrong), jax.tree.leaves(plain), strict=True)
    )
    assert worst > 1e-3


@pytest.mark.parametrize(
    "head_dim, capability, chosen",
    [(64, 8.0, "cudnn"), (36, 9.0, "plain"), (256, 9.0, "cudnn"), (256, 8.9, "plain")],
)
def test_auto_leaves_heads_that_cudnn_does_not_take(head_dim, capability, chosen):
    gpu = ComputeConfig().resolve(
        n_layers=2, platform="gpu", compute_capability=capability, head_dim=head_dim
    )
    assert gpu.attention == chosen


def test_lean_is_narrow_on_a_gpu_with_bfloat16_and_nowhere_else():
    def chosen(platform, capability, **given):
        made = ComputeConfig(goal="lean", **given).resolve(
            n_layers=2, platform=platform, compute_capability=capability
        )
        return made.residual_dtype, made.logits_dtype, made.remat, made.gate_up

    assert chosen("gpu", 9.0) == ("bfloat16", "bfloat16", "products", "apart")
    assert chosen("gpu", 9.0, residual_dtype="float32")[0] == "float32"
    assert chosen("gpu", 9.0, remat="layer")[2] == "layer"
    wide = ("float32", "float32", "none")
    assert chosen("gpu", 7.5) == (*wide, "joined")
    assert chosen("cpu", 0.0) == (*wide, "apart")


def test_auto_chooses_fast_forms_on_a_gpu():
    gpu = ComputeConfig().resolve(
        n_layers=18, vocab_size=49152, platform="gpu", compute_capability=9.0
    )
    assert gpu == dataclasses.replace(
        gpu, attention="cudnn", layer="fused", gate_up="joined", unroll=18,
        cross_entropy="chunked", embedding="sorted", compute_dtype="bfloat16",
    )  # fmt: skip


def test_cudnn_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="compute.attention=cudnn.*this is a cpu"):
        ComputeConfig(attention="cudnn").resolve(n_layers=1)
