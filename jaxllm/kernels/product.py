"""Products of two matrices as the fast layer and the loss take them: XLA's, or ours.

M, K, N are the sizes of a product: (M, K) by (K, N).
"""

import functools

import jax
import jax.numpy as jnp

from jaxllm.kernels import native

SPECS = {"nn": "MK,KN->MN", "nt": "MK,NK->MN", "tn": "KM,KN->MN"}


def product(kind: str, x, y, add=None, *, ours: str = "") -> jax.Array:
    """x @ y (nn), x @ y.T (nt) or x.T @ y (tn), plus `add` (M, N) in its dtype.

    `ours` is one of gemm.c's methods, native or amx, which take float32 and one CPU
    and have no derivative; without it the product is XLA's.
    """
    if ours:
        return _ours(ours, kind, x, y, add)
    if add is None:
        return jnp.einsum(SPECS[kind], x, y)
    # For cuBLASLt this is one call, which adds before it rounds, as long as `add` is
    # the very array: a reshape in between, and XLA copies it first.
    return jnp.einsum(SPECS[kind], x, y, preferred_element_type=add.dtype) + add


def _ours(method: str, kind: str, x, y, add) -> jax.Array:
    (k, m) = x.shape if kind[0] == "t" else x.shape[::-1]
    n = y.shape[0] if kind[1] == "t" else y.shape[1]
    shapes = (m, n), (native.scratch_floats(method, m, n, k),)
    call = jax.ffi.ffi_call(
        native.target(f"gemm_{method}_{kind}"),
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
    )
    return call(x, y, *(() if add is None else (add,)))[0]


def times_transposed(x_MK: jax.Array, y_NK: jax.Array, method: str) -> jax.Array:
    """x @ y.T by gemm.c, with its derivative."""
    return _times_transposed(method, x_MK, y_NK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times_transposed(method, x_MK, y_NK):
    return product("nt", x_MK, y_NK, ours=method)


def _forward(method, x_MK, y_NK):
    return _times_transposed(method, x_MK, y_NK), (x_MK, y_NK)


def _backward(method, residuals, dout_MN):
    x_MK, y_NK = residuals
    ours = functools.partial(product, ours=method)
    return ours("nn", dout_MN, y_NK), ours("tn", dout_MN, x_MK)


_times_transposed.defvjp(_forward, _backward)
