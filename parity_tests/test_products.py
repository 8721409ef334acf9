"""oneDNN's products, which a CPU's step takes for large networks, under the gates of
the trajectories: steps against PyTorch's."""

import dataclasses

import jax
import pytest

from jaxllm.train.compiler import has_onednn
from parity_tests.cases import TINY
from parity_tests.compare import worst
from parity_tests.gates import gate
from parity_tests.precision import FP32
from parity_tests.rungs import RUNGS
from parity_tests.rungs_training import Run, paired

WIDE = dataclasses.replace(TINY, dim=256, n_heads=8, n_kv_heads=4, head_dim=32)
CUT = dataclasses.replace(TINY, vocab_size=96)
CPU = {"layer": "fused", "attention": "blocked", "gemm": "onednn"}


@pytest.mark.skipif(
    not has_onednn(jax.devices()[0]), reason="XLA is not known to have oneDNN here"
)
@pytest.mark.parametrize(
    "run",
    [
        Run("reference, A=4", 20, 0),
        # Rounding grows with every step of a wide network, on either side: after six
        # it is a quarter of the gates, after twenty as large as they are.
        Run("adamw, token mean, A=1", 6, 3, model=WIDE, length=33),
        Run("adamw, token mean, A=4", 20, 2, model=CUT, mesh=(2, 1, 2)),
    ],
    ids=["tiny", "wide", "mesh"],
)
def test_steps_stay_within_the_gates(run):
    for rung, pairs in paired(run, FP32, **CPU).items():
        found = worst(pairs, RUNGS[rung].metric)
        assert found.error <= gate(rung, FP32), (rung, found)
