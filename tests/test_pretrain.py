"""A run from end to end: it learns, it goes on where it stopped, it refuses clearly."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config as configuration
from jaxllm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from jaxllm.data.corpus import prepare
from jaxllm.train import loop
from jaxllm.train import run as run_module
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.digest import digest_state
from jaxllm.train.loop import run
from jaxllm.train.metrics import Meter, read_jsonl
from jaxllm.train.run_folder import RunFolder
from jaxllm.train.step_folders import CheckpointError

VOCAB = 320


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards of 200 short documents with some structure to learn."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    lines = [
        json.dumps({"text": " ".join(rng.choice(words[k % 5 :: 5], 40)) + f" {k}."})
        for k in range(200)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare([folder / "text.jsonl"], folder / "shards", vocab_size=VOCAB, workers=1,
            val_fraction=0.1)  # fmt: skip
    return folder / "shards"


def tiny(data: Path, out: Path, **train) -> RunConfig:
    rhythm: dict[str, Any] = dict(
        batch_size=8, steps=12, log_every=5, eval_every=0, sample_every=0,
        save_every=4, sample_tokens=4, eval_rows=16,
    )  # fmt: skip
    return RunConfig(
        out=str(out),
        model=ModelConfig(
            dim=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            vocab_size=VOCAB,
            max_seq_len=32,
        ),  # fmt: skip
        data=DataConfig(path=str(data)),
        optim=OptimConfig(learning_rate=1e-2, min_learning_rate=1e-3),
        train=TrainConfig(**rhythm | train),
    )


def losses(out: Path) -> dict[int, float]:
    records = read_jsonl(out / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def final_state(config: RunConfig) -> dict:
    """Digests of the newest checkpoint's arrays, as its manifest has them."""
    folder = RunFolder(config.out)
    step, params = Checkpoints(folder.checkpoints).read_arrays("")
    return {"step": step} | digest_state(params)


