"""Every rung of the ladder, in its precisions, over its seeds, within its gate."""

import numpy as np
import pytest

from parity_tests.compare import assert_within
from parity_tests.gates import gate
from parity_tests.precision import PRECISIONS
from parity_tests.rungs import RUNGS

CASES = [
    pytest.param(
        name, precision, id=f"{name}-{precision}",
        marks=[pytest.mark.slow] if rung.slow else [],
    )
    for name, rung in RUNGS.items()
    for precision in rung.limits
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_both_sides_agree_within_the_gate(name, precision):
    rung, bound = RUNGS[name], gate(name, PRECISIONS[precision])
    for seed in rung.seeds[:1] if rung.slow else rung.seeds:
        pairs = rung.run(PRECISIONS[precision], seed)
        if precision == "fp64" and rung.metric != "unequal":
            for where, (mine, _) in pairs.items():
                dtype = np.asarray(mine).dtype
                assert dtype.itemsize == 8, f"{where} is {dtype}, not a 64-bit result"
        assert_within(pairs, bound, rung.metric)
