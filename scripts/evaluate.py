#!/usr/bin/env python3
"""Measures how well weights predict text: loss, perplexity, bits per byte, top-1.

    python scripts/evaluate.py runs/demo
    python scripts/evaluate.py runs/poems --data held_out.jsonl.gz
    python scripts/evaluate.py some/llama-folder --data data/poems --split val
    python scripts/evaluate.py runs/poems --tasks my_task --task-path tasks/

PATH is a run, a Hugging Face Llama folder, or a folder or .safetensors file of a
k_model. Documents are scored as the training's own validation does it: one stream of
windows as long as the context.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import command_line
import numpy as np
import tyro


@dataclass(frozen=True)
class Arguments:
    """Measures how well weights predict text."""

    weights: tyro.conf.Positional[Path]
    """A run, a Hugging Face Llama folder, or a k_model's folder or .safetensors."""
    data: tuple[str, ...] = ()
    """Text files (as for prepare_data.py: .jsonl, .gz, .zst, ...) or one data folder of
    token shards. Empty: the data folder of the run."""
    split: Literal["train", "val"] = "val"
    """Which documents of a data folder."""
    field: str = "text"
    """Field of a JSON line that holds the text."""
    step: int | None = None
    """Checkpoint of a run, by its step. None: the newest undamaged one."""
    config: Path | None = None
    """The config.json of weights that have none beside them."""
    tokenizer: Path | None = None
    """The tokenizer.json of weights that have none beside them."""
    seq_len: int = 0
    """Length of a window in tokens. 0: the model's whole context."""
    max_tokens: int = 0
    """Stop after about this many tokens. 0: read everything."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Dtype of matrix products; auto is bfloat16 on a GPU that has it, else float32."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness in the place of --data (needs jaxllm[eval])."""
    task_path: Path | None = None
    """Folder with task files of your own."""
    limit: int | None = None
    """Documents of each task at most. None: all."""
    json: Path | None = None
    """File for the figures, as JSON."""


def main(arguments: Arguments) -> None:
    """Measures, prints, and writes the figures if asked to."""
    _check(arguments)
    from jaxllm.train.origin import find_weights

    origin = find_weights(arguments.weights, config=arguments.config)
    tokenizer = origin.tokenizer
    if arguments.tokenizer is not None:
        from jaxllm.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(arguments.tokenizer)
    if arguments.tasks:
        import lm_eval_adapter

        lm_eval_adapter.require()
        if tokenizer is None:
            raise ValueError(_no_tokenizer(arguments))
        step, scorer, network = load(origin, arguments)
        figures = lm_eval_adapter.evaluate(
            scorer, network, tokenizer, tasks=arguments.tasks,
            task_path=arguments.task_path, limit=arguments.limit,
        )  # fmt: skip
    else:
        opened = open_text(arguments, origin, tokenizer)
        step, scorer, _ = load(origin, arguments)
        figures = measure(arguments, scorer, *opened)
    about = {"weights": str(arguments.weights), "step": step}
    where = f"{arguments.weights}" + ("" if step is None else f", step {step}")
    print("\n".join([where, *_lines(figures)]))
    if arguments.json is not None:
        from jaxllm.data.files import write_atomically

        text = json.dumps(about | figures, indent=2, default=str) + "\n"
        write_atomically(arguments.json, text.encode())


