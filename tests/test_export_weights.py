"""export_weights.py: folders that others open, proven or refused, whole or absent."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from convert_cases import (
    MODELS,
    assert_same,
    one_thread,  # noqa: F401
    our_logits,
    script,
    trained_like,
)

from jaxllm.config import ComputeConfig, DataConfig, ModelConfig, RunConfig
from jaxllm.convert import from_state_dict, names
from jaxllm.convert.names import parameter_tree
from jaxllm.convert.tensors import read_tensors
from jaxllm.data.corpus import prepare
from jaxllm.data.tokenizer import Tokenizer
from torch_ref import k_model

export_weights = script("export_weights")
import_weights = script("import_weights")
verify_weights = script("verify_weights")

CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=400, max_seq_len=64
)
TEXTS = [
    "hello <|im_end|> and <|im_start|>user",
    "a\r\nb\r",
    "\x00nul\x00",
    "  lead  two \n\n\t tabs ",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 caf\u00e9 e\u0301",
    "<s></s><unk>",
    "don't, we'll 's \u4e2d\u6587",
    "\ufeffbom\u2028",
    "",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with data, tokenizer, metrics and a checkpoint of weights that attend."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    lines = [json.dumps({"text": f"{i} {p}"}) for i, p in enumerate(_paragraphs())]
    source = folder.parent / "source.jsonl"
    source.write_text("\n".join(lines))
    data = folder.parent / "data"
    prepare([source], data, vocab_size=380, val_fraction=0.3, workers=1)
    write_run(folder, trained_like(CONFIG), data=str(data))
    Tokenizer.load(data).save(folder / "tokenizer.json")
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 6.0, "val_bpb": 3.1}\n'
        '{"step": 7, "val_loss": 5.0, "val_bpb": 2.5}\n'
        '{"step": 9, "val_loss": 1.0, "val_bpb": 0.5}\n'
    )
    return folder


def _paragraphs() -> list[str]:
    sources = [verify_weights, export_weights, import_weights, names]
    return [
        paragraph
        for module in sources
        for paragraph in Path(module.__file__).read_text().split("\n\n")
        if paragraph.strip()
    ]


def write_run(folder: Path, params: dict, *, data: str = "", **model: Any) -> None:
    dtype = str(params["norm"]["weight"].dtype)
    config = RunConfig(
        out=str(folder),
        model=ModelConfig(**{**CONFIG.__dict__, **model}),
        compute=ComputeConfig(param_dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(path=data),
    )
    zeros = [
        parameter_tree(config.model, lambda s: np.zeros(s, dtype)) for _ in range(2)
    ]
    opt = {"count": np.int32(7), "m": zeros[0], "v": zeros[1]}
    opt["count"] = np.full((), 7, np.int32)
    state = {"step": np.full((), 7, np.int32), "params": params, "opt": opt}
    folder.mkdir()
    import_weights.write_run(folder, config, state, {"data": None}, None)


def export(*args: object) -> int:
    return export_weights.main([str(arg) for arg in args])


def report(folder: Path) -> dict:
    return json.loads((folder / "parity.json").read_text())


def test_an_export_is_what_transformers_opens_and_says_so(run, tmp_path):
    out = tmp_path / "llama"
    assert export(run, "--out", out, "--verify") == 0
    found = report(out)
    assert found["status"] == "verified" and found["step"] == 7
    assert all(check["passed"] for check in found["checks"])
    logits = next(check for check in found["checks"] if check["name"] == "logits")
    assert logits["relative_l2"] < 5e-6 and "held-out documents" in logits["text"]
    assert logits["top1_agreement"] == 1.0
    card = (out / "README.md").read_text()
    for words in ("relative L2", "2.5000", "sha256", "from_pretrained", "near-ties"):
        assert words in card
    assert "0.5000" not in card  # evaluated after the exported step
    params = from_state_dict(read_tensors(out), CONFIG, format="llama")
    assert_same(params, trained_like(CONFIG))
    # Once more replaces it, whole.
    assert export(run, "--out", out, "--no-verify") == 0
    assert report(out)["status"] == "not verified"
    assert "Not verified" in (out / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_the_exported_tokenizer_gives_text_back(run, tmp_path):
    out = tmp_path / "llama"
    assert export(run, "--out", out, "--no-verify") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = Tokenizer.load(run)
    for text in TEXTS:
        assert theirs.decode(theirs(text).input_ids) == text
        as_text = theirs(text, split_special_tokens=True).input_ids
        assert as_text == ours.encode(text) and theirs.decode(as_text) == text
    assert theirs("<|im_start|>x<|im_end|>").input_ids[::2] == [3, 4]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (3, 4)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    said = theirs.apply_chat_template(chat, tokenize=False)
    asks = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert said == asks + "yo<|im_end|>\n"
    asked = theirs.apply_chat_template(
        chat[:1], tokenize=False, add_generation_prompt=True
    )
    assert asked == asks


def test_k_model_exports_load_strictly_and_compute_our_logits(run, tmp_path):
    out = tmp_path / "k"
    assert export(run, "--format", "k_model", "--out", out, "--pth", "--optimizer") == 0
    assert report(out)["status"] == "verified"
    model = k_model.Transformer.from_pretrained(out)
    state = torch.load(out / "model.pth", weights_only=True)
    model.load_state_dict(state, strict=True)
    head, table = state["output.weight"], state["tok_embeddings.weight"]
    assert head.data_ptr() == table.data_ptr()
    trainer = torch.load(out / "trainer.pt", weights_only=True)
    assert trainer["step"] == 7 and trainer["optimizer"]["state"][0]["step"] == 7.0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_exports_read_back(run, tmp_path, dtype):
    from jaxllm.convert.export import round_params
    from jaxllm.convert.gguf_file import read_gguf

    out = tmp_path / "gguf"
    assert export(run, "--format", "gguf", "--dtype", dtype, "--out", out) == 0
    found = report(out)
    assert found["status"] == "verified"
    (file,) = out.glob("*.gguf")
    back = from_state_dict(read_gguf(file), CONFIG, format="gguf")
    assert_same(back, round_params(trained_like(CONFIG), CONFIG, dtype))
    print({check["name"]: check["passed"] for check in found["checks"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_exports_in_shards_are_verified(run, tmp_path, dtype):
    out = tmp_path / "half"
    args = ("--dtype", dtype, "--max-shard-gb", "0.0001", "--out", out)
    assert export(run, *args) == 0
    assert report(out)["status"] == "verified"
    assert len(list(out.glob("*.safetensors"))) > 1
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == dtype
    assert {str(t.dtype) for t in read_tensors(out).values()} == {dtype}


def test_bfloat16_and_untied_runs_without_data_or_tokenizer_export(tmp_path):
    import dataclasses

    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False, rope_theta=5e5)
    params = trained_like(untied, dtype="bfloat16")
    run = tmp_path / "run"
    write_run(run, params, tie_word_embeddings=False, rope_theta=5e5)
    assert export(run) == 0
    out = run / "export" / "llama"
    assert "random ids" in report(out)["text"] and report(out)["dtype"] == "bfloat16"
    assert_same(from_state_dict(read_tensors(out), untied, format="llama"), params)
    assert not (out / "tokenizer.json").exists()


MISTAKES = {
    "not permuted": ("rotary", ""),
    "permuted by the wrong heads": ("rotary", "n_kv_heads"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_export_fails_and_is_marked(
    run, tmp_path, capsys, monkeypatch, mistake
):
    field, value = MISTAKES[mistake]
    wrong = [
        row if row.rotary != "n_heads" else names.Row(**{**row.__dict__, field: value})
        for row in names.TABLE
    ]
    monkeypatch.setattr(names, "TABLE", tuple(wrong))
    out = tmp_path / "llama"
    assert export(run, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "logits" in said and str(out) in said
    assert not out.exists()
    failed = tmp_path / "llama.failed"
    assert report(failed)["status"] == "failed"
    assert "Do not use it" in (failed / "README.md").read_text()
    (logits,) = [c for c in report(failed)["checks"] if c["name"] == "logits"]
    margin = logits["relative_l2"] / logits["relative_l2_gate"]
    print(f"{mistake}: {margin:,.0f} times the gate, KL {logits['max_kl_nats']:.2g}")
    assert margin > 1000
    # Put right, it takes its place, and the failed one is gone.
    monkeypatch.undo()
    assert export(run, "--out", out) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("lost", ["norm_eps", "rope_theta", "tie_word_embeddings"])
def test_a_number_lost_in_config_json_fails_the_export(
    run, tmp_path, monkeypatch, lost
):
    from jaxllm.convert import export as writer

    def describe(config, *, dtype):
        values = writer_llama_config(config, dtype=dtype)
        if lost == "norm_eps":
            values["rms_norm_eps"] = 1e-6
        elif lost == "rope_theta":
            values["rope_parameters"]["rope_theta"] = values["rope_theta"] = 10100.0
        else:
            values["tie_word_embeddings"] = False
        return values

    writer_llama_config = writer.llama_config
    monkeypatch.setattr(writer, "llama_config", describe)
    assert export(run, "--out", tmp_path / "out") == 2
    assert report(tmp_path / "out.failed")["status"] == "failed"


@pytest.mark.parametrize("format", ["llama", "k_model", "gguf"])
def test_an_export_that_cannot_be_opened_fails_and_is_marked(
    run, tmp_path, monkeypatch, capsys, format
):
    write = export_weights.write_export

    def cut(draft, *args, **options):
        write(draft, *args, **options)
        (file,) = [p for p in draft.iterdir() if p.suffix in (".safetensors", ".gguf")]
        file.write_bytes(file.read_bytes()[:-4000])

    monkeypatch.setattr(export_weights, "write_export", cut)
    assert export(run, "--format", format, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "weights read back" in said and "out.failed" in said
    assert report(tmp_path / "out.failed")["status"] == "failed"
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]


FULL = """
import resource, signal, sys
sys.path.insert(0, "scripts")
import export_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(export_weights.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("format", ["llama", "gguf"])
def test_a_disk_without_room_is_said_in_one_line_and_leaves_nothing(
    run, tmp_path, format
):
    words = [str(run), "--format", format, "--no-verify", "--out", str(tmp_path / "x")]
    result = subprocess.run(
        [sys.executable, "-c", FULL, *words], capture_output=True, text=True,
        cwd=Path(__file__).parents[1], timeout=300,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "was not written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_torch_the_export_is_written_and_says_so(
    run, tmp_path, capsys, monkeypatch
):
    find_spec = verify_weights.importlib.util.find_spec
    monkeypatch.setattr(
        verify_weights.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch" else find_spec(name, *rest),
    )
    assert export(run, "--out", tmp_path / "out") == 0
    assert "torch is not installed" in capsys.readouterr().out
    assert report(tmp_path / "out")["reason"] == "torch is not installed"
    assert export(run, "--out", tmp_path / "no", "--verify") == 2
    assert "needs torch" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


REFUSED = {
    "no run": (("nowhere",), "nowhere"),
    "no such step": (("RUN", "--step", "3"), "no checkpoint 3"),
    "flags of another format": (("RUN", "--pth"), "--pth"),
    "moments rounded": (
        ("RUN", "--format", "k_model", "--optimizer", "--dtype", "bfloat16"),
        "--dtype",
    ),
    "no end of a shard": (("RUN", "--max-shard-gb", "inf"), "--max-shard-gb"),
    "no shard is that small": (("RUN", "--max-shard-gb", "0"), "--max-shard-gb"),
    "not ours to replace": (("RUN", "--out", "THESIS"), "--out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_in_one_line(case, run, tmp_path, capsys):
    args, says = REFUSED[case]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("!")
    places = {"RUN": str(run), "THESIS": str(thesis)}
    args = [places.get(arg, arg) for arg in args]
    if "--out" not in args:
        args += ["--out", str(tmp_path / "out")]
    code = 74 if "no checkpoint" in says else 2
    assert export(*args) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert says in said
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_diverged_weights_and_overflow_are_refused_by_name(tmp_path, capsys):
    params = trained_like(CONFIG)
    params["norm"]["weight"][3] = 1e6
    write_run(tmp_path / "big", params)
    assert export(tmp_path / "big", "--dtype", "float16") == 2
    assert "'norm.weight' reaches 1e+06" in capsys.readouterr().err
    params["norm"]["weight"][3] = np.nan
    write_run(tmp_path / "nan", params)
    assert export(tmp_path / "nan") == 2
    assert "'norm.weight' holds 1 values" in capsys.readouterr().err
    assert not (tmp_path / "nan" / "export").exists() or not any(
        (tmp_path / "nan" / "export").iterdir()
    )


def test_greedy_continuations_of_20_prompts_equal_ours_in_transformers(tmp_path):
    """256 tokens on 20 prompts, with near-ties listed."""
    import dataclasses

    config = dataclasses.replace(
        MODELS["tied, 2 of 4 heads"], max_seq_len=272, n_layers=2
    )
    params = trained_like(config)
    params["tok_embeddings"]["embedding"] *= 3  # logits of a model that is sure
    script("export_weights").write_export(
        tmp_path, params, config, format="llama", tokenizer=None
    )
    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = None
    prompts = np.random.default_rng(2).integers(0, config.vocab_size, (20, 16))
    said = model.generate(
        torch.from_numpy(prompts),
        attention_mask=torch.ones(20, 16, dtype=torch.long),
        do_sample=False,
        max_new_tokens=256,
        pad_token_id=4,
    ).numpy()
    assert said.shape == (20, 272)
    ours = our_logits(params, config, said)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(said)).logits.numpy()
    noise = float(np.abs(ours - theirs).max())
    found = export_weights_compare().check_greedy(ours, said, prompt=16, noise=noise)
    print({key: value for key, value in found.items() if key != "different"})
    assert found["passed"] and found["new_tokens"] == 256


def export_weights_compare() -> Any:
    from jaxllm.convert import compare

    return compare


def test_the_comparison_notices_what_it_should():
    compare = export_weights_compare()
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((2, 30, 50)).astype(np.float32)
    same = compare.compare_logits(ours, ours)
    assert same["passed"] and same["relative_l2"] == 0 and same["top1_agreement"] == 1
    for bad in (np.nan, np.inf, 1e3):
        theirs = ours.copy()
        theirs[1, 7, 9] = bad
        found = compare.compare_logits(ours, theirs)
        assert not found["passed"]
        json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="shape"):
        compare.compare_logits(ours, ours[:, :, :-1])
    tokens = ours.argmax(-1)
    written = np.concatenate([tokens[:, :1], tokens[:, :-1]], axis=1)
    assert compare.check_greedy(ours, written, prompt=1, noise=1e-6)["passed"]
    written[0, 20] = (written[0, 20] + 1) % 50
    found = compare.check_greedy(ours, written, prompt=1, noise=1e-6)
    assert not found["passed"] and found["different"][0]["position"] == 20
    gap = found["different"][0]["gap"]
    found = compare.check_greedy(ours, written, prompt=1, noise=gap)
    assert found["passed"] and len(found["near_ties"]) == 1


def test_the_script_explains_itself(capsys):
    for name in ("export_weights", "import_weights"):
        with pytest.raises(SystemExit) as ended:
            script(name).main(["--help"])
        assert ended.value.code in (0, None)
        help_text = capsys.readouterr().out
        assert "--out" in help_text and "default" in help_text
    assert "torch" in sys.modules  # of this process: exporting alone needs none
