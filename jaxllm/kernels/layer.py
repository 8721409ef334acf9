"""The decoder layer's fast form: forward and backward written out, to move less memory.

Equal to model.DecoderLayer up to rounding (in float64 to 1e-13, gradients included).
Away from the matrix products and attention a training step does nothing but move
activations, so this form

- folds each norm into the products that follow it: norm(x) @ W is
  rsqrt(mean(x^2) + eps) * (x @ (weight * W)), where weight * W is made once per
  layer and the factor, one number a token, joins the rotation or the SwiGLU gate. The
  normed activations are never written, and the norm weight's gradient is a sum over
  the matrix instead of over the tokens;
- multiplies q, k and v in one product, and, where act is kept, gate and up in another;
- keeps x, q, k, v, the attention's output, x again, gate and up, and recomputes the
  elementwise rest in the backward pass, never a product and never attention. One
  array of that rest may be kept too, for 97 KiB a token more memory and less traffic.

B batch, T time, D dim, N query heads, K key/value heads, G = N / K, H head dim,
F feed-forward dim, J = K (G + 2) H the joined width of q, k and v, C = 2: gate, up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.kernels.attention import attention


class Weights(NamedTuple):
    """A layer's matrices in the compute dtype, the norm weights folded in."""

    qkv_DJ: jax.Array
    out_D: jax.Array
    """wo, (N H, D)."""
    gate_up: "jax.Array | tuple[jax.Array, jax.Array]"
    """Joined as (D, C, F), or (D, F) of each: recomputing act beside its gradients is
    one kernel only while those are two arrays."""
    down_FD: jax.Array


class Static(NamedTuple):
    """What shapes do not tell."""

    n_heads: int
    n_kv_heads: int
    eps: float
    attention: str
    keep_act: bool = False
    """Keep act = silu(gate) * up for the backward pass instead of recomputing it."""


def fused_layer(layer: Any, h_BTD, freqs_cos, freqs_sin) -> jax.Array:
    """Runs a model.DecoderLayer in its fast form; returns h_BTD in its dtype.

    For rows without cache, segments and dropout; tables are (B or 1, T, R).
    """
    config, compute = layer.attention.config, layer.compute
    static = Static(
        config.n_heads,
        config.n_kv_heads,
        config.norm_eps,
        compute.attention,
        keep_act=compute.remat == "none",
    )
    weights = fold(
        layer, config.n_kv_heads, compute.compute_dtype, join=static.keep_act
    )
    return decoder_layer(static, h_BTD, weights, freqs_cos, freqs_sin)


