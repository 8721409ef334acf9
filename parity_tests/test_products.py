"""What a CPU's step may multiply by in a large network, our own products with our own
attention or oneDNN's, under the gates of the trajectories: steps against PyTorch's."""

import dataclasses

import jax
import pytest

from jaxllm.kernels.native import has_native
from jaxllm.train.compiler import has_onednn
from parity_tests.cases import TINY
from parity_tests.compare import Difference, worst
from parity_tests.gates import gate
from parity_tests.mutation import MARGIN, compiled_cheaply
from parity_tests.patching import Mutant, planted
from parity_tests.precision import FP32
from parity_tests.rungs import RUNGS
from parity_tests.rungs_training import Run, paired

WIDE = dataclasses.replace(TINY, dim=256, n_heads=8, n_kv_heads=4, head_dim=32)
CUT = dataclasses.replace(TINY, vocab_size=96)
KINDS: dict[str, dict] = {
    "amx": {"layer": "fused", "attention": "native", "gemm": "amx"},
    "native": {"layer": "fused", "attention": "native", "gemm": "native"},
    "onednn": {"layer": "fused", "attention": "blocked", "gemm": "onednn"},
}
RUNS = {
    "tiny": Run("reference, A=4", 20, 0),
    # Rounding grows with every step of a wide network, on either side: after six it is
    # a quarter of the gates, after twenty as large as they are.
    "wide": Run("adamw, token mean, A=1", 6, 3, model=WIDE, length=33),
    "mesh": Run("adamw, token mean, A=4", 20, 2, model=CUT, mesh=(2, 1, 2)),
}
native = pytest.mark.skipif(
    not has_native(jax.devices()[0]), reason="our own kernel cannot be compiled here"
)
amx = pytest.mark.skipif(
    not has_native(jax.devices()[0], "amx"), reason="the processor has no AMX"
)
onednn = pytest.mark.skipif(
    not has_onednn(jax.devices()[0]), reason="XLA is not known to have oneDNN here"
)


def compared(run: Run, kind: str) -> dict[str, Difference]:
    """Every rung that a trajectory has, by its worst pair."""
    found = paired(run, FP32, **KINDS[kind])
    return {rung: worst(pairs, RUNGS[rung].metric) for rung, pairs in found.items()}


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        # Our own are for one device.
        *(pytest.param("amx", run, marks=amx) for run in ("tiny", "wide")),
        *(pytest.param("native", run, marks=native) for run in ("tiny", "wide")),
        *(pytest.param("onednn", run, marks=onednn) for run in RUNS),
    ],
)
def test_steps_stay_within_the_gates(kind, run):
    for rung, found in compared(RUNS[run], kind).items():
        assert found.error <= gate(rung, FP32), (rung, found)


_PRODUCT, _APART = "kernels.product:_ours", "kernels.layer:_apart_backward"
MUTANTS = (
    Mutant("addend forgotten", _PRODUCT, "() if add is None else (add,)", "()", ""),
    Mutant("a little too large", _PRODUCT, "(add,)))[0]", "(add,)))[0] * 1.0001", ""),
    Mutant("up's matrix learns from gate", _APART, 'multiply("tn", x_MD, dup_MF)',
           "dgate_DF", ""),
    Mutant("down's matrix learns too little", "kernels.layer:_down_gradient",
           'product("tn", act_MF, dy_MD, ours=static.ours)',
           'product("tn", act_MF, 0.999 * dy_MD, ours=static.ours)', ""),
    Mutant("the head learns nothing", "kernels.cross_entropy:_plain",
           "times_transposed(h_MD, head_VD, ours)",
           "times_transposed(h_MD, jax.lax.stop_gradient(head_VD), ours)", ""),
)  # fmt: skip
"""Of what only a step with our own products runs, so that no rung notices."""


@native
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_passes_a_gate_by_far(mutant):
    with compiled_cheaply(), planted(mutant):
        found = compared(Run("reference, A=1", 2, 0), "native")
    margin = max(x.error / gate(rung, FP32) for rung, x in found.items())
    print(f"{mutant.name}: {margin:.3g}x")
    assert margin >= MARGIN
