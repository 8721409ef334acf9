"""Trackers get every step's figures, and can neither stop nor hold up a run."""

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from run_worker import tiny, write_data

from jaxllm.train import loop, report, track
from jaxllm.train.loop import run
from jaxllm.train.metrics import read_jsonl
from jaxllm.train.track import Tracker


def records(n: int) -> list[dict]:
    return [{"step": step, "loss": 2.0 + step, "note": "text"} for step in range(n)]


def test_figures_arrive_in_order_and_all_of_them():
    seen, ended, failed = [], [], []
    tracker = Tracker(
        lambda: (
            lambda figures, step: seen.append((step, figures)),
            lambda: ended.append(len(seen)),
        ),
        failed.append,
    )
    for record in [*records(500), {"step": 500, "loss": "nan", "clip": float("inf")}]:
        tracker.log(record)
    tracker.close()
    assert seen[:500] == [(step, {"loss": 2.0 + step}) for step in range(500)]
    assert seen[500:] == [(500, {})]
    assert (ended, failed) == ([501], [])


def test_a_tracker_that_raises_is_counted_and_then_given_up():
    failed = []

    def log(figures, step):
        raise SystemExit("not logged in\nreally")

    tracker = Tracker(lambda: (log, lambda: None), failed.append)
    for record in records(40):
        tracker.log(record)
    tracker.close()
    assert len(failed) == track.FAILURES
    assert failed[0] == "the tracker failed: SystemExit: not logged in really"
    assert "given up" in failed[-1]


def test_a_tracker_that_does_not_open_is_given_up():
    failed = []
    tracker = Tracker(lambda: [][0], failed.append)
    tracker.close()
    assert len(failed) == 1 and "did not start: IndexError" in failed[0]


def test_a_tracker_that_hangs_costs_its_closing_time_at_most(monkeypatch):
    monkeypatch.setattr(track, "QUEUE", 50)
    parked, failed = threading.Event(), []
    tracker = Tracker(
        lambda: (lambda figures, step: parked.wait(60), lambda: None),
        failed.append, close_s=0.2,
    )  # fmt: skip
    begun = time.monotonic()
    for record in records(49):
        tracker.log(record)
    tracker.close()
    assert 0.2 <= time.monotonic() - begun < 5
    assert len(failed) == 1 and "did not end within" in failed[0]
    for record in records(99):  # dropped
        tracker.log(record)
    parked.set()

    failed.clear()
    parked.clear()
    full = Tracker(
        lambda: (lambda figures, step: parked.wait(60), lambda: None), failed.append
    )
    for record in records(99):
        full.log(record)
    full.close()
    parked.set()
    assert len(failed) == 1 and "took nothing while 50 records came" in failed[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def small(data: Path, out: Path, **train):
    config = tiny(str(out), str(data), **dict(steps=6, log_every=2) | train)
    return replace(
        config, model=replace(config.model, dim=32, hidden_dim=64, head_dim=8)
    )


def fake_package(folder: Path, monkeypatch, add_scalar: str) -> None:
    (folder / "tensorboardX.py").write_text(
        "import json\n"
        "class SummaryWriter:\n"
        "    def __init__(self, folder): self.file = open(folder + '.txt', 'w')\n"
        f"    def add_scalar(self, *given): {add_scalar}\n"
        "    def close(self): self.file.close()\n"
    )
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.syspath_prepend(folder)


def test_a_run_feeds_its_tracker(data, tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, "self.file.write(json.dumps(given) + chr(10))")
    run(small(data, tmp_path / "run", track="tensorboard"))
    lines = (tmp_path / "run" / "tensorboard.txt").read_text().splitlines()
    given = [tuple(json.loads(line)) for line in lines]
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    expected = [("loss", r["loss"], r["step"]) for r in steps]
    assert [g for g in given if g[0] == "loss"] == expected
    assert ("val_bpb", 0) in {(g[0], g[2]) for g in given}


def test_trackers_and_plots_that_fail_stop_nothing(data, tmp_path, monkeypatch, capsys):
    def no_plot(folder):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "write_plot", no_plot)
    fake_package(tmp_path, monkeypatch, "raise OSError('no route')")
    run(small(data, tmp_path / "run", track="tensorboard"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    happened = summary["what_happened"]
    assert (happened["plot_failed"], happened["tracker_failed"]) == (1, 8)
    said = capsys.readouterr().out
    assert "WARNING: the tracker failed: OSError: no route" in said
    assert "tracker failures: 8" in said and "plot failures: 1" in said


def test_a_missing_package_is_named_before_anything_is_written(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package tensorboardX: pip install"):
        run(small(data, tmp_path / "run", track="tensorboard"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoints_by_the_clock(data, tmp_path, monkeypatch):
    true_prefetched = loop.prefetched

    def prefetched(run, first):
        for item in true_prefetched(run, first):
            time.sleep(0.2 if item[0] % 2 else 0)
            yield item

    monkeypatch.setattr(loop, "prefetched", prefetched)
    config = small(
        data, tmp_path / "run", save_every=1000, save_every_minutes=0.1 / 60, keep=99
    )
    run(config)
    steps = {int(p.name) for p in (tmp_path / "run/checkpoints").glob("[0-9]*")}
    assert {0, 2, 4, 6} <= steps


def test_deterministic_changes_nothing_on_a_cpu_and_asks_for_it_on_a_gpu(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2")
    losses = []
    for flag in (False, True):
        config = replace(small(data, tmp_path / str(flag)), deterministic=flag)
        run(config)
        found = read_jsonl(tmp_path / str(flag) / "metrics.jsonl")
        losses.append([r["loss"] for r in found if "loss" in r])
    assert losses[0] == losses[1]
    import os

    flags = os.environ["XLA_FLAGS"].split()
    assert flags == [
        "--xla_gpu_autotune_level=2",
        "--xla_gpu_exclude_nondeterministic_ops=true",
        f"--xla_gpu_per_fusion_autotune_cache_dir={tmp_path}/True/cache/autotune",
    ]


def test_too_little_room_is_said_before_the_first_step(
    data, tmp_path, monkeypatch, capsys
):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    few = type(usage)(usage.total, usage.used, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    run(small(data, tmp_path / "run", keep=2, keep_every=2))
    said = capsys.readouterr().out
    # 3 parameters' worth of float32 of 28,832 parameters, 3 + 3 times and step 0.
    assert "WARNING: the checkpoints may take 7 x 0.3 MB, 2.4 MB more than now" in said
    assert said.index("WARNING: the checkpoints") < said.index("validation after 0")
