"""Cross entropy of the next token, from the last hidden state on.

M tokens (batch and time together), D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    h_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    loss_mask_M: jax.Array,
    *,
    implementation: str = "plain",
    chunk: int = 4096,
) -> jax.Array:
    """Sums the negative log-likelihood of the targets, in nats, over unmasked tokens.

    The logits h_MD @ head_VD.T take the inputs' dtype as operands and are accumulated,
    like the log-sum-exp and the sum, in at least float32, which the result has.
    """
    assert implementation == "plain", implementation
    del chunk
    logits_MV = logits(h_MD, head_VD)
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    picked_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return jnp.sum((lse_M - picked_M) * loss_mask_M.astype(logits_MV.dtype))


def logits(h_D: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Scores every token: (..., D) and (V, D) to (..., V) in at least float32."""
    stat = jnp.promote_types(h_D.dtype, jnp.float32)
    return jnp.einsum("...D,VD->...V", h_D, head_VD, preferred_element_type=stat)
