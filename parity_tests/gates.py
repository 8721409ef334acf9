"""The one table of gates, gates.json, and the only way it changes: tighter.

For each rung and precision it holds `limit`, the specification's own bound; `measured`,
the worst error over the seeds when it was frozen; and `gate`, which tests enforce.
`python -m parity_tests.gates` measures everything again and tightens what it can.
"""

import json
import math
from pathlib import Path

from parity_tests.precision import PRECISIONS, Precision

FILE = Path(__file__).with_name("gates.json")
HEADROOM = 10.0
"""A new gate is this many times what was measured: machines sum in other orders."""
WIDEST = 20.0
"""No gate may be further than this from its measured value."""

# The specification's bounds, (fp64, fp32). A gate never exceeds them.
LIMITS: dict[str, tuple[float, float]] = {
    "rope tables": (1e-14, 5e-6),
    "rotary": (1e-14, 5e-6),
    "rmsnorm": (1e-14, 5e-7),
    "attention": (1e-13, 5e-6),
    "mlp": (1e-13, 5e-6),
    "decoder layer": (1e-13, 5e-6),
    "logits": (1e-12, 5e-6),
    "loss": (1e-13, 5e-6),
    "gradients": (1e-12, 2e-5),
    "other shapes": (1e-12, 2e-5),
    "learning rates": (1e-14, 2e-6),
    "clip": (1e-12, 2e-6),
    "step losses": (1e-10, 2e-5),
    "step learning rates": (1e-14, 2e-6),
    "step clips": (1e-12, 1e-5),
    "step m": (1e-12, 2e-5),
    "step v": (1e-12, 2e-5),
    "step params": (1e-12, 1e-5),
}


def table() -> dict[str, dict[str, dict[str, float]]]:
    """The committed gates: rung, precision, then limit, measured and gate."""
    return json.loads(FILE.read_text())


def gate(rung: str, precision: Precision) -> float:
    """The bound that a rung must keep in a precision."""
    return table()[rung][precision.name]["gate"]


def tightened(measured: float, *, limit: float, eps: float, old: float | None) -> float:
    """The gate for a measured error: headroom above it, below the limit and the old."""
    wanted = HEADROOM * max(measured, eps)
    # One significant digit, rounded up.
    unit = 10.0 ** math.floor(math.log10(wanted))
    rounded = math.ceil(wanted / unit - 1e-9) * unit
    return min(float(f"{rounded:.1g}"), limit, math.inf if old is None else old)


def freeze(measured: dict[str, dict[str, float]]) -> None:
    """Writes the table for newly measured errors. Gates only shrink."""
    before = table() if FILE.exists() else {}
    frozen = {}
    for rung, by_precision in measured.items():
        frozen[rung] = {}
        for (name, precision), limit in zip(
            PRECISIONS.items(), LIMITS[rung], strict=True
        ):
            old = before.get(rung, {}).get(name, {})
            # The worst ever seen, not the worst of today.
            error = max(by_precision[name], old.get("measured", 0.0))
            frozen[rung][name] = {
                "limit": limit,
                "measured": float(f"{error:.3g}"),
                "gate": tightened(
                    error, limit=limit, eps=precision.eps, old=old.get("gate")
                ),
            }
    FILE.write_text(json.dumps(frozen, indent=1) + "\n")


def main() -> None:
    """Measures every rung over the seeds, freezes the table, prints it."""
    import parity_tests.conftest  # noqa: F401  (the same strict JAX as the tests)
    from parity_tests.rungs import RUNGS, SEEDS, measure

    measured: dict[str, dict[str, float]] = {}
    for rung in RUNGS:
        measured[rung] = {
            name: max(measure(rung, precision, seed).error for seed in SEEDS)
            for name, precision in PRECISIONS.items()
        }
        print(rung, {k: f"{v:.3g}" for k, v in measured[rung].items()}, flush=True)
    freeze(measured)


if __name__ == "__main__":
    main()
