"""1,000 steps of the reference's recipe on text: our trainer's step beside theirs.

The text is the poems, if they lie beside the repository, and generated text otherwise.
Both sides start from the same weights and read the same batches, in float32; a third
run, the reference in float64, says how far rounding alone carries two runs apart.
"""

import dataclasses
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.data.batches import Batches
from jaxllm.data.corpus import prepare
from jaxllm.presets import preset
from jaxllm.train import optim
from parity_tests import cases, sides
from parity_tests.precision import FP32, FP64, Precision
from torch_ref import ddp_pretrain

POEMS = Path(__file__).resolve().parents[2] / "shared/data/poems_100k.jsonl.gz"
DOCUMENTS = 4_000
MODEL = ModelConfig(
    dim=96, n_layers=3, n_heads=6, n_kv_heads=3, vocab_size=1024, max_seq_len=128,
    init="reference",
)  # fmt: skip
ROWS = 8


def documents(count: int) -> tuple[str, list[str]]:
    """The first poems, or as many generated texts; and which of the two they are."""
    if POEMS.is_file():
        with gzip.open(POEMS, "rt", encoding="utf-8") as lines:
            return "poems", [json.loads(next(lines))["text"] for _ in range(count)]
    rng = np.random.default_rng(0)
    texts = []
    for number in range(count):
        walk = cases.text(number, (int(rng.integers(20, 400)),), 2000)
        texts.append("".join(chr(0x4E00 + token) for token in walk.ravel()))
    return "generated text", texts


def batches(folder: Path, steps: int) -> tuple[str, list[dict]]:
    """Tokenises the text by our own pipeline; returns the reference's rows by step."""
    name, texts = documents(DOCUMENTS)
    source = folder / "text.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    data = folder / "data"
    prepare([source], data, vocab_size=MODEL.vocab_size, workers=1)
    rows = Batches(data, layout="rows", seq_len=MODEL.max_seq_len - 1, batch_size=ROWS)
    return name, [rows[step] for step in range(steps)]


def config(precision: Precision) -> RunConfig:
    """The reference preset with a small network."""
    reference = preset("reference")
    return dataclasses.replace(
        reference,
        model=MODEL,
        compute=precision.compute().resolve(n_layers=MODEL.n_layers),
        train=dataclasses.replace(reference.train, batch_size=ROWS, accumulate=1),
    )


def our_losses(params: dict, rows: list[dict], total_steps: int) -> list[float]:
    """The loss of every step of ours, in float32."""
    program = sides.program(config(FP32), total_steps, (1, 1, 1))
    params = jax.tree.map(jnp.array, params)
    state = {
        "step": jnp.zeros((), jnp.int32), "params": params, "opt": optim.init(params)
    }  # fmt: skip
    losses = []
    for row in rows:
        batch = {name: x[None] for name, x in row.items()}
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def their_losses(
    params: dict, rows: list[dict], total_steps: int, precision: Precision
) -> list[float]:
    """The loss of every step of the reference trainer's own train_step."""
    model = sides.theirs(params, MODEL, precision).train()
    module = ddp_pretrain.SummedLoss(model)
    settings = config(precision)
    adam = ddp_pretrain.make_optimizer(model, settings.optim)
    losses = []
    for step, row in enumerate(rows):
        metrics = ddp_pretrain.train_step(
            module, adam, row, config=settings, step=step, total_steps=total_steps
        )
        losses.append(float(metrics["loss"]))
    return losses


def compare(steps: int = 1000) -> dict[str, Any]:
    """Runs all three; returns their losses and how far they lie apart."""
    with tempfile.TemporaryDirectory() as folder:
        text, rows = batches(Path(folder), steps)
    fresh = ddp_pretrain.make_model(MODEL, seed=0)
    state = {name: t.numpy() for name, t in fresh.state_dict().items()}
    params = cases.from_torch(state, MODEL, FP32)
    losses = {
        "ours, float32": our_losses(params, rows, steps),
        "reference, float32": their_losses(params, rows, steps, FP32),
        "reference, float64": their_losses(params, rows, steps, FP64),
    }
    ours, theirs, truth = (np.array(values) for values in losses.values())
    return {
        "text": text,
        "steps": steps,
        "tokens": int(sum(row["loss_mask"].sum() for row in rows)),
        "first_loss": float(theirs[0]),
        "last_100_mean_loss": float(theirs[-100:].mean()),
        "ours_to_reference": float(np.max(np.abs(ours - theirs))),
        "ours_to_float64": float(np.max(np.abs(ours - truth))),
        "reference_to_float64": float(np.max(np.abs(theirs - truth))),
        "losses": losses,
    }
