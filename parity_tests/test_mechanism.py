"""That the instruments measure: comparisons can fail, float64 is float64."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests import cases, sides
from parity_tests.compare import METRICS, assert_within, difference
from parity_tests.precision import FP32, FP64
from parity_tests.rungs import RUNGS


def float64_digest() -> str:
    """A hash over the float64 loss and gradients of the small network."""
    params = cases.spread(cases.SMALL, 0, FP64)
    batch = cases.batch(0, (2, 2, 64), cases.SMALL.vocab_size)
    run = sides.run_config(cases.SMALL, FP64.compute(), rows=2, accumulate=2)
    results = sides.our_loss_and_grads(run, FP64, params, batch)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(results)]
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float64")}
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def test_float64_in_a_context_equals_float64_in_a_process_of_its_own():
    code = (
        "import parity_tests.conftest, jax\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "from parity_tests.test_mechanism import float64_digest\n"
        "print(float64_digest())"
    )
    root = Path(__file__).resolve().parents[1]
    alone = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, text=True, check=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(root)},
    ).stdout.strip()  # fmt: skip
    # A float32 trace of the same functions first: it must not be found again.
    with FP32.active():
        assert jnp.ones(3).dtype == jnp.float32
    assert float64_digest() == alone
    assert jnp.ones(3).dtype == jnp.float32


@pytest.mark.parametrize("metric", [*METRICS, "unequal"])
def test_every_metric_sees_a_change_and_nothing_else(metric):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 7))
    b = a.copy()
    assert difference("same", a, b, metric).error == 0
    b[1, 2] += 1e-3
    found = difference("changed", a, b, metric)
    assert found.error > 0 and "(1, 2)" in found.detail
    for wrong in (np.nan, np.inf):
        b[1, 2] = wrong
        assert difference("lost", a, b, metric).error > 0.5
    assert difference("cut", a, b[:2], metric).error == np.inf


def test_the_assertion_names_element_values_and_relative_l2():
    a = np.arange(6.0).reshape(2, 3)
    b = a + np.array([[0, 0, 0], [0, 0.5, 0]])
    with pytest.raises(AssertionError) as error:
        assert_within({"h": (a, b)}, 1e-3, "relative L2")
    for part in ("h: relative L2 0.0", "(1, 1)", "ours 4", "theirs 4.5", "gate 0.001"):
        assert part in str(error.value)


def test_metrics_of_rungs_are_known():
    assert {rung.metric for rung in RUNGS.values()} <= {*METRICS, "unequal"}


def test_weights_kept_for_other_processes_are_the_same_and_damage_makes_them_anew(
    tmp_path,
):
    made = []

    def make():
        made.append(1)
        return {"w": np.arange(3.0)}

    file = tmp_path / "kept" / "weights.npz"
    for content in (None, None, b"PK no archive", b""):
        if content is not None:
            file.write_bytes(content)
        np.testing.assert_array_equal(cases._kept(file, make)["w"], np.arange(3.0))
        assert [x.name for x in file.parent.iterdir()] == [file.name]
    assert len(made) == 3  # not the second time
    (tmp_path / "a file").touch()  # where no folder can be: made, not kept
    nowhere = tmp_path / "a file" / "kept.npz"
    np.testing.assert_array_equal(cases._kept(nowhere, make)["w"], np.arange(3.0))
