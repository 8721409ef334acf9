"""Cross entropy of the next token, from the last hidden state on.

M tokens (batch and time together), D model width, V vocabulary, C tokens of a chunk.

The plain form keeps logits_MV and what its gradient needs, 3 arrays of tokens x
vocabulary. The chunked form computes the gradient in the forward pass, C tokens at a
time, so that nothing of the size of the vocabulary outlives a chunk, and the backward
pass only scales: the idea of Liger (Hsu et al., 2024), with the weight's gradient
accumulated in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.per_device import P, axes, per_device, size
from jaxllm.kernels.product import times_transposed


def cross_entropy(
    h_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    loss_mask_M: jax.Array,
    *,
    implementation: str = "plain",
    chunk: int = 4096,
    dtype: str | None = None,
    ours: str = "",
) -> jax.Array:
    """Sums the negative log-likelihood of the targets, in nats, over unmasked tokens.

    The logits h_MD @ head_VD.T take operands of h_MD's dtype and are accumulated,
    like the log-sum-exp and the sum, in at least float32, which the result has. They
    are rounded to `dtype` if it is given, and their gradient to h_MD's dtype.
    `head_VD` may be wider than h_MD: it is cast here, and its gradient keeps its dtype.
    `ours` is the method of gemm.c that the plain form multiplies by, for float32 on one
    CPU.
    """
    if implementation == "plain":
        return _plain(h_MD, head_VD, targets_M, loss_mask_M, dtype, ours)
    assert implementation == "chunked", implementation
    return _chunked((chunk, dtype), h_MD, head_VD, targets_M, loss_mask_M)


def logits(h_D: jax.Array, head_VD: jax.Array, dtype: str | None = None) -> jax.Array:
    """Scores every token: (..., D) and (V, D) to (..., V) in at least float32, having
    been rounded to `dtype` if it is given."""
    stat = _stat(h_D.dtype)
    scores = jnp.einsum(
        "...D,VD->...V",
        h_D,
        head_VD.astype(h_D.dtype),
        preferred_element_type=jnp.dtype(dtype or stat),
    )
    return scores.astype(stat)


def _plain(h_MD, head_VD, targets_M, loss_mask_M, dtype, ours):
    if ours:
        logits_MV = times_transposed(h_MD, head_VD, ours)
    else:
        logits_MV = logits(h_MD, head_VD, dtype)
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    picked_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return jnp.sum((lse_M - picked_M) * loss_mask_M.astype(logits_MV.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(how, h_MD, head_VD, targets_M, loss_mask_M):
    """The loss alone: what runs where no gradient is asked for. `how` is the length of
    a chunk, and the dtype of the logits or None."""
    return _over_devices(_loss_only, how, h_MD, head_VD, targets_M, loss_mask_M)


def _chunked_fwd(how, h_MD, head_VD, targets_M, loss_mask_M):
    loss, dh_MD, dhead_VD = _over_devices(
        _loss_and_grads, how, h_MD, head_VD, targets_M, loss_mask_M
    )
    return loss, (dh_MD, dhead_VD.astype(head_VD.dtype), targets_M, loss_mask_M)


def _chunked_bwd(how, residuals, dloss):
    dh_MD, dhead_VD, targets_M, loss_mask_M = residuals
    return (
        dh_MD * dloss.astype(dh_MD.dtype),
        dhead_VD * dloss.astype(dhead_VD.dtype),
        _no_gradient(targets_M),
        _no_gradient(loss_mask_M),
    )


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _over_devices(f, how, h_MD, *inputs):
    """Gives every device its share of the tokens, over all axes of the mesh.

    A loop over chunks of the whole batch would put each chunk on one device. Also the
    devices of the tensor axis share out tokens here, not vocabulary: the head is small
    beside the activations of its tokens.
    """
    names = axes()
    if not names or h_MD.shape[0] % size():
        return f(how, (), h_MD, *inputs)
    tokens = P(names)
    outputs = (P(), tokens, P()) if f is _loss_and_grads else P()
    return per_device(
        functools.partial(f, how, names),
        in_specs=(tokens, P(), tokens, tokens),
        out_specs=outputs,
    )(h_MD, *inputs)


def _loss_only(how, names, h_MD, head_VD, targets_M, loss_mask_M):
    head_VD = head_VD.astype(h_MD.dtype)
    loss = jnp.zeros((), _stat(h_MD.dtype))

    def add(loss, h_CD, targets_C, loss_mask_C):
        scores_CV = logits(h_CD, head_VD, how[1])
        return loss + _scores(scores_CV, targets_C, loss_mask_C)[0]

    def body(loss, inputs):
        return add(loss, *inputs), None

    chunks, rest = _cut(how[0], (h_MD, targets_M, loss_mask_M))
    if chunks is not None:
        loss, _ = jax.lax.scan(body, loss, chunks)
    if rest is not None:
        loss = add(loss, *rest)
    return jax.lax.psum(loss, names) if names else loss


def _loss_and_grads(how, names, h_MD, head_VD, targets_M, loss_mask_M):
    """The loss and both gradients; that of h_MD takes its place, chunk by chunk."""
    stat = _stat(h_MD.dtype)
    head_VD = head_VD.astype(h_MD.dtype)

    def add(loss, dhead_VD, h_CD, targets_C, loss_mask_C):
        scores_CV = logits(h_CD, head_VD, how[1])
        more, dlogits_CV = _scores(scores_CV, targets_C, loss_mask_C)
        dlogits_CV = dlogits_CV.astype(h_CD.dtype)
        dh_CD = jnp.einsum("CV,VD->CD", dlogits_CV, head_VD)
        dhead_VD = dhead_VD + jnp.einsum(
            "CV,CD->VD", dlogits_CV, h_CD, preferred_element_type=stat
        )
        return loss + more, dhead_VD, dh_CD

    def body(carry, inputs):
        loss, dhead_VD, h_MD = carry
        index, targets_C, loss_mask_C = inputs
        start = index * how[0]
        h_CD = jax.lax.dynamic_slice_in_dim(h_MD, start, how[0])
        loss, dhead_VD, dh_CD = add(loss, dhead_VD, h_CD, targets_C, loss_mask_C)
        return (loss, dhead_VD, _put(h_MD, dh_CD, start)), None

    loss, dhead_VD = jnp.zeros((), stat), jnp.zeros(head_VD.shape, stat)
    chunks, rest = _cut(how[0], (targets_M, loss_mask_M))
    whole = 0
    if chunks is not None:
        n = chunks[0].shape[0]
        whole = n * how[0]
        carry = (loss, dhead_VD, h_MD)
        carry, _ = jax.lax.scan(body, carry, (jnp.arange(n), *chunks))
        loss, dhead_VD, h_MD = carry
    if rest is not None:
        loss, dhead_VD, dh_CD = add(loss, dhead_VD, h_MD[whole:], *rest)
        h_MD = _put(h_MD, dh_CD, whole)
    if names:
        loss, dhead_VD = jax.lax.psum((loss, dhead_VD), names)
    return loss, h_MD, dhead_VD


def _scores(logits_CV, targets_C, loss_mask_C):
    """The summed loss of a chunk, and its gradient with respect to the logits.

    The target's logit is picked, and its 1 subtracted, by comparison with an iota: a
    gather or scatter would stand between two passes over logits_CV that XLA else fuses.
    """
    mask_C = loss_mask_C.astype(logits_CV.dtype)
    ids_CV = jax.lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1)
    is_target_CV = ids_CV == targets_C[:, None]
    lse_C, picked_C = _statistics(logits_CV, is_target_CV)
    probs_CV = jnp.exp(logits_CV - lse_C[:, None])
    dlogits_CV = jnp.where(is_target_CV, probs_CV - 1, probs_CV) * mask_C[:, None]
    return jnp.sum((lse_C - picked_C) * mask_C), dlogits_CV


def _statistics(logits_CV, is_target_CV):
    """The log-sum-exp of each token's logits, and its target's logit."""

    def one_pass(logits_CV, is_target_CV):
        """Maximum and sum together, read once: on a GPU the bytes are what counts."""

        def combine(a, b):
            top = jnp.maximum(a[0], b[0])
            # Of two -inf (the padding of a reduction) the difference is not a number.
            safe = jnp.where(top == -jnp.inf, 0, top)
            total = a[1] * jnp.exp(a[0] - safe) + b[1] * jnp.exp(b[0] - safe)
            return top, total, a[2] + b[2]

        ones_CV = jnp.ones_like(logits_CV)
        picked_CV = jnp.where(is_target_CV, logits_CV, 0)
        zero = jnp.zeros((), logits_CV.dtype)
        top_C, total_C, picked_C = jax.lax.reduce(
            (logits_CV, ones_CV, picked_CV), (zero - jnp.inf, zero, zero), combine, (1,)
        )
        return top_C + jnp.log(total_C), picked_C

    def two_passes(logits_CV, is_target_CV):
        picked_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
        return jax.nn.logsumexp(logits_CV, axis=-1), picked_C

    return jax.lax.platform_dependent(
        logits_CV, is_target_CV, cuda=one_pass, default=two_passes
    )


def _cut(chunk, inputs):
    """Cuts the leading axis into whole chunks, stacked, and a shorter rest; or None."""
    m = inputs[0].shape[0]
    whole = m // chunk * chunk
    chunks = tuple(x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in inputs)
    rest = tuple(x[whole:] for x in inputs)
    return chunks if whole else None, rest if m > whole else None


def _put(x, part, start):
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)


def _no_gradient(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _stat(dtype):
    return jnp.promote_types(dtype, jnp.float32)
