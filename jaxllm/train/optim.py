"""Learning-rate schedule, gradient clip and Adam/AdamW, exact against torch.optim.

Written out instead of taken from optax, for two reasons that a float64 oracle sees:
optax's clip lacks PyTorch's 1e-6 in the divisor, and its float32 bias correction
1 - b2 ** t is off by 1.3e-5 relative at t = 1, where ours (by expm1) is off by 6e-8.
"""

import math

import jax
import jax.numpy as jnp

from jaxllm.config import OptimConfig


def learning_rate(
    optim: OptimConfig, step: jax.Array, *, total_steps: int, accumulate: int = 1
) -> jax.Array:
    """The learning rate of update `step` (0-based) of `total_steps`.

    A linear rise over warmup_steps, then a cosine from learning_rate down to
    min_learning_rate, which is reached one past the last update. With
    schedule_unit="micro_step" everything counts micro-steps, and an update has the
    learning rate of its last one.
    """
    real = jnp.result_type(float)
    unit = accumulate if optim.schedule_unit == "micro_step" else 1
    at = (step.astype(real) + 1) * unit - 1
    warmup, total = optim.warmup_steps * unit, total_steps * unit
    progress = jnp.clip((at - warmup) / max(total - warmup, 1), 0.0, 1.0)
    low, high = optim.min_learning_rate, optim.learning_rate
    cosine = low + 0.5 * (high - low) * (1.0 + jnp.cos(math.pi * progress))
    return jnp.where(at < warmup, high * (at + 1) / max(warmup, 1), cosine)


def global_norm(grads: dict) -> jax.Array:
    """The Euclidean norm of all leaves together, in at least float32."""
    return jnp.sqrt(sum(_square_sum(leaf) for leaf in jax.tree.leaves(grads)))


def clip_coefficient(optim: OptimConfig, norm: jax.Array) -> jax.Array:
    """PyTorch's clip_grad_norm_: min(1, clip_norm / (norm + 1e-6)), or 1 if it is 0."""
    if optim.clip_norm == 0:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, optim.clip_norm / (norm + 1e-6))


def init(params: dict) -> dict:
    """Adam's state before the first update: count, and moments m and v like params."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {
        "count": jnp.zeros((), jnp.int32),
        "m": zeros,
        "v": jax.tree.map(jnp.zeros_like, params),
    }


def update(
    optim: OptimConfig,
    params: dict,
    grads: dict,
    opt: dict,
    lr: jax.Array,
    clip: jax.Array,
    good: jax.Array | bool = True,
) -> tuple[dict, dict]:
    """One update of Adam, or of AdamW, by gradients scaled with `clip`.

    Adam (Kingma and Ba, 2015) in the order of torch.optim: eps is added to the root of
    the bias-corrected second moment. AdamW (Loshchilov and Hutter, 2019) first shrinks
    matrices by 1 - lr * weight_decay. Computes in the parameters' dtype. Where `good`
    (bool []) is false all stays as it was, whatever the gradients are.
    """
    count = opt["count"] + 1
    bias1 = _bias_correction(optim.beta1, count)
    root_bias2 = jnp.sqrt(_bias_correction(optim.beta2, count))

    def leaf(path, p, g, m, v):
        g = g.astype(p.dtype) * clip.astype(p.dtype)
        new_m = optim.beta1 * m + (1 - optim.beta1) * g
        new_v = optim.beta2 * v + (1 - optim.beta2) * g * g
        # The weights come from the moments as they are kept: a CPU's XLA, which has a
        # kernel for each of the three, else computes them from the old ones, and copies
        # those first, since the new ones take their place (16 bytes a weight).
        m, v = jnp.where(good, new_m, m), jnp.where(good, new_v, v)
        start = p
        if optim.algorithm == "adamw" and decays(path):
            start = p * (1 - lr * optim.weight_decay).astype(p.dtype)
        denominator = jnp.sqrt(v) / root_bias2.astype(p.dtype) + optim.eps
        end = start - (lr / bias1).astype(p.dtype) * m / denominator
        return jnp.where(good, end, p), m, v

    moved = jax.tree_util.tree_map_with_path(leaf, params, grads, opt["m"], opt["v"])
    params, m, v = jax.tree.transpose(
        jax.tree.structure(params), jax.tree.structure((0, 0, 0)), moved
    )
    count = jnp.where(good, count, opt["count"])
    return params, {"count": count, "m": m, "v": v}


def decays(path) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on norm weights."""
    return path[-1].key in ("kernel", "embedding")


def _square_sum(x):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sum(x * x)


def _bias_correction(beta: float, count):
    """1 - beta ** count without the cancellation."""
    if beta == 0.0:
        return jnp.ones((), jnp.result_type(float))
    return -jnp.expm1(count.astype(jnp.result_type(float)) * math.log(beta))
