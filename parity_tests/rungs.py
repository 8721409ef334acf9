"""The ladder: every rung by name, what runs it, and how its error is counted.

Tests, mutants and the report all go through this table, so that each rung exists once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from parity_tests import rungs_forward as forward
from parity_tests import rungs_training as training
from parity_tests.compare import Difference, Pairs, worst
from parity_tests.precision import Precision

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Rung:
    """One comparison of both sides."""

    run: Callable[[Precision, int], Pairs]
    """From a precision and a seed to named pairs of results."""
    metric: str
    """One of compare.METRICS, or "unequal"."""


def _steps(kind: str) -> Callable[[Precision, int], Pairs]:
    return lambda precision, seed: steps_of(precision, seed)[kind]


@functools.cache
def steps_of(precision: Precision, seed: int) -> dict[str, Pairs]:
    """Twenty steps of every recipe, once for the six rungs that read them."""
    return training.steps(precision, seed)


RUNGS: dict[str, Rung] = {
    "rope tables": Rung(forward.rope_tables, "absolute"),
    "rotary": Rung(forward.rotary, "absolute"),
    "rmsnorm": Rung(forward.rmsnorm, "relative L2"),
    "attention": Rung(forward.attention, "relative L2"),
    "mlp": Rung(forward.mlp, "relative L2"),
    "decoder layer": Rung(forward.decoder_layer, "relative L2"),
    "logits": Rung(forward.logits, "relative L2"),
    "loss": Rung(forward.loss, "absolute"),
    "gradients": Rung(forward.gradients, "relative L2"),
    "other shapes": Rung(forward.shapes, "relative L2"),
    "learning rates": Rung(training.learning_rates, "relative"),
    "clip": Rung(training.clip, "relative"),
    "step losses": Rung(_steps("step losses"), "absolute"),
    "step learning rates": Rung(_steps("step learning rates"), "relative"),
    "step clips": Rung(_steps("step clips"), "relative"),
    "step m": Rung(_steps("step m"), "relative L2"),
    "step v": Rung(_steps("step v"), "relative L2"),
    "step params": Rung(_steps("step params"), "relative L2"),
}


def measure(name: str, precision: Precision, seed: int) -> Difference:
    """The worst pair of one rung."""
    rung = RUNGS[name]
    return worst(rung.run(precision, seed), rung.metric)