def fold(layer: Any, n_kv_heads: int, dtype, *, join: bool) -> Weights:
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
    gate_up = tuple(
        (ffn_norm_D[:, None] * projection.kernel[...]).astype(dtype)
        for projection in (mlp.w1, mlp.w3)
    )
    if join:
        gate_up = jnp.stack(gate_up, axis=1)
    return Weights(
        qkv_DJ=qkv_DKJ.reshape(d, -1).astype(dtype),
        out_D=attention.wo.kernel[...].astype(dtype),
        gate_up=gate_up,
        down_FD=mlp.w2.kernel[...].astype(dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decoder_layer(
    static: Static, h_BTD: jax.Array, weights: Weights, freqs_cos, freqs_sin
) -> jax.Array:
    """The layer as a function of arrays."""
    return _forward(static, h_BTD, weights, freqs_cos, freqs_sin)[0]


def _forward(static, h_BTD, weights, freqs_cos, freqs_sin):
    dtype = weights.qkv_DJ.dtype
    x_BTD = _narrow(h_BTD, dtype)
    rstd_BT = _rstd(h_BTD, static.eps)
    q, k, v = _split(static, x_BTD @ weights.qkv_DJ, rstd_BT, freqs_cos, freqs_sin)
    out_BTNH, attention_vjp = jax.vjp(
        functools.partial(attention, implementation=static.attention), q, k, v
    )
    out_BTE = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
    h_BTD = h_BTD + (out_BTE @ weights.out_D).astype(h_BTD.dtype)

    x_mid_BTD = _narrow(h_BTD, dtype)
    rstd_mid_BT = _rstd(h_BTD, static.eps)
    gate_up = _gate_up(x_mid_BTD, weights.gate_up)
    act_BTF = _swiglu(gate_up, rstd_mid_BT)
    h_BTD = h_BTD + (act_BTF @ weights.down_FD).astype(h_BTD.dtype)

    attention_residuals = (x_BTD, rstd_BT, attention_vjp, out_BTE)
    kept = act_BTF if static.keep_act else None
    mlp_residuals = (x_mid_BTD, rstd_mid_BT, gate_up, kept)
    return h_BTD, (attention_residuals, mlp_residuals, weights, freqs_cos, freqs_sin)


def _backward(static, residuals, dh_BTD):
    attention_residuals, mlp_residuals, weights, freqs_cos, freqs_sin = residuals
    dtype = weights.qkv_DJ.dtype

    # h + down(act), act = silu(gate r) * (up r), where r is the norm's factor.
    x_BTD, rstd_BT, gate_up, kept = mlp_residuals
    dy_BTD = dh_BTD.astype(dtype)
    dact_BTF = _times_transposed(dy_BTD, weights.down_FD)
    # Behind the barrier XLA cannot take the forward's activations for those it
    # recomputes here: keeping them costs 97 KiB a token in a 215M model.
    dact_BTF, gate_up = jax.lax.optimization_barrier((dact_BTF, gate_up))
    act_BTF, swiglu_vjp = jax.vjp(_swiglu, gate_up, rstd_BT)
    act_BTF = act_BTF if kept is None else kept
    dgate_up, drstd_BT = swiglu_vjp(dact_BTF)
    # The narrower factor is the one that a CPU copies transposed.
    ddown_FD = _outer(dy_BTD, act_BTF).T
    dx_BTD, dgate_up = _gate_up_backward(x_BTD, weights.gate_up, dgate_up)
    dh_BTD = _add_norm_gradient(dh_BTD, dx_BTD, x_BTD, rstd_BT, drstd_BT)

    # h + out(attention(rotate(x qkv r))). The factor's gradient is taken from
    # dx . x = d(x qkv) . (x qkv), which spares reading q, k and v again.
    x_BTD, rstd_BT, attention_vjp, out_BTE = attention_residuals
    dy_BTD = dh_BTD.astype(dtype)
    dout_BTE = _times_transposed(dy_BTD, weights.out_D)
    dout_D = _outer(out_BTE, dy_BTD)
    dout_BTNH = dout_BTE.reshape(*dout_BTE.shape[:2], static.n_heads, -1)
    dqkv_BTJ = _join(static, attention_vjp(dout_BTNH), rstd_BT, freqs_cos, freqs_sin)
    dqkv_DJ = _outer(x_BTD, dqkv_BTJ)
    dx_BTD = _times_transposed(dqkv_BTJ, weights.qkv_DJ)
    stat = rstd_BT.dtype
    along_BT = jnp.sum(dx_BTD.astype(stat) * x_BTD.astype(stat), axis=-1)
    dh_BTD = _add_norm_gradient(dh_BTD, dx_BTD, x_BTD, rstd_BT, along_BT / rstd_BT)
    dweights = Weights(dqkv_DJ, dout_D, dgate_up, ddown_FD)
    return dh_BTD, dweights, jnp.zeros_like(freqs_cos), jnp.zeros_like(freqs_sin)


decoder_layer.defvjp(_forward, _backward)


def _narrow(h_BTD, dtype):
    """Casts the stream to the products' dtype, for good.

    Without the barrier XLA keeps a float32 stream for the backward pass and casts it
    again: 102 KiB a token more memory in a 215M model, and 142 more moved.
    """
    if h_BTD.dtype == dtype:
        return h_BTD
    return jax.lax.optimization_barrier(h_BTD.astype(dtype))


def _rstd(h_BTD, eps):
    """One over the root mean square of each token, in at least float32."""
    h = h_BTD.astype(_stat(h_BTD.dtype))
    return jax.lax.rsqrt(jnp.mean(h * h, axis=-1) + eps)


def _add_norm_gradient(dh_BTD, dx_BTD, x_BTD, rstd_BT, drstd_BT):
    """Adds to the stream's gradient what comes back through x and through rstd."""
    stat = rstd_BT.dtype
    slope_BT = -drstd_BT * rstd_BT**3 / x_BTD.shape[-1]
    total = dh_BTD.astype(stat) + dx_BTD.astype(stat)
    total = total + slope_BT[..., None] * x_BTD.astype(stat)
    if dh_BTD.dtype == stat:
        return total
    # Without the barrier XLA keeps a second, float32 copy of a bfloat16 gradient for
    # the next sum of this chain: 216 KiB a token in a 215M model.
    return jax.lax.optimization_barrier(total.astype(dh_BTD.dtype))


def _gate_up(x_BTD, gate_up):
    """gate and up, before the norm's factor: (B, T, C, F), or (B, T, F) of each."""
    if isinstance(gate_up, tuple):
        return tuple(x_BTD @ weight_DF for weight_DF in gate_up)
    return jnp.einsum("BTD,DCF->BTCF", x_BTD, gate_up)


def _gate_up_backward(x_BTD, gate_up, dgate_up):
    """The gradients of x_BTD and of the matrices."""
    if isinstance(gate_up, tuple):
        gate_DF, up_DF = gate_up
        dgate_BTF, dup_BTF = dgate_up
        dx_BTD = _times_transposed(dgate_BTF, gate_DF)
        dx_BTD = dx_BTD + _times_transposed(dup_BTF, up_DF)
        return dx_BTD, (_outer(x_BTD, dgate_BTF), _outer(x_BTD, dup_BTF))
    dx_BTD = jnp.einsum("BTCF,DCF->BTD", dgate_up, gate_up)
    return dx_BTD, jnp.einsum("BTD,BTCF->DCF", x_BTD, dgate_up)


def _swiglu(gate_up, rstd_BT):
    """silu(gate) * up, each times the norm's factor."""
    if isinstance(gate_up, tuple):
        gate, up = (x.astype(rstd_BT.dtype) * rstd_BT[..., None] for x in gate_up)
        return (jax.nn.silu(gate) * up).astype(gate_up[0].dtype)
    # The factor before the cut: the other way around, XLA makes three kernels of the
    # gradient, and moves 278 KiB a token more in a 215M model.
    both = gate_up.astype(rstd_BT.dtype) * rstd_BT[..., None, None]
    return (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]).astype(gate_up.dtype)


def _split(static, qkv_BTJ, rstd_BT, freqs_cos, freqs_sin):
    """Cuts q, k and v apart, applies the norm's factor and rotates q and k."""
    b, t, j = qkv_BTJ.shape
    n, k = static.n_heads, static.n_kv_heads
    h = j // (n + 2 * k)
    qkv_BTKGH = qkv_BTJ.reshape(b, t, k, -1, h)
    scale = rstd_BT[:, :, None, None, None]
    qkv = qkv_BTKGH.astype(rstd_BT.dtype) * scale
    q, key, value = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
    q = _rotate(q.reshape(b, t, n, h), freqs_cos, freqs_sin)
    key = _rotate(key, freqs_cos, freqs_sin)
    return tuple(x.astype(qkv_BTJ.dtype) for x in (q, key, value))


def _join(static, dqkv, rstd_BT, freqs_cos, freqs_sin):
    """The transpose of _split: turns back, applies the factor, and joins."""
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


def _times_transposed(dy, weight):
    return jnp.einsum("BTF,DF->BTD", dy, weight)


def _outer(x, dy):
    """A matrix's gradient: the sum over tokens of x times dy."""
    return jnp.einsum("BTD,BTF->DF", x, dy)


def _stat(dtype):
    return jnp.promote_types(dtype, jnp.float32)
