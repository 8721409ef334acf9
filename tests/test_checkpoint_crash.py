"""Death and failing disks at any moment leave the last good checkpoint as it was."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_worker import abstract_state, assert_same_bits, make_state

from jaxllm.train import checkpoint, step_folders
from jaxllm.train.checkpoint import CheckpointError, Checkpoints
from jaxllm.train.digest import digest_state

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture
def checkpoints(tmp_path):
    """Holds step 1; only one is kept, so that pruning too early would lose it."""
    made = Checkpoints(tmp_path / "checkpoints", keep=1)
    made.save(1, make_state(1), {"step": 1})
    made.wait()
    return made


def assert_holds(checkpoints: Checkpoints, step: int) -> None:
    assert checkpoints.steps() == [step]
    restored = Checkpoints(checkpoints.folder).restore(abstract_state())
    assert (restored.step, restored.skipped) == (step, [])
    assert_same_bits(restored.state, make_state(step))


def start(*args: object, **options) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), *map(str, args)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, **options
    )


def test_sigkill_at_random_moments_loses_no_visible_step(tmp_path):
    """Each process finds every step the killed one had shown, restores it and goes on
    (or fails, see save_forever). It prints a step once its saving has begun, which is
    after the one before it was published."""
    rng = random.Random(0)
    newest = 0
    for _ in range(4):
        worker = start("forever", tmp_path)
        assert worker.stdout is not None
        first = int(worker.stdout.readline() or -1)
        assert first >= max(newest, 1), worker.wait()
        time.sleep(rng.uniform(0.0, 0.5))
        worker.send_signal(signal.SIGKILL)
        printed = [first, *map(int, worker.stdout.read().split())]
        worker.wait()
        worker.stdout.close()
        checkpoints = Checkpoints(tmp_path)
        steps = checkpoints.steps()
        newest = steps[-1] if steps else 0
        assert newest >= printed[-1] - 1
        assert newest < 2 or len(steps) >= 2 or newest == first  # keep=2
        for step in steps:
            restored = checkpoints.restore(abstract_state(), step=step)
            assert restored.meta == {"step": step}
            assert_same_bits(restored.state, make_state(step))


class Killed(BaseException):
    """Stands for death: nothing that follows on the same thread is done."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "place, number",
    [
        (place, number)
        for place in ("rename", "fsync", "rmtree", "verify_arrays", "seal", "open")
        for number in (1, 2, 3)
    ],
)
def test_death_at_each_station_of_publishing(tmp_path, monkeypatch, place, number):
    """What SIGKILL seldom hits: between two calls that change the folder."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {"step": 1})
    checkpoints.wait()
    checkpoints.save(2, make_state(2), {"step": 2})
    checkpoints.wait()
    owner, name = {
        "rename": (Path, "rename"),
        "fsync": (os, "fsync"),
        "rmtree": (shutil, "rmtree"),
        "open": (os, "open"),
        "verify_arrays": (checkpoint, "verify_arrays"),
        "seal": (checkpoint, "seal"),
    }[place]
    original, calls = getattr(owner, name), []

    def dying(*args, **options):
        if not threading.current_thread().name.startswith("checkpoint-"):
            return original(*args, **options)
        calls.append(args)
        if len(calls) >= number:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        checkpoints.save(3, make_state(3), {"step": 3})
        checkpoints._join()
    # The dead run's memory is gone; only the folder is left.
    survivor = Checkpoints(tmp_path, keep=1)
    assert set(survivor.steps()) <= {2, 3}
    restored = survivor.restore(abstract_state())
    assert restored.skipped == []
    assert_same_bits(restored.state, make_state(restored.step))
    survivor.save(4, make_state(4), {"step": 4})
    survivor.close()
    assert_holds(survivor, 4)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"4", step_folders.UNFINISHED}
    assert list((tmp_path / step_folders.UNFINISHED).iterdir()) == []


@pytest.fixture
def full_disk():
    """Makes every file of this process end after 4 KiB, as a full disk or quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    def empty():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield fill, empty
    empty()
    signal.signal(signal.SIGXFSZ, ignored)