def load(origin: Any, arguments: Arguments) -> tuple[int | None, Any, tuple[Any, dict]]:
    """Reads the weights onto the first device; gives their step, what scores with
    them, and the network itself."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config import ComputeConfig, RunConfig
    from jaxllm.score import Scorer
    from jaxllm.train.load import network

    compute = ComputeConfig(compute_dtype=arguments.compute_dtype)
    if arguments.compute_dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    step, params = origin.read(arguments.step)
    graphdef = network(RunConfig(model=origin.model, compute=compute))
    params = jax.tree.map(jnp.asarray, params)
    return step, Scorer(graphdef, params), (graphdef, params)


def open_text(
    arguments: Arguments, origin: Any, tokenizer: Any
) -> tuple[str, Any, Any]:
    """Finds the text: its name, its tokens in pieces, and a count of what was read.

    Raises: ValueError if there is none, or none that these weights can read.
    """
    from jaxllm.data.shards import load_manifest, load_tokenizer
    from jaxllm.data.windows import Read, shard_tokens, text_tokens

    read, given = Read(), list(arguments.data)
    if not given:
        given = _own_data(origin)
    folder = Path(given[0])
    if len(given) == 1 and (folder / "manifest.json").is_file():
        manifest = load_manifest(folder)
        theirs = load_tokenizer(manifest)
        if tokenizer is not None and theirs.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{folder} was written with another tokenizer (sha256 "
                f"{theirs.sha256[:12]}...) than that of {arguments.weights} "
                f"({tokenizer.sha256[:12]}...): give text files, or data prepared with "
                f"its --tokenizer"
            )
        _require_vocabulary(folder, theirs, origin)
        if not manifest.splits[arguments.split]:
            raise ValueError(
                f"{folder} has no {arguments.split} documents: give another --split"
            )
        name = f"{folder}, {arguments.split}"
        return name, shard_tokens(manifest, arguments.split, read), read
    if tokenizer is None:
        raise ValueError(_no_tokenizer(arguments))
    _require_vocabulary(arguments.tokenizer or origin.path, tokenizer, origin)
    pieces = text_tokens(given, tokenizer, read, field=arguments.field)
    return ", ".join(given), pieces, read


def measure(
    arguments: Arguments, scorer: Any, name: str, pieces: Any, read: Any
) -> dict[str, Any]:
    """Scores window after window, and sums up.

    Raises: ValueError if the text has not even one token to predict.
    """
    from jaxllm.data.windows import windows
    from jaxllm.score import ROWS

    longest = scorer.config.max_seq_len
    seq_len = arguments.seq_len or longest
    if seq_len > longest:
        raise ValueError(
            f"--seq-len {seq_len} is longer than the model's context of {longest} "
            f"tokens: lower it"
        )
    begun, nats, tokens, best, text_bytes = time.perf_counter(), 0.0, 0, 0, 0
    cut = windows(pieces, seq_len)
    if arguments.max_tokens:
        cut = islice(cut, math.ceil(arguments.max_tokens / seq_len))
    for rows in _batches(cut, ROWS):
        for log_p, likeliest in scorer.score(rows):
            nats -= float(log_p.astype(np.float64).sum())
            tokens += len(log_p)
            best += int(likeliest.sum())
    if not tokens:
        damage = f" ({read.first_damage})" if read.first_damage else ""
        raise ValueError(
            f"{name} holds no text to predict{damage}: give another --data"
        )
    figures: dict[str, Any] = {
        "data": name,
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "top1": best / tokens,
        "tokens": tokens,
        "seq_len": seq_len,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    if not math.isfinite(nats):
        raise ValueError(f"{name}: the loss is {nats}: these weights have diverged")
    text_bytes = read.text_bytes
    if not arguments.max_tokens:  # else the text was not read to its end
        figures["bits_per_byte"] = nats / math.log(2) / max(text_bytes, 1)
        figures |= {k: v for k, v in asdict(read).items() if k != "first_damage"}
    if read.damaged:
        print(
            f"note: {read.damaged} damaged records were left out, the first in "
            f"{read.first_damage}",
            file=sys.stderr,
        )
    return figures


def _own_data(origin: Any) -> list[str]:
    from jaxllm.data.batches import parse_mixture
    from jaxllm.train.run_folder import RunFolder

    if origin.format is None:
        folder = RunFolder(origin.path)
        path = folder.load_config().data.path
        places = [*([p for p, _ in parse_mixture(path)] if path else []), folder.data]
        for place in places:
            if (place / "manifest.json").is_file():
                return [str(place)]
    raise ValueError(f"{origin.path} has no data of its own here: give --data")


def _require_vocabulary(where: Any, tokenizer: Any, origin: Any) -> None:
    if tokenizer.vocab_size > origin.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} ids, and the model "
            f"only {origin.model.vocab_size}: give the one that belongs to it"
        )


def _no_tokenizer(arguments: Arguments) -> str:
    return (
        f"{arguments.weights} has no tokenizer of our kind (byte-level, special tokens "
        f"at ids 0-4), which text needs: give --tokenizer, or a data folder of shards"
    )


def _batches(rows: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(rows, size)):
        yield batch


def _lines(figures: dict[str, Any]) -> list[str]:
    if "tasks" in figures:
        return [
            f"  {task}: {name} {value:.4f}"
            for task, values in figures["tasks"].items()
            for name, value in values.items()
        ]
    lines = [
        f"  data           {figures['data']}",
        f"  loss           {figures['loss']:.4f} nats a token",
        f"  perplexity     {figures['perplexity']:.4g}",
    ]
    if "bits_per_byte" in figures:
        lines.append(f"  bits per byte  {figures['bits_per_byte']:.4f}")
    return [
        *lines,
        f"  top-1          {figures['top1']:.2%}",
        f"  tokens         {figures['tokens']:,} in windows of {figures['seq_len']}, "
        f"{figures['seconds']:.1f} s",
    ]


def _check(arguments: Arguments) -> None:
    for name in ("seq_len", "max_tokens"):
        if getattr(arguments, name) < 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(arguments, name)} must be at least 0")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} must be at least 1")
    if arguments.tasks and arguments.data:
        raise ValueError("--tasks bring their own text: leave --data out")


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Arguments, description=__doc__)))
