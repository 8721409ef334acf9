"""Runs the mutants: each must push its rung past ten times the gate."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from parity_tests.gates import gate
from parity_tests.mutants_forward import FORWARD
from parity_tests.mutants_training import TRAINING
from parity_tests.patching import Mutant, planted
from parity_tests.precision import PRECISIONS
from parity_tests.rungs import RUNGS, measure

MARGIN = 10.0
"""A kill counts if the error is this many times the gate."""
ALL: tuple[Mutant, ...] = (*FORWARD, *TRAINING)


@dataclass(frozen=True)
class Kill:
    """What a mutant did to its rung."""

    mutant: Mutant
    error: float
    gate: float
    detail: str

    @property
    def margin(self) -> float:
        """Error over gate; infinite where the gate is exact equality."""
        if self.gate == 0:
            return np.inf if self.error > 0 else 0.0
        return self.error / self.gate

    @property
    def killed(self) -> bool:
        """Whether the rung noticed, and by far."""
        return self.margin >= MARGIN


def attempt(mutant: Mutant) -> Kill:
    """Plants a mutant, runs its rung, and takes it out again.

    Compiled with few optimizations, in two thirds of the time: they move a result by
    rounding, and a mutant is killed by ten times the gate.
    """
    precision = PRECISIONS[mutant.precision]
    bound, seed = gate(mutant.rung, precision), RUNGS[mutant.rung].seeds[0]
    with compiled_cheaply(), planted(mutant):
        try:
            found = measure(mutant.rung, precision, seed)
        except (AssertionError, TypeError, ValueError) as error:
            # Refused outright: shapes, names or counts no longer fit.
            return Kill(mutant, np.inf, bound, f"refused: {str(error)[:80]}")
    return Kill(mutant, found.error, bound, found.name)


@contextlib.contextmanager
def compiled_cheaply() -> Iterator[None]:
    """Compiles with few optimizations inside the block."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)
