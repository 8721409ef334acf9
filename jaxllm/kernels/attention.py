"""Causal attention with grouped key/value heads: a plain form and cuDNN's.

B batch, T query position, S key position, N query heads, K key/value heads,
G = N / K query heads per key/value head, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from jaxllm.kernels.per_device import HEADS, ROWS, P, per_device


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    implementation: str = "plain",
) -> jax.Array:
    """Attends from every query to the keys that it may see; returns out_BTNH.

    Query t sees key s if s <= t. With `positions_BT` (decoding into a cache, where key
    s has position s) it sees s <= positions_BT[b, t] instead; with `segment_ids_BT`
    only keys of its own segment. Query head n reads key/value head n // G, the order
    of PyTorch's repeat_interleave. Inputs share one dtype, which the output has; the
    softmax is computed in at least float32.

    Raises: ValueError if cuDNN is asked for what it does not do here.
    """
    if implementation == "cudnn":
        if positions_BT is not None or segment_ids_BT is not None:
            raise ValueError(
                "compute.attention=cudnn serves plain causal rows only: use "
                "compute.attention=plain for decoding or isolated documents"
            )
        rows = P(ROWS, None, HEADS, None)
        flash = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        return per_device(flash, in_specs=(rows, rows, rows), out_specs=rows)(
            q_BTNH, k_BSKH, v_BSKH
        )
    assert implementation == "plain", implementation
    return _plain(q_BTNH, k_BSKH, v_BSKH, positions_BT, segment_ids_BT)


def _plain(q_BTNH, k_BSKH, v_BSKH, positions_BT, segment_ids_BT):
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    stat = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=stat
    )
    scores_BKGTS = scores_BKGTS * h**-0.5
    visible = _visible(t, s, positions_BT, segment_ids_BT)
    scores_BKGTS = jnp.where(visible, scores_BKGTS, -jnp.inf)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(b, t, n, h)


def _visible(t, s, positions_BT, segment_ids_BT):
    """Boolean mask that broadcasts against scores_BKGTS."""
    keys_S = jnp.arange(s)
    if positions_BT is None:
        visible_BTS = (keys_S[None, :] <= jnp.arange(t)[:, None])[None]
    else:
        visible_BTS = keys_S[None, None, :] <= positions_BT[:, :, None]
    if segment_ids_BT is not None:
        same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        visible_BTS = visible_BTS & same
    return visible_BTS[:, None, None]
