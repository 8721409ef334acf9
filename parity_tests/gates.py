"""The one table of gates, gates.json, and the only way it changes: tighter.

For each rung and precision it holds `limit`, the specification's own bound; `measured`,
the worst error over the seeds when it was frozen; and `gate`, which tests enforce.
`python -m parity_tests.gates [RUNG ...]` measures and freezes rungs that are new, or
those that are named; a gate that is there can only shrink.
"""

import json
import math
import sys
import time
from pathlib import Path

from parity_tests.precision import PRECISIONS, Precision

FILE = Path(__file__).with_name("gates.json")
HEADROOM = 10.0
"""A new gate is this many times what was measured: machines sum in other orders."""
WIDEST = 20.0
"""No gate may be further than this from its measured value."""


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


def freeze(rung: str, limits: dict[str, float], errors: dict[str, float]) -> None:
    """Writes one rung's row for newly measured errors. Gates only shrink."""
    frozen = table() if FILE.exists() else {}
    before = frozen.get(rung, {})
    frozen[rung] = {}
    for name, limit in limits.items():
        old = before.get(name, {})
        # The worst ever seen, not the worst of today.
        error = max(errors[name], old.get("measured", 0.0))
        eps = PRECISIONS[name].eps
        frozen[rung][name] = {
            "limit": limit,
            "measured": float(f"{error:.3g}"),
            "gate": tightened(error, limit=limit, eps=eps, old=old.get("gate")),
        }
    FILE.write_text(json.dumps(frozen, indent=1) + "\n")


def main(names: list[str]) -> None:
    """Measures rungs over their seeds and freezes them, one after the other."""
    import parity_tests.conftest  # noqa: F401  (the same strict JAX as the tests)
    from parity_tests.rungs import RUNGS, measure

    known = table() if FILE.exists() else {}
    for name in names or [name for name in RUNGS if name not in known]:
        rung, began = RUNGS[name], time.perf_counter()
        errors = {
            precision: max(
                measure(name, PRECISIONS[precision], seed).error for seed in rung.seeds
            )
            for precision in rung.limits
        }
        freeze(name, rung.limits, errors)
        seconds = time.perf_counter() - began
        print(name, errors, f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
