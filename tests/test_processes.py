"""Several real processes as one run: the same losses, one end, whatever ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from run_worker import write_data

from jaxllm.parallel import DistributedConfig
from jaxllm.train import cluster
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.cluster import DEAD_PEER, Place, find
from jaxllm.train.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("run_worker.py")
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Starts `count` processes of a run; ends them with the tests at the latest."""
    begun: list[subprocess.Popen] = []
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "RUN_WORKER_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }

    def launch(commands: list[list[str]]) -> list[subprocess.Popen]:
        begun.extend(
            subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env=environment,
            )
            for command in commands
        )  # fmt: skip
        return begun[-len(commands) :]

    def start(out: Path, count: int, only_in_last: str = "", **orders):
        orders = {"steps": STEPS, "double": 1, "save_every": 2} | orders
        if count > 1:
            orders |= {"processes": count, "port": free_port()}
        words = [f"{name}={value}" for name, value in orders.items()]
        commands = [[str(WORKER), str(out), str(data), *words] for _ in range(count)]
        for index, command in enumerate(commands[: count if count > 1 else 0]):
            command.append(f"process={index}")
        commands[-1] += [only_in_last] if only_in_last else []
        return launch(commands)

    start.launch = launch  # type: ignore[attr-defined]
    yield start
    for process in begun:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def end(process: subprocess.Popen, *, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out + err)[-3000:]
    return out + err


def losses(out: Path) -> dict[int, float]:
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert len({r["step"] for r in records}) == len(records), "a step is there twice"
    return {r["step"]: r["loss"] for r in records}


def steps(out: Path) -> list[int]:
    return Checkpoints(out / "checkpoints").steps()


