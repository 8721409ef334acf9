"""A decoder layer's matrices as its fast form multiplies by them.

D dim, E = N H, N query heads, K key/value heads, G = N / K, H head dim, F feed-forward
dim, J = K (G + 2) H the joined width of q, k and v, C = 2: gate, up.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Piece(NamedTuple):
    """A part of the feed-forward's matrices, some of its F; most layers have one."""

    gate_up: "jax.Array | tuple[jax.Array, jax.Array]"
    """Joined as (D, C, F), or (D, F) of each."""
    down_FD: jax.Array


class Weights(NamedTuple):
    """A layer's matrices in the compute dtype, the norm weights folded in."""

    qkv_DJ: jax.Array
    out_D: jax.Array
    """wo, (N H, D)."""
    mlp: tuple[Piece, ...]
    """Feed-forwards whose results add up."""


def fold(layer: Any, n_kv_heads: int, dtype, *, join: bool, pieces: int = 1) -> Weights:
    """Folds norm weights into matrices (d_in, d_out), joins q, k, v; casts to `dtype`.

    q, k and v are joined head group by head group (K, G + 2, H), so that a mesh that
    cuts heads cuts the joined matrix at the same places.
    """
    attention, mlp = layer.attention, layer.feed_forward
    attention_norm_D, ffn_norm_D = (
        layer.attention_norm.weight[...],
        layer.ffn_norm.weight[...],
    )
    d = attention_norm_D.shape[0]
    groups = [
        projection.kernel[...].reshape(d, n_kv_heads, -1)
        for projection in (attention.wq, attention.wk, attention.wv)
    ]
    qkv_DKJ = attention_norm_D[:, None, None] * jnp.concatenate(groups, axis=2)
    return Weights(
        qkv_DJ=qkv_DKJ.reshape(d, -1).astype(dtype),
        out_D=attention.wo.kernel[...].astype(dtype),
        mlp=tuple(
            _fold_piece(ffn_norm_D, kernels, dtype, join=join)
            for kernels in _cut(mlp, pieces)
        ),
    )


def _cut(mlp: Any, pieces: int) -> list[tuple[Any, ...]]:
    """The kernels of gate, up and down, F cut into pieces as equal as can be."""
    kernels = mlp.w1.kernel[...], mlp.w3.kernel[...], mlp.w2.kernel[...]
    if pieces == 1:
        return [kernels]
    f = kernels[2].shape[0]
    edges = [f * piece // pieces for piece in range(pieces + 1)]
    sizes = tuple(end - start for start, end in itertools.pairwise(edges))
    axes = (1, 1, 0)
    parts = [jax.lax.split(x, sizes, a) for x, a in zip(kernels, axes, strict=True)]
    return list(zip(*parts, strict=True))


def _fold_piece(norm_D, kernels, dtype, *, join: bool) -> Piece:
    gate_DF, up_DF, down_FD = kernels
    gate_up = tuple((norm_D[:, None] * x).astype(dtype) for x in (gate_DF, up_DF))
    if join:
        gate_up = jnp.stack(gate_up, axis=1)
    return Piece(gate_up, down_FD.astype(dtype))
