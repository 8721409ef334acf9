"""The decoder layer's fast form: forward and backward written out, to move less memory.

Equal to model.DecoderLayer up to rounding (in float64 to 1e-13, gradients included).
Away from the matrix products and attention a training step does nothing but move
activations, so this form

- folds each norm into the products that follow it: norm(x) @ W is
  rsqrt(mean(x^2) + eps) * (x @ (weight * W)), where weight * W is made once per
  layer and the factor, one number a token, joins the rotation or the SwiGLU gate. The
  normed activations are never written, and the norm weight's gradient is a sum over
  the matrix instead of over the tokens;
- multiplies q, k and v in one product, and gate and up in another or in two;
- adds products to the stream, and to its gradient, in one call with the product, where
  the library can: the stream is a matrix (M, D) here for that;
- keeps x, q, k, v, the attention's output, x again, gate and up, and recomputes the
  elementwise rest in the backward pass, never a product and never attention. One
  array of that rest may be kept too, for 97 KiB a token more memory and less traffic;
- hands the stream's gradient on in the dtype of the products, also where the stream
  itself is wider: a float32 one moves 180 KiB a token more in a 215M model, and every
  product that takes it rounds it anyway.

B batch, T time, M = B T tokens, D dim, E = N H, N query heads, K key/value heads,
G = N / K, H head dim, F feed-forward dim, J = K (G + 2) H the joined width of q, k and
v, C = 2: gate, up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.kernels.fold import Piece, Weights, fold
from jaxllm.kernels.heads import attend, attend_backward
from jaxllm.kernels.per_device import HEADS
from jaxllm.kernels.product import product

PIECES = 2
"""Of the fullest layer's feed-forward: half of dact, act, dgate and dup at a time is 11
KiB a token less at the peak of a 215M model, for one layer's products in two."""


class Static(NamedTuple):
    """What shapes do not tell."""

    n_heads: int
    n_kv_heads: int
    eps: float
    attention: str
    keep_act: bool = False
    """Keep act = silu(gate) * up for the backward pass instead of recomputing it."""
    ours: str = ""
    """The method of gemm.c to multiply by, for float32 on one CPU."""