def wait_for_step(out: Path, process: subprocess.Popen, least: int) -> None:
    deadline = time.monotonic() + 100
    while max(steps(out), default=-1) < least:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> dict[int, float]:
    """The losses of a run in one process that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    end(*start(out, 1))
    return losses(out)


def assert_same(found: dict[int, float], expected: dict[int, float]) -> None:
    """In float64; measured: at most 7e-12 over 20 steps, other orders of summation."""
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-10)


def test_one_process_then_two_that_are_stopped_and_killed_then_one(
    start, whole, tmp_path
):
    out = tmp_path / "moved"
    end(*start(out, 1, stop_at=3))

    # Two processes, each with half of the weights; one of them is asked to stop.
    first, second = start(out, 2, fsdp=2, pause_s=0.1)
    wait_for_step(out, first, 6)
    second.send_signal(signal.SIGTERM)
    said, other = end(first), end(second)
    stopped = steps(out)[-1]
    assert 6 <= stopped < 14
    assert f"stopped after step {stopped} of {STEPS}; everything is saved" in said
    assert "continuing from the checkpoint" in said and "SIGTERM" not in said
    assert "SIGTERM: finishing the step" in other
    assert "Epoch" not in other and "stopped after" not in other

    # One of them dies: the other notices, says what to do, and ends.
    first, second = start(out, 2, fsdp=2, pause_s=0.1)
    wait_for_step(out, first, stopped + 2)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    begun = time.monotonic()
    out_text, err = first.communicate(timeout=90)
    # Its next collective fails, or the coordinator's heartbeat does, in JAX (abort).
    assert first.returncode in (DEAD_PEER, -signal.SIGABRT), err[-3000:]
    assert "another process has died" in err or "another task died" in err
    assert time.monotonic() - begun < 60

    end(*start(out, 1))
    assert_same(losses(out), whole)


def test_who_fails_alone_takes_the_others_along(start, tmp_path):
    first, second = start(tmp_path / "failed", 2, "fail_at=5", fsdp=2)
    begun = time.monotonic()
    assert "RuntimeError: an accident in one process" in end(second, code=1)
    waited = time.monotonic()
    said = end(first, code=1)
    assert "error: process 1 failed: RuntimeError: an accident in one process" in said
    assert time.monotonic() - waited < 20, begun


def test_different_flags_are_refused_by_all(start, data, tmp_path):
    port, out = free_port(), tmp_path / "none"
    both = start.launch(
        [
            [str(ROOT / "scripts" / "pretrain.py"), "--out", str(out),
             "--data.path", str(data), "--train.steps", str(4 + index),
             "--distributed.coordinator", f"localhost:{port}",
             "--distributed.num-processes", "2", "--distributed.process-id", str(index)]
            for index in range(2)
        ]
    )  # fmt: skip
    for process in both:
        said = end(process, code=2)
        assert "in process 1: it was started with train.steps=5, and process 0" in said
        assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.slow
def test_four_processes(start, whole, tmp_path):
    out = tmp_path / "four"
    for process in start(out, 4, fsdp=2):
        end(process)
    assert_same(losses(out), whole)
    assert json.loads((out / "summary.json").read_text())["finished"]


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
JAX_OWN = {
    "JAX_COORDINATOR_ADDRESS": "n1:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"
}  # fmt: skip
ONE_A_NODE = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("env", "gpus", "place"),
    [
        ({}, 8, None),
        (SLURM, 8, Place(None, 16, 9, [1])),
        # One GPU shown to each: it is number 0 in its process, whatever its task's.
        (SLURM, 1, Place(None, 16, 9, [0])),
        (SLURM | ONE_A_NODE, 8, Place(None, 2, 1, list(range(8)))),
        # A shell inside an allocation of 16 tasks is one process.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 8, None),
        # A batch script outside srun has no step.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, 8, None),
        (OPEN_MPI | URI, 8, Place(None, 4, 3, [1])),
        # mpirun inside an allocation: the step is that of its daemons, one a node.
        (SLURM | ONE_A_NODE | OPEN_MPI | URI, 8, Place(None, 4, 3, [1])),
        (JAX_OWN, 8, Place("n1:99", 2, 1, None)),
        (JAX_OWN | {"JAX_NUM_PROCESSES": "1"}, 8, None),
    ],
)
def test_launchers_are_read(env, gpus, place):
    assert find(DistributedConfig(), env, n_gpus=gpus) == place


def test_flags_come_first():
    given = DistributedConfig(coordinator="h:1", num_processes=3, process_id=0)
    assert find(given, JAX_OWN, n_gpus=1) == Place("h:1", 3, 0, None)
    assert find(given, {}, n_gpus=1) == Place("h:1", 3, 0, None)
    alone = DistributedConfig(num_processes=1)
    assert find(alone, SLURM, n_gpus=1) is None


@pytest.mark.parametrize(
    ("given", "env", "words"),
    [
        # Open MPI 5 does not say where process 0 is.
        ({}, OPEN_MPI, ["Open MPI", "--distributed.coordinator"]),
        ({}, {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"},
         ["Kubernetes", "--distributed.coordinator", "--distributed.num-processes"]),
        ({"num_processes": 2}, {}, ["--distributed.coordinator", "--distributed.proc"]),
        ({"coordinator": "h:1"}, {}, ["--distributed.num-processes"]),
    ],
)  # fmt: skip
def test_what_cannot_be_found_out_is_asked_for(given, env, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError) as caught:
        find(DistributedConfig(**given), env, n_gpus=1)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coordinator": "host"}, ["coordinator='host'", "HOST:PORT"]),
        ({"num_processes": 2, "process_id": 2}, ["process_id=2", "num_processes=2"]),
        ({"heartbeat_s": 0}, ["heartbeat_s=0"]),
    ],
)
def test_impossible_places_are_refused(fields, words):
    with pytest.raises(ValueError) as caught:
        DistributedConfig(**fields)
    for word in words:
        assert word in str(caught.value)


def test_a_failed_collective_is_no_mistake_of_the_user():
    gloo = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"
    for error in (ValueError(gloo), jax.errors.JaxRuntimeError(gloo)):
        code, text = cluster._verdict(error)
        assert code == DEAD_PEER and "another process has died" in text
    assert cluster._verdict(ValueError("--train.steps 0")) == (2, "--train.steps 0")
