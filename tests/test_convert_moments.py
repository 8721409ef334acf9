"""Adam's moments travel: a run of the reference trainer goes on in JAX, and back."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from convert_cases import (
    assert_same,
    one_thread,  # noqa: F401
    script,
)

from jaxllm.config import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    to_json,
)
from jaxllm.convert import from_state_dict
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.run_folder import RunFolder
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build, to_device
from torch_ref import ddp_pretrain, run_folder

export_weights = script("export_weights")
import_weights = script("import_weights")
torch_moments = script("torch_moments")

BEFORE, AFTER = 15, 50
MODEL = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=16
)


def config(out: Path, **model) -> RunConfig:
    return RunConfig(
        out=str(out),
        model=dataclasses.replace(MODEL, **model),
        compute=ComputeConfig(param_dtype="float32", compute_dtype="float32"),
        data=DataConfig(seq_len=15),
        optim=OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=5),
        parallel=ParallelConfig(data=1),
        train=TrainConfig(batch_size=4, steps=BEFORE + AFTER, save_every=BEFORE),
    )


def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    # A pattern that can be learned, so that the losses move.
    start, stride = rng.integers(0, 64, (2, 4, 1))
    tokens = (start + (stride % 5 + 1) * np.arange(16)) % 64
    return {
        "inputs": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "loss_mask": rng.random((4, 15)) < 0.9,
    }


class Torch:
    def __init__(self, run: RunConfig):
        self.config = run
        self.model = ddp_pretrain.make_model(run.model)
        self.optimizer = ddp_pretrain.make_optimizer(self.model, run.optim)

    def train(self, first: int, last: int) -> list[float]:
        loss = ddp_pretrain.SummedLoss(self.model)
        return [
            float(
                ddp_pretrain.train_step(
                    loss, self.optimizer, batch(step), config=self.config, step=step,
                    total_steps=self.config.train.steps,
                )["loss"]
            )
            for step in range(first, last)
        ]  # fmt: skip

    def save(self, step: int) -> Path:
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        run_folder.save(out, self.model, self.optimizer, self.config, step)
        return out


class Ours:
    def __init__(self, run: RunConfig):
        self.config = run
        mesh = make_mesh(run.parallel, jax.devices()[:1])
        self.program = build(run, mesh, total_steps=run.train.steps)
        self.state = self.program.init()

    def restore(self, folder: Path) -> int:
        checkpoints = Checkpoints(RunFolder(folder).checkpoints)
        restored = checkpoints.restore(self.program.abstract_state)
        self.state = restored.state
        return restored.step

    def save(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True)
        RunFolder(folder).config.write_text(to_json(self.config))
        checkpoints = Checkpoints(RunFolder(folder).checkpoints)
        checkpoints.save(step, self.state, {"data": None})
        checkpoints.close()

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            inputs = to_device(self.program, batch(step), parts=1)
            self.state, metrics = self.program.train_step(self.state, inputs)
            losses.append(float(metrics["loss"]))
        return losses


# The largest relative difference of 50 losses after the move. Measured: 2.6e-7; without
# the moments 1.5e-2.
GATE = 2e-5


def apart(a: list[float], b: list[float]) -> float:
    return float(np.max(np.abs(np.array(a) - b) / np.abs(b)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_torch_run_goes_on_in_jax_as_if_it_had_never_moved(tmp_path, tied):
    run = config(tmp_path / "torch", tie_word_embeddings=tied)
    theirs = Torch(run)
    theirs.train(0, BEFORE)
    source = theirs.save(BEFORE)
    expected = theirs.train(BEFORE, BEFORE + AFTER)
    args = [str(source), "--out", str(tmp_path / "run"), "--allow-pickle"]
    assert import_weights.main(args) == 0
    moved = RunFolder(tmp_path / "run").load_config()
    assert moved.optim == run.optim and moved.train == run.train
    ours = Ours(run)
    assert ours.restore(tmp_path / "run") == BEFORE
    rested = jax.tree.map(np.zeros_like, jax.device_get(ours.state["opt"]))
    found = ours.train(BEFORE, BEFORE + AFTER)
    print(f"{AFTER} losses within {apart(found, expected):.1e}, gate {GATE:.0e}")
    assert apart(found, expected) < GATE
    # The control: the same weights with the moments lost.
    ours.restore(tmp_path / "run")
    ours.state = ours.state | {"opt": jax.tree.map(jax.numpy.asarray, rested)}
    lost = apart(ours.train(BEFORE, BEFORE + AFTER), expected)
    print(f"without moments: {lost:.1e}, {lost / GATE:,.0f} times the gate")
    assert lost > 100 * GATE


@pytest.mark.parametrize("tied", [True, False])
def test_a_jax_run_goes_on_in_torch_as_if_it_had_never_moved(tmp_path, tied):
    run = config(tmp_path / "run", tie_word_embeddings=tied)
    ours = Ours(run)
    ours.train(0, BEFORE)
    ours.save(tmp_path / "run", BEFORE)
    kept = jax.tree.map(np.array, ours.state)
    expected = ours.train(BEFORE, BEFORE + AFTER)
    target = tmp_path / "torch" / f"step_{BEFORE:08d}"
    args = [str(tmp_path / "run"), "--format", "k_model", "--optimizer"]
    assert export_weights.main([*args, "--no-verify", "--out", str(target)]) == 0
    theirs = Torch(run)
    start = run_folder.restore(target, theirs.model, theirs.optimizer, run)
    assert start == BEFORE
    for entry in theirs.optimizer.state_dict()["state"].values():
        assert all(tensor.is_contiguous() for tensor in entry.values())
    # Bit for bit, before any of them moves on.
    names = torch_moments._optimizer(run)[0]
    for ours_name, theirs_name in torch_moments.OURS.items():
        entries = theirs.optimizer.state_dict()["state"]
        tensors = {names[i]: entry[theirs_name] for i, entry in entries.items()}
        arrays = torch_moments.to_arrays(tensors, where="moments")
        tree = from_state_dict(arrays, run.model, format="k_model")
        assert_same(tree, kept["opt"][ours_name])
    found = theirs.train(BEFORE, BEFORE + AFTER)
    print(f"{AFTER} losses within {apart(found, expected):.1e}, gate {GATE:.0e}")
    assert apart(found, expected) < GATE


def test_there_and_back_with_moments_is_bit_exact(tmp_path):
    run = config(tmp_path / "run")
    ours = Ours(run)
    ours.train(0, 3)
    ours.save(tmp_path / "run", 3)
    state = jax.device_get(ours.state)
    target = tmp_path / "torch" / "step_00000003"
    args = [str(tmp_path / "run"), "--format", "k_model", "--optimizer", "--no-verify"]
    assert export_weights.main([*args, "--out", str(target)]) == 0
    args = [str(target.parent), "--out", str(tmp_path / "back"), "--allow-pickle"]
    assert import_weights.main([*args, "--no-verify"]) == 0
    _, back = Checkpoints(RunFolder(tmp_path / "back").checkpoints).read_arrays("")
    assert_same(back, state)


DAMAGE = {
    "a step that is none": (lambda c: c.update(step=[1]), "'[1]'"),
    "a step beyond all": (lambda c: c.update(step=10**30), "2^31"),
    "a count that is none": (
        lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(np.inf)),
        "inf",
    ),
    "negative squares": (
        lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1.0),
        "negative",
    ),
    "a list of states": (lambda c: c["optimizer"].update(state=[]), "damaged"),
    "another model": (lambda c: c["config"]["model"].update(n_layers=10**9), "model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_moments_are_refused_in_one_line(damage, tmp_path, capsys):
    theirs = Torch(config(tmp_path / "torch"))
    theirs.train(0, 1)
    (step,) = theirs.save(1).glob("step_*")
    saved = torch_moments.load(step / "trainer.pt")
    change, says = DAMAGE[damage]
    change(saved)
    torch.save(saved, step / "trainer.pt")
    args = [str(step), "--out", str(tmp_path / "run"), "--allow-pickle"]
    capsys.readouterr()
    assert import_weights.main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "trainer.pt" in said and says in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_moved_has_no_moments_to_lose(tmp_path):
    theirs = Torch(config(tmp_path / "torch"))
    source = theirs.save(0)
    args = [str(source), "--out", str(tmp_path / "run"), "--allow-pickle"]
    assert import_weights.main([*args, "--no-verify"]) == 0
    _, opt = Checkpoints(RunFolder(tmp_path / "run").checkpoints).read_arrays("opt/")
    assert int(opt["count"]) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(opt["m"]))