def fused_layer(
    layer: Any, h_BTD, freqs_cos, freqs_sin, *, fullest: bool = False
) -> jax.Array:
    """Runs a model.DecoderLayer in its fast form; returns h_BTD in its dtype.

    For rows without cache, segments and dropout; tables are (B or 1, T, R). `fullest`
    says that this layer's backward pass is where memory is fullest.
    """
    config, compute = layer.attention.config, layer.compute
    # Pieces of F would lie across the devices that share it out.
    shared = jax.sharding.get_abstract_mesh().shape.get(HEADS, 1) > 1
    in_pieces = fullest and compute.remat != "none" and not shared
    static = Static(
        config.n_heads,
        config.n_kv_heads,
        config.norm_eps,
        compute.attention,
        keep_act=compute.remat == "none",
        ours=compute.ours,
    )
    weights = fold(
        layer,
        config.n_kv_heads,
        compute.compute_dtype,
        join=compute.gate_up == "joined",
        pieces=PIECES if in_pieces else 1,
    )
    return decoder_layer(static, h_BTD, weights, freqs_cos, freqs_sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decoder_layer(
    static: Static, h_BTD: jax.Array, weights: Weights, freqs_cos, freqs_sin
) -> jax.Array:
    """The layer as a function of arrays."""
    return _forward(static, h_BTD, weights, freqs_cos, freqs_sin)[0]


def _forward(static, h_BTD, weights, freqs_cos, freqs_sin):
    dtype = weights.qkv_DJ.dtype
    b, t, d = h_BTD.shape
    h_MD = h_BTD.reshape(-1, d)
    x_MD = _narrow(h_MD, dtype)
    rstd_M = _rstd(h_MD, static.eps)
    multiply = functools.partial(product, ours=static.ours)
    qkv_BTJ = multiply("nn", x_MD, weights.qkv_DJ).reshape(b, t, -1)
    heads = static.n_heads, static.n_kv_heads, static.attention
    tables = freqs_cos, freqs_sin
    out_BTNH, attended = attend(*heads, qkv_BTJ, rstd_M.reshape(b, t), *tables)
    out_ME = out_BTNH.reshape(b * t, -1)
    h_MD = multiply("nn", out_ME, weights.out_D, h_MD)

    x_mid_MD = _narrow(h_MD, dtype)
    rstd_mid_M = _rstd(h_MD, static.eps)
    kept = []
    for piece in weights.mlp:
        gate_up = _gate_up(multiply, x_mid_MD, piece.gate_up)
        act_MF = _swiglu(gate_up, rstd_mid_M)
        h_MD = multiply("nn", act_MF, piece.down_FD, h_MD)
        kept.append((gate_up, act_MF if static.keep_act else None))

    attention_residuals = (x_MD, rstd_M, attended, out_ME)
    mlp_residuals = (x_mid_MD, rstd_mid_M, kept)
    residuals = (attention_residuals, mlp_residuals, weights, freqs_cos, freqs_sin)
    return h_MD.reshape(b, t, d), residuals


def _backward(static, residuals, dh_BTD):
    attention_residuals, mlp_residuals, weights, freqs_cos, freqs_sin = residuals
    dtype = weights.qkv_DJ.dtype
    b, t, d = dh_BTD.shape
    # Widened between layers, since a gradient has the dtype of its value: XLA drops the
    # two casts.
    dh_MD = dh_BTD.astype(dtype).reshape(-1, d)

    multiply = functools.partial(product, ours=static.ours)
    dh_MD, dmlp = _mlp_backward(static, dh_MD, mlp_residuals, weights.mlp)

    # h + out(attention(rotate(x qkv r))). The factor's gradient is taken from
    # dx . x = d(x qkv) . (x qkv), which spares reading q, k and v again.
    x_MD, rstd_M, attended, out_ME = attention_residuals
    dout_ME = multiply("nt", dh_MD, weights.out_D)
    dout_D = multiply("tn", out_ME, dh_MD)
    dout_BTNH = dout_ME.reshape(b, t, static.n_heads, -1)
    tables = freqs_cos, freqs_sin
    dqkv_BTJ = attend_backward(
        static.attention, attended, rstd_M.reshape(b, t), *tables, dout_BTNH
    )
    dqkv_MJ = dqkv_BTJ.reshape(b * t, -1)
    dqkv_DJ = multiply("tn", x_MD, dqkv_MJ)
    dx_MD = multiply("nt", dqkv_MJ, weights.qkv_DJ)
    stat = rstd_M.dtype
    along_M = jnp.sum(dx_MD.astype(stat) * x_MD.astype(stat), axis=-1)
    dh_MD = _add_norm_gradient(dh_MD, x_MD, rstd_M, along_M / rstd_M, dx_MD)
    dweights = Weights(dqkv_DJ, dout_D, dmlp)
    return (
        dh_MD.reshape(b, t, d).astype(dh_BTD.dtype),
        dweights,
        jnp.zeros_like(freqs_cos),
        jnp.zeros_like(freqs_sin),
    )


decoder_layer.defvjp(_forward, _backward)


def _mlp_backward(static, dh_MD, residuals, pieces):
    """Back through h + down(act), act = silu(gate r) * (up r), r the norm's factor."""
    x_MD, rstd_M, kept = residuals
    dy_MD, dmlp, drstds_M = dh_MD, [], []
    for number, ((gate_up, act_MF), piece) in enumerate(zip(kept, pieces, strict=True)):
        if number:  # not begun before the piece before is done
            dh_MD, dy_MD = jax.lax.optimization_barrier((dh_MD, dy_MD))
        dh_MD, dpiece, drstd_M = _piece_backward(
            static, dh_MD, dy_MD, x_MD, rstd_M, gate_up, act_MF, piece
        )
        dmlp.append(dpiece)
        drstds_M.append(drstd_M)
    drstd_M = functools.reduce(jnp.add, drstds_M)
    return _add_norm_gradient(dh_MD, x_MD, rstd_M, drstd_M), tuple(dmlp)


def _piece_backward(static, dh_MD, dy_MD, x_MD, rstd_M, gate_up, kept, piece: Piece):
    """Adds to dh_MD what comes back through gate and up where dy_MD is the gradient of
    the result; returns it, and the gradients of the matrices and of r."""
    multiply = functools.partial(product, ours=static.ours)
    dact_MF = multiply("nt", dy_MD, piece.down_FD)
    if kept is not None and isinstance(gate_up, tuple):
        return _apart_backward(
            static, dh_MD, dy_MD, x_MD, rstd_M, gate_up, kept, dact_MF, piece
        )
    # Behind the barrier XLA cannot take the forward's activations for those it
    # recomputes here: keeping them costs 97 KiB a token in a 215M model.
    dact_MF, gate_up = jax.lax.optimization_barrier((dact_MF, gate_up))
    act_MF, swiglu_vjp = jax.vjp(_swiglu, gate_up, rstd_M)
    act_MF = act_MF if kept is None else kept
    dgate_up, drstd_M = swiglu_vjp(dact_MF)
    ddown_FD = _down_gradient(static, act_MF, dy_MD)
    dh_MD, dgate_up = _gate_up_backward(multiply, dh_MD, x_MD, piece.gate_up, dgate_up)
    return dh_MD, Piece(dgate_up, ddown_FD), drstd_M


def _apart_backward(
    static, dh_MD, dy_MD, x_MD, rstd_M, gate_up, act_MF, dact_MF, piece
):
    """_piece_backward where act was kept, and gate and up are two arrays: what a CPU
    does fastest. The factor's gradient comes from dx . x, which is narrower than F."""
    stat = rstd_M.dtype
    multiply = functools.partial(product, ours=static.ours)
    ddown_FD = _down_gradient(static, act_MF, dy_MD)
    dgate_MF, dup_MF = _swiglu_backward(gate_up, rstd_M, dact_MF)
    gate_DF, up_DF = piece.gate_up
    dx_MD = multiply("nt", dgate_MF, gate_DF).astype(stat)
    if static.ours:
        dx_MD = multiply("nt", dup_MF, up_DF, dx_MD)
    else:
        dx_MD = dx_MD + multiply("nt", dup_MF, up_DF).astype(stat)
    drstd_M = jnp.sum(dx_MD * x_MD.astype(stat), axis=-1) / rstd_M
    dh_MD = (dh_MD.astype(stat) + dx_MD).astype(dh_MD.dtype)
    if static.ours:
        dgate_DF = multiply("tn", x_MD, dgate_MF)
        dgate_up = dgate_DF, multiply("tn", x_MD, dup_MF)
        return dh_MD, Piece(dgate_up, ddown_FD), drstd_M
    # As sums over the tokens of both factors these take longer; one copy serves both.
    x_DM = jax.lax.optimization_barrier(x_MD.T)
    dgate_up = x_DM @ dgate_MF, x_DM @ dup_MF
    return dh_MD, Piece(dgate_up, ddown_FD), drstd_M


def _swiglu_backward(gate_up, rstd_M, dact_MF):
    """The gradients of gate and up, before the norm's factor, in two kernels."""
    # Without a barrier each XLA writes the sigmoid for both to read, or keeps the
    # forward's, which is then written for this.
    first, dact_MF = jax.lax.optimization_barrier((gate_up[0], dact_MF))
    gates = first, jax.lax.optimization_barrier(gate_up[0])
    rstd_M1 = rstd_M[..., None]
    gate, again, up = (x.astype(rstd_M.dtype) * rstd_M1 for x in (*gates, gate_up[1]))
    dact = dact_MF.astype(rstd_M.dtype) * rstd_M1
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dact * jax.nn.silu(again)
    return tuple(x.astype(dact_MF.dtype) for x in (dgate, dup))


def _narrow(h_MD, dtype):
    """Casts the stream to the products' dtype, for good.

    Without the barrier XLA keeps a float32 stream for the backward pass and casts it
    again: 102 KiB a token more memory in a 215M model, and 142 more moved.
    """
    if h_MD.dtype == dtype:
        return h_MD
    return jax.lax.optimization_barrier(h_MD.astype(dtype))


def _rstd(h_MD, eps):
    """One over the root mean square of each token, in at least float32."""
    h = h_MD.astype(_stat(h_MD.dtype))
    return jax.lax.rsqrt(jnp.mean(h * h, axis=-1) + eps)


def _add_norm_gradient(dh_MD, x_MD, rstd_M, drstd_M, dx_MD=None):
    """Adds to the stream's gradient what comes back through rstd, and dx."""
    stat = rstd_M.dtype
    slope_M = -drstd_M * rstd_M**3 / x_MD.shape[-1]
    total = dh_MD.astype(stat)
    if dx_MD is not None:
        total = total + dx_MD.astype(stat)
    total = total + slope_M[..., None] * x_MD.astype(stat)
    if dh_MD.dtype == stat:
        return total
    # Without the barrier XLA keeps a second, float32 copy of a bfloat16 gradient for
    # the next sum of this chain: 216 KiB a token in a 215M model.
    return jax.lax.optimization_barrier(total.astype(dh_MD.dtype))


def _gate_up(multiply, x_MD, gate_up):
    """gate and up, before the norm's factor: (M, C, F), or (M, F) of each."""
    if isinstance(gate_up, tuple):
        return tuple(multiply("nn", x_MD, weight_DF) for weight_DF in gate_up)
    return jnp.einsum("MD,DCF->MCF", x_MD, gate_up)


def _gate_up_backward(multiply, dh_MD, x_MD, gate_up, dgate_up):
    """Adds the gradient of x_MD to dh_MD; returns it and that of the matrices."""
    if isinstance(gate_up, tuple):
        dweights = []
        for weight_DF, dy_MF in zip(gate_up, dgate_up, strict=True):
            dh_MD = multiply("nt", dy_MF, weight_DF, dh_MD)
            dweights.append(multiply("tn", x_MD, dy_MF))
        return dh_MD, tuple(dweights)
    spec = "MCF,DCF->MD"
    dx_MD = jnp.einsum(spec, dgate_up, gate_up, preferred_element_type=dh_MD.dtype)
    dh_MD = dx_MD + dh_MD
    return dh_MD, jnp.einsum("MD,MCF->DCF", x_MD, dgate_up)


def _swiglu(gate_up, rstd_M):
    """silu(gate) * up, each times the norm's factor."""
    if isinstance(gate_up, tuple):
        gate, up = (x.astype(rstd_M.dtype) * rstd_M[..., None] for x in gate_up)
        return (jax.nn.silu(gate) * up).astype(gate_up[0].dtype)
    # The factor before the cut: the other way around, XLA makes three kernels of the
    # gradient, and moves 278 KiB a token more in a 215M model.
    both = gate_up.astype(rstd_M.dtype) * rstd_M[..., None, None]
    return (jax.nn.silu(both[:, 0]) * both[:, 1]).astype(gate_up.dtype)


def _down_gradient(static, act_MF, dy_MD):
    if static.ours:
        return product("tn", act_MF, dy_MD, ours=static.ours)
    # The narrower factor is the one that XLA's products copy transposed on a CPU.
    return product("tn", dy_MD, act_MF).T


def _stat(dtype):
    return jnp.promote_types(dtype, jnp.float32)
