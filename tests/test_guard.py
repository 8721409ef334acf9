"""Bad steps: skipped on the device, counted, undone when too many; nothing else moves.

Poison is put into batches by a monkeypatch: a factor, at a place in the data, by which
the step's loss and gradient are multiplied.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from poison import poison as poison_runs
from run_worker import tiny, write_data

from jaxllm.guard import GuardConfig
from jaxllm.presets import PRESETS
from jaxllm.train import guard, loop
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.digest import digest_state
from jaxllm.train.loop import run
from jaxllm.train.manifest import read_manifest
from jaxllm.train.metrics import read_jsonl
from jaxllm.train.rollback import Diverged
from jaxllm.train.run import open_batches
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build, to_device

NAN, INF = float("nan"), float("inf")


def follow(values: list[tuple[float, float]], factor: float = 10.0):
    """Whether each (loss, norm) is accepted, under which bounds, and the last guard."""
    step = jax.jit(lambda g, loss, norm: guard.judge(factor, g, loss, norm))
    state, kept, bounds = jax.jit(guard.init)(), [], []
    for loss, norm in values:
        state, good, bound = step(state, jnp.float32(loss), jnp.float32(norm))
        kept.append(bool(good))
        bounds.append(np.asarray(bound))
    return kept, bounds, state


def falling(n: int, seed: int = 0) -> list[tuple[float, float]]:
    """A loss that falls from 9 to 3 with 2 % of noise, a norm that drifts with 30 %."""
    rng = np.random.default_rng(seed)
    at = np.arange(n) / n
    losses = (9 - 6 * np.sqrt(at)) * np.exp(0.02 * rng.standard_normal(n))
    norms = (2 - at) * np.exp(0.3 * rng.standard_normal(n))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def test_the_bound_is_that_of_the_definition():
    values = falling(150)
    _, bounds, _ = follow(values)
    for n in (0, 15, 16, 40, 64, 65, 149):
        logs = np.log(np.array(values[max(0, n - 64) : n], np.float64)).reshape(-1, 2)
        if n < 16:
            assert np.all(bounds[n] == np.inf)
            continue

        def median(x):
            return np.sort(x)[(len(x) - 1) // 2]

        loss, norm = logs.T
        deviations = (
            max(0.02, 1.4826 * median(np.abs(np.diff(loss))) / np.sqrt(2)),
            max(0.1, 1.4826 * median(np.abs(norm - median(norm)))),
        )
        expected = [
            np.exp(median(x) + 10 * d)
            for x, d in zip((loss, norm), deviations, strict=True)
        ]
        assert np.allclose(bounds[n], expected, rtol=1e-5), n


def test_training_as_usual_is_never_bad_and_spikes_are():
    for seed in range(20):
        assert all(follow(falling(200, seed))[0])
    values = falling(200)
    values[120] = (values[120][0] * 1.5, values[120][1])
    values[140] = (values[140][0], values[140][1] * 100)
    kept, _, _ = follow(values)
    assert [i for i, good in enumerate(kept) if not good] == [120, 140]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_bad_at_once_and_leaves_the_guard_alone(bad):
    values = falling(40)
    before = follow(values)[2]
    for pair in ((bad, 1.0), (1.0, bad)):
        kept, _, after = follow([*values, pair])
        assert kept == [True] * 40 + [False]
        assert digest_state(after) == digest_state(before)
    assert follow([(bad, 1.0)])[0] == [False]


def test_a_lasting_change_of_level_is_accepted_in_the_end():
    values = [(3.0, 1.0)] * 64 + [(6.0, 1.0)] * 64
    kept, _, _ = follow(values)
    assert not any(kept[64:90]) and all(kept[100:])


def test_presets_that_are_compared_with_pytorch_have_no_bound():
    bounds = {name: make().guard.spike_factor for name, make in PRESETS.items()}
    assert bounds == {
        "demo": 10.0, "k-215m": 10.0, "k-259m": 10.0,
        "reference": 0.0, "reference-small": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def small(data: Path, out: Path, guard: GuardConfig | None = None, **train: Any):
    config = tiny(str(out), str(data), **dict(steps=40, log_every=7) | train)
    model = replace(config.model, dim=32, hidden_dim=64, head_dim=8)
    return replace(config, model=model, guard=guard or GuardConfig(spike_factor=10.0))


@pytest.fixture
def poison(monkeypatch):
    """A dict from batches of the data to the factor of their loss and gradient."""
    factors: dict[int, float] = {}
    poison_runs(factors, monkeypatch.setattr)
    return factors


def by_hand(config, batch_of: dict[int, int | None], first: int = 0):
    """Trains with the batch `batch_of` says for a step, None leaving the step out.

    Returns the digests of params and opt after the last, and the losses.
    """
    train, _ = open_batches(config)
    program = build(config, make_mesh(config.parallel), total_steps=config.train.steps)
    state, losses = program.init(), {}
    for step in range(config.train.steps):
        batch = batch_of.get(step, step)
        if batch is None:
            state["step"] = state["step"] + 1
            continue
        state, metrics = program.train_step(
            state, to_device(program, train[batch], parts=1)
        )
        losses[step] = float(metrics["loss"])
    return trained(digest_state(state)), losses


def trained(digests: dict[str, str]) -> dict[str, str]:
    return {path: d for path, d in digests.items() if not path.startswith("guard/")}


def outcome(out: str):
    folder = Path(out, "checkpoints")
    step = Checkpoints(folder).steps()[-1]
    arrays = read_manifest(folder / str(step), step)["arrays"]
    records = read_jsonl(Path(out, "metrics.jsonl"))
    losses = {r["step"]: r["loss"] for r in records if r.get("skipped") == 0}
    return trained({path: a["digest"] for path, a in arrays.items()}), losses


def summary_of(out: str) -> dict:
    return json.loads(Path(out, "summary.json").read_text())


def test_bad_steps_are_skipped_and_the_rest_is_as_if_they_were_not_there(
    poison, data, tmp_path, capsys
):
    config = small(data, tmp_path / "run")
    poison |= {3: NAN, 12: INF, 25: 1000.0, 26: NAN, 33: -INF}
    run(config)
    assert outcome(config.out) == by_hand(config, dict.fromkeys(poison))
    said = capsys.readouterr().out
    for step in poison:
        assert f"step {step} was skipped (batch {step}): loss" in said
    assert "(bound " in said
    assert "steps skipped: 5" in said
    happened = summary_of(config.out)["what_happened"]
    assert happened["skipped_steps"] == 5 and happened["rolled_back"] == 0
    bad = [
        r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r.get("skipped")
    ]
    assert [r["step"] for r in bad] == list(poison)
    assert 3 < bad[2]["loss_bound"] < bad[2]["loss"]


def test_nothing_is_skipped_without_poison(poison, data, tmp_path, capsys):
    config = small(data, tmp_path / "run")
    run(config)
    assert outcome(config.out) == by_hand(config, {})
    off = replace(config, guard=GuardConfig(), out=str(tmp_path / "off"))
    run(off)
    assert outcome(off.out) == outcome(config.out)
    assert "nothing out of the ordinary" in capsys.readouterr().out
    arrays = Checkpoints(tmp_path / "off" / "checkpoints").read_arrays("")[1]
    assert "guard" not in arrays


THREE = GuardConfig(spike_factor=10.0, bad_steps=3, rollbacks=2)


class Death(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def test_bad_steps_in_a_row_go_back_and_on_behind_them(
    poison, data, tmp_path, capsys, monkeypatch
):
    config = small(data, tmp_path / "run", THREE)
    poison |= {10: NAN, 18: NAN, 19: 1000.0, 20: INF, 21: NAN, 22: NAN}
    run(config)
    # Checkpoint 16 is the last before the bad steps 18 to 20. Then comes batch 21 as
    # step 16, and 22 as 17, which are two in a row and not three.
    expected = {10: None, 16: None, 17: None} | {s: s + 5 for s in range(18, 40)}
    assert outcome(config.out) == by_hand(config, expected)
    said = capsys.readouterr().out
    assert "STEPS 18-20 WERE BAD (loss nan, gradient norm nan)" in said
    assert "back to the checkpoint of step 16, and on with batch 21 of" in said
    summary = summary_of(config.out)
    assert summary["rollbacks"] == [
        {"to": 16, "first_batch": 18, "last_batch": 20,
         "reason": "loss nan, gradient norm nan"}
    ]  # fmt: skip
    assert summary["what_happened"]["rolled_back"] == 1
    assert summary["what_happened"]["skipped_steps"] == 6
    assert summary["what_happened"]["lost_s"] > 0

    # Dead before, within and behind the rollback, it ends in the very same state.
    cut = replace(config, out=str(tmp_path / "cut"))
    true_advance, true_rewind = loop.prefetched, Checkpoints.rewind
    deaths = [19, "rewind", 16, 17, 29]

    def prefetched(run, first):
        for item in true_advance(run, first):
            moved = run.position.data_offset > 0
            if deaths and item[0] == deaths[0] and moved == (item[0] != 19):
                deaths.pop(0)
                raise Death
            yield item

    def rewind(self, step):
        if deaths and deaths[0] == "rewind":
            deaths.pop(0)
            raise Death
        true_rewind(self, step)

    monkeypatch.setattr(loop, "prefetched", prefetched)
    monkeypatch.setattr(Checkpoints, "rewind", rewind)
    for _ in range(5):
        with pytest.raises(Death):
            run(cut)
    run(cut)
    assert not deaths
    assert outcome(cut.out) == outcome(config.out)
    summary = summary_of(cut.out)
    assert summary["rollbacks"] == summary_of(config.out)["rollbacks"]
    assert summary["what_happened"]["resumed"] == 5


def test_too_many_rollbacks_end_with_a_diagnosis(poison, data, tmp_path):
    config = small(data, tmp_path / "run", THREE)
    poison |= dict.fromkeys(range(17, 60), NAN)
    with pytest.raises(Diverged) as caught:
        run(config)
    assert caught.value.exit_code == 65
    said = str(caught.value)
    assert "\n" not in said
    # To 16, then to 12, since 16 was tried, then no more.
    for words in ("bad batches are 17-19, 20-22, 23-25", "--guard.rollbacks",
                  "after 2 rollback(s)", "diagnosis.json"):  # fmt: skip
        assert words in said, said
    report = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert [b["batch"] for b in report["batches"]] == list(range(17, 26))
    assert [b["to"] for b in report["bad"][:2]] == [16, 12]
    assert all(len(b["rows"]) == config.train.batch_size for b in report["batches"])
    summary = summary_of(config.out)
    assert not summary["finished"]
    assert summary["what_happened"]["rolled_back"] == 2
    # The state before is there, and a mended start goes on from it.
    poison.clear()
    run(replace(config, guard=replace(THREE, rollbacks=9)))
    assert summary_of(config.out)["finished"]


def test_a_checkpoint_without_a_guard_and_a_run_without_one_go_on(
    poison, data, tmp_path, capsys
):
    config = small(data, tmp_path / "run", GuardConfig(), steps=8)
    run(config)
    longer = replace(config.train, steps=12)
    guarded = replace(config, resume=True, train=longer, guard=THREE)
    run(guarded)
    assert "checkpoint 8 has no guard" in capsys.readouterr().out
    arrays = Checkpoints(tmp_path / "run" / "checkpoints").read_arrays("guard/")[1]
    assert int(arrays["seen"]) == 4
    longer = replace(config.train, steps=16)
    run(replace(config, resume=True, train=longer))
    assert "guard" not in Checkpoints(tmp_path / "run/checkpoints").read_arrays("")[1]