# TensorStore's callbacks find Orbax's event loop closed after a failed write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_while_saving(checkpoints, full_disk):
    fill, empty = full_disk
    big = {"x": np.random.default_rng(0).normal(size=100_000)}
    for step in (2, 3):
        fill()
        with pytest.raises(CheckpointError, match=f"checkpoint {step} was not saved"):
            checkpoints.save(step, big, {})
            checkpoints.wait()
        empty()
        assert_holds(checkpoints, 1)
        unfinished = checkpoints.folder / step_folders.UNFINISHED
        assert not list(unfinished.rglob("*")), "its room is given back"
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert_holds(checkpoints, 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_save_surfaces_once_at_the_next_call(checkpoints, full_disk):
    fill, empty = full_disk
    fill()
    checkpoints.save(2, {"x": np.random.default_rng(0).normal(size=100_000)}, {})
    checkpoints._join()
    empty()
    with pytest.raises(CheckpointError, match="checkpoint 2 was not saved"):
        checkpoints.save(3, make_state(3), {})
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert_holds(checkpoints, 3)


def test_too_little_room_is_seen_before_saving(checkpoints, monkeypatch):
    needed = checkpoint.state_bytes(abstract_state())
    usage = shutil.disk_usage(checkpoints.folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        message = f"needs up to {needed:,} bytes .* {needed - 1:,} free"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(2, make_state(2), {})
        assert_holds(checkpoints, 1)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        checkpoints.save(2, make_state(2), {})
        checkpoints.close()
    assert_holds(checkpoints, 2)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoint 1 was not saved .*directory"):
        checkpoints.save(1, make_state(1), {})
    checkpoints.close()


def test_a_folder_that_turns_read_only(checkpoints, monkeypatch):
    def refuse(self, target):
        raise PermissionError(30, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match="2 was not saved .*Read-only file"):
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
    assert_holds(checkpoints, 1)


def test_old_steps_that_cannot_be_deleted_do_not_fail_a_save(
    checkpoints, monkeypatch, caplog
):
    def refuse(*args, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", refuse)
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    assert "could not delete old checkpoints: [Errno 5]" in caplog.text
    assert checkpoints.steps() == [1, 2]


def test_a_folder_that_vanishes_between_saves(checkpoints):
    gone = checkpoints.folder.with_name("gone")
    checkpoints.folder.rename(gone)
    for _ in range(2):  # never made anew: below a mount point it would be another disk
        with pytest.raises(CheckpointError, match="has vanished; is its disk still"):
            checkpoints.save(2, make_state(2), {})
        assert not checkpoints.folder.exists()
    gone.rename(checkpoints.folder)
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert_holds(checkpoints, 2)


def test_a_folder_that_vanishes_while_saving(checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "forget_cached", lambda _: shutil.rmtree(checkpoints.folder)
        )
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match="checkpoint 2 was not saved"):
            checkpoints.wait()
    checkpoints.close()


def test_two_processes_agree_on_everything(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [start("one_of_two", tmp_path, address, rank) for rank in (0, 1)]
    try:
        outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0]
    reports = [json.loads(text.splitlines()[-1]) for text in outputs]
    assert reports[0] == reports[1]
    expected = digest_state(make_state(2))  # of one process on one device
    assert reports[0]["digests"] == expected
    assert reports[0]["restored"] == [2, expected]
    step, skipped = reports[0]["fallback"]
    assert step == 1
    assert skipped[0][0] == 2 and "manifest.ocdbt" in skipped[0][1]
    assert "checkpoint 2 was not saved" in reports[0]["error"]
    assert reports[0]["error"].endswith("the disk lies")
    assert reports[0]["steps"] == [1, 3]
    restored = Checkpoints(tmp_path).restore(abstract_state())
    assert_same_bits(restored.state, make_state(3))
