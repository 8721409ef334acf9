"""Causal attention with grouped key/value heads: a plain form, a CPU's, and cuDNN's.

B batch, T query position, S key position, N query heads, K key/value heads,
G = N / K query heads per key/value head, H head dim. In the blocked form M = C G are
the queries of one block of C positions and one key/value head.
"""

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
    softmax is computed in at least float32. blocked is XLA's fast form on a CPU, for
    plain causal rows; with positions or segments it runs plain. native is the same
    here: our own kernel begins with the joined product (heads.py).

    Raises: ValueError if cuDNN is asked for what it does not do here.
    """
    if implementation == "cudnn":
        if positions_BT is not None or segment_ids_BT is not None:
            raise ValueError(
                "compute.attention=cudnn serves plain causal rows only: use "
                "compute.attention=plain for decoding or isolated documents"
            )
        rows = P(ROWS, None, HEADS, None)
        return per_device(_flash, in_specs=(rows, rows, rows), out_specs=rows)(
            q_BTNH, k_BSKH, v_BSKH
        )
    assert implementation in ("plain", "blocked", "native"), implementation
    plain = implementation == "plain"
    if not plain and positions_BT is None and segment_ids_BT is None:
        return _blocked(q_BTNH, k_BSKH, v_BSKH)
    return _plain(q_BTNH, k_BSKH, v_BSKH, positions_BT, segment_ids_BT)


def _flash(q_BTNH, k_BTKH, v_BTKH):
    """cuDNN's FlashAttention, whose backward pass wants an even number of positions: an
    odd one gets another at its end, which no query sees and whose output is cut off."""
    t = q_BTNH.shape[1]
    if t % 2:
        q_BTNH, k_BTKH, v_BTKH = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
            for x in (q_BTNH, k_BTKH, v_BTKH)
        )
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )
    return out_BTNH[:, :t]


def _plain(q_BTNH, k_BSKH, v_BSKH, positions_BT, segment_ids_BT):
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1:3]
    stat = _stat(q_BTNH.dtype)
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


@jax.custom_vjp
def _blocked(q_BTNH, k_BSKH, v_BSKH):
    """Block by block of queries, each against no more keys than it can see.

    Saves almost half of the arithmetic, and writes the products in the one order of
    axes that needs no copy of the scores. The softmax is left unnormed, and its norm
    applied to the output, which is narrower; the backward pass takes the sum of
    probabilities times their gradients from the output (Dao et al., 2022).
    """
    return _blocked_fwd(q_BTNH, k_BSKH, v_BSKH)[0]


def _blocked_fwd(q_BTNH, k_BSKH, v_BSKH):
    h = q_BTNH.shape[-1]
    q_BKTGH = _by_kv_head(q_BTNH * h**-0.5, k_BSKH.shape[2])
    k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (k_BSKH, v_BSKH))
    kept = []
    for start, end in _blocks(q_BTNH.shape[1]):
        at_M = jnp.arange(start, end).repeat(q_BKTGH.shape[3])
        kept.append(
            _attend(
                _rows(q_BKTGH, start, end), k_BKSH[:, :, :end], v_BKSH[:, :, :end], at_M
            )
        )
    out_BTNH = _by_position([out for out, *_ in kept], q_BKTGH.shape)
    return out_BTNH.astype(q_BTNH.dtype), (q_BKTGH, k_BKSH, v_BKSH, kept)


def _attend(q_BKMH, k_BKSH, v_BKSH, at_M):
    """One block's output, and the weights and their inverse sums for its gradient."""
    scores_BKMS = _product(q_BKMH, k_BKSH, 3, 3)
    visible_MS = jnp.arange(k_BKSH.shape[2])[None, :] <= at_M[:, None]
    scores_BKMS = jnp.where(visible_MS[None, None], scores_BKMS, -jnp.inf)
    scores_BKMS = scores_BKMS - jnp.max(scores_BKMS, axis=-1, keepdims=True)
    weights_BKMS = jnp.exp(scores_BKMS)
    inverse_BKM1 = 1 / jnp.sum(weights_BKMS, axis=-1, keepdims=True)
    weights_BKMS = weights_BKMS.astype(v_BKSH.dtype)
    out_BKMH = _product(weights_BKMS, v_BKSH, 3, 2) * inverse_BKM1
    return out_BKMH, weights_BKMS, inverse_BKM1