class Death(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def die_at(monkeypatch, fatal_step: int) -> None:
    def prefetched(run, first):
        for item in true_prefetched(run, first):
            if item[0] == fatal_step:
                raise Death
            yield item

    true_prefetched = loop.prefetched
    monkeypatch.setattr(loop, "prefetched", prefetched)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> RunConfig:
    """A run that was never interrupted."""
    config = tiny(data, tmp_path_factory.mktemp("runs") / "whole")
    run(config)
    return config


def test_a_run_learns_and_leaves_everything_behind(finished):
    out = Path(finished.out)
    summary = json.loads((out / "summary.json").read_text())
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    assert summary["finished"] and summary["step"] == 12
    assert last["val_bpb"] < 0.8 * first["val_bpb"]
    # Untrained, the model knows nothing: the loss is the logarithm of the vocabulary.
    assert first["val_loss"] == pytest.approx(np.log(VOCAB), rel=0.02)
    assert sorted(losses(out)) == list(range(12))
    for name in ("config.json", "tokenizer.json", "loss.png", "samples.txt"):
        assert (out / name).stat().st_size > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpoints(out / "checkpoints").steps() == [4, 8, 12]
    log = (out / "train.log").read_text()
    assert "Epoch:[1/1](0/12) loss:" in log and "Epoch:[1/1](11/12)" in log


@pytest.mark.parametrize("fatal_step", [0, 1, 5, 8, 11])
def test_resume_equals_uninterrupted(finished, data, tmp_path, monkeypatch, fatal_step):
    config = replace(finished, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        die_at(patch, fatal_step)
        with pytest.raises(Death):
            run(config)
    run(config)  # no flag: an unfinished run simply goes on
    assert losses(Path(config.out)) == losses(Path(finished.out))
    assert final_state(config) == final_state(finished)


def test_a_damaged_checkpoint_is_passed_over_and_nothing_else_changes(
    finished, tmp_path, capsys
):
    config = replace(finished, out=str(tmp_path / "damaged"), resume=True)
    shutil.copytree(finished.out, config.out)
    (tmp_path / "damaged" / "summary.json").unlink()
    newest = tmp_path / "damaged" / "checkpoints" / "12"
    victim = max(newest.rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    run(config)
    assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
    assert losses(Path(config.out)) == losses(Path(finished.out))
    assert final_state(config) == final_state(finished)


def unfinished(finished: RunConfig, out: Path) -> RunConfig:
    """A copy of the run that died just before it could say that it was finished."""
    shutil.copytree(finished.out, out)
    (out / "summary.json").unlink()
    return replace(finished, out=str(out))


def test_when_no_checkpoint_is_whole_nothing_begins_anew(finished, tmp_path, capsys):
    config = unfinished(finished, tmp_path / "lost")
    for step in (4, 8, 12):
        folder = tmp_path / "lost" / "checkpoints" / str(step)
        max(folder.rglob("d/*"), key=lambda p: p.stat().st_size).write_bytes(b"")
    before = snapshot(tmp_path / "lost" / "checkpoints")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint in") as caught:
        run(config)
    assert all(f"{step}: file state/" in str(caught.value) for step in (4, 8, 12))
    assert snapshot(tmp_path / "lost" / "checkpoints") == before
    assert losses(Path(config.out)) == losses(Path(finished.out))
    summary = json.loads((tmp_path / "lost" / "summary.json").read_text())
    assert not summary["finished"] and summary["error"] == str(caught.value)


def test_damaged_figures_and_a_mistake_in_the_steps_cost_nothing(finished, tmp_path):
    config = unfinished(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"12\n\xff\xfe{\x00}\n[]\n")
    (tmp_path / "run" / "incidents.jsonl").write_text('12\n{"what": []}\n{"wh')
    with pytest.raises(ValueError, match="has taken 12 steps, and is to end after 6"):
        run(replace(config, train=replace(config.train, steps=6)))
    run(config)
    assert losses(Path(config.out)) == losses(Path(finished.out))
    assert final_state(config) == final_state(finished)


def test_a_stop_during_the_first_evaluation_does_not_wait_for_a_step(
    finished, tmp_path, monkeypatch, capsys
):
    asked = loop.Stop()
    monkeypatch.setattr(loop, "Stop", lambda: asked)
    monkeypatch.setattr(loop.events, "validate", lambda *_: asked.request())
    config = replace(finished, out=str(tmp_path / "early"))
    run(config)
    assert losses(Path(config.out)) == {}
    assert Checkpoints(tmp_path / "early" / "checkpoints").steps() == [0]
    assert "stopped after step 0 of 12; everything is saved" in capsys.readouterr().out


def test_samples_and_summaries_that_fail_cost_no_training(
    finished, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    config = replace(finished, out=str(tmp_path / "run"))
    monkeypatch.setattr(loop.events, "_write_sample", too_large)
    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.train.report.write_summary", full)
        with pytest.raises(run_module.Unwritable, match="step 12 is saved") as caught:
            run(config)
    assert caught.value.exit_code == 74
    run(config)
    assert final_state(config) == final_state(finished)
    happened = json.loads((tmp_path / "run" / "summary.json").read_text())
    happened = happened["what_happened"]
    assert happened["sample_failed"] == happened["resumed"] == 1
    assert happened["lost_s"] == 0


def test_a_finished_run_is_left_alone_and_can_be_made_longer(
    finished, tmp_path, capsys
):
    config = replace(finished, out=str(tmp_path / "longer"))
    shutil.copytree(finished.out, config.out)
    for again in (config, replace(config, resume=True)):
        run(again)
        assert "is finished: 12 steps" in capsys.readouterr().out
    longer = replace(config.train, steps=16)
    run(replace(config, resume=True, train=longer))
    assert "schedule is stretched" in capsys.readouterr().out
    assert sorted(losses(Path(config.out))) == list(range(16))


def test_a_finished_demo_starts_again_or_goes_on(finished, tmp_path):
    again = replace(finished.train, when_finished="again")
    config = replace(finished, out=str(tmp_path / "demo"), train=again)
    shutil.copytree(finished.out, config.out)
    run(replace(config, resume=True))
    assert sorted(losses(Path(config.out))) == list(range(24))
    assert Checkpoints(tmp_path / "demo" / "checkpoints").steps()[-1] == 24
    run(replace(config, train=replace(again, steps=2)))
    assert sorted(losses(tmp_path / "demo" / "archive" / "1")) == list(range(24))
    assert sorted(losses(Path(config.out))) == [0, 1]


def test_fresh_sets_the_old_run_aside_whole(finished, tmp_path):
    config = replace(finished, out=str(tmp_path / "fresh"))
    shutil.copytree(finished.out, config.out)
    run(replace(config, fresh=True, train=replace(config.train, steps=3)))
    aside = tmp_path / "fresh" / "archive" / "1"
    assert Checkpoints(aside / "checkpoints").steps() == [4, 8, 12]
    assert sorted(losses(aside)) == list(range(12))
    assert Checkpoints(tmp_path / "fresh" / "checkpoints").steps() == [0, 3]


def test_accumulation_and_devices_change_only_rounding(finished, data, tmp_path):
    assert len(jax.devices()) == 8
    for name, changes in {
        "accumulated": {"train": replace(finished.train, batch_size=16)},
        "reference": {"train": replace(finished.train, batch_size=16, accumulate=2)},
    }.items():
        run(replace(finished, out=str(tmp_path / name), **changes))
    whole, parts = (losses(tmp_path / n) for n in ("reference", "accumulated"))
    for step in whole:
        # Measured: at most 2e-6 over 12 steps.
        assert whole[step] == pytest.approx(parts[step], abs=1e-5)


def test_compiled_once_without_transfers(data, tmp_path, monkeypatch):
    programs = []
    true_build = loop.prepare

    def prepare(*args):
        programs.append(true_build(*args))
        step = programs[0].program.train_step

        def guarded(state, batch):
            with jax.transfer_guard("disallow"):
                return step(state, batch)

        program = replace(programs[0].program, train_step=guarded)
        return replace(programs[0], program=program)

    monkeypatch.setattr(loop, "prepare", prepare)
    run(tiny(data, tmp_path / "guarded", steps=6))
    assert programs[0].program.train_step._cache_size() == 1


def test_compiling_is_not_taken_for_the_speed_of_a_step(data, tmp_path, monkeypatch):
    now = [0.0]
    true_prepare = loop.prepare

    def prepare(*args):
        prepared = true_prepare(*args)
        step = prepared.program.train_step

        def slow_at_first(state, batch):
            now[0] += 9000.0 if not step._cache_size() else 60.0
            return step(state, batch)

        program = replace(prepared.program, train_step=slow_at_first)
        return replace(prepared, program=program, meter=Meter(lambda: now[0]))

    monkeypatch.setattr(loop, "prepare", prepare)
    run(tiny(data, tmp_path / "timed", steps=5, log_every=1))
    records = read_jsonl(tmp_path / "timed" / "metrics.jsonl")
    steps = [record["step_ms"] for record in records if "step_ms" in record]
    # A line a step, also where a save reads the figures early.
    assert len(steps) == 5
    assert steps[0] < 1 and sum(steps) == pytest.approx(4 * 60e3)
    said = (tmp_path / "timed" / "train.log").read_text()
    # The first reading comes after two more steps, and three are left.
    assert "epoch_Time:6.0min;" in said and "ETA:6.0min" in said
    assert "warmup" not in said


def test_a_warm_up_as_long_as_the_run_is_pointed_out(data, tmp_path, capsys):
    config = tiny(data, tmp_path / "warm", steps=2)
    optim = replace(config.optim, warmup_steps=2)
    run(replace(config, optim=optim))
    assert "WARNING: optim.warmup_steps=2 is the whole" in capsys.readouterr().out


REFUSALS = {
    "dim": (dict(model={"dim": 64}), ["model.dim=32", "model.dim=64"]),
    "rate": (dict(optim={"learning_rate": 0.5}), ["learning_rate=0.01", "0.5"]),
    "batch": (dict(train={"batch_size": 16}), ["train.batch_size=8", "16", "--out"]),
    "seed": (dict(data={"seed": 1}), ["data.seed=0", "data.seed=1", "--fresh"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_another_configuration_is_refused_by_the_field(finished, name, tmp_path):
    changes, words = REFUSALS[name]
    before = snapshot(Path(finished.out))
    config = replace(finished, resume=True)
    values = json.loads(configuration.to_json(config))
    for room, fields in changes.items():
        values[room].update(fields, **{"hidden_dim": None} if room == "model" else {})
    with pytest.raises(ValueError) as caught:
        unfinished = tmp_path / "unfinished"
        shutil.copytree(finished.out, unfinished)
        (unfinished / "summary.json").unlink()
        other = configuration.from_dict(RunConfig, values)
        run(replace(other, out=str(unfinished)))
    for word in words:
        assert word in str(caught.value)
    assert snapshot(Path(finished.out)) == before


def test_other_data_is_refused(finished, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"no {i} " * 9}) for i in range(99)))
    prepare([other], tmp_path / "shards", vocab_size=VOCAB, workers=1)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished.out, unfinished)
    (unfinished / "summary.json").unlink()
    config = replace(finished, out=str(unfinished), resume=True)
    with pytest.raises(ValueError, match="trained on other data"):
        run(replace(config, data=replace(config.data, path=str(tmp_path / "shards"))))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(resume=True), ["--resume", "no checkpoint"]),
        (dict(data=DataConfig(path="/no/such/folder")), ["/no/such/folder"]),
        (dict(train=TrainConfig(batch_size=12)), ["batch_size=12", "8 devices"]),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(data, tmp_path, changes, words):
    config = replace(tiny(data, tmp_path / "none"), **changes)
    with pytest.raises(ValueError) as caught:
        run(config)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "none" / "config.json").exists()


def test_a_damaged_shard_is_noticed_when_asked_for(data, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(data, damaged)
    shard = next((damaged / "train").glob("*.ds"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    config = tiny(damaged, tmp_path / "none")
    with pytest.raises(ValueError, match=shard.name):
        run(replace(config, data=replace(config.data, verify=True)))


def test_a_vocabulary_larger_than_the_model_is_refused(data, tmp_path):
    config = tiny(data, tmp_path / "none")
    config = replace(config, model=replace(config.model, vocab_size=VOCAB - 1))
    with pytest.raises(ValueError) as caught:
        run(config)
    assert str(VOCAB) in str(caught.value) and str(VOCAB - 1) in str(caught.value)


def test_out_of_memory_says_what_to_change(data, tmp_path, monkeypatch):
    def full(run, first):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB")
        yield

    monkeypatch.setattr(loop, "prefetched", full)
    with pytest.raises(ValueError) as caught:
        run(tiny(data, tmp_path / "full"))
    for words in ("--train.accumulate 2", "--compute.remat products", "9 GiB"):
        assert words in str(caught.value)


def test_two_processes_do_not_train_in_one_folder(finished):
    folder = RunFolder(finished.out)
    with folder.locked(), pytest.raises(ValueError, match="is training in") as caught:
        run(replace(finished, fresh=True))
    assert getattr(caught.value, "exit_code") == 69  # noqa: B009


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_start_on_a_disk_that_takes_nothing_says_so(
    finished, tmp_path, monkeypatch, number
):
    def full(path, content):
        raise OSError(number, os.strerror(number))

    config = replace(finished, out=str(tmp_path / "full"))
    shutil.copytree(finished.out, config.out)
    (tmp_path / "full" / "summary.json").unlink()
    before = snapshot(tmp_path / "full")
    monkeypatch.setattr(run_module, "write_atomically", full)
    with pytest.raises(run_module.Unwritable, match=os.strerror(number)) as caught:
        run(config)
    assert caught.value.exit_code == 74
    assert snapshot(tmp_path / "full") == before


def test_a_checkpoint_of_another_run_is_passed_over(finished, tmp_path, capsys):
    other = replace(finished.train, seed=1)
    run(replace(finished, out=str(tmp_path / "other"), train=other))
    config = replace(finished, out=str(tmp_path / "run"), resume=True)
    shutil.copytree(finished.out, config.out)
    (tmp_path / "run" / "summary.json").unlink()
    theirs, ours = (tmp_path / n / "checkpoints" / "12" for n in ("other", "run"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    run(config)
    assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
    assert losses(Path(config.out)) == losses(Path(finished.out))
    assert final_state(config) == final_state(finished)
    happened = json.loads(
        (tmp_path / "run" / "incidents.jsonl").read_text().split("\n")[0]
    )
    assert happened["reason"] == "it is another run's: train.seed is 1 there and 0 here"
