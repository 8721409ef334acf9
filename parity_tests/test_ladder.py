"""Every rung of the ladder, in both precisions, over all seeds, within its gate."""

import numpy as np
import pytest

from parity_tests.compare import assert_within
from parity_tests.gates import gate
from parity_tests.precision import PRECISIONS
from parity_tests.rungs import RUNGS, SEEDS


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("rung", RUNGS)
def test_both_sides_agree_within_the_gate(rung, precision):
    for seed in SEEDS:
        pairs = RUNGS[rung].run(precision, seed)
        for name, (mine, _) in pairs.items():
            dtype = np.asarray(mine).dtype
            # Python floats of step metrics are float64 in either precision.
            assert dtype in (precision.dtype, np.float64), f"{name} is {dtype}"
        assert_within(pairs, gate(rung, precision), RUNGS[rung].metric)
