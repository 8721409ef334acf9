"""The reference trainer: jaxllm's losses, any number of processes, any interruption."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.config import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from jaxllm.convert import from_state_dict, to_state_dict
from jaxllm.data.batches import Batches
from jaxllm.data.shards import Manifest, Shard, file_sha256, index_path
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, train_tokenizer
from jaxllm.presets import preset
from jaxllm.train import optim as jax_optim
from jaxllm.train import step as jax_step
from jaxllm.train.sharding import make_mesh
from torch_ref import ddp_pretrain as ref
from torch_ref.arguments import configure, make_parser
from torch_ref.run_folder import load_weights

SCRIPT = Path(ref.__file__)
MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=64
)
SMALL = ["--preset", "demo", "--dim", "32", "--n_layers", "1", "--n_heads", "2",
         "--n_kv_heads", "1", "--vocab_size", "320", "--max_seq_len", "32",
         "--steps", "8", "--batch_size", "4", "--accumulate", "2", "--log_every", "1",
         "--learning_rate", "0.003", "--warmup_steps", "2", "--threads", "1",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on many threads, in tests side by side, mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder of 60 documents whose tokens follow one another with some habit."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(["one two three four five six"], 261)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    rng = np.random.default_rng(0)
    splits = {"train": [_shard(folder, "train/00000.ds", rng, 60)], "val": []}
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
        dtype="uint16", splits=splits, sources=[], options={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def _shard(folder: Path, name: str, rng, documents: int) -> Shard:
    texts = []
    for length in rng.integers(4, 120, documents):
        walk = np.cumsum(rng.integers(0, 4, length)) % 250 + 5
        texts.append(np.concatenate([[BEGIN_ID], walk, [END_ID]]))
    tokens, path = np.concatenate(texts).astype("<u2"), folder / name
    tokens.tofile(path)
    np.cumsum([len(text) for text in texts]).astype("<u8").tofile(index_path(path))
    return Shard(
        name=name, documents=documents, tokens=len(tokens), text_bytes=len(tokens),
        sha256=file_sha256(path), index_sha256=file_sha256(index_path(path)),
    )  # fmt: skip


def _run(argv: list[str], capsys) -> tuple[int, str, str]:
    code = ref.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _metrics(out: Path) -> list[dict]:
    return [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def _config(algorithm, loss_norm, accumulate, **model) -> RunConfig:
    unit = "micro_step" if loss_norm == "micro_batch" else "update"
    return RunConfig(
        model=dataclasses.replace(MODEL, **model),
        compute=ComputeConfig(compute_dtype="float32", attention="plain"),
        data=DataConfig(layout="rows"),
        optim=OptimConfig(
            algorithm=algorithm, learning_rate=1e-3, min_learning_rate=1e-4,
            warmup_steps=5, loss_norm=loss_norm, schedule_unit=unit,
        ),
        train=TrainConfig(batch_size=8, accumulate=accumulate),
    )  # fmt: skip


def _ours(config: RunConfig, model, batches, steps: int) -> list[float]:
    """Losses of jaxllm's step, from the reference model's weights."""
    mesh = make_mesh(ParallelConfig(), devices=jax.devices()[:1])
    program = jax_step.build(config, mesh, total_steps=steps)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    state = program.init()
    state["params"] = jax.device_put(
        from_state_dict(weights, config.model, format="k_model"),
        jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state["params"]),
    )
    losses = []
    for step in range(steps):
        micros = {
            name: rows.reshape(config.train.accumulate, -1, *rows.shape[1:])
            for name, rows in batches[step].items()
        }
        state, metrics = program.train_step(
            state, jax.device_put(micros, program.batch_sharding)
        )
        losses.append(float(metrics["loss"]))
    return losses


def _theirs(config: RunConfig, model, batches, steps: int, **kwargs) -> list[float]:
    """Losses of the reference; moves `model`."""
    optimizer = ref.make_optimizer(model, config.optim)
    loss_module = ref.SummedLoss(model)
    return [
        ref.train_step(
            loss_module, optimizer, batches[step], config=config, step=step,
            total_steps=steps, **kwargs,
        )["loss"].item()
        for step in range(steps)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "loss_norm", "accumulate"),
    [
        ("adam", "micro_batch", 4),
        ("adamw", "token", 1),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in (
                ("adam", "micro_batch", 1),
                ("adam", "token", 1),
                ("adam", "token", 4),
                ("adamw", "token", 4),
                ("adamw", "micro_batch", 1),
                ("adamw", "micro_batch", 4),
            )
        ),
    ],
)
def test_50_losses_are_jaxllms(data, algorithm, loss_norm, accumulate):
    config = _config(algorithm, loss_norm, accumulate)
    batches = Batches(data, layout="rows", seq_len=63, batch_size=8)
    model = ref.make_model(config.model)
    ours = _ours(config, model, batches, 50)
    theirs = _theirs(config, model, batches, 50)
    assert ours[-1] < ours[0] - 1.0  # both learn: 5.5 to 3.9
    # Measured over these eight: at most 9.5e-7, two units in the last place.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit", ["update", "micro_step"])
def test_learning_rate_is_jaxllms(unit):
    optim = OptimConfig(warmup_steps=7, schedule_unit=unit)
    with jax.enable_x64(True):
        for step in range(120):
            ours = jax_optim.learning_rate(
                optim, jnp.int32(step), total_steps=100, accumulate=3
            )
            assert ref.learning_rate(optim, step, 100, 3) == pytest.approx(
                float(ours), rel=1e-14, abs=0
            )


def test_learning_rates_are_those_of_the_seeds_log():
    optim = preset("reference").optim
    printed = [f"{ref.learning_rate(optim, step, 3125):.7f}" for step in (100, 1600)]
    assert printed == ["0.0001995", "0.0001066"]


def test_float64_accumulation_changes_nothing(data):
    batches = Batches(data, layout="rows", seq_len=63, batch_size=8)
    losses = []
    for accumulate in (1, 2, 8):
        config = _config("adamw", "token", accumulate)
        model = ref.make_model(config.model, dtype="float64")
        losses.append(_theirs(config, model, batches, 5, dtype="float64"))
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-13)


def test_decay_acts_on_matrices_only():
    model = ref.make_model(MODEL)
    decayed, plain = ref.make_optimizer(model, OptimConfig()).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    count = sum(p.numel() for p in decayed["params"] + plain["params"])
    assert count == MODEL.n_params


def test_bfloat16_is_autocast_over_float32_weights(data):
    config = _config("adamw", "token", 1)
    batches = Batches(data, layout="rows", seq_len=63, batch_size=8)
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = ref.make_model(config.model)
        losses.append(_theirs(config, model, batches, 5, dtype=dtype))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)


def test_dropout_is_decided_by_the_step(data):
    config = _config("adamw", "token", 1, dropout=0.3)
    batches = Batches(data, layout="rows", seq_len=63, batch_size=8)
    losses = []
    for _ in range(2):
        model = ref.make_model(config.model)
        torch.manual_seed(len(losses))
        losses.append(_theirs(config, model, batches, 3))
    assert losses[0] == losses[1]


def test_log_line_is_the_seeds(data, tmp_path, capsys):
    code, out, _ = _run([*SMALL, "--data", str(data), "--out", str(tmp_path)], capsys)
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 8
    assert lines[0].startswith("Epoch:[1/1](0/8) loss:5.")
    assert " lr:0.0015000 epoch_Time:0.0min; grad_norm:" in lines[0]
    records = _metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(8))
    assert set(records[0]) == {"step", "loss", "lr", "grad_norm", "clip", "tokens"}


def test_log_every_prints_those_and_the_last(data, tmp_path, capsys):
    argv = [*SMALL, "--log_every", "3", "--json", "--data", str(data)]
    code, out, _ = _run([*argv, "--out", str(tmp_path)], capsys)
    assert code == 0
    shown = [json.loads(line) for line in out.splitlines()[1:]]
    assert [record["step"] for record in shown] == [0, 3, 6, 7]
    assert len(_metrics(tmp_path)) == 8


def test_resume_equals_uninterrupted(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--dropout", "0.2", "--save_every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _run([*argv, "--out", str(whole)], capsys)[0] == 0
    assert _run([*argv, "--out", str(cut)], capsys)[0] == 0
    for late in ("step_00000006", "step_00000008"):
        for file in sorted((cut / late).iterdir()):
            file.unlink()
        (cut / late).rmdir()
    code, out, err = _run([*argv, "--out", str(cut), "--resume"], capsys)
    assert (code, err) == (0, "")
    assert "(3/8)" in out and "(2/8)" not in out
    assert _metrics(whole) == _metrics(cut)
    tensors = [ref.make_model(MODEL_SMALL) for _ in range(2)]
    for model, folder in zip(tensors, (whole, cut), strict=True):
        load_weights(model, folder / "step_00000008")
    for one, other in zip(*(model.parameters() for model in tensors), strict=True):
        assert torch.equal(one, other)


MODEL_SMALL = ModelConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=320, max_seq_len=32
)


def test_only_the_newest_checkpoints_stay(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--save_every", "2", "--keep", "2"]
    assert _run([*argv, "--out", str(tmp_path)], capsys)[0] == 0
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["metrics.jsonl", "step_00000006", "step_00000008"]


def test_init_from_starts_at_those_weights(data, tmp_path, capsys):
    """A jaxllm state dict and a file of save_pretrained give the same first loss."""
    from safetensors.numpy import save_file

    model = ref.make_model(MODEL_SMALL, seed=7)
    model.save_pretrained(tmp_path / "pretrained")
    weights = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    tree = from_state_dict(weights, MODEL_SMALL, format="k_model")
    tensors = to_state_dict(tree, MODEL_SMALL, format="k_model")
    dense = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    save_file(dense, tmp_path / "ours.safetensors")
    firsts = []
    for number, source in enumerate(("pretrained", "ours.safetensors")):
        argv = [*SMALL, "--data", str(data), "--init_from", str(tmp_path / source)]
        out = tmp_path / str(number)
        assert _run([*argv, "--out", str(out)], capsys)[0] == 0
        firsts.append(_metrics(out)[0]["loss"])
    fresh = tmp_path / "fresh"
    assert _run([*SMALL, "--data", str(data), "--out", str(fresh)], capsys)[0] == 0
    assert firsts[0] == firsts[1] != _metrics(fresh)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("loss_norm", ["token", "micro_batch"])
def test_two_processes_equal_one(data, tmp_path, loss_norm):
    argv = [*SMALL, "--data", str(data), "--dtype", "float64", "--layout", "rows",
            "--loss_norm", loss_norm]  # fmt: skip
    metrics = []
    for world in (1, 2):
        out = tmp_path / str(world)
        launch = [sys.executable]
        if world > 1:
            launch += ["-m", "torch.distributed.run", "--standalone",
                       "--nproc_per_node", str(world)]  # fmt: skip
        done = subprocess.run(
            [*launch, SCRIPT, *argv, "--out", out],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        metrics.append(_metrics(out))
    for one, two in zip(*metrics, strict=True):
        assert one["tokens"] == two["tokens"]
        # Measured 2e-16 relative: one sum in another order.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-13)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_compiled_equals_eager(data):
    config = _config("adamw", "token", 1)
    batches = Batches(data, layout="rows", seq_len=63, batch_size=8)
    eager = _theirs(config, ref.make_model(config.model), batches, 5)
    model = ref.make_model(config.model)
    optimizer, loss_module = (
        ref.make_optimizer(model, config.optim),
        ref.SummedLoss(model),
    )
    try:
        loss_module.compile(fullgraph=True)
        compiled = [
            ref.train_step(
                loss_module, optimizer, batches[step], config=config, step=step,
                total_steps=5,
            )["loss"].item()
            for step in range(5)
        ]  # fmt: skip
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip("no C++ compiler for torch.compile")
        raise
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--preset", "big"], ["'big'", "choose one of demo"]),
        (["--data", "nowhere"], ["nowhere", "prepare_data.py"]),
        (["--vocab_size", "260"], ["261", "260", "vocab"]),
        (["--accumulate", "3"], ["batch_size=4", "accumulate=3", "change one"]),
        (["--n_kv_heads", "3"], ["n_kv_heads=3", "divisor"]),
        (["--resume"], ["no checkpoint", "without --resume"]),
        (["--init_from", "gone"], ["--init_from gone", "give a file"]),
        (["--device", "tpu"], ["--device tpu", "cpu, cuda"]),
        (["--learning_rate", "1e30", "--clip_norm", "0"], ["loss", "--learning_rate"]),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, change, words):
    argv = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), *change]
    code, _, err = _run(argv, capsys)
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--layout", "books"], ["--layout", "'books'", "packed"]),
        (["--batch", "8"], ["--batch"]),
    ],
)
def test_bad_flags_are_one_line(capsys, change, words):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["--data", "x", *change])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_second_start_refuses_the_folder_of_a_run(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--out", str(tmp_path)]
    assert _run(argv, capsys)[0] == 0
    code, _, err = _run(argv, capsys)
    assert code == 2 and "--resume" in err and "another --out" in err


def test_resume_refuses_another_configuration(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--out", str(tmp_path)]
    assert _run(argv, capsys)[0] == 0
    code, _, err = _run([*argv, "--resume", "--learning_rate", "0.004"], capsys)
    assert code == 2 and "optim.learning_rate=0.003, not 0.004" in err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", ["lacks 'norm.weight'"]),
        ("unknown", ["unknown tensor 'extra'"]),
        ("shape", ["'norm.weight' has shape (3,)", "(32,)"]),
        ("untied", ["output.weight differs"]),
    ],
)
def test_wrong_weights_are_named(tmp_path, damage, words):
    from safetensors.numpy import save_file

    model = ref.make_model(MODEL_SMALL)
    tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    if damage == "missing":
        del tensors["norm.weight"]
    elif damage == "unknown":
        tensors["extra"] = np.zeros(2, np.float32)
    elif damage == "shape":
        tensors["norm.weight"] = np.zeros(3, np.float32)
    else:
        tensors["output.weight"] = tensors["output.weight"] + 1
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "weights.safetensors")
    assert all(word in str(caught.value) for word in words), caught.value


def test_widths_follow_a_changed_dim():
    args = make_parser().parse_args(["--data", "x", "--preset", "demo", "--dim", "96"])
    model = configure(args).model
    assert (model.hidden_dim, model.head_dim) == (256, 16)
