"""What a run leaves for people: the loss plot, the summary, what to do next."""

import json
import math
from pathlib import Path
from typing import Any

from jaxllm.data.files import write_atomically
from jaxllm.train.metrics import read_jsonl
from jaxllm.train.run_folder import RunFolder


def write_plot(folder: RunFolder) -> Path | None:
    """Draws training and validation loss over steps from metrics.jsonl."""
    # matplotlib is slow to import and missing on bare GPU images.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_jsonl(folder.metrics)
    records = [r for r in records if "step" in r]
    train = [(r["step"], r["loss"]) for r in records if _is_number(r.get("loss"))]
    val = [(r["step"], r["val_loss"]) for r in records if _is_number(r.get("val_loss"))]
    if not train:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(folder.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = folder.plot.with_name(".loss.tmp.png")
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(folder.plot)
    return folder.plot


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Writes summary.json, whose `finished` marks the run as complete."""
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(folder.summary, text.encode())


def contents(folder: RunFolder) -> list[str]:
    """Describes the files of a run folder, a line each."""
    what = {
        "config.json": "the configuration",
        "tokenizer.json": "the tokenizer",
        "data": "token shards of the demo corpus",
        "checkpoints": "saved states, a folder a step",
        "cache": "compiled programs",
        "train.log": "the log",
        "metrics.jsonl": "every step's figures",
        "incidents.jsonl": "what went wrong",
        "samples.txt": "text samples",
        "loss.png": "the loss curve",
        "summary.json": "how the run ended",
        "archive": "earlier runs of this name",
    }
    return [
        f"  {folder.path / name}{'/' if (folder.path / name).is_dir() else ''}: {text}"
        for name, text in what.items()
        if (folder.path / name).exists()
    ]


def next_commands(folder: RunFolder, *, steps: int) -> list[str]:
    """Says how to train on, generate and export."""
    run = folder.path
    return [
        f"  train on:  {resume_command(folder)} --train.steps {2 * steps}",
        f"  generate:  python scripts/generate.py {run} --prompt 'import '",
        f"  export:    python scripts/export_weights.py {run} --format llama",
    ]


def resume_command(folder: RunFolder) -> str:
    """The command that goes on with a run, whatever preset and flags it began with."""
    return f"python scripts/pretrain.py --resume --out {folder.path}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
