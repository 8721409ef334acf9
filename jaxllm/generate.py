"""Decoding with a key/value cache: greedy, temperature, top-k, top-p, penalties.

B rows, T prompt length, S cache length, V vocabulary. Prompts of different lengths go
into one batch: they are padded on the right, token t of a row lies in cache slot t, and
a query sees the slots up to its own position, so that padding is never looked at.
Lengths are rounded up to powers of two, and few programs serve all of them.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.kernels.cross_entropy import logits
from jaxllm.model import Cache, Transformer

SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Shrinks the logits of tokens that have occurred (Keskar et al., 2019)."""
    seed: int = 0
    """Seed of the choice; row b's token does not depend on the other rows."""

    def __post_init__(self):
        # Beyond these float32 has no quotient: every logit would be infinite or none.
        warm = 1e-6 <= self.temperature <= 1e6
        penalty = 1e-6 <= self.repetition_penalty <= 1e6
        rules = (
            ("temperature", self.temperature == 0 or warm, "0 or in [1e-6, 1e6]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", penalty, "in [1e-6, 1e6]"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")


def generate(
    graphdef: Any,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Goes on from each prompt; returns the new ids, a stop id included.

    Raises: ValueError as `stream`.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        graphdef, params, prompts, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_ids=stop_ids,
    ):  # fmt: skip
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    graphdef: Any,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Yields the next id of every row, None for rows that have stopped.

    When a row outgrows max_seq_len, the context is cut on the left and its first token
    becomes position 0 again, as in the reference: every position moves, no cached key
    stays valid, and each further token costs a full pass.

    Raises: ValueError for no prompt, an empty one, or an id outside the vocabulary.
    """
    config: ModelConfig = nnx.merge(graphdef, params).config
    sampling = sampling or Sampling()
    _check(prompts, config, max_new_tokens)
    rows = [list(prompt) for prompt in prompts]
    stopped = [False] * len(rows)
    layers, cache = [], None
    for count in range(max_new_tokens):
        lengths = [len(row) for row in rows]
        if max(lengths) > config.max_seq_len:
            tokens, ends = _padded(rows, config.max_seq_len, config.max_seq_len)
            logits_BV = _score(graphdef, params, tokens, ends)
        elif cache is None:
            layers = unstack(graphdef, params)
            need = min(max(lengths) + max_new_tokens - 1, config.max_seq_len)
            tokens, ends = _padded(rows, _bucket(max(lengths), config.max_seq_len))
            logits_BV, cache = _prefill(
                graphdef, params, layers, tokens, ends,
                _bucket(need, config.max_seq_len),
            )  # fmt: skip
        else:
            latest = np.array([[row[-1]] for row in rows], np.int32)
            ends = np.array(lengths, np.int32)
            logits_BV, cache = _decode(graphdef, params, layers, latest, ends, cache)
        chosen = _choose(sampling, logits_BV, rows, count, config.vocab_size)
        out: list[int | None] = []
        for b, token in enumerate(chosen.tolist()):
            out.append(None if stopped[b] else token)
            # A stopped row goes on in the batch, on its last token, and is not shown;
            # its length stands still so that it cannot outgrow the cache.
            if not stopped[b]:
                rows[b].append(token)
                stopped[b] = token in stop_ids
        yield out
        if all(stopped):
            return


def unstack(graphdef: Any, params: dict) -> list[dict]:
    """Gives every layer arrays of its own; a token would else copy all weights anew.

    Matrices come in the dtype in which they enter products. On a CPU, where nothing is
    cast, the arrays share the memory of `params`; elsewhere they are copies.
    """
    model: Transformer = nnx.merge(graphdef, params)
    dtype = jnp.dtype(model.compute.compute_dtype)
    stacks = jax.tree.map(jnp.asarray, params["layers"])
    return [
        jax.tree.map(functools.partial(_row, i, dtype), stacks)
        for i in range(model.config.n_layers)
    ]


def _row(i, dtype, stacked):
    dtype, devices = dtype if stacked.ndim == 3 else stacked.dtype, stacked.devices()
    on_one_cpu = len(devices) == 1 and min(d.platform for d in devices) == "cpu"
    if on_one_cpu and stacked.dtype == dtype:
        return jax.device_put(np.asarray(stacked)[i], *devices)
    return _copied_row(i, dtype, stacked)


@functools.partial(jax.jit, static_argnums=1)
def _copied_row(i, dtype, stacked):
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _prefill(graphdef, params, layers, tokens_BT, lengths_B, slots: int):
    """Runs the prompts through an empty cache; returns logits_BV and the cache."""
    model: Transformer = nnx.merge(graphdef, params)
    config, compute = model.config, model.compute
    shape = len(tokens_BT), slots, config.n_kv_heads, config.head_dim
    cache = [
        {name: jnp.zeros(shape, compute.compute_dtype) for name in ("k", "v")}
        for _ in layers
    ]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    h_BTD, cache = model.hidden(
        tokens_BT, positions_BT=positions_BT, layers=layers, cache=cache
    )
    return _last_logits(model, h_BTD, lengths_B), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _decode(graphdef, params, layers, tokens_B1, lengths_B, cache: list[Cache]):
    """Adds one token a row, the lengths_B-th; returns logits_BV and the cache."""
    model: Transformer = nnx.merge(graphdef, params)
    h_B1D, grown = model.hidden(
        tokens_B1, positions_BT=lengths_B[:, None] - 1, layers=layers, cache=cache
    )
    return logits(h_B1D[:, 0], model.head_VD()), grown


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, params, tokens_BT, lengths_B):
    """Logits_BV after the lengths_B-th token, without a cache."""
    model: Transformer = nnx.merge(graphdef, params)
    return _last_logits(model, model.hidden(tokens_BT)[0], lengths_B)


def _last_logits(model, h_BTD, lengths_B):
    last_BD = jnp.take_along_axis(h_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    return logits(last_BD, model.head_VD())


def _choose(sampling: Sampling, logits_BV, rows, count, vocab_size) -> np.ndarray:
    seen_BV = None
    if sampling.repetition_penalty != 1.0:
        seen_BV = np.zeros((len(rows), vocab_size), bool)
        for b, row in enumerate(rows):
            seen_BV[b, row] = True
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    return np.asarray(
        _sample(
            logits_BV, seen_BV, np.uint32(sampling.seed), count,
            float(sampling.temperature), top_k, float(sampling.top_p),
            float(sampling.repetition_penalty), greedy=sampling.temperature == 0,
        )
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="greedy")
def _sample(
    logits_BV, seen_BV, seed, count, temperature, top_k, top_p, penalty, *, greedy
):
    if seen_BV is not None:
        penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if greedy:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / temperature
    # The top-k floor is the k-th largest; ties with it stay, as in the reference.
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    k = jnp.clip(top_k, 1, logits_BV.shape[-1])
    floor_B1 = jnp.take_along_axis(
        sorted_BV, jnp.full((len(logits_BV), 1), k - 1), axis=-1
    )
    kept_BV = jnp.where(sorted_BV >= floor_B1, sorted_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(kept_BV, axis=-1)
    # A token belongs to the nucleus if those before it don't reach top_p yet.
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    nucleus_BV = jnp.where((before_BV < top_p) & (probs_BV > 0), sorted_BV, jnp.inf)
    floor_B1 = jnp.maximum(floor_B1, jnp.min(nucleus_BV, axis=-1, keepdims=True))
    logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), count)
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(len(logits_BV)))
    return jax.vmap(jax.random.categorical)(keys, logits_BV)


def _padded(rows, width, keep=None):
    """Right-pads the last `keep` ids of each row to (B, width); also their counts."""
    rows = [row[-keep:] if keep else row for row in rows]
    tokens_BT = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
    return tokens_BT, np.array([len(row) for row in rows], np.int32)


def _bucket(length: int, longest: int) -> int:
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, longest)


def _check(prompts, config: ModelConfig, max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("no prompt was given: give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for b, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {b} is empty: begin it with the begin token")
        worst = max(prompt, key=lambda i: i if i >= 0 else config.vocab_size - i)
        if not 0 <= worst < config.vocab_size:
            raise ValueError(
                f"prompt {b} holds the id {worst}, outside the model's vocabulary of "
                f"{config.vocab_size}: use the model's own tokenizer"
            )
