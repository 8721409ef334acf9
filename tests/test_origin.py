"""Runs that begin with weights from elsewhere, and imported runs that go on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from convert_cases import assert_same, script, trained_like

from jaxllm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.configs import llama_config
from jaxllm.convert.folder import write_json
from jaxllm.convert.tensors import write_tensors
from jaxllm.data.corpus import prepare
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.loop import run
from jaxllm.train.origin import find_weights
from jaxllm.train.run_folder import RunFolder

import_weights, pretrain = script("import_weights"), script("pretrain")
VOCAB = 300
MODEL = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=32
)


def shards(folder: Path, word: str) -> Path:
    lines = [json.dumps({"text": f"{word} {i} {word} " * 9}) for i in range(40)]
    (folder / f"{word}.jsonl").write_text("\n".join(lines))
    prepare([folder / f"{word}.jsonl"], folder / word, vocab_size=VOCAB, workers=1,
            val_fraction=0.1)  # fmt: skip
    return folder / word


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Two data folders with different tokenizers; a Llama, bare and with the first."""
    room = tmp_path_factory.mktemp("origin")
    shards(room, "poem")
    shards(room, "prose")
    tensors = to_state_dict(trained_like(MODEL), MODEL, format="llama")
    for name in ("bare", "llama"):
        (room / name).mkdir()
        write_json(room / name / "config.json", llama_config(MODEL))
        write_tensors(room / name, tensors)
    Tokenizer.load(room / "poem").save(room / "llama" / "tokenizer.json")
    for name in ("bare", "llama"):
        out = ["--out", str(room / f"run-{name}")]
        assert import_weights.main([str(room / name), *out, "--no-verify"]) == 0
    return room


def new_run(room: Path, origin: str, out: Path, data: str = "poem", **train: Any):
    rhythm: dict[str, Any] = dict(
        batch_size=8, steps=1, eval_every=0, sample_every=0, sample_tokens=2,
        eval_rows=4,
    )  # fmt: skip
    return RunConfig(
        out=str(out), init_from=str(room / origin) if origin else "", model=MODEL,
        data=DataConfig(path=str(room / data) if data else ""),
        train=TrainConfig(**rhythm | train),
    )  # fmt: skip


def first_state(folder: Path) -> dict:
    return Checkpoints(RunFolder(folder).checkpoints).read_arrays("", step=0)[1]


def refused(config: RunConfig, *words: str) -> None:
    before = {p: p.read_bytes() for p in Path(config.out).rglob("*.json")}
    with pytest.raises(ValueError) as caught:
        run(config)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in Path(config.out).rglob("*.json")} == before


@pytest.mark.parametrize("origin", ["llama", "run-llama"])
def test_a_new_run_begins_with_the_weights_and_an_optimizer_at_rest(
    origin, room, tmp_path
):
    config = new_run(room, origin, tmp_path / "run")
    run(config)
    state = first_state(tmp_path / "run")
    assert_same(state["params"], trained_like(MODEL))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt"]))
    trained = Checkpoints(RunFolder(tmp_path / "run").checkpoints)
    assert trained.steps() == [0, 1]
    # The same command goes on with it, and other weights are another run.
    (tmp_path / "run" / "summary.json").unlink()
    refused(replace(config, init_from=str(room / "bare")), "init_from", "bare", "--out")


def test_weights_that_do_not_fit_the_new_run_are_refused_by_name(room, tmp_path):
    out = tmp_path / "run"
    refused(new_run(room, "run-llama", out, "prose"), "tokenizer", "prose",
            f"--tokenizer {room / 'run-llama' / 'tokenizer.json'}")  # fmt: skip
    refused(new_run(room, "run-llama", out, ""), "--data.path", "--tokenizer")
    refused(new_run(room, "bare", out, ""), "--data.path")
    wide = new_run(room, "llama", out)
    wide = replace(wide, model=replace(MODEL, n_layers=3))
    refused(wide, "model.n_layers=2", "model.n_layers=3")
    refused(new_run(room, "nowhere", out), "nowhere", "does not exist")
    refused(new_run(room, "poem", out), "poem", "holds no run")
    with pytest.raises(ValueError, match="the new run itself"):
        new_run(room, "run-llama", room / "run-llama")
    assert not (out / "config.json").exists()


def test_an_import_without_data_goes_on_with_data_of_its_tokenizer(room, tmp_path):
    out = tmp_path / "run"
    assert (
        import_weights.main([str(room / "llama"), "--no-verify", "--out", str(out)])
        == 0
    )
    imported = RunFolder(out).load_config()
    asked = new_run(room, "", out)
    here = replace(
        imported,
        resume=True,
        train=replace(asked.train, batch_size=32),
        data=asked.data,
    )
    refused(replace(here, data=DataConfig()), "--data.path", "--tokenizer")
    refused(new_run(room, "", out, "prose", batch_size=32), "prose", "--tokenizer")
    run(here)
    assert Checkpoints(RunFolder(out).checkpoints).steps() == [0, 1]


def test_the_command_takes_the_network_from_the_weights(room, tmp_path):
    words = ["--init-from", str(room / "llama"), "--out", str(tmp_path)]
    config = pretrain.parse([*words, "--optim.learning-rate", "3e-4"])
    assert config.model == MODEL
    assert config.optim.learning_rate == 3e-4
    with pytest.raises(ValueError, match="does not exist"):
        pretrain.parse(["--init-from", "nowhere"])


def test_weights_are_found_with_the_tokenizer_that_fits_them(room):
    sha256 = Tokenizer.load(room / "poem").sha256
    for name in ("llama", "run-llama"):
        tokenizer = find_weights(room / name).tokenizer
        assert tokenizer is not None and tokenizer.sha256 == sha256
    assert find_weights(room / "bare").tokenizer is None
    assert find_weights(room / "llama" / "model.safetensors").format == "llama"
    with pytest.raises(ValueError, match="--step 3"):
        find_weights(room / "llama").read(3)
