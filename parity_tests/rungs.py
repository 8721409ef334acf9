"""The ladder: every rung by name, what runs it, and how its error is counted.

Tests, mutants and the report all go through this table, so that each rung exists once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from parity_tests import rungs_215m as true_size
from parity_tests import rungs_bf16 as bf16
from parity_tests import rungs_data as data
from parity_tests import rungs_dropout as dropped
from parity_tests import rungs_forward as forward
from parity_tests import rungs_paths as paths
from parity_tests import rungs_rows as rows
from parity_tests import rungs_training as training
from parity_tests import rungs_update as updates
from parity_tests.compare import Difference, Pairs, worst
from parity_tests.precision import Precision

SEEDS = (0, 1, 2, 3, 4)
BOTH = ("fp64", "fp32")


@dataclass(frozen=True)
class Rung:
    """One comparison of both sides."""

    run: Callable[[Precision, int], Pairs]
    """From a precision and a seed to named pairs of results."""
    metric: str
    """One of compare.METRICS, or "unequal"."""
    limits: dict[str, float]
    """The specification's bound for each precision in which the rung is run."""
    seeds: tuple[int, ...] = SEEDS
    slow: bool = False
    """Takes more than about ten seconds: `--quick` leaves it out, and the tests take
    its first seed, while the report takes all."""


@functools.cache
def steps_of(precision: Precision, seed: int) -> dict[str, Pairs]:
    """Twenty steps of every recipe, once for the six rungs that read them."""
    return training.steps(precision, seed)


@functools.cache
def long_of(precision: Precision, seed: int) -> dict[str, Pairs]:
    """Two hundred steps of every recipe, once for the rungs that read them."""
    return training.long(precision, seed)


def _rung(run, metric: str, fp64: float, fp32: float, **rest) -> Rung:
    return Rung(run, metric, dict(zip(BOTH, (fp64, fp32), strict=True)), **rest)


def _steps(kind: str, metric: str, fp64: float, fp32: float) -> Rung:
    return _rung(lambda p, seed: steps_of(p, seed)[kind], metric, fp64, fp32)


def _long(kind: str, metric: str, fp64: float) -> Rung:
    return Rung(
        lambda p, seed: long_of(p, seed)[kind], metric, {"fp64": fp64}, slow=True
    )


def _true_size(run, metric: str, fp32: float) -> Rung:
    return Rung(run, metric, {"fp32": fp32}, (0,), slow=True)


RUNGS: dict[str, Rung] = {
    "rope tables": _rung(forward.rope_tables, "absolute", 1e-14, 5e-6),
    "rotary": _rung(forward.rotary, "absolute", 1e-14, 5e-6),
    "rmsnorm": _rung(forward.rmsnorm, "relative L2", 1e-14, 5e-7),
    "attention": _rung(forward.attention, "relative L2", 1e-13, 5e-6),
    "mlp": _rung(forward.mlp, "relative L2", 1e-13, 5e-6),
    "decoder layer": _rung(forward.decoder_layer, "relative L2", 1e-13, 5e-6),
    "logits": _rung(forward.logits, "relative L2", 1e-12, 5e-6),
    "loss": _rung(forward.loss, "absolute", 1e-13, 5e-6),
    "gradients": _rung(forward.gradients, "relative L2", 1e-12, 2e-5),
    "other shapes": _rung(forward.shapes, "relative L2", 1e-12, 2e-5),
    "fast forms": _rung(paths.forms, "relative L2", 1e-12, 2e-5),
    "blocked attention": _rung(paths.blocked, "relative L2", 1e-13, 5e-6),
    "documents": _rung(paths.documents, "relative L2", 1e-12, 5e-6),
    "document gradients": _rung(paths.document_gradients, "relative L2", 1e-12, 2e-5),
    "cached decode": _rung(paths.cached, "relative L2", 1e-12, 5e-6),
    "dropout": _rung(dropped.dropout, "relative L2", 1e-12, 2e-5),
    "evaluation": _rung(paths.evaluation, "relative", 1e-13, 5e-6),
    "init": Rung(paths.init, "relative", {"fp32": 0.03}, (0, 1, 2)),
    "learning rates": _rung(
        training.learning_rates, "relative", 1e-14, 2e-6, seeds=(0,)
    ),
    "clip": _rung(training.clip, "relative", 1e-12, 2e-6),
    "update": _rung(updates.update, "relative L2", 1e-12, 2e-5),
    "accumulation": _rung(updates.accumulation, "relative L2", 1e-12, 2e-5),
    "one recipe": _rung(updates.one_recipe, "relative L2", 1e-12, 1e-4),
    "skipped": _rung(updates.skipped, "unequal", 0.0, 0.0, seeds=(0,)),
    "mesh": _rung(updates.mesh, "relative L2", 1e-12, 1e-4),
    "step losses": _steps("step losses", "absolute", 1e-10, 2e-5),
    "step learning rates": _steps("step learning rates", "relative", 1e-14, 2e-6),
    "step clips": _steps("step clips", "relative", 1e-12, 1e-5),
    "step m": _steps("step m", "relative L2", 1e-12, 2e-5),
    "step v": _steps("step v", "relative L2", 1e-12, 2e-5),
    "step params": _steps("step params", "relative L2", 1e-12, 1e-5),
    "200 losses": _long("step losses", "absolute", 1e-10),
    "200 params": _long("step params", "relative L2", 1e-9),
    "200 m": _long("step m", "relative L2", 1e-9),
    "200 v": _long("step v", "relative L2", 1e-9),
    "200 steps over torch's noise": Rung(
        training.long_noise, "absolute", {"fp32": 3.0}, (0,), slow=True
    ),
    "weights": _rung(data.weights, "unequal", 0.0, 0.0),
    "moments": _rung(data.moments, "unequal", 0.0, 0.0),
    "exported": _rung(data.exported, "relative L2", 5e-6, 5e-6, seeds=(0,)),
    "rows": Rung(rows.rows, "unequal", {"fp64": 0.0}),
    "bf16 parts": Rung(bf16.parts, "relative L2", {"bf16": 1e-4}),
    "bf16 over autocast": Rung(bf16.forward_and_gradients, "absolute", {"bf16": 1.5}),
    "bf16 200 steps over autocast": Rung(
        bf16.trajectory, "absolute", {"bf16": 1.5}, (0,), slow=True
    ),
    "215M logits": _true_size(true_size.logits, "relative L2", 5e-6),
    "215M KL": _true_size(true_size.logits, "KL", 1e-10),
    "215M loss": _true_size(true_size.loss, "absolute", 5e-6),
    "215M gradients": _true_size(true_size.gradients, "relative L2", 2e-5),
}


def measure(name: str, precision: Precision, seed: int) -> Difference:
    """The worst pair of one rung."""
    rung = RUNGS[name]
    return worst(rung.run(precision, seed), rung.metric)
