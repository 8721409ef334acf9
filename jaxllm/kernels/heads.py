"""From the joined product of q, k and v to the heads' outputs, and back.

B batch, T time, N query heads, K key/value heads, G = N / K, H head dim,
J = K (G + 2) H the joined width of q, k and v, group by group.
"""

import functools

import jax
import jax.numpy as jnp

from jaxllm.kernels import native
from jaxllm.kernels.attention import attention


def attend(n_heads, n_kv_heads, implementation, qkv_BTJ, rstd_BT, freqs_cos, freqs_sin):
    """Applies the norm's factor, rotates q and k, and attends; returns out_BTNH, and
    what attend_backward takes. Tables are (B or 1, T, R)."""
    if implementation == "native":
        b, t, j = qkv_BTJ.shape
        h = j // (n_heads + 2 * n_kv_heads)
        shapes = (b, t, n_heads, h), (2, b, n_heads, t)
        out_BTNH, stats_2BNT = jax.ffi.ffi_call(
            native.target("attention_forward"),
            [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        )(qkv_BTJ, rstd_BT, freqs_cos, freqs_sin)
        return out_BTNH, (qkv_BTJ, out_BTNH, stats_2BNT)
    q, k, v = split(n_heads, n_kv_heads, qkv_BTJ, rstd_BT, freqs_cos, freqs_sin)
    plain = functools.partial(attention, implementation=implementation)
    return jax.vjp(plain, q, k, v)


def attend_backward(implementation, kept, rstd_BT, freqs_cos, freqs_sin, dout_BTNH):
    """The gradient of qkv_BTJ, where the norm's factor counts as constant."""
    if implementation == "native":
        qkv_BTJ, out_BTNH, stats_2BNT = kept
        inputs = qkv_BTJ, rstd_BT, freqs_cos, freqs_sin, out_BTNH, stats_2BNT
        shape = jax.ShapeDtypeStruct(qkv_BTJ.shape, jnp.float32)
        call = jax.ffi.ffi_call(native.target("attention_backward"), shape)
        return call(*inputs, dout_BTNH)
    return join(kept(dout_BTNH), rstd_BT, freqs_cos, freqs_sin)


def split(n_heads, n_kv_heads, qkv_BTJ, rstd_BT, freqs_cos, freqs_sin):
    """Cuts q, k and v apart, applies the norm's factor and rotates q and k."""
    b, t, j = qkv_BTJ.shape
    n, k = n_heads, n_kv_heads
    h = j // (n + 2 * k)
    qkv_BTKGH = qkv_BTJ.reshape(b, t, k, -1, h)
    scale = rstd_BT[:, :, None, None, None]
    qkv = qkv_BTKGH.astype(rstd_BT.dtype) * scale
    q, key, value = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
    q = _rotate(q.reshape(b, t, n, h), freqs_cos, freqs_sin)
    key = _rotate(key, freqs_cos, freqs_sin)
    return tuple(x.astype(qkv_BTJ.dtype) for x in (q, key, value))


def join(dqkv, rstd_BT, freqs_cos, freqs_sin):
    """The transpose of split: turns back, applies the factor, and joins."""
    dq, dk, dv = (x.astype(rstd_BT.dtype) for x in dqkv)
    b, t, k, h = dk.shape
    dq = _rotate(dq, freqs_cos, -freqs_sin).reshape(b, t, k, -1, h)
    dk = _rotate(dk, freqs_cos, -freqs_sin)
    joined = jnp.concatenate([dq, dk[:, :, :, None], dv[:, :, :, None]], axis=3)
    joined = joined * rstd_BT[:, :, None, None, None]
    return joined.reshape(b, t, -1).astype(dqkv[0].dtype)


def _rotate(x_BTNH, freqs_cos, freqs_sin):
    """Rotates interleaved pairs (a, b) to (a cos - b sin, b cos + a sin)."""
    pairs = x_BTNH.reshape(*x_BTNH.shape[:-1], -1, 2)
    cos = freqs_cos[:, :, None, :, None]
    signs_2 = jnp.array([-1, 1], freqs_sin.dtype)
    sin = freqs_sin[:, :, None, :, None] * signs_2[None, None, None, None]
    return (pairs * cos + pairs[..., ::-1] * sin).reshape(x_BTNH.shape)
