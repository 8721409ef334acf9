"""Rungs of every other way through the model: fast forms, documents, cache, fresh.

Each path has its own code on our side, and the same plain reference on theirs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.generate import unstack
from jaxllm.kernels.attention import attention
from jaxllm.train import step as ours_step
from parity_tests import cases, sides
from parity_tests.cases import TINY
from parity_tests.compare import Pairs
from parity_tests.oracle import backward
from parity_tests.precision import Precision
from torch_ref import k_model

FORMS: dict[str, dict] = {
    "fused layer, one-hot embedding, chunked loss": {
        "layer": "fused", "gate_up": "joined", "embedding": "one_hot",
        "cross_entropy": "chunked", "loss_chunk": 37,
    },
    "fused layer unrolled, sorted embedding, remat": {
        "layer": "fused", "embedding": "sorted", "remat": "products", "unroll": 2,
    },
    "remat of products, rows embedding, one chunk": {
        "remat": "products", "embedding": "rows",
        "cross_entropy": "chunked",
    },
    "remat of layers, fused, even chunks": {
        "layer": "fused", "remat": "layer", "unroll": 2, "cross_entropy": "chunked",
        "loss_chunk": 20,
    },
    "remat of layers, plain": {"remat": "layer"},
    "a CPU's": {"layer": "fused", "attention": "blocked", "unroll": 2},
}  # fmt: skip
"""Every form of every kernel at least once, and the ones a GPU picks together."""
CPU: dict = {"layer": "fused", "attention": "blocked"}
"""Rows with segments, dropout or a cache must leave these forms for the plain ones."""


def forms(precision: Precision, seed: int) -> Pairs:
    """Loss and gradients in every compute form, of networks unlike the default one."""
    pairs: Pairs = {}
    for k, (name, changes) in zip((2, 1, 4, 2, 2, 2), FORMS.items(), strict=True):
        config = dataclasses.replace(
            TINY, n_kv_heads=k, norm_eps=1e-3, head_dim=12,
            tie_word_embeddings=k != 2,
        )  # fmt: skip
        params = cases.spread(config, seed, precision)
        # More tokens than a chunk of the sorted embedding holds.
        batch = cases.batch(seed, (2, 4, 40), config.vocab_size)
        other = sides.theirs(params, config, precision)
        run = sides.run_config(
            config, precision.compute(**changes), rows=4, accumulate=2
        )
        mine, grads = sides.our_loss_and_grads(run, precision, params, batch)
        theirs, their_grads = backward(other, batch, "token")
        by_name = cases.to_torch(grads, config)
        pairs[f"{name}: loss"] = (mine, theirs)
        for tensor, grad in their_grads.items():
            pairs[f"{name}: d {tensor}"] = (by_name[tensor], grad.numpy())
    return pairs


def blocked(precision: Precision, seed: int) -> Pairs:
    """Blocked attention and its gradients: whole blocks, a part of one, and many."""
    pairs: Pairs = {}
    for t, k in ((150, 2), (64, 4), (33, 1), (2, 2), (520, 2)):
        rng = np.random.default_rng((37, seed, t))
        shapes = ((2, t, 4, 16), (2, t, k, 16), (2, t, k, 16), (2, t, 4, 16))
        q, key, v, dout = (rng.normal(size=s).astype(precision.dtype) for s in shapes)
        with precision.active():
            mine = [np.asarray(x) for x in _blocked(3 * q, key, v, dout)]
        inputs = [torch.from_numpy(x).requires_grad_() for x in (3 * q, key, v)]
        a, b, c = (
            x.transpose(1, 2).repeat_interleave(4 // x.shape[2], 1) for x in inputs
        )
        their_out = torch.nn.functional.scaled_dot_product_attention(
            a, b, c, is_causal=True
        ).transpose(1, 2)
        their_out.backward(torch.from_numpy(dout))
        theirs = [their_out.detach()] + [x.grad for x in inputs]
        for name, a, b in zip(("out", "dq", "dk", "dv"), mine, theirs, strict=True):
            assert b is not None
            pairs[f"T={t} K={k}: {name}"] = (a, b.numpy())
    return pairs


@jax.jit
def _blocked(q, k, v, dout):
    run = functools.partial(attention, implementation="blocked")
    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(dout)


def documents(precision: Precision, seed: int) -> Pairs:
    """Documents packed in a row, isolated, against each document alone."""
    params = cases.spread(TINY, seed, precision)
    rng = np.random.default_rng((31, seed))
    cuts = np.sort(rng.choice(np.arange(2, 46), 2, replace=False))
    lengths = np.diff([0, *cuts.tolist(), TINY.max_seq_len])
    tokens = cases.text(seed, (1, TINY.max_seq_len), TINY.vocab_size)
    segments = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    functions = sides.ours(sides.run_config(TINY, precision.compute(**CPU)))
    with precision.active():
        packed = np.asarray(
            functions.logits(
                params, tokens.astype(np.int32), positions_BT=positions,
                segment_ids_BT=segments,
            )
        )  # fmt: skip
    other = sides.theirs(params, TINY, precision)
    pairs: Pairs = {}
    for i, end in enumerate(np.cumsum(lengths)):
        rows = slice(int(end - lengths[i]), int(end))
        with torch.no_grad():
            alone = other(torch.from_numpy(tokens[:, rows])).logits.numpy()
        pairs[f"document {i}"] = (packed[:, rows], alone)
    return pairs


def document_gradients(precision: Precision, seed: int) -> Pairs:
    """Loss and gradients of packed documents in a step, against each one alone.

    Once more with every second position left out: a rotation sees differences alone, so
    that positions which merely run on would not be told from those that restart.
    """
    params = cases.spread(TINY, seed, precision)
    lengths, length = (13, 22, 5), 40
    batch = cases.batch(seed, (1, 1, length), TINY.vocab_size)
    ends = np.cumsum(lengths)
    # The last token of a document predicts nothing; the last row but one is real.
    batch["loss_mask"] = ~np.isin(np.arange(length), ends - 1)[None, None]
    batch["segment_ids"] = np.repeat(np.arange(1, 4), lengths)[None, None]
    run = sides.run_config(TINY, precision.compute(**CPU))
    other = sides.theirs(params, TINY, precision)
    tables = k_model.precompute_freqs_cis(
        TINY.dim // TINY.n_heads, TINY.max_seq_len, dtype=precision.torch_dtype
    )
    pairs: Pairs = {}
    for apart in (1, 2):
        positions = np.concatenate([apart * np.arange(n) for n in lengths])
        batch["positions"] = positions[None, None]
        batch = {
            name: x if x.dtype == bool else x.astype(np.int32)
            for name, x in batch.items()
        }
        mine, grads = sides.our_loss_and_grads(run, precision, params, batch)
        by_name = cases.to_torch(grads, TINY)
        # The reference knows no positions: its tables are cut instead.
        other._freqs_cis = (tables[0][::apart], tables[1][::apart])
        other.zero_grad()
        total = torch.zeros((), dtype=precision.torch_dtype)
        for start, end in zip(ends - lengths, ends, strict=True):
            alone = {k: sides.as_torch(x[0, :, start:end]) for k, x in batch.items()}
            losses = other(alone["inputs"], alone["targets"]).loss
            total = total + (losses * alone["loss_mask"]).sum()
        loss = total / int(batch["loss_mask"].sum())
        loss.backward()
        where = f"positions {apart} apart: "
        pairs[f"{where}loss"] = (mine, loss.detach().numpy())
        for name, weight in sides.named_parameters(other).items():
            assert weight.grad is not None
            pairs[f"{where}d {name}"] = (by_name[name], weight.grad.numpy().copy())
    return pairs


def cached(precision: Precision, seed: int) -> Pairs:
    """Prefill of prompts of different lengths, then token by token."""
    params = cases.spread(TINY, seed, precision)
    tokens = cases.text(seed, (3, 40), TINY.vocab_size).astype(np.int32)
    lengths, slots = np.array([25, 7, 16]), 44
    graphdef = sides.ours(sides.run_config(TINY, precision.compute(**CPU))).graphdef
    other = sides.theirs(params, TINY, precision)
    with torch.no_grad():
        theirs = other(sides.as_torch(tokens)).logits.numpy()

    @jax.jit
    def run(params, layers, tokens, positions, cache):
        model = nnx.merge(graphdef, params)
        h, cache = model.hidden(
            tokens, positions_BT=positions, layers=layers, cache=cache
        )
        return h @ model.head_VD().T, cache

    pairs: Pairs = {}
    with precision.active():
        on_device = jax.tree.map(jnp.asarray, params)
        layers = unstack(graphdef, on_device)
        shape = (3, slots, TINY.n_kv_heads, TINY.head_dim)
        cache = [
            {name: jnp.zeros(shape, precision.dtype) for name in "kv"} for _ in layers
        ]
        width = int(lengths.max())
        prompt = np.where(np.arange(width) < lengths[:, None], tokens[:, :width], 1)
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), prompt.shape)
        logits, cache = run(on_device, layers, prompt, positions, cache)
        for row, length in enumerate(lengths):
            pairs[f"prefill row {row}"] = (
                np.asarray(logits[row, :length]), theirs[row, :length],
            )  # fmt: skip
        for new in range(12):
            at = (lengths + new)[:, None].astype(np.int32)
            latest = np.take_along_axis(tokens, at, axis=1)
            logits, cache = run(on_device, layers, latest, at, cache)
            expected = np.take_along_axis(theirs, at[..., None], axis=1)
            pairs[f"decode {new}"] = (np.asarray(logits), expected)
    return pairs


def init(precision: Precision, seed: int) -> Pairs:
    """The spread of fresh weights: by tensor, its standard deviation and kurtosis."""
    pairs: Pairs = {}
    kinds: tuple = (("residual", False), ("reference", True))
    for kind, tied in kinds:
        config = ModelConfig(
            dim=256, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=331,
            init=kind, tie_word_embeddings=tied,
        )  # fmt: skip
        run = sides.run_config(config, precision.compute(), seed=seed)
        with precision.active():
            fresh = ours_step.build(run, sides.mesh(), total_steps=1).init()
            params = jax.tree.map(np.asarray, fresh["params"])
            assert not any(np.any(x) for x in jax.tree.leaves(fresh["opt"]))
        zeros = jax.tree.map(np.zeros_like, params)
        modules = dict(sides.theirs(zeros, config, precision).named_modules())
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            names = [key.key for key in path[:-1]]
            where, x = f"{kind} tied={tied}: {'.'.join(names)}", x.astype(np.float64)
            if path[-1].key == "weight":
                pairs[where] = (x, np.ones_like(x))
                continue
            names = ["layers", "0", *names[1:]] if names[0] == "layers" else names
            std = getattr(modules[".".join(names)], "init_std", 0.02)
            pairs[where] = (x.std(), std)
            pairs[f"{where} mean"] = (1 + x.mean() / x.std(), 1.0)
            pairs[f"{where} kurtosis"] = (np.mean(x**4) / x.var() ** 2, 3.0)
        layers = params["layers"]["attention"]["wq"]["kernel"]
        alike = np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]
        pairs[f"{kind} tied={tied}: layers alike"] = (1 + alike, 1.0)
    return pairs


EVALUATED = dataclasses.replace(TINY, vocab_size=96)
ONE, ALL = (1, 1, 1), (2, 2, 2)
_CHUNKS = {"cross_entropy": "chunked", "loss_chunk": 37}


def evaluation(precision: Precision, seed: int) -> Pairs:
    """eval_step's summed loss and its count of tokens: both forms, and on 8 devices."""
    params = cases.spread(EVALUATED, seed, precision)
    batch = cases.batch(seed, (1, 4, 40), EVALUATED.vocab_size)
    pairs: Pairs = {}
    other = sides.theirs(params, EVALUATED, precision)
    with torch.no_grad():
        out = other(*(sides.as_torch(batch[n][0]) for n in ("inputs", "targets")))
        assert out.loss is not None
        total = (out.loss * torch.from_numpy(batch["loss_mask"][0])).sum().numpy()
    forms: tuple = (("plain", {}, ONE), ("chunked", _CHUNKS, ONE),
                    ("chunked, 8 devices", _CHUNKS, ALL))  # fmt: skip
    for form, changes, devices in forms:
        run = sides.run_config(EVALUATED, precision.compute(**changes), rows=4)
        with precision.active():
            program = sides.program(run, 10, devices)
            layout = jax.tree.map(lambda x: x.sharding, program.abstract_state)
            placed = jax.device_put(params, layout["params"])
            loss, count = map(np.asarray, program.eval_step(placed, batch))
        pairs[f"{form}: summed loss"] = (loss, total)
        pairs[f"{form}: tokens"] = (count, batch["loss_mask"].sum())
    return pairs
