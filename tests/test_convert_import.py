"""import_weights.py: models that we did not design, and files better left closed."""

import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from convert_cases import (
    MODELS,
    assert_same,
    build_k_model,
    logits_of,
    one_thread,  # noqa: F401
    our_logits,
    relative,
    script,
    some_tokens,
    trained_like,
)

from jaxllm.config import ModelConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.configs import k_model_config, llama_config
from jaxllm.convert.folder import write_json
from jaxllm.convert.tensors import write_tensors
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.run_folder import RunFolder

import_weights = script("import_weights")
verify_import = script("verify_import")
SMALL = MODELS["tied, 2 of 4 heads"]
TOKENIZER = train_tokenizer(["import weights, and weights travel. " * 40], 300)


def imported(run: Path) -> tuple[ModelConfig, dict]:
    folder = RunFolder(run)
    _, params = Checkpoints(folder.checkpoints).read_arrays("params/")
    return folder.load_config().model, params


def write_llama(folder: Path, config: ModelConfig = SMALL, dtype: str = "float32"):
    folder.mkdir(parents=True, exist_ok=True)
    params = trained_like(config, dtype=dtype)
    write_json(folder / "config.json", llama_config(config, dtype=dtype))
    write_tensors(folder, to_state_dict(params, config, format="llama"))
    return params


def imports(words: list[str]) -> None:
    """Runs the command without its verification, which the random Llamas have."""
    assert import_weights.main([*words, "--no-verify"]) == 0


