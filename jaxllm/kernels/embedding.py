"""Token embedding, with a gradient that adds no rows through a contended scatter.

M tokens, V vocabulary, D model width, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.per_device import ROWS, P, axes, per_device

# One-hot rows times gradients cost as much as the output head's product, 0.9 % of the
# arithmetic of a 215M step at 6,144 ids and 7 % at 49,152: take it up to here.
ONE_HOT_VOCAB = 8192
CHUNK = 128


def embed(
    table_VD: jax.Array,
    tokens_BT: jax.Array,
    *,
    dtype,
    implementation: str = "plain",
    grad_dtype=None,
) -> jax.Array:
    """Looks up each token's row and casts it: returns h_BTD in `dtype`.

    Implementations differ in the gradient, which is summed in at least float32 and has
    the table's dtype; all but plain round what they sum to `grad_dtype` first, if it is
    given. plain: XLA's scatter-add. one_hot: a product with one-hot rows.
    sorted: sums within chunks of tokens sorted by id, then a scatter whose rows
    hardly collide (on GPU a float32 scatter-add is a compare-and-swap loop, up to
    2000x slower where many tokens share an id). rows: one token after the other, the
    fast form on a CPU.
    """
    if implementation == "plain":
        return table_VD[tokens_BT].astype(dtype)
    dtypes = jnp.dtype(dtype), jnp.dtype(grad_dtype or dtype)
    return _embed(implementation, dtypes, table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(implementation, dtypes, table_VD, tokens_BT):
    return table_VD[tokens_BT].astype(dtypes[0])


def _embed_fwd(implementation, dtypes, table_VD, tokens_BT):
    # Of the table only shape and dtype are needed: an empty slice carries both.
    return _embed(implementation, dtypes, table_VD, tokens_BT), (
        tokens_BT,
        table_VD[:, :0],
    )


def _embed_bwd(implementation, dtypes, residuals, dh_BTD):
    tokens_BT, table_V0 = residuals
    vocab, d = table_V0.shape[0], dh_BTD.shape[-1]
    stat = jnp.promote_types(dtypes[0], jnp.float32)
    dh_BTD = dh_BTD.astype(dtypes[1])
    sums = {"one_hot": _one_hot, "sorted": _sorted, "rows": _rows}[implementation]
    if implementation != "one_hot":  # a product, which XLA cuts up by itself
        sums = _over_devices(sums)
    with jax.named_scope("embedding"):
        dtable_VD = sums(tokens_BT.reshape(-1), dh_BTD.reshape(-1, d), vocab, stat)
    return (
        dtable_VD.astype(table_V0.dtype),
        np.zeros(tokens_BT.shape, jax.dtypes.float0),
    )


_embed.defvjp(_embed_fwd, _embed_bwd)


def _over_devices(sums):
    """Every device sums its own tokens; the tables are then added up."""
    names = tuple(name for name in ROWS if name in axes())

    def local(tokens_M, dh_MD, vocab, stat):
        def f(tokens_M, dh_MD):
            table_VD = sums(tokens_M, dh_MD, vocab, stat)
            return jax.lax.psum(table_VD, names) if names else table_VD

        return per_device(f, in_specs=(P(names), P(names)), out_specs=P())(
            tokens_M, dh_MD
        )

    return local


def _one_hot(tokens_M, dh_MD, vocab, stat):
    one_hot_MV = jax.nn.one_hot(tokens_M, vocab, dtype=dh_MD.dtype)
    return jnp.einsum("MV,MD->VD", one_hot_MV, dh_MD, preferred_element_type=stat)


def _sorted(tokens_M, dh_MD, vocab, stat):
    """Sums runs of equal ids by small one-hot products, C sorted tokens at a time.

    Row r of a chunk's partial sums belongs to its r-th distinct id; rows without an id
    are dropped. An id that fills k chunks collides k times, not once per token.
    """
    m, d = dh_MD.shape
    pad = -m % CHUNK
    order_M = jnp.argsort(tokens_M)
    ids = jnp.pad(tokens_M[order_M], (0, pad), constant_values=vocab)
    order = jnp.pad(order_M, (0, pad))
    ids_NC = ids.reshape(-1, CHUNK)
    new_NC = jnp.pad(ids_NC[:, 1:] != ids_NC[:, :-1], ((0, 0), (1, 0)))
    rank_NC = jnp.cumsum(new_NC, axis=1)
    dh_NCD = dh_MD[order].reshape(-1, CHUNK, d)
    # [n, r, c] is 1 where sorted token c of chunk n has the chunk's r-th distinct id.
    member_NRC = rank_NC[:, None, :] == jnp.arange(CHUNK)[None, :, None]
    sums_NRD = jnp.einsum(
        "NRC,NCD->NRD", member_NRC.astype(dh_MD.dtype), dh_NCD,
        preferred_element_type=stat,
    )  # fmt: skip
    ids_NR = jnp.min(jnp.where(member_NRC, ids_NC[:, None, :], vocab), axis=2)
    return (
        jnp.zeros((vocab, d), stat)
        .at[ids_NR.reshape(-1)]
        .add(sums_NRD.reshape(-1, d), mode="drop")
    )


def _rows(tokens_M, dh_MD, vocab, stat):
    def add_row(m, sums_VD):
        row = jax.lax.dynamic_index_in_dim(sums_VD, tokens_M[m])
        row = row + jax.lax.dynamic_index_in_dim(dh_MD, m).astype(stat)
        return jax.lax.dynamic_update_index_in_dim(sums_VD, row, tokens_M[m], 0)

    zeros = jnp.zeros((vocab, dh_MD.shape[1]), stat)
    return jax.lax.fori_loop(0, tokens_M.shape[0], add_row, zeros)
