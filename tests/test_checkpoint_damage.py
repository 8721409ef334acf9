"""No damage to a checkpoint goes unnoticed; a run with older ones goes on from them."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_damages import KINDS, save_pristine
from checkpoint_worker import abstract_state, assert_same_bits, make_state

from jaxllm.train import checkpoint
from jaxllm.train.checkpoint import CheckpointError, Checkpoints
from jaxllm.train.seal import seal
from jaxllm.train.step_folders import UNFINISHED


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A folder with the steps 100, 200 and 300."""
    folder = tmp_path_factory.mktemp("pristine")
    save_pristine(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def test_every_damage_is_noticed_and_an_older_step_taken():
    report = damages(120)
    assert report["noticed"] == report["restored right"] == 120
    assert all(report[kind] > 5 for kind in KINDS), report


def test_the_digests_alone_never_let_a_wrong_state_through():
    report = damages(60, "--reseal")
    assert report["restored right"] == 60
    assert report["noticed"] > 10  # measured 18; the rest struck bytes of no effect


def damages(count: int, *options: str) -> dict:
    """Runs in another process: where its reading fails, Orbax leaves tasks behind that
    complain whenever they happen to be collected, in some other test."""
    script = Path(__file__).with_name("checkpoint_damages.py")
    command = [sys.executable, str(script), str(count), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_arrays_swapped_for_another_steps_are_noticed_without_the_seal(folder):
    """Whole, readable and well-formed, but of another step: the digests' own case."""
    shutil.rmtree(folder / "300" / "state")
    shutil.copytree(folder / "200" / "state", folder / "300" / "state")
    seal(folder / "300")
    restored = Checkpoints(folder).restore(abstract_state())
    assert restored.step == 200
    assert "array opt/count arrived otherwise" in restored.skipped[0][1]


def test_a_changed_manifest_is_noticed_without_the_seal(folder):
    file = folder / "300" / "meta" / "metadata"
    manifest = json.loads(file.read_text())
    manifest["meta"]["step"] = 301
    file.write_text(json.dumps(manifest))
    seal(folder / "300")
    restored = Checkpoints(folder).restore(abstract_state())
    reason = "file meta/metadata differs from the manifest that was written"
    assert (restored.step, restored.skipped) == (200, [(300, reason)])


@pytest.mark.parametrize("source", ["200", "100"])
def test_a_renamed_step_is_noticed(folder, source):
    shutil.rmtree(folder / "300")
    shutil.copytree(folder / source, folder / "300")
    restored = Checkpoints(folder).restore(abstract_state())
    assert (restored.step, restored.skipped) == (
        200,
        [(300, f"it holds step {source}")],
    )
    assert Checkpoints(folder).read_meta() == {"step": 200}


def test_a_folder_with_nothing_or_a_file_in_its_place_is_noticed(folder):
    shutil.rmtree(folder / "300")
    (folder / "300").mkdir()
    shutil.rmtree(folder / "200")
    (folder / "200").write_text("?")
    restored = Checkpoints(folder).restore(abstract_state())
    assert restored.step == 100
    assert [step for step, _ in restored.skipped] == [300, 200]


def test_files_where_steps_belong_are_set_aside(folder):
    (folder / "999").write_text("?")
    (folder / "damaged-999").write_text("an earlier one")
    (folder / "888").symlink_to("/nonexistent")
    (folder / "latest").write_text("garbage")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(abstract_state()).step == 300
    checkpoints.save(400, make_state(400), {})
    checkpoints.close()
    assert checkpoints.steps()[-1] == 400
    assert (folder / "damaged-999").read_text() == "?"
    assert (folder / "damaged-888").is_symlink()


def test_a_step_of_another_run_is_passed_over(folder):
    def stranger(meta: dict) -> str:
        return "it is not ours" if meta["step"] == 300 else ""

    restored = Checkpoints(folder).restore(abstract_state(), stranger=stranger)
    assert restored.skipped == [(300, "it is not ours")]
    assert_same_bits(restored.state, make_state(200))


def test_going_back_deletes_the_newer_and_keeps_the_damaged(folder):
    (folder / "250").mkdir()
    checkpoints = Checkpoints(folder, keep=9)
    assert checkpoints.restore(abstract_state(), at_most=299).step == 200
    checkpoints.rewind(200)
    assert checkpoints.steps() == [100, 200]
    assert (folder / "damaged-250").is_dir()
    checkpoints.save(201, make_state(201), {})
    checkpoints.close()
    assert Checkpoints(folder).restore(abstract_state()).step == 201
    oldest = Checkpoints(folder).restore(abstract_state(), at_most=50)
    assert oldest.step == 100, "better too new than none"


def test_the_warning_names_the_step_and_the_reason(folder, caplog):
    (folder / "300" / "meta" / "metadata").unlink()
    with caplog.at_level(logging.WARNING, logger="jaxllm"):
        Checkpoints(folder).restore(abstract_state())
    text = caplog.messages[0]
    assert text.startswith("CHECKPOINT 300 IN ") and "\n" not in text
    assert text.endswith("file meta/metadata is missing")
    assert caplog.messages[1] == "continuing from the older checkpoint 200"


def test_when_no_step_is_left_each_is_named_with_its_reason(folder):
    for step in (100, 200, 300):
        (folder / str(step) / "SHA256SUMS").unlink()
        (folder / str(step) / "meta" / "metadata").write_text("{}")
    for read in (
        lambda c: c.restore(abstract_state()),
        lambda c: c.read_meta(),
    ):
        with pytest.raises(CheckpointError) as caught:
            read(Checkpoints(folder))
        for step in (100, 200, 300):
            assert f"{step}: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_explicit_damaged_step_is_not_replaced(folder):
    (folder / "300" / "SHA256SUMS").unlink()
    checkpoints = Checkpoints(folder)
    with pytest.raises(CheckpointError, match="300: SHA256SUMS is missing"):
        checkpoints.restore(abstract_state(), step=300)
    assert checkpoints.steps() == [100, 200, 300]


def test_a_run_that_fell_back_saves_the_damaged_step_again(folder):
    (folder / "300" / "SHA256SUMS").write_text("")
    checkpoints = Checkpoints(folder, keep=3)
    assert checkpoints.restore(abstract_state()).step == 200
    for step in (250, 300):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [200, 250, 300]
    assert (folder / "damaged-300" / "SHA256SUMS").exists()
    # Again: the folder holds at most one of each.
    (folder / "300" / "SHA256SUMS").unlink()
    assert checkpoints.restore(abstract_state()).step == 250
    checkpoints.save(300, make_state(300), {"step": 300})
    checkpoints.close()
    assert not (folder / "damaged-300" / "SHA256SUMS").exists()
    restored = checkpoints.restore(abstract_state())
    assert (restored.step, restored.skipped) == (300, [])


def flip_a_byte_of(state: Path) -> None:
    """Changes the largest file of array data, as a disk or a cable might."""
    file = max(state.rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_disk_that_stores_something_else_is_noticed_at_once(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "forget_cached", lambda f: flip_a_byte_of(f / "state")
        )
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match="checkpoint 2 was not saved in"):
            checkpoints.wait()
    assert checkpoints.steps() == [1]  # not pruned, though keep=1
    restored = checkpoints.restore(abstract_state())
    assert_same_bits(restored.state, make_state(1))
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert checkpoints.steps() == [2]


def test_a_copy_off_the_device_that_goes_wrong_is_noticed(tmp_path, monkeypatch):
    """The digest is of what the device held, not of what reached the writer."""
    args = checkpoint.ocp.args
    original = args.StandardSave

    def save_another(state):
        weight = np.array(state["params"]["layers"]["norm"]["weight"])
        weight[1, 3] = np.nextafter(weight[1, 3], np.float32(9))
        norm = {"norm": {"weight": weight}}
        layers = state["params"]["layers"] | norm
        return original(state | {"params": state["params"] | {"layers": layers}})

    monkeypatch.setattr(args, "StandardSave", save_another)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(
        CheckpointError, match="array params/layers/norm/weight does not read back"
    ):
        checkpoints.close()
    assert checkpoints.steps() == []
    assert not (tmp_path / UNFINISHED / "1").exists()
