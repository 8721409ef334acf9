"""What may be drawn and how likely: the sampler against its definition, written out."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import generate
from jaxllm.generate import Sampling
from parity_tests.precision import FP64

ROWS, VOCAB = 3, 41
SAMPLINGS = (
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=1),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=0.8, top_k=VOCAB + 9),
    Sampling(temperature=0.9, top_p=0.6),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.1, top_k=12, top_p=0.8, repetition_penalty=1.7),
    Sampling(temperature=0.6, repetition_penalty=0.5),
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logits_that_are_drawn_from_are_those_of_the_definition(monkeypatch, sampling):
    scores, rows = _scores()
    drawn = _drawn_from(monkeypatch, sampling, scores, rows)
    expected = np.array(
        [_kept(sampling, *pair) for pair in zip(scores, rows, strict=True)]
    )
    assert np.array_equal(np.isfinite(drawn), np.isfinite(expected))
    np.testing.assert_allclose(drawn, expected, rtol=1e-14)


def test_greedy_takes_the_likeliest_after_the_penalty():
    scores, rows = _scores()
    for penalty in (1.0, 1.5, 50.0):
        sampling = Sampling(repetition_penalty=penalty)
        with FP64.active():
            chosen = generate._choose(sampling, scores, rows, 3, VOCAB)
        expected = [
            int(np.argmax(_penalised(penalty, *pair)))
            for pair in zip(scores, rows, strict=True)
        ]
        assert chosen.tolist() == expected


def test_every_row_position_and_seed_has_a_key_of_its_own(monkeypatch):
    scores, rows = _scores()
    keys = [
        tuple(key)
        for seed in (0, 1)
        for count in (0, 1, 2)
        for key in _drawn_from(
            monkeypatch, Sampling(temperature=1.0, seed=seed), scores, rows,
            count=count, take=jax.random.key_data,
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) == 2 * 3 * ROWS


def _scores() -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(5)
    scores = 2 * rng.standard_normal((ROWS, VOCAB))
    scores[0, [3, 17]] = np.sort(scores[0])[-5]  # ties at the fifth place
    return scores, [[3, 4, 4], [0, 40, *range(10, 20)], [7]]


def _drawn_from(monkeypatch, sampling, scores, rows, *, count=2, take=None):
    """What reaches jax.random.categorical: the logits, or `take` of the keys."""
    jitted: Any = generate._sample
    with monkeypatch.context() as patch, FP64.active():
        patch.setattr(generate, "_sample", jitted.__wrapped__)
        patch.setattr(
            jax.random, "categorical",
            lambda key, logits: take(key) if take else logits,
        )  # fmt: skip
        return generate._choose(sampling, jax.numpy.asarray(scores), rows, count, VOCAB)


def _penalised(penalty: float, scores: np.ndarray, row: list[int]) -> np.ndarray:
    scores = scores.copy()
    for token in set(row):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    return scores


def _kept(sampling: Sampling, scores: np.ndarray, row: list[int]) -> np.ndarray:
    scores = _penalised(sampling.repetition_penalty, scores, row)
    scores = scores / sampling.temperature
    order = sorted(scores.tolist(), reverse=True)
    if sampling.top_k:
        floor = order[min(sampling.top_k, len(order)) - 1]
        order = [x for x in order if x >= floor]
    total, reached, floor = sum(map(math.exp, order)), 0.0, order[-1]
    for x in order:
        floor, reached = x, reached + math.exp(x) / total
        if reached >= sampling.top_p:
            break
    if sampling.top_p == 1.0:
        floor = order[-1]
    return np.where(scores >= floor, scores, -np.inf)