def refused(capsys, *args: object, out: Path) -> str:
    """Runs the command, which must fail in one line and leave nothing behind."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert import_weights.main([*map(str, args), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert len(said.err) < 700
    assert sorted(out.parent.iterdir()) == before
    return said.err


# Drawn by transformers, not by us.
FOREIGN = {
    "untied, theta 500000, eps 1e-6, 5 heads of 48, 3 shards": dict(
        hidden_size=160, intermediate_size=224, num_hidden_layers=3, head_dim=48,
        num_attention_heads=5, num_key_value_heads=1, vocab_size=499,
        rope_theta=500000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "tied, all heads": dict(
        hidden_size=96, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=6, vocab_size=301,
        tie_word_embeddings=True,
    ),
    "wide heads, grouped": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=333,
        rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
}  # fmt: skip


def drawn(seed: int) -> dict[str, Any]:
    """Sizes and constants as nobody would choose them together."""
    rng = np.random.default_rng(seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    groups, kv_heads = one_of(1, 2, 3, 5), one_of(1, 2, 3)
    return dict(
        hidden_size=groups * kv_heads * one_of(8, 10, 24),
        intermediate_size=int(rng.integers(20, 200)),
        num_hidden_layers=one_of(1, 2, 4),
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=one_of(2, 10, 48, 64),
        vocab_size=int(rng.integers(260, 500)),
        max_position_embeddings=one_of(40, 300, 4096),
        rope_theta=one_of(100.0, 10000.0, 500000.0, 8e6),
        rms_norm_eps=one_of(1e-3, 1e-5, 1e-6, 1e-8),
        tie_word_embeddings=one_of(True, False),
    )  # fmt: skip


LLAMAS = FOREIGN | {f"drawn {seed}": drawn(seed) for seed in range(3)}


@pytest.mark.parametrize("name", LLAMAS)
def test_random_llamas_import_and_match_transformers(name, tmp_path, capsys):
    torch.manual_seed(7)
    values: dict[str, Any] = LLAMAS[name]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # from 0.02 to weights that attend
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    size = sum(p.numel() * 4 for p in theirs.parameters())
    folder, out = tmp_path / "theirs", tmp_path / "run"
    theirs.save_pretrained(folder, max_shard_size=size // 2)
    assert len(list(folder.glob("*.safetensors"))) >= 2
    foreign = name.startswith("drawn")
    if foreign:
        # A tokenizer as others make them: its own special tokens, lower case.
        text = TOKENIZER._text.replace("<|im_start|>", "[CLS]")
        (folder / "tokenizer.json").write_text(text)
    capsys.readouterr()
    assert import_weights.main([str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "; verified, logits within" in said.out
    assert ("[CLS]" in said.err and "without its tokenizer" in said.err) == foreign
    assert not (out / "tokenizer.json").exists()
    config, params = imported(out)
    length = min(256, config.max_seq_len)
    tokens = some_tokens(config)[:, :length]
    found = relative(our_logits(params, config, tokens), logits_of(theirs, tokens))
    print(f"{name}: relative L2 {found:.1e}, gate 1e-5")
    assert found < 1e-5
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    for key, tensor in to_state_dict(params, config, format="llama").items():
        assert tensor.tobytes() == state[key].tobytes(), key


def test_a_bfloat16_llama_widens_exactly_or_stays(tmp_path):
    params = write_llama(tmp_path / "theirs", dtype="bfloat16")
    source = str(tmp_path / "theirs")
    imports([source, "--out", str(tmp_path / "wide")])
    wide = imported(tmp_path / "wide")[1]
    assert wide["norm"]["weight"].dtype == np.float32
    back = import_weights.cast_tree(wide, "bfloat16")
    assert_same(back, params)
    args = [source, "--out", str(tmp_path / "same"), "--dtype", "bfloat16"]
    imports(args)
    assert_same(imported(tmp_path / "same")[1], params)
    run = RunFolder(tmp_path / "same").load_config()
    assert run.compute.param_dtype == "bfloat16"


def test_old_folders_with_rotary_buffers_import_unless_scaled(tmp_path, capsys):
    folder = tmp_path / "old"
    params = write_llama(folder)
    tensors = dict(to_state_dict(params, SMALL, format="llama"))
    frequencies = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    for scale in (1.0, 0.25):
        for i in range(SMALL.n_layers):
            name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
            tensors[name] = (scale * frequencies).astype(np.float32)
        write_tensors(folder, tensors)
        out = tmp_path / f"run{scale}"
        if scale == 1.0:
            imports([str(folder), "--out", str(out)])
            assert_same(imported(out)[1], params)
        else:
            assert "inv_freq" in refused(capsys, folder, out=out)


def test_k_models_import_from_folder_file_and_pickle(tmp_path, capsys):
    folder = tmp_path / "k"
    folder.mkdir()
    params = trained_like(SMALL)
    tensors = to_state_dict(params, SMALL, format="k_model")
    model = build_k_model(tensors, SMALL)
    model.save_pretrained(folder)  # type: ignore[operator]
    torch.save(model.state_dict(), folder / "model.pth")
    TOKENIZER.save(folder / "tokenizer.json")
    for i, path in enumerate((folder, folder / "model.safetensors")):
        out = tmp_path / f"run{i}"
        imports([str(path), "--out", str(out)])
        assert_same(imported(out)[1], params)
        assert (out / "tokenizer.json").exists()
    path, out = folder / "model.pth", tmp_path / "pickled"
    assert "--allow-pickle" in refused(capsys, path, out=out)
    imports([str(path), "--out", str(out), "--allow-pickle"])
    assert_same(imported(out)[1], params)
    bf16 = model.bfloat16().state_dict()
    torch.save(bf16, folder / "half.pth")
    args = [str(folder / "half.pth"), "--out", str(tmp_path / "half")]
    imports([*args, "--allow-pickle"])
    expected = bf16["norm.weight"].float().numpy()
    assert (imported(tmp_path / "half")[1]["norm"]["weight"] == expected).all()


class Code:
    """What unpickles into a call."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_code_is_refused_and_nothing_runs(tmp_path, capsys):
    folder = tmp_path / "evil"
    folder.mkdir()
    write_json(folder / "config.json", k_model_config(SMALL))
    ran = tmp_path / "ran"
    tensors = {"norm.weight": torch.ones(64), "x": Code(ran)}
    torch.save(tensors, folder / "model.pth")
    torch.save(tensors, folder / "trainer.pt")
    said = refused(capsys, folder / "model.pth", "--allow-pickle", out=tmp_path / "out")
    assert "code" in said
    assert "code" in refused(capsys, folder, "--allow-pickle", out=tmp_path / "out")
    assert "--allow-pickle" in refused(capsys, folder, out=tmp_path / "out")
    assert not ran.exists()
    for content in ([1, 2], {"norm.weight": 3.0}, {}):
        torch.save(content, folder / "model.pth")
        refused(capsys, folder / "model.pth", "--allow-pickle", out=tmp_path / "out")
    (folder / "model.pth").write_bytes(b"\x80\x04not a pickle")
    refused(capsys, folder / "model.pth", "--allow-pickle", out=tmp_path / "out")