def _blocked_bwd(residuals, dout_BTNH):
    q_BKTGH, k_BKSH, v_BKSH, kept = residuals
    t, h = q_BKTGH.shape[2], q_BKTGH.shape[-1]
    dout_BKTGH = _by_kv_head(dout_BTNH, k_BKSH.shape[1])
    dqs, dks, dvs = [], [], []
    for (start, end), block in zip(_blocks(t), kept, strict=True):
        dq_BKMH, *dkv = _attend_bwd(
            _rows(q_BKTGH, start, end), k_BKSH[:, :, :end], v_BKSH[:, :, :end], block,
            _rows(dout_BKTGH, start, end),
        )  # fmt: skip
        dqs.append(dq_BKMH)
        for sums, part in zip((dks, dvs), dkv, strict=True):
            sums.append(jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, t - end))))
    dq_BTNH = _by_position(dqs, q_BKTGH.shape) * h**-0.5
    dk_BSKH, dv_BSKH = (jnp.transpose(sum(x), (0, 3, 1, 2)) for x in (dks, dvs))
    return tuple(x.astype(q_BKTGH.dtype) for x in (dq_BTNH, dk_BSKH, dv_BSKH))


def _attend_bwd(q_BKMH, k_BKSH, v_BKSH, block, dout_BKMH):
    """One block's gradients of queries, keys and values; takes what _attend gave."""
    out_BKMH, weights_BKMS, inverse_BKM1 = block
    dout_BKMH = dout_BKMH * inverse_BKM1
    along_BKM1 = jnp.sum(dout_BKMH * out_BKMH, axis=-1, keepdims=True)
    dout_BKMH = dout_BKMH.astype(v_BKSH.dtype)
    dweights_BKMS = _product(dout_BKMH, v_BKSH, 3, 3)
    dscores_BKMS = weights_BKMS * (dweights_BKMS - along_BKM1)
    dscores_BKMS = dscores_BKMS.astype(k_BKSH.dtype)
    dq_BKMH = _product(dscores_BKMS, k_BKSH, 3, 2)
    dk_BKHS = _product(q_BKMH, dscores_BKMS, 2, 2)
    dv_BKHS = _product(dout_BKMH, weights_BKMS, 2, 2)
    return dq_BKMH, dk_BKHS, dv_BKHS


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _blocks(t):
    """Cuts 0 .. t - 1 into at most 8 blocks of at least 64 queries."""
    size = max(64, -(-t // 8))
    return [(start, min(start + size, t)) for start in range(0, t, size)]


def _by_kv_head(x_BTNH, k):
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4)


def _rows(x_BKTGH, start, end):
    b, k, _, _, h = x_BKTGH.shape
    return x_BKTGH[:, :, start:end].reshape(b, k, -1, h)


def _by_position(blocks, shape):
    """Joins blocks of (B, K, M, H) to (B, T, N, H)."""
    b, k, t, g, h = shape
    x_BKTGH = jnp.concatenate(blocks, axis=2).reshape(shape)
    return x_BKTGH.transpose(0, 2, 1, 3, 4).reshape(b, t, k * g, h)


def _product(x, y, axis_x, axis_y):
    """Contracts an axis of each, for all B and K; in at least float32."""
    return jax.lax.dot_general(
        x, y, (((axis_x,), (axis_y,)), ((0, 1), (0, 1))),
        preferred_element_type=_stat(x.dtype),
    )  # fmt: skip


def _stat(dtype):
    return jnp.promote_types(dtype, jnp.float32)
