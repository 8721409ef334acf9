"""Kills a training run at random moments, very often, and looks what becomes of it.

kill_many_runs.py KILLS [SEED [MINUTES]]: starts the run of run_worker.py with a
checkpoint every other step, kills it at a random moment by SIGKILL, and starts it again
with the same arguments, until it ends; then the next run, until there were KILLS, or
the time is over. Each run's final state and losses must be those of a run that was left
alone. Prints one JSON line.

Every run is forked from this process, which has imported all and started nothing.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import run_worker

import jaxllm.train.loop  # noqa: F401  imported once, before the forks
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.manifest import read_manifest
from jaxllm.train.metrics import read_jsonl


def fork_run(out: Path, data: Path) -> int:
    if process := os.fork():
        return process
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        run_worker.main(str(out), str(data), "save_every=2", "pause_s=0.01")
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def outcome(out: Path) -> tuple[dict, dict]:
    """The newest checkpoint's digests, and the loss of every step."""
    folder = out / "checkpoints"
    step = Checkpoints(folder).steps()[-1]
    arrays = read_manifest(folder / str(step), step)["arrays"]
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
    losses = {r["step"]: r["loss"] for r in records}
    return {path: a["digest"] for path, a in arrays.items()}, losses


def main(kills: int, seed: int = 0, minutes: int = 10**6) -> dict:
    deadline = time.monotonic() + 60 * minutes
    rng = random.Random(seed)
    report: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["RUN_WORKER_CACHE"] = f"{scratch}/cache"
        made = os.fork()
        if made == 0:
            run_worker.write_data(Path(scratch))
            os._exit(0)
        os.waitpid(made, 0)
        data = Path(scratch, "shards")
        whole, seconds = Path(scratch, "whole"), 0.0
        for _ in range(2):  # again with everything compiled, for its duration
            begun = time.monotonic()
            assert os.waitpid(fork_run(whole, data), 0)[1] == 0, log_of(whole)
            seconds = time.monotonic() - begun
            expected = outcome(whole)
            os.rename(whole, Path(scratch, f"whole-{time.monotonic_ns()}"))
        run, newest = 0, -1
        while True:
            out = Path(scratch, f"run-{run}")
            process = fork_run(out, data)
            end = time.monotonic() + rng.uniform(0, 0.8 * seconds)
            done = 0
            enough = report["killed"] >= kills or time.monotonic() > deadline
            while not done and (enough or time.monotonic() < end):
                done, status = os.waitpid(process, os.WNOHANG)
                time.sleep(0.002)
            if not done:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                report["killed"] += 1
                steps = Checkpoints(out / "checkpoints").steps()
                before, newest = newest, max(steps, default=-1)
                assert newest >= before, "a checkpoint was lost"
                unfinished = out / "checkpoints" / ".unfinished"
                report["killed in a save"] += any(unfinished.glob("*"))
                continue
            assert status == 0, log_of(out)
            assert outcome(out) == expected, "the end is another one"
            report["runs ended equal"] += 1
            run, newest = run + 1, -1
            if enough:
                break
    return dict(report)


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text()[-3000:]


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
