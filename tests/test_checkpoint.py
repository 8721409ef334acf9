"""Saving and restoring: bit for bit, on any mesh, and what is kept."""

import json
import math
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_worker import (
    abstract_state,
    assert_same_bits,
    make_mesh,
    make_state,
)

from jaxllm.train import checkpoint, step_folders
from jaxllm.train.checkpoint import CheckpointError, Checkpoints, state_bytes


@pytest.fixture
def checkpoints(tmp_path):
    # A name that would break a URL or a shell.
    made = Checkpoints(tmp_path / "run #1 (50%) {ü}" / "checkpoints")
    yield made
    made.close()


def names(checkpoints) -> set[str]:
    return {entry.name for entry in checkpoints.folder.iterdir()}


def test_round_trip_is_bitwise(checkpoints):
    meta = {
        "loss": 0.1 + 0.2,
        "bad": math.nan,
        "config": {"out": "ü", "betas": (0.9, 0.95), "none": None},
    }
    checkpoints.save(5, make_state(5), meta)
    checkpoints.wait()
    restored = checkpoints.restore(abstract_state())
    assert restored.step == 5
    assert restored.skipped == []
    assert_same_bits(restored.state, make_state(5))
    assert math.isnan(restored.meta.pop("bad"))
    assert restored.meta == {
        "loss": 0.30000000000000004,
        "config": {"out": "ü", "betas": [0.9, 0.95], "none": None},
    }
    assert checkpoints.read_meta()["loss"] == meta["loss"]
    assert names(checkpoints) == {"5", step_folders.UNFINISHED}


def test_restores_onto_other_meshes_bitwise(checkpoints):
    shapes = ((1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 1))
    for step, shape in enumerate(shapes):
        mesh = make_mesh(*shape)
        abstract = abstract_state(mesh)
        if step:
            restored = checkpoints.restore(abstract)
            assert_same_bits(restored.state, make_state(77))
            same = jax.tree.map(
                lambda got, want: got.sharding == want.sharding,
                restored.state,
                abstract,
            )
            assert all(jax.tree.leaves(same))
            state = restored.state
        else:
            state = make_state(77, mesh)
        checkpoints.save(step, state, {})


def test_nan_payloads_infinities_and_signed_zeros_survive(checkpoints):
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    bits[:6] = 0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 1
    state = {
        "f32": jnp.asarray(bits.view(np.float32)),
        "zero": jnp.zeros((64, 64)),  # TensorStore leaves out chunks of its fill value
        "negative_zero": -jnp.zeros((64, 64)),
        "bf16": jnp.asarray(bits.view(np.uint16).view(jnp.bfloat16)),
        "u8": jnp.asarray(bits.view(np.uint8)),
    }
    checkpoints.save(0, state, {})
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same_bits(restored.state, state)


def test_the_state_may_be_donated_at_once(checkpoints):
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
    )
    state = {f"x{i}": jnp.arange(2_000_000, dtype=jnp.float32) + i for i in range(4)}
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same_bits(restored.state, expected)


@pytest.mark.parametrize(
    "keep, keep_every, left",
    [(1, 0, [12]), (3, 0, [8, 10, 12]), (2, 4, [4, 8, 10, 12]), (1, 3, [6, 12])],
)
def test_keeps_the_newest_and_every_jth(tmp_path, keep, keep_every, left):
    checkpoints = Checkpoints(tmp_path, keep=keep, keep_every=keep_every)
    for step in range(2, 14, 2):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()
    assert checkpoints.steps() == left
    for step in left:
        restored = checkpoints.restore(abstract_state(), step=step)
        assert restored.meta == {"step": step}
        assert_same_bits(restored.state, make_state(step))
    assert list((tmp_path / step_folders.UNFINISHED).iterdir()) == []


def test_steps_are_listed_from_disk(checkpoints):
    assert checkpoints.steps() == []
    for step in (10, 9_999_999_999):
        checkpoints.save(step, make_state(1), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 9_999_999_999]
    for stray in ("007", "12.orbax-checkpoint-tmp", "-3", "٣", "notes", "damaged-4"):
        (checkpoints.folder / stray).mkdir()
    shutil.rmtree(checkpoints.folder / "10")
    assert checkpoints.steps() == [9_999_999_999]


@pytest.mark.parametrize("step", [9, 10, -1])
def test_a_step_not_above_the_newest_is_refused(checkpoints, step):
    checkpoints.save(10, make_state(10), {})
    with pytest.raises(CheckpointError, match=f"checkpoint {step} .* newest, 10"):
        checkpoints.save(step, make_state(10), {})
    checkpoints.save(11, make_state(11), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 11]


