"""How far apart two results are, and one assertion that says where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Pairs = dict[str, tuple[Any, Any]]
"""What a rung returns: by name, our result and the one that it must equal."""


@dataclass(frozen=True)
class Difference:
    """The distance of one pair, and everything needed to find its worst element."""

    name: str
    error: float
    metric: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.metric} {self.error:.3g}; {self.detail}"


def difference(name: str, ours: Any, theirs: Any, metric: str) -> Difference:
    """Measures one pair; what cannot be compared is infinitely far apart."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        return Difference(name, np.inf, metric, f"shapes {a.shape} and {b.shape}")
    if not a.size:
        return Difference(name, np.inf, metric, "nothing to compare")
    if metric == "unequal":
        wrong = a != b
        at = np.unravel_index(int(np.argmax(wrong)), a.shape)
        detail = f"first at {_plain(at)}: ours {a[at]!r}, theirs {b[at]!r}"
        return Difference(name, float(np.sum(wrong)), metric, detail)
    a, b = _wide(a), _wide(b)
    with np.errstate(invalid="ignore"):  # what is not finite is the finding
        return _measured(name, a, b, metric)


def _measured(name: str, a, b, metric: str) -> Difference:
    # Where both overflow alike (a masked -inf) they agree; a lone NaN never does.
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(alike, 0.0, np.abs(a - b))
    at = np.unravel_index(int(np.argmax(np.nan_to_num(gap, nan=np.inf))), gap.shape)
    error = METRICS[metric](a, b, gap)
    error = np.inf if np.isnan(error) else float(error)
    detail = (
        f"worst element {_plain(at)}: ours {a[at]:.17g}, theirs {b[at]:.17g}, apart "
        f"{gap[at]:.3g}; relative L2 {_relative_l2(a, b, gap):.3g}; size of theirs "
        f"{np.max(np.abs(b)):.3g}"
    )
    return Difference(name, error, metric, detail)


def worst(pairs: Mapping[str, tuple[Any, Any]], metric: str) -> Difference:
    """The pair that is furthest apart."""
    assert pairs, "a rung without pairs proves nothing"
    found = [difference(name, *pair, metric) for name, pair in pairs.items()]
    return max(found, key=lambda d: d.error)


def assert_within(
    pairs: Mapping[str, tuple[Any, Any]], gate: float, metric: str
) -> Difference:
    """Asserts that every pair lies within `gate`, and says which does not and where."""
    found = worst(pairs, metric)
    assert found.error <= gate, f"beyond the gate {gate:.3g}: {found}"
    return found


def _relative_l2(a, b, gap):
    norm = np.linalg.norm(b)
    if norm == 0:
        return 0.0 if np.linalg.norm(a) == 0 else np.inf
    return np.linalg.norm(gap) / norm


def _absolute(a, b, gap):
    return np.max(gap)


def _relative(a, b, gap):
    """Worst element, relative to itself: for lists of scalars."""
    scale = np.where(b == 0, np.finfo(np.float64).tiny, np.abs(b))
    return np.max(gap / scale)


def _kl(a, b, gap):
    """Largest divergence of two rows of logits over the last axis, in nats."""
    log_p, log_q = _log_softmax(b), _log_softmax(a)
    return np.max(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))


METRICS: dict[str, Callable[..., Any]] = {
    "relative L2": _relative_l2,
    "absolute": _absolute,
    "relative": _relative,
    "KL": _kl,
}


def _log_softmax(x):
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def _wide(x):
    return np.atleast_1d(x.astype(np.float64))


def _plain(index) -> tuple[int, ...]:
    return tuple(int(i) for i in index)
