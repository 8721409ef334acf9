"""The bound that a step's loss and gradient norm must keep, computed on the device.

Both are followed as logarithms, whose last WINDOW finite values are part of the train
state. The bound is their median plus `factor` typical deviations. Medians, since a mean
and a standard deviation follow the very outliers that they are to tell. For the norm,
which drifts, a deviation is the median distance from the median; for the loss, which
falls, the median distance between neighbours, so that its trend does not pass for
noise. Skipped values enter too: a lasting change of level moves the bound in the end.
"""

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 64
LEAST = 16
"""Values that must be known before the bound holds."""
LEAST_DEVIATION = (0.02, 0.1)
"""Of the logarithms of loss and norm: about 2 % and 10 %."""
NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

Guard = dict[str, jax.Array]


def init() -> Guard:
    """The guard before the first step: `seen` int32 [], and `logs` float32 [2, WINDOW],
    of loss and norm, the newest last."""
    return {
        "seen": jnp.zeros((), jnp.int32),
        "logs": jnp.zeros((2, WINDOW), jnp.float32),
    }


def judge(
    factor: float, guard: Guard, loss: jax.Array, norm: jax.Array
) -> tuple[Guard, jax.Array, jax.Array]:
    """Returns the guard after this step, whether the step keeps the bounds (bool []),
    and the bounds of loss and norm (float32 [2], infinite while too little is known).

    What is not finite keeps no bound and leaves the guard as it was.
    """
    values = jnp.stack([loss.astype(jnp.float32), norm.astype(jnp.float32)])
    bounds = jnp.exp(_bound(factor, guard["seen"], guard["logs"]))
    finite = jnp.all(jnp.isfinite(values))
    newest = jnp.log(jnp.maximum(values, jnp.finfo(jnp.float32).tiny))
    logs = jnp.concatenate([guard["logs"][:, 1:], newest[:, None]], axis=1)
    after = {
        "seen": guard["seen"] + finite.astype(jnp.int32),
        "logs": jnp.where(finite, logs, guard["logs"]),
    }
    return after, finite & jnp.all(values <= bounds), bounds


def _bound(factor: float, seen: jax.Array, logs: jax.Array) -> jax.Array:
    known = jnp.minimum(seen, WINDOW)
    place = jnp.arange(WINDOW)
    median = _median(logs, place >= WINDOW - known, known)
    norm_apart = jnp.abs(logs[1] - median[1])
    loss_apart = jnp.abs(jnp.diff(logs[0], prepend=0.0)) / np.float32(np.sqrt(2))
    deviation = jnp.stack(
        [
            _median(loss_apart, place > WINDOW - known, known - 1),
            _median(norm_apart, place >= WINDOW - known, known),
        ]
    )
    deviation = jnp.maximum(NORMAL * deviation, np.array(LEAST_DEVIATION, np.float32))
    return jnp.where(known < LEAST, jnp.inf, median + factor * deviation)


def _median(values: jax.Array, valid: jax.Array, count: jax.Array) -> jax.Array:
    """The lower median of the `count` values along the last axis that are valid."""
    valid = jnp.broadcast_to(valid, values.shape)
    ascending = jnp.sort(jnp.where(valid, values, jnp.inf), axis=-1)
    return jnp.take(ascending, jnp.maximum(count - 1, 0) // 2, axis=-1)
