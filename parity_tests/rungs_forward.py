"""The ladder's forward rungs: each compares one part on both sides from one seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxllm import model as ours_model
from jaxllm.config import ModelConfig
from parity_tests import cases, sides
from parity_tests.cases import SMALL
from parity_tests.compare import Pairs
from parity_tests.oracle import backward
from parity_tests.precision import Precision
from torch_ref import k_model

KV_HEADS = (1, 2, 4)
"""Of 4 query heads: one for all, one for two, one each."""
LENGTHS = (1, 4, 128, SMALL.max_seq_len)


def rope_tables(precision: Precision, seed: int) -> Pairs:
    """Cosines and sines: head widths, lengths and bases, drawn and fixed."""
    rng = np.random.default_rng((1, seed))
    pairs: Pairs = {}
    for head_dim, end, theta in (
        (2, 1, 10000.0),
        (64, 2048, 10000.0),
        (128, 512, 500000.0),
        (2 * int(rng.integers(1, 65)), 300, float(rng.uniform(100, 1e6))),
    ):
        # The cache around it hides the function's signature from a type checker.
        mine = ours_model.precompute_freqs_cis(
            *(head_dim, end, theta, jnp.dtype(precision.dtype))
        )
        other = k_model.precompute_freqs_cis(
            head_dim, end, theta, dtype=precision.torch_dtype
        )
        for name, a, b in zip(("cos", "sin"), mine, other, strict=True):
            pairs[f"{name} H={head_dim} T={end} theta={theta:g}"] = (a, b.numpy())
    return pairs


def rotary(precision: Precision, seed: int) -> Pairs:
    """Turned queries and keys, from the same tables."""
    cos, sin = k_model.precompute_freqs_cis(16, 128, dtype=precision.torch_dtype)
    xq = _normal((2, 128, 4, 16), precision, (2, seed))
    xk = _normal((2, 128, 2, 16), precision, (3, seed))
    with precision.active():
        mine = ours_model.apply_rotary_emb(
            jnp.asarray(xq), jnp.asarray(xk), _table(cos), _table(sin)
        )
        mine = [np.asarray(x) for x in mine]
    theirs = torch.from_numpy(xq), torch.from_numpy(xk)
    other = k_model.apply_rotary_emb(theirs[0], theirs[1], cos, sin)
    return {name: (a, b.numpy()) for name, a, b in zip("qk", mine, other, strict=True)}


def rmsnorm(precision: Precision, seed: int) -> Pairs:
    """Norms of large, common and tiny rows: the eps decides the last."""
    pairs: Pairs = {}
    for eps in (1e-5, 1e-6):
        for scale in (100.0, 1.0, 1e-3):
            x = _normal((2, 128, 64), precision, (4, seed)) * scale
            x = x.astype(precision.dtype)
            weight = 1 + 0.3 * _normal((64,), precision, (5, seed))
            weight = weight.astype(precision.dtype)
            with precision.active():
                norm = ours_model.RMSNorm(64, eps, param_dtype=precision.dtype)
                norm.weight[...] = jnp.asarray(weight)
                mine = np.asarray(norm(jnp.asarray(x)))
            other = k_model.RMSNorm(64, eps).to(precision.torch_dtype)
            other.weight.data = torch.from_numpy(weight)
            theirs = other(torch.from_numpy(x)).detach().numpy()
            pairs[f"eps={eps:g} scale={scale:g}"] = (mine, theirs)
    return pairs


def attention(precision: Precision, seed: int) -> Pairs:
    """The attention block for each number of key/value heads, both reference forms."""
    pairs: Pairs = {}
    for k in KV_HEADS:
        config = dataclasses.replace(SMALL, n_kv_heads=k)
        mine, other = _block("attention", config, precision, seed)
        plain = _their_block("attention", config, precision, seed, flash_attn=False)
        pairs[f"K={k}"], pairs[f"K={k} plain"] = (mine, other), (mine, plain)
    return pairs


def mlp(precision: Precision, seed: int) -> Pairs:
    """The feed-forward block."""
    return {"mlp": _block("feed_forward", SMALL, precision, seed)}


def decoder_layer(precision: Precision, seed: int) -> Pairs:
    """One whole layer, for each number of key/value heads."""
    return {
        f"K={k}": _block(
            "layer", dataclasses.replace(SMALL, n_kv_heads=k), precision, seed
        )
        for k in KV_HEADS
    }


def logits(precision: Precision, seed: int) -> Pairs:
    """Logits of trained and of spread weights, at lengths from 1 to the longest."""
    pairs: Pairs = {}
    for weights in ("trained", "spread"):
        params = getattr(cases, weights)
        params = (
            cases.trained(seed, precision)
            if weights == "trained"
            else cases.spread(SMALL, seed, precision)
        )
        other = sides.theirs(params, SMALL, precision)
        for length in LENGTHS:
            tokens = cases.text(seed, (2, length), SMALL.vocab_size)
            mine = sides.our_logits(params, SMALL, precision, tokens)
            with torch.no_grad():
                theirs = other(torch.from_numpy(tokens)).logits.numpy()
            pairs[f"{weights} T={length}"] = (mine, theirs)
    return pairs


def shapes(precision: Precision, seed: int) -> Pairs:
    """Logits, loss and gradients of networks of other shapes, tied and untied."""
    pairs: Pairs = {}
    for name, config in SHAPES.items():
        for what, pair in of_shape(config, precision, seed).items():
            pairs[f"{name}: {what}"] = pair
    return pairs


SHAPES = {
    "one layer, one head, untied": ModelConfig(
        dim=24, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=53, max_seq_len=160,
        multiple_of=7, tie_word_embeddings=False,
    ),
    "wide heads, own hidden, theta, eps": ModelConfig(
        dim=40, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=12, hidden_dim=50,
        vocab_size=101, max_seq_len=131, rope_theta=500000.0, norm_eps=1e-3,
    ),
}  # fmt: skip


def of_shape(
    config: ModelConfig, precision: Precision, seed: int, length: int = 128
) -> Pairs:
    """Logits, masked loss and every gradient of one network with spread weights."""
    params = cases.spread(config, seed, precision)
    batch = cases.batch(seed, (1, 2, length), config.vocab_size)
    other = sides.theirs(params, config, precision)
    mine = sides.our_logits(params, config, precision, batch["inputs"][0])
    with torch.no_grad():
        theirs = other(sides.as_torch(batch["inputs"][0])).logits.numpy()
    pairs: Pairs = {"logits": (mine, theirs)}
    return pairs | _loss_and_gradients(config, params, batch, precision, other)


def loss(precision: Precision, seed: int) -> Pairs:
    """The masked mean loss of trained weights on padded rows."""
    return {
        name: pair
        for name, pair in _trained_step(precision, seed).items()
        if name == "loss"
    }


def gradients(precision: Precision, seed: int) -> Pairs:
    """Every gradient tensor of trained weights, layer by layer."""
    return {
        name: pair
        for name, pair in _trained_step(precision, seed).items()
        if name != "loss"
    }


def _trained_step(precision: Precision, seed: int) -> Pairs:
    params = cases.trained(seed, precision)
    batch = cases.batch(seed, (1, 3, 144), SMALL.vocab_size)
    other = sides.theirs(params, SMALL, precision)
    pairs = _loss_and_gradients(SMALL, params, batch, precision, other)
    with torch.no_grad():  # the reference's own masked mean, beside autograd's
        masked = other(*(sides.as_torch(x[0]) for x in batch.values())).loss
    assert masked is not None
    return pairs | {"loss": (pairs["loss"][0], masked.numpy())}


def _loss_and_gradients(config, params, batch, precision, other) -> Pairs:
    run = sides.run_config(config, precision.compute(), rows=batch["inputs"].shape[1])
    mine, grads = sides.our_loss_and_grads(run, precision, params, batch)
    theirs, their_grads = backward(other, batch, "token")
    by_name = cases.to_torch(grads, config)
    pairs: Pairs = {"loss": (mine, theirs)}
    for name, grad in their_grads.items():
        pairs[f"d {name}"] = (by_name[name], grad.numpy())
    return pairs


def _block(part: str, config: ModelConfig, precision: Precision, seed: int):
    """Runs one block of layer 1 on a random stream, on both sides."""
    params, x, tables = _block_inputs(config, precision, seed)
    one = jax.tree.map(lambda leaf: leaf[1], params["layers"])
    kinds = {
        "attention": (ours_model.Attention, one["attention"]),
        "feed_forward": (ours_model.MLP, one["feed_forward"]),
        "layer": (ours_model.DecoderLayer, one),
    }
    kind, weights = kinds[part]
    compute = precision.compute().resolve(n_layers=1)
    with precision.active():
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: kind(config, compute, rngs=nnx.Rngs(0)))
        )

        @jax.jit
        def run(weights, x, *tables):
            block = nnx.merge(graphdef, weights)
            return block(x) if part == "feed_forward" else block(x, *tables)[0]

        mine = np.asarray(run(weights, x, *(table.numpy()[None] for table in tables)))
    return mine, _their_block(part, config, precision, seed)


def _their_block(part, config, precision, seed, **changes) -> np.ndarray:
    params, x, tables = _block_inputs(config, precision, seed)
    layer = sides.theirs(params, config, precision, **changes).layers[1]
    inputs = (torch.from_numpy(x), *(() if part == "feed_forward" else tables))
    with torch.no_grad():
        return (layer if part == "layer" else getattr(layer, part))(*inputs).numpy()


def _block_inputs(config: ModelConfig, precision: Precision, seed: int):
    params = cases.spread(config, seed, precision)
    x = _normal((2, 128, config.dim), precision, (6, seed))
    assert config.head_dim is not None
    tables = k_model.precompute_freqs_cis(
        config.head_dim, 128, config.rope_theta, dtype=precision.torch_dtype
    )
    return params, x, tables


def _table(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.numpy()[None])


def _normal(shape, precision: Precision, seed) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(precision.dtype)
