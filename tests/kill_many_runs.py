"""Kills a training run very often, everywhere, and looks what becomes of it.

kill_many_runs.py KILLS [SEED [MINUTES]] [--write | --add]: starts a run that prepares
its data, trains 30 steps with a checkpoint every other step, meets bad data and goes
back once; kills it by SIGKILL, and starts it again with the same arguments, until it
ends; then the next run, until there were KILLS, or the time is over. Half of the kills
come at a moment drawn evenly from the duration of a run; the others soon after the run
has entered one of PLACES, often within it. No kill may take a visible checkpoint away,
and each run's final arrays, losses, rollbacks and data must be those of a run that was
left alone.
Prints one line of JSON; --write makes it the record in docs/kills.json, and --add one
more of it.

Every run is forked from this process, which has imported all and started nothing.
"""

import hashlib
import importlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib.backends.backend_agg  # noqa: F401  imported once, before the forks
import matplotlib.figure  # noqa: F401
import run_worker
from poison import poison
from stamp import stamp

import jaxllm.train.loop
from jaxllm.data import corpus
from jaxllm.guard import GuardConfig
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.manifest import read_manifest
from jaxllm.train.metrics import read_jsonl

STEPS = 30
BAD: dict[int, float] = dict.fromkeys((5, 14, 15, 16), math.nan)
PLACES = {
    "preparing data": ["data.corpus:_make_tokenizer", "data.corpus:_run",
                       "data.corpus:merge"],
    "a step": ["train.feed:to_device"],
    "a save": ["train.checkpoint:make_manifest", "train.checkpoint:verify_arrays"],
    "the commit": ["train.checkpoint:seal", "train.checkpoint:sync_folder"],
    "pruning": ["train.checkpoint:prune", "train.step_folders:discard"],
    "a rollback": ["train.rollback:restore", "train.rollback:forget"],
    "the end": ["train.ending:keep_last", "train.report:write_summary"],
}  # fmt: skip
Order = tuple[str, int, float]
"""A place, which of the calls there, and the seconds from that call to the kill."""


def fork_run(out: Path, text: Path, order: Order | None = None) -> int:
    if process := os.fork():
        return process
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if order is not None:
            kill_at(*order)
        train(out, text)
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def kill_at(place: str, nth: int, delay_s: float) -> None:
    module, name = place.split(":")
    room = importlib.import_module(f"jaxllm.{module}")
    true, calls = getattr(room, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return true(*args, **kwargs)

    setattr(room, name, counted)


def train(out: Path, text: Path) -> None:
    """The run. Its data are prepared as those of the demo, but from a small text."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_compilation_cache_dir", os.environ["RUN_WORKER_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    poison(BAD)

    def prepare_demo(folder, *, vocab_size):
        return corpus.prepare(
            [text], folder, vocab_size=vocab_size, workers=1, val_fraction=0.1
        )

    corpus.prepare_demo = prepare_demo
    config = run_worker.tiny(str(out), "", steps=STEPS, save_every=2)
    jaxllm.train.loop.run(
        replace(
            config,
            model=replace(config.model, dim=32, hidden_dim=64, head_dim=8),
            guard=GuardConfig(spike_factor=10.0, bad_steps=3),
        )
    )


def outcome(out: Path) -> tuple:
    """The newest checkpoint's digests, the loss of every step, what was undone, and the
    bytes of the data."""
    folder = out / "checkpoints"
    step = Checkpoints(folder).steps()[-1]
    arrays = read_manifest(folder / str(step), step)["arrays"]
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
    losses = {r["step"]: r["loss"] for r in records}
    assert len(losses) == len(records) == STEPS, "a step is missing or there twice"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and len(summary["rollbacks"]) == 1
    shards = sorted((out / "data").rglob("*.ds"))
    return (
        {path: a["digest"] for path, a in arrays.items()},
        losses,
        summary["rollbacks"],
        [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards],
    )


def main(kills: int, seed: int = 0, minutes: int = 10**6) -> dict:
    begun = time.monotonic()
    rng = random.Random(seed)
    killed: Counter = Counter()
    report: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["RUN_WORKER_CACHE"] = f"{scratch}/cache"
        text = run_worker.write_text(Path(scratch))
        whole, seconds = Path(scratch, "whole"), 0.0
        for _ in range(2):  # again with everything compiled, for its duration
            since = time.monotonic()
            assert os.waitpid(fork_run(whole, text), 0)[1] == 0, log_of(whole)
            seconds = time.monotonic() - since
            expected = outcome(whole)
            os.rename(whole, Path(scratch, f"whole-{time.monotonic_ns()}"))
        run, least = 0, -1
        while True:
            out = Path(scratch, f"run-{run}")
            enough = killed.total() >= kills or time.monotonic() > begun + 60 * minutes
            where, order, end_s = "a random moment", None, rng.uniform(0, seconds)
            if rng.random() < 0.5:
                where = rng.choice([*PLACES])
                often = {"a step": 20, "a save": 12, "the commit": 12, "pruning": 9}
                nth = rng.randint(1, often.get(where, 1))
                order = (rng.choice(PLACES[where]), nth, rng.uniform(0, 0.02))
                end_s = math.inf
            process = fork_run(out, text, None if enough else order)
            end, done, status = time.monotonic() + end_s, 0, 0
            while not done and (enough or time.monotonic() < end):
                done, status = os.waitpid(process, os.WNOHANG)
                time.sleep(0.002)
            if not done:
                os.kill(process, signal.SIGKILL)
                status = os.waitpid(process, 0)[1]
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL, log_of(out)
                killed[where] += 1
                least = newest_whole(out, least)
                unfinished = out / "checkpoints" / ".unfinished"
                report["left a save unfinished"] += any(unfinished.glob("*"))
                continue
            assert status == 0, log_of(out)
            assert outcome(out) == expected, "the end is another one"
            report["runs ended equal"] += 1
            run, least = run + 1, -1
            if enough:
                break
    return {
        "seed": seed, "kills": killed.total(), "killed in": dict(killed), **report,
        "minutes": round((time.monotonic() - begun) / 60, 1), **stamp(),
    }  # fmt: skip


def newest_whole(out: Path, least: int) -> int:
    """Checks that no kill has cost a checkpoint; returns the step below which the
    newest may not be from now on: its own, once the run has gone back, and until then
    at most 14, the first of the bad steps."""
    checkpoints = Checkpoints(out / "checkpoints")
    steps = checkpoints.steps()
    newest = max(steps, default=-1)
    assert newest >= least, f"a checkpoint from {least} on was lost, {steps} are left"
    if newest <= 14 or checkpoints.read_meta(newest)["position"]["rollbacks"]:
        return newest
    return 14


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text()[-3000:]


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word not in ("--write", "--add")]
    records, file = [], Path(__file__).parents[1] / "docs" / "kills.json"
    if "--add" in sys.argv:
        records = json.loads(file.read_text())
    records.append(main(*map(int, given)))
    print(json.dumps(records[-1]))
    if {"--write", "--add"} & {*sys.argv}:
        file.write_text(json.dumps(records, indent=1) + "\n")
