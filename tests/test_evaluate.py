"""evaluate.py: the figures of a run, a Llama or a k_model, on shards and on text."""

import gzip
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import build_llama, logits_of, script, trained_like

from jaxllm.config import ModelConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.configs import k_model_config, llama_config
from jaxllm.convert.folder import write_json
from jaxllm.convert.tensors import write_tensors
from jaxllm.data.corpus import prepare
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer
from jaxllm.generate import generate
from jaxllm.train.origin import find_weights

evaluate, import_weights = script("evaluate"), script("import_weights")
adapter = script("lm_eval_adapter")
MODEL = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=48
)
TEXTS = [f"line {i} of a text that is there to be measured, {i * i}" for i in range(30)]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A text file, its shards (all held out but one), and the weights in four forms."""
    room = tmp_path_factory.mktemp("evaluate")
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (room / "text.jsonl").write_text(lines)
    with gzip.open(room / "text.jsonl.gz", "wt") as file:
        file.write(lines + '\n{"no": 1}\nnot JSON\n')
    prepare([room / "text.jsonl"], room / "shards", vocab_size=300, workers=1,
            val_fraction=0.5)  # fmt: skip
    params = trained_like(MODEL)
    for name, config in (("llama", llama_config), ("k_model", k_model_config)):
        (room / name).mkdir()
        write_json(room / name / "config.json", config(MODEL))
        tensors = to_state_dict(params, MODEL, format=name)  # type: ignore[arg-type]
        write_tensors(room / name, tensors)
        Tokenizer.load(room / "shards").save(room / name / "tokenizer.json")
    words = [str(room / "llama"), "--out", str(room / "run")]
    assert (
        import_weights.main([*words, "--no-verify", "--data", str(room / "shards")])
        == 0
    )
    return room


def figures(room: Path, weights: str, *data: str, **options: Any) -> dict[str, Any]:
    file = room / "figures.json"
    evaluate.main(
        evaluate.Arguments(
            room / weights, tuple(str(room / name) for name in data), json=file,
            **options,
        )
    )  # fmt: skip
    return json.loads(file.read_text())


def by_torch(ids: np.ndarray) -> tuple[float, int]:
    """Nats and hits of a stream in windows, computed by transformers in float64."""
    model = build_llama(
        to_state_dict(trained_like(MODEL), MODEL, format="llama"), MODEL
    )
    nats, hits = 0.0, 0
    for start in range(0, len(ids) - 1, MODEL.max_seq_len):
        row = ids[start : start + MODEL.max_seq_len + 1]
        logits = torch.from_numpy(logits_of(model.double(), row[None, :-1]))
        log_p = logits[0].log_softmax(-1).numpy()
        nats -= log_p[np.arange(len(row) - 1), row[1:]].sum()
        hits += int((log_p.argmax(-1) == row[1:]).sum())
    return nats, hits


@pytest.mark.parametrize("weights", ["run", "llama", "k_model"])
def test_figures_are_those_of_transformers(weights, room):
    found = figures(room, weights, "text.jsonl")
    tokenizer = Tokenizer.load(room / "shards")
    ids = np.concatenate([[BEGIN_ID, *tokenizer.encode(t), END_ID] for t in TEXTS])
    nats, hits = by_torch(ids)
    assert found["tokens"] == len(ids) - 1
    assert math.isclose(found["loss"], nats / found["tokens"], rel_tol=1e-6)
    assert math.isclose(found["perplexity"], math.exp(found["loss"]), rel_tol=1e-12)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found["text_bytes"] == n_bytes and found["documents"] == len(TEXTS)
    assert math.isclose(
        found["bits_per_byte"], nats / math.log(2) / n_bytes, rel_tol=1e-6
    )
    assert found["top1"] == hits / found["tokens"]
    assert found["step"] == (0 if weights == "run" else None)


def test_packed_files_and_shards_give_the_same_figures_as_their_text(room, capsys):
    plain = figures(room, "llama", "text.jsonl")
    packed = figures(room, "llama", "text.jsonl.gz")
    assert packed["damaged"] == 2 and "2 damaged records" in capsys.readouterr().err
    assert (packed["loss"], packed["top1"]) == (plain["loss"], plain["top1"])
    # The run's own held-out documents, by the run's own tokenizer.
    own, named = figures(room, "run"), figures(room, "llama", "shards")
    assert own["loss"] == named["loss"] and 0 < own["documents"] < len(TEXTS)
    short = figures(room, "llama", "text.jsonl", max_tokens=96)
    assert short["tokens"] == 96 and "bits_per_byte" not in short


def test_what_cannot_be_measured_is_refused_by_name(room, tmp_path):
    def refused(*words: str, **options: Any) -> None:
        with pytest.raises(ValueError) as caught:
            given = {"weights": room / "llama", "data": (str(room / "text.jsonl"),)}
            evaluate.main(evaluate.Arguments(**given | options))
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("nowhere", weights=room / "nowhere")
    refused("nowhere.jsonl", data=("nowhere.jsonl",))
    refused("no data of its own", data=())
    refused("--step 3", step=3)
    refused("500", weights=room / "run", step=500)
    refused("--seq-len 49", "48", seq_len=49)
    refused("--max-tokens -1", max_tokens=-1)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    refused("no text to predict", "no field", data=(str(tmp_path / "bad.jsonl"),))
    prepare([room / "text.jsonl.gz"], tmp_path / "other", vocab_size=280, workers=1,
            val_fraction=0.5)  # fmt: skip
    refused("another tokenizer", data=(str(tmp_path / "other"),))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((room / "llama" / name).read_bytes())
    refused("no tokenizer", "--tokenizer", weights=bare)
    assert figures(room, str(bare), "shards")["tokens"] > 0


def test_without_the_harness_tasks_are_refused(room, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jaxllm\[eval\]"):
        evaluate.main(evaluate.Arguments(room / "llama", tasks=("local",)))


@pytest.fixture(scope="module")
def answers(room) -> Any:
    origin = find_weights(room / "llama")
    arguments = evaluate.Arguments(room / "llama", compute_dtype="float32")
    _, scorer, network = evaluate.load(origin, arguments)
    return adapter.Answers(scorer, network, origin.tokenizer)


def test_the_harness_gets_log_probabilities_of_continuations_and_texts(answers):
    tokenizer = answers.tokenizer
    ids = np.array([BEGIN_ID, *tokenizer.encode("line 3 of a text")])
    nats, _ = by_torch(ids)
    assert math.isclose(answers.rolling(["line 3 of a text"])[0], -nats, rel_tol=1e-6)
    pairs = [
        ("line 3 ", "of a text"),
        ("line 3", " of a text"),
        ("", "line 3 of a text"),
    ]
    spaced, joined, whole = answers.likelihoods(pairs)
    assert spaced == joined and math.isclose(whole[0], -nats, rel_tol=1e-6)
    before = answers.rolling(["line 3"])[0]
    assert math.isclose(joined[0], -nats - before, rel_tol=1e-5)
    # Longer than the context: in windows, every token once.
    long = " ".join(TEXTS[:12])
    count = len(tokenizer.encode(long))
    rows: list[np.ndarray] = []
    score = answers.scorer.score
    answers.scorer.score = lambda batch: (rows.extend(batch), score(batch))[1]
    try:
        assert answers.rolling([long])[0] < 0
    finally:
        del answers.scorer.score
    assert count > 2 * MODEL.max_seq_len and len(rows) == -(-count // 48)
    assert {len(row) for row in rows} == {49}


def test_the_harness_gets_greedy_text_up_to_a_stop(answers):
    free = answers.until("line", {"max_gen_toks": 12})
    graphdef, params = answers.network
    prompt = [BEGIN_ID, *answers.tokenizer.encode("line")]
    ids = generate(graphdef, params, [prompt], max_new_tokens=12, stop_ids=(END_ID,))[0]
    assert free and free == answers.tokenizer.decode(ids)
    # What greedy decoding writes first is said to be so, and another word is not.
    for context in TEXTS:
        before = [BEGIN_ID, *answers.tokenizer.encode(context)]
        best = generate(graphdef, params, [before], max_new_tokens=1)[0]
        word = answers.tokenizer.decode(best)
        if answers.tokenizer.encode(context + word) == [*before[1:], *best]:
            break
    pairs = [(context, word), (context, "\n")]
    assert [greedy for _, greedy in answers.likelihoods(pairs)] == [True, False]
    stop = free[len(free) // 2 :][:2]
    cut = answers.until("line", {"until": [stop], "max_gen_toks": 12})
    assert cut == free[: free.index(stop)]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
@pytest.mark.filterwarnings("default")
def test_the_harness_passes_a_local_task(room, tmp_path):
    questions = [
        {"question": f"line {i} of a", "choices": [" text", " zebra"], "answer": 0}
        for i in range(6)
    ]
    lines = "\n".join(map(json.dumps, questions))
    (tmp_path / "q.jsonl").write_text(lines)
    head = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\n"
    )
    tasks = {
        "choose": "output_type: multiple_choice\ndoc_to_target: '{{answer}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n",
        "write": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match}]\n",
        "read": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    for name, body in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: local_{name}\n{head}{body}")
    names = tuple(f"local_{name}" for name in tasks)
    found = figures(room, "llama", tasks=names, task_path=tmp_path)["tasks"]
    assert 0 <= found["local_choose"]["acc"] <= 1
    assert found["local_read"]["bits_per_byte"] > 0
    assert found["local_write"]["exact_match"] == 0
    with pytest.raises(ValueError, match="no_such_task"):
        figures(room, "llama", tasks=("no_such_task",))
