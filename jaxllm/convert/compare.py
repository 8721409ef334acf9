"""How far two networks are apart: logits on the same tokens, and what they say."""

import math
from typing import Any

import numpy as np

LOGITS_GATE = 5e-6
"""Largest relative L2 distance of float32 logits of a faithful copy. A network that
attends sharply is noisier than that in float32 whoever computes it, so the gate widens
to NOISE_FACTOR times the copy's own distance from its float64 self."""
NOISE_FACTOR = 4.0
KL_GATE = 1e-6
"""Largest KL divergence in nats of any one next-token distribution."""


def compare_logits(
    ours_BTV: np.ndarray, theirs_BTV: np.ndarray, *, noise: float = 0.0
) -> dict[str, Any]:
    """Compares logits on the same tokens; `noise` is the relative L2 rounding error of
    theirs.

    Returns figures as JSON takes them: relative L2 and its gate, largest difference,
    largest KL(ours || theirs) in nats, share of positions with the same best token, the
    disagreements that are no near-ties, and whether all of that passed. NaN never does.

    Raises: ValueError if the shapes differ.
    """
    if ours_BTV.shape != theirs_BTV.shape:
        raise ValueError(
            f"logits have shape {theirs_BTV.shape} where ours have {ours_BTV.shape}: "
            f"another vocabulary or another number of tokens"
        )
    square = norm = largest = kl = 0.0
    same, swaps = [], []
    for ours, theirs in zip(ours_BTV, theirs_BTV, strict=True):  # a row's float64 fits
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        square += float(((ours - theirs) ** 2).sum())
        norm += float((ours**2).sum())
        # np.maximum, unlike max, keeps a NaN.
        largest = float(np.maximum(largest, np.abs(ours - theirs).max()))
        p, q = _log_softmax(ours), _log_softmax(theirs)
        kl = float(np.maximum(kl, (np.exp(p) * (p - q)).sum(-1).max()))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
        swaps.append(top_gap(ours)[~same[-1]])
    relative = math.sqrt(square / norm) if norm else math.nan
    # Rows that differ by at most `largest` can only swap tokens closer than twice that:
    # what is further apart and still swapped is a different network.
    swapped = int((np.concatenate(swaps) > 2 * largest).sum())
    gate = max(LOGITS_GATE, NOISE_FACTOR * noise)
    return {
        "positions": int(np.concatenate(same).size),
        "relative_l2": _finite(relative),
        "relative_l2_gate": gate,
        "rounding_noise": noise,
        "max_abs_difference": _finite(largest),
        "max_kl_nats": _finite(kl),
        "max_kl_gate": KL_GATE,
        "top1_agreement": float(np.concatenate(same).mean()),
        "top1_swapped_beyond_noise": swapped,
        "passed": relative <= gate and kl <= KL_GATE and swapped == 0,
    }


def check_greedy(
    ours_BTV: np.ndarray, tokens_BT: np.ndarray, *, prompt: int, noise: float
) -> dict[str, Any]:
    """Checks the greedy continuations that others wrote against our logits on them.

    Position by position our best token must be the one they chose: by induction both
    then write the same text, and where a near-tie fell the other way the rest is still
    compared on common ground. `noise` is the largest absolute difference of a logit;
    near-ties, closer than twice that, are listed with their gap and pass.
    """
    chosen = tokens_BT[:, prompt:]
    logits = ours_BTV[:, prompt - 1 : tokens_BT.shape[1] - 1].astype(np.float64)
    differ = logits.argmax(-1) != chosen
    best = logits.max(-1)
    theirs = np.take_along_axis(logits, chosen[..., None], -1)[..., 0]
    ties, wrong = [], []
    for row, at in np.argwhere(differ):
        gap = float(best[row, at] - theirs[row, at])
        entry = {"prompt": int(row), "position": int(prompt + at), "gap": _finite(gap)}
        (ties if gap <= 2 * noise else wrong).append(entry)
    return {
        "prompts": len(tokens_BT),
        "prompt_tokens": prompt,
        "new_tokens": int(chosen.shape[1]),
        "same": int((~differ).sum()),
        "noise": _finite(noise),
        "near_ties": ties,
        "different": wrong,
        "passed": not wrong and bool(np.isfinite(logits).all()),
    }


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of a from b, relative to the length of b, taken in float64."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def top_gap(logits: np.ndarray) -> np.ndarray:
    """How far the best logit is above the second best, along the last axis."""
    second, best = np.partition(logits, -2, axis=-1)[..., -2:].T
    return (best - second).T


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # an infinity becomes NaN, which never passes
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _finite(value: float) -> float | str:
    # JSON has no NaN; a figure that is none must still be readable as one.
    return value if math.isfinite(value) else str(value)