def _packed(path: Path) -> None:
    """Compresses a .pth, whose numbers then take memory that the file does not have."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_a_pickle_cannot_claim_more_than_it_holds(tmp_path, capsys):
    path, out = tmp_path / "model.pth", tmp_path / "out"
    write_json(tmp_path / "config.json", k_model_config(SMALL))
    tensors = to_state_dict(trained_like(SMALL), SMALL, format="k_model")
    good = {name: torch.tensor(np.array(t)) for name, t in tensors.items()}
    norm = "norm.weight"
    odd = {
        "more numbers than": {norm: torch.zeros(1).expand(10**12)},
        "without numbers": {norm: torch.ones(64, device="meta")},
        "float8": {norm: torch.ones(64).to(torch.float8_e4m3fn)},
        "is no name": {1: torch.ones(1), "zz": torch.ones(1)},
        "unpacks": {},
    }
    for says, change in odd.items():
        torch.save(good | change, path)
        if not change:
            _packed(path)
        assert says in refused(capsys, path, "--allow-pickle", out=out)
    torch.save(good, path)
    imports([str(path), "--out", str(out), "--allow-pickle"])


def _edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text()) | values)


def _tensors(folder: Path, change) -> None:
    tensors = dict(to_state_dict(trained_like(SMALL), SMALL, format="llama"))
    change(tensors)
    write_tensors(folder, tensors)


def _header(folder: Path, change) -> None:
    """Rewrites the header of model.safetensors, and nothing behind it."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    before = content[8:end].decode()
    after = change(before)
    assert after != before
    size = len(after).to_bytes(8, "little")
    path.write_bytes(size + after.encode() + content[end:])


def _set(name: str, value):
    return lambda folder: _tensors(folder, lambda t: t.update({name: value(t[name])}))


