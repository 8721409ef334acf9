"""The model card: what an exported model is, what it saw, how good and how equal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig

_LOAD = {
    "llama": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
inputs = tokenizer("<|im_start|>Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

The architecture is stock Llama: no remote code. `vllm serve {folder}` and other
programs that open Llama folders take it as well.""",
    "k_model": """\
```python
from torch_ref.k_model import Transformer

model = Transformer.from_pretrained("{folder}")
```""",
    "gguf": """\
```
llama-cli -m {folder}/{file} -p "<|im_start|>Once"
```""",
}


def model_card(
    config: RunConfig,
    *,
    folder: Path,
    files: Sequence[str],
    report: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    plot: str | None,
) -> str:
    """Writes the card as Markdown.

    `report` is what parity.json holds; `data` describes the data's manifest, if it is
    still there; `evaluations` are the records of metrics.jsonl with a val_loss.
    """
    model, train = config.model, config.train
    gguf = next((name for name in files if name.endswith(".gguf")), "")
    lines = [
        "---",
        *(["library_name: transformers"] if report["format"] == "llama" else []),
        "pipeline_tag: text-generation",
        "tags: [jaxllm, llama]",
        "---",
        "",
        f"# {report['name']}",
        "",
        f"A Llama-style decoder of {model.n_params:,} parameters in {report['dtype']}, "
        f"after {report['step']:,} updates, exported by jaxllm as {report['format']}.",
        "",
        "## Load it",
        "",
        _LOAD[report["format"]].format(folder=folder, file=gguf),
        "",
        "A document is `<|im_start|>`, its text, `<|im_end|>`; the tokenizer adds "
        "neither by itself. The chat template is ChatML; whether the model follows it "
        "depends on whether it was trained on chats.",
        "",
        "## Architecture",
        "",
        *_table(
            ("", "value"),
            [
                ("layers", model.n_layers),
                ("width", model.dim),
                ("feed-forward width (SwiGLU)", model.hidden_dim),
                ("query heads", model.n_heads),
                ("key/value heads", model.n_kv_heads),
                ("head width", model.head_dim),
                ("vocabulary", model.vocab_size),
                ("context in tokens", model.max_seq_len),
                ("rotary base", model.rope_theta),
                ("RMSNorm epsilon", model.norm_eps),
                ("head tied to the embedding", model.tie_word_embeddings),
            ],
        ),
        "",
        "## Training",
        "",
        *_table(("", "value"), _training(config, report, data)),
        "",
        f"{config.optim.algorithm}, learning rate {config.optim.learning_rate:g} to "
        f"{config.optim.min_learning_rate:g} (cosine, {config.optim.warmup_steps} "
        f"steps of warm-up), betas {config.optim.beta1:g} and {config.optim.beta2:g}, "
        f"clip {config.optim.clip_norm:g}, {train.batch_size} rows of {config.seq_len} "
        f"tokens an update, layout `{config.data.layout}`.",
        "",
    ]
    if plot:
        lines += [f"![training and validation loss]({plot})", ""]
    lines += ["## Evaluation on held-out documents", "", *_evaluation(evaluations), ""]
    lines += ["## Is it the same model?", "", *_parity(report), ""]
    return "\n".join(lines)


def _training(config, report, data) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [
        ("updates", f"{report['step']:,}"),
        ("tokens seen, at most",
         f"{report['step'] * config.train.batch_size * config.seq_len:,}"),
    ]  # fmt: skip
    if data is None:
        return [*rows, ("data", f"`{config.data.path}` (not there at export)")]
    return [
        *rows,
        ("data", f"`{data['path']}`"),
        ("documents, training and held out",
         f"{data['train_documents']:,}, {data['val_documents']:,}"),
        ("tokens, training and held out",
         f"{data['train_tokens']:,}, {data['val_tokens']:,}"),
        ("sha256 of the data's manifest", f"`{data['sha256']}`"),
        ("sha256 of the tokenizer", f"`{data['tokenizer_sha256']}`"),
    ]  # fmt: skip


def _evaluation(records: Sequence[Mapping[str, Any]]) -> list[str]:
    if not records:
        return ["The run has not been evaluated."]
    # The beginning, the end, and a few between tell the story.
    every = max(1, (len(records) - 1) // 8)
    chosen = [*records[:-1:every], records[-1]]
    rows = [
        (r["step"], _number(r.get("val_loss")), _number(r.get("val_bpb")))
        for r in chosen
    ]
    return _table(("update", "loss (nats per token)", "bits per byte"), rows)


def _parity(report: Mapping[str, Any]) -> list[str]:
    if report["status"] == "not verified":
        return [f"Not verified: {report['reason']}."]
    if report["status"] == "failed":
        wrong = [check["name"] for check in report["checks"] if not check["passed"]]
        return [
            f"**No: it failed the comparison ({'; '.join(wrong)}). Do not use it.**"
        ]
    rows = [(check["name"], _figures(check)) for check in report["checks"]]
    return [
        "This folder was opened with the programs below and compared, in float32, with "
        f"the run it came from, on {report['text']}. All figures: `parity.json`.",
        "",
        *_table(("check", "result"), rows),
    ]


def _figures(check: Mapping[str, Any]) -> str:
    named = {
        "relative_l2": "relative L2 {:.2g}",
        "relative_l2_gate": "(gate {:.2g})",
        "max_kl_nats": "largest KL {:.2g} nats",
        "top1_agreement": "same best token {:.4%}",
        "positions": "{} positions",
        "tensors": "{} tensors, every bit",
        "texts": "{} texts, same ids, given back",
        "prompts": "{} prompts",
        "same": "{} tokens the same",
        "near_ties": "{} near-ties",
    }
    parts = []
    for key, text in named.items():
        if key in check:
            value = check[key]
            parts.append(text.format(len(value) if isinstance(value, list) else value))
    return ", ".join(parts).replace(", (", " (") or "as it should"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
