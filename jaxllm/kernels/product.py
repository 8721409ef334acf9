"""Products of two matrices as the fast layer and the loss take them: XLA's, or ours.

M, K, N are the sizes of a product: (M, K) by (K, N).
"""

import functools

import jax
import jax.numpy as jnp

from jaxllm.kernels import native

SPECS = {"nn": "MK,KN->MN", "nt": "MK,NK->MN", "tn": "KM,KN->MN"}


def product(kind: str, x, y, add=None, *, ours: bool = False) -> jax.Array:
    """x @ y (nn), x @ y.T (nt) or x.T @ y (tn), plus `add` (M, N) in its dtype.

    With `ours`, which takes float32 and one device, by gemm.c; it has no derivative.
    """
    if ours:
        return _ours(kind, x, y, add)
    if add is None:
        return jnp.einsum(SPECS[kind], x, y)
    # For cuBLASLt this is one call, which adds before it rounds, as long as `add` is
    # the very array: a reshape in between, and XLA copies it first.
    return jnp.einsum(SPECS[kind], x, y, preferred_element_type=add.dtype) + add


def _ours(kind: str, x, y, add) -> jax.Array:
    (k, m) = x.shape if kind[0] == "t" else x.shape[::-1]
    n = y.shape[0] if kind[1] == "t" else y.shape[1]
    shapes = (m, n), (native.scratch_floats(m, n, k),)
    call = jax.ffi.ffi_call(
        native.target(f"gemm_{kind}"),
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
    )
    return call(x, y, *(() if add is None else (add,)))[0]


@jax.custom_vjp
def times_transposed(x_MK: jax.Array, y_NK: jax.Array) -> jax.Array:
    """x @ y.T by gemm.c, with its derivative."""
    return product("nt", x_MK, y_NK, ours=True)


def _forward(x_MK, y_NK):
    return times_transposed(x_MK, y_NK), (x_MK, y_NK)


def _backward(residuals, dout_MN):
    x_MK, y_NK = residuals
    ours = functools.partial(product, ours=True)
    return ours("nn", dout_MN, y_NK), ours("tn", dout_MN, x_MK)


times_transposed.defvjp(_forward, _backward)
