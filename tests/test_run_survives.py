"""What a run promises through death, signals, full disks, damage and other machines."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_worker import STEPS, write_data

from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.manifest import read_manifest
from jaxllm.train.metrics import read_jsonl

WORKER = Path(__file__).with_name("run_worker.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(data, cache):
    """Starts a run in its own process; ends it with the tests at the latest."""
    begun = []

    def start(out: Path, **orders) -> subprocess.Popen:
        command = [sys.executable, str(WORKER), str(out), str(data)]
        command += [f"{name}={value}" for name, value in orders.items()]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "RUN_WORKER_CACHE": str(cache),
        }
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen, *, code: int = 0, disk_full: bool = False) -> str:
    out, err = process.communicate(timeout=150)
    assert process.returncode == code, err[-3000:]
    # TensorStore prints one of its own when its callback finds Orbax's loop closed.
    assert disk_full or "Traceback" not in err
    return out + err


def digests(out: Path) -> dict[str, str]:
    """Of every array of the newest checkpoint."""
    folder = out / "checkpoints"
    step = Checkpoints(folder).steps()[-1]
    arrays = read_manifest(folder / str(step), step)["arrays"]
    return {"newest": str(step)} | {path: a["digest"] for path, a in arrays.items()}


def losses(out: Path) -> dict[int, float]:
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert len({r["step"] for r in records}) == len(records), "a step is there twice"
    return {r["step"]: r["loss"] for r in records}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    end(start(out))
    assert digests(out)["newest"] == str(STEPS)
    return out


def wait_for_step(out: Path, process: subprocess.Popen, least: int) -> None:
    checkpoints = Checkpoints(out / "checkpoints")
    wait_until(process, lambda: max(checkpoints.steps(), default=-1) >= least)


def wait_for_loss(out: Path, process: subprocess.Popen) -> None:
    """Until a step is done and told: compiling it may take long on a busy machine."""
    wait_until(process, lambda: bool(losses(out)))


def wait_until(process: subprocess.Popen, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not done():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_sigkill_and_the_same_command_again_equal_an_uninterrupted_run(
    start, whole, tmp_path
):
    rng = random.Random(1)
    out, newest = tmp_path / "killed", -1
    for _ in range(3):
        process = start(out, pause_s=0.02)
        wait_for_step(out, process, newest + 1)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        newest = Checkpoints(out / "checkpoints").steps()[-1]
    assert newest < STEPS, "killed too late to show anything"
    assert f"continuing from the checkpoint of step {newest}" in end(start(out))
    assert digests(out) == digests(whole)
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_running_step_and_exits_with_0(
    start, whole, tmp_path, number
):
    out = tmp_path / "stopped"
    process = start(out, pause_s=0.05, save_every=1000, log_every=5)
    wait_for_loss(out, process)
    begun = time.monotonic()
    process.send_signal(number)
    said = end(process)
    assert time.monotonic() - begun < 30  # on a machine with nothing else to do, 1 s
    steps = Checkpoints(out / "checkpoints").steps()
    assert 0 < steps[-1] < STEPS
    assert f"stopped after step {steps[-1]} of {STEPS}; everything is saved" in said
    assert f"python scripts/pretrain.py --resume --out {out}" in said
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["step"]) == (False, steps[-1])
    end(start(out, save_every=1000))
    happened = json.loads((out / "summary.json").read_text())["what_happened"]
    assert (happened["resumed"], happened["lost_s"]) == (1, 0)
    assert digests(out) == digests(whole)
    assert losses(out) == losses(whole)


def test_a_damaged_newest_checkpoint_costs_one_interval(start, whole, tmp_path):
    out = tmp_path / "damaged"
    end(start(out, stop_at=21))
    newest = Checkpoints(out / "checkpoints").steps()
    assert newest == [20, 22]
    file = max(
        (out / "checkpoints" / "22").rglob("*"), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = end(start(out))
    assert "CHECKPOINT 22 IN" in said and "IS DAMAGED" in said
    assert "continuing from the checkpoint of step 20" in said
    assert digests(out) == digests(whole)
    assert losses(out) == losses(whole)
    assert (out / "checkpoints" / "damaged-22").is_dir()


def test_a_disk_that_is_full_for_a_while_stops_nothing(start, whole, tmp_path):
    out = tmp_path / "full"
    said = end(start(out, full_from=10, full_to=30, pause_s=0.05), disk_full=True)
    assert "WARNING: checkpoint 12 was not saved" in said
    assert digests(out) == digests(whole)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and len(summary["failed_saves"]) >= 3
    assert len(set(summary["failed_saves"])) == len(summary["failed_saves"])


def test_a_disk_that_stays_full_ends_with_its_own_exit_code(start, tmp_path):
    out = tmp_path / "full"
    process = start(out, full_from=20, full_to=STEPS, pause_s=0.05)
    said = end(process, code=74, disk_full=True)
    assert f"error: checkpoint {STEPS} was not saved" in said
    newest = Checkpoints(out / "checkpoints").steps()[-1]
    assert 4 <= newest <= 20
    assert f"continuing from the checkpoint of step {newest}" in end(start(out))


def test_a_hung_run_leaves_for_the_scheduler_and_loses_one_interval(
    start, whole, tmp_path
):
    out = tmp_path / "hung"
    process = start(out, hang_at=22, hang_s=2, exit_when_hung=1, pause_s=0.02)
    said = end(process, code=75)
    assert "s (usually" in said and "since step 19 ended" in said
    stacks = (out / "stacks.txt").read_text()
    assert "run_worker.py" in stacks and "in prefetched" in stacks
    assert "continuing from the checkpoint of step 20" in end(start(out))
    assert digests(out) == digests(whole)
    assert losses(out) == losses(whole)
    happened = json.loads((out / "summary.json").read_text())["what_happened"]
    assert (happened["hung"], happened["resumed"]) == (1, 1)
    assert happened["lost_s"] > 2


def test_resume_on_1_then_8_then_2_devices(start, tmp_path):
    """In float64: in float32 the other orders of summation grow to 1e-3 in 60 steps."""
    double = {"double": 1, "steps": 24}
    still_at, out = tmp_path / "still", tmp_path / "moved"
    end(start(still_at, devices=1, **double))
    end(start(out, devices=1, stop_at=8, **double))
    end(start(out, devices=8, stop_at=16, **double))
    end(start(out, devices=2, **double))
    moved, still = losses(out), losses(still_at)
    assert moved.keys() == still.keys()
    assert all(moved[s] == still[s] for s in range(9))
    worst = max(abs(moved[s] / still[s] - 1) for s in still)
    assert 0 < worst < 1e-10, worst


def test_the_places_where_many_runs_are_killed_are_there():
    """tests/kill_many_runs.py is run by hand: it must not fall behind the code."""
    from kill_many_runs import PLACES

    for place in (place for places in PLACES.values() for place in places):
        module, name = place.split(":")
        assert callable(getattr(importlib.import_module(f"jaxllm.{module}"), name))