def test_what_orbax_skips_is_an_error(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda *a, **k: False)
    with pytest.raises(CheckpointError, match="checkpoint 1 .*Orbax skipped it"):
        checkpoints.save(1, make_state(1), {})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"step": jax.ShapeDtypeStruct((), jnp.int8)},
            "step is int32.. there and int8",
        ),
        ({"step": jax.ShapeDtypeStruct((1,), jnp.int32)}, r"int32\[1\] here"),
        ({"extra": jax.ShapeDtypeStruct((), jnp.int32)}, "extra is no such array"),
        ({"opt": {}}, r"opt/count is int32\[\] there and no such array here"),
    ],
)
def test_another_form_of_state_is_refused_not_cast(checkpoints, change, message):
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    # Not damage: an older step would not fit either, and must not be taken instead.
    with pytest.raises(CheckpointError, match=f"checkpoint 2 .*{message}"):
        checkpoints.restore(abstract_state() | change)


def test_an_explicit_step(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()
    restored = checkpoints.restore(abstract_state(), step=1)
    assert (restored.step, restored.meta) == (1, {"step": 1})
    assert_same_bits(restored.state, make_state(1))
    assert checkpoints.read_meta(1) == {"step": 1}
    for read in (checkpoints.read_meta, checkpoints.restore):
        given = () if read == checkpoints.read_meta else (abstract_state(),)
        with pytest.raises(CheckpointError, match="no checkpoint 3 .* there are 1, 2"):
            read(*given, step=3)


def test_an_empty_or_missing_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        checkpoints = Checkpoints(folder)
        assert checkpoints.steps() == []
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            checkpoints.restore(abstract_state())
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            checkpoints.read_meta()
        checkpoints.close()
    assert not (tmp_path / "missing").exists()


def test_reading_changes_nothing_on_disk(checkpoints, tmp_path):
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    # What a save of another process, alive at this moment, has written so far.
    (checkpoints.folder / step_folders.UNFINISHED / "2").mkdir()

    def content():
        return {
            str(p): p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")
        }

    before = content()
    reader = Checkpoints(checkpoints.folder, keep=1)
    reader.restore(abstract_state())
    reader.read_meta()
    reader.steps()
    reader.close()
    assert content() == before


def test_state_bytes_counts_each_element_once():
    f32, bf16, step = 3 * 16 * 8 + 32 * 16, 3 * 16 * 8 + 32 * 16, 4
    norms = 3 * (3 * 16) * 4
    expected = 2 * f32 * 4 + bf16 * 2 + norms + step + 4
    assert state_bytes(abstract_state()) == expected
    assert state_bytes(abstract_state(make_mesh(8, 1, 1))) == expected


def test_a_checkpoint_takes_no_more_than_state_bytes_and_a_little(checkpoints):
    state = {"noise": jax.random.normal(jax.random.key(0), (1000, 1000))}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    sizes = [p.stat().st_size for p in (checkpoints.folder / "1").rglob("*")]
    assert 0.5 < sum(sizes) / state_bytes(state) < 1.03  # measured 0.93


@pytest.mark.parametrize("keep, keep_every", [(0, 0), (-1, 0), (1, -1)])
def test_bad_options_are_refused(tmp_path, keep, keep_every):
    with pytest.raises(ValueError, match=f"keep={keep} .*keep_every={keep_every}"):
        Checkpoints(tmp_path, keep=keep, keep_every=keep_every)


@pytest.mark.parametrize("name", ["a[1]", "a*", "b?", "back\\slash"])
def test_folders_in_which_orbax_loses_arrays_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be saved below .*: rename"):
        Checkpoints(tmp_path / name / "checkpoints")


def test_meta_that_is_not_json_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="checkpoint 1 .*not JSON serializable"):
        checkpoints.save(1, make_state(1), {"path": object()})
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_others_can_read_it(checkpoints):
    """sha256sum checks the seal; plain Orbax and a JSON reader open the rest."""
    checkpoints.save(3, make_state(3), {"tokens": 7})
    checkpoints.wait()
    folder = checkpoints.folder / "3"
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert done.stdout.count(": OK") == len(files) - 1
    args = checkpoint.ocp.args
    with checkpoint.ocp.CheckpointManager(checkpoints.folder) as manager:
        assert manager.latest_step() == 3
        items = args.Composite(
            state=args.StandardRestore(make_state(0)), meta=args.JsonRestore()
        )
        loaded = manager.restore(3, args=items)
    assert_same_bits(loaded.state, make_state(3))
    manifest = json.loads((folder / "meta" / "metadata").read_text())
    assert manifest["meta"] == {"tokens": 7}
    assert manifest["arrays"]["opt/m/layers/norm/weight"]["shape"] == [3, 16]