DAMAGE = {
    "unknown architecture": (
        lambda f: _edit(f, architectures=["MambaForCausalLM"], model_type="mamba"),
        "mamba",
    ),
    "scaled rotary embedding": (
        lambda f: _edit(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling",
    ),
    "biases": (lambda f: _edit(f, attention_bias=True), "attention_bias"),
    "another activation": (lambda f: _edit(f, hidden_act="relu"), "hidden_act"),
    "code to run": (lambda f: _edit(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json",
    ),
    "config.json is cut": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        "config.json",
    ),
    "more layers than weights": (
        lambda f: _edit(f, num_hidden_layers=10**9),
        "layers.3",
    ),
    "fewer layers than weights": (lambda f: _edit(f, num_hidden_layers=2), "layers.2"),
    "another vocabulary": (lambda f: _edit(f, vocab_size=2**31 - 1), "embed_tokens"),
    "untied without a head": (
        lambda f: _edit(f, tie_word_embeddings=False),
        "lm_head.weight",
    ),
    "a number beyond all floats": (
        lambda f: _edit(f, rms_norm_eps=10**400),
        "rms_norm_eps",
    ),
    "a name twice in config.json": (
        lambda f: (f / "config.json").write_text(
            '{"vocab_size": 307, "vocab_size": 9}'
        ),
        "'vocab_size' twice",
    ),
    "a tensor twice": (
        lambda f: _header(
            f,
            lambda text: text.replace(
                "{",
                '{"model.norm.weight": '
                '{"dtype": "F32", "shape": [64], "data_offsets": [0, 256]},',
                1,
            ),
        ),
        "model.safetensors",
    ),
    "overlapping tensors": (
        lambda f: _header(
            f,
            lambda text: re.sub(
                r'("model.norm.weight".*?"data_offsets":)\[\d+,\d+\]',
                r"\1[0,256]",
                text,
            ),
        ),
        "model.safetensors",
    ),
    "a lie about a dtype": (
        lambda f: _header(
            f,
            lambda text: text.replace(
                '"model.norm.weight":{"dtype":"F32","shape":[64]',
                '"model.norm.weight":{"dtype":"F16","shape":[128]',
            ),
        ),
        "model.norm.weight",
    ),
    "a header beyond the file": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\0" * 9),
        "model.safetensors",
    ),
    "an empty file": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors",
    ),
    "a missing tensor": (
        lambda f: _tensors(f, lambda t: t.pop("model.norm.weight")),
        "model.norm.weight",
    ),
    "an extra tensor": (
        lambda f: _tensors(f, lambda t: t.update(bias=t["model.norm.weight"])),
        "'bias'",
    ),
    "a wrong shape": (_set("model.norm.weight", lambda t: t[:-1]), "(63,)"),
    "another dtype": (
        _set("model.norm.weight", lambda t: t.astype(np.float16)),
        "model.norm.weight",
    ),
    "integers": (
        _set("model.norm.weight", lambda t: t.astype(np.int32)),
        "model.norm.weight",
    ),
    "not a number": (
        _set("model.norm.weight", lambda t: t * np.nan),
        "model.norm.weight",
    ),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "a value without end": (
        lambda f: _edit(f, hidden_act="relu" * 10**5),
        "hidden_act",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_folders_are_refused_in_one_line_and_leave_nothing(
    damage, tmp_path, capsys
):
    folder = tmp_path / "theirs"
    write_llama(folder)
    act, names = DAMAGE[damage]
    act(folder)
    assert names in refused(capsys, folder, out=tmp_path / "run")


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    folder, out = tmp_path / "theirs", tmp_path / "run"
    write_llama(folder)
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", out=out)
    (tmp_path / "notes.txt").write_text("x")
    args = (tmp_path / "notes.txt", "--config", folder / "config.json")
    assert "no .safetensors" in refused(capsys, *args, out=out)
    big = train_tokenizer([" ".join(map(str, range(3000)))], 400)
    big.save(tmp_path / "tokenizer.json")
    args = (folder, "--tokenizer", tmp_path / "tokenizer.json")
    assert "ids" in refused(capsys, *args, out=out)
    tensors = to_state_dict(trained_like(SMALL), SMALL, format="llama")
    big_one = tensors["model.norm.weight"] * 1e6
    write_tensors(folder, tensors | {"model.norm.weight": big_one})
    said = refused(capsys, folder, "--dtype", "float16", out=out)
    assert "'norm/weight' reaches" in said and "bfloat16" in said
    write_tensors(folder, tensors)
    TOKENIZER.save(folder / "tokenizer.json")
    (tmp_path / "data").mkdir()
    train_tokenizer(["another text"], 290).save(tmp_path / "data" / "tokenizer.json")
    said = refused(capsys, folder, "--data", tmp_path / "data", out=out)
    assert "another tokenizer" in said
    (folder / "tokenizer.json").unlink()
    said = refused(capsys, folder, "--data", tmp_path / "no", out=out)
    assert "does not exist" in said
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "exists" in refused(capsys, folder, out=out)


def test_a_foreign_tokenizer_is_left_out_with_a_word(tmp_path, capsys):
    folder = tmp_path / "theirs"
    write_llama(folder)
    (folder / "tokenizer.json").write_text("{}")
    imports([str(folder), "--out", str(tmp_path / "run")])
    assert "without its tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    shutil.rmtree(tmp_path / "run")
    # One of our kind that somebody gave a token beyond the embedding.
    values = json.loads(TOKENIZER._text)
    values["added_tokens"].append(
        values["added_tokens"][0] | {"id": 5000, "content": "<pad>"}
    )
    pad = values["added_tokens"][-1]["content"]
    values["model"]["vocab"][pad] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(values))
    imports([str(folder), "--out", str(tmp_path / "run")])
    assert "has 5001 ids" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    TOKENIZER.save(folder / "tokenizer.json")
    imports([str(folder), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_an_import_that_computes_something_else_is_refused(
    tmp_path, capsys, monkeypatch
):
    folder, out = tmp_path / "theirs", tmp_path / "run"
    write_llama(folder)
    # A loader that forgets the permutation of the rotary pairs.
    read = import_weights.read_params

    def forgetful(path, config, *, format):
        params = read(path, config, format=format)
        wq = params["layers"]["attention"]["wq"]
        wq["kernel"] = np.ascontiguousarray(wq["kernel"][..., ::-1])
        return params

    monkeypatch.setattr(import_weights, "read_params", forgetful)
    said = refused(capsys, folder, out=out)
    assert "transformers" in said and "--no-verify" in said
    # And one that transformers does not open at all.
    odd = replace(SMALL, dim=66)
    tensors = to_state_dict(trained_like(odd), odd, format="llama")
    write_tensors(folder, tensors)
    _edit(folder, hidden_size=66)
    assert "cannot be opened by transformers" in refused(capsys, folder, out=out)
    write_llama(folder)
    imports([str(folder), "--out", str(out)])
    monkeypatch.undo()
    file = folder / "model.safetensors"
    said = refused(capsys, file, "--verify", out=tmp_path / "other")
    assert "--verify cannot compare" in said
