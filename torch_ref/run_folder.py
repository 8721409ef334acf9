"""The folder of a reference run: checkpoints, the log, and weights from elsewhere.

OUT/metrics.jsonl      one line an update
OUT/step_N/            after N updates: what save_pretrained writes, and trainer.pt
                       with the optimizer's state, the position and the config
"""

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxllm.config import RunConfig
from torch_ref import k_model

METRICS = "metrics.jsonl"
TRAINER = "trainer.pt"

# Fields in which a resumed run must equal the saved one; () means all of a section.
DECISIVE: dict[str, tuple[str, ...]] = {
    "model": (),
    "optim": (),
    "data": ("layout", "seq_len", "seed"),
    "train": ("batch_size", "accumulate", "seed", "steps", "epochs"),
}


def load_weights(model: k_model.Transformer, path: str | os.PathLike[str]) -> None:
    """Copies the weights of a safetensors file, or of an exported folder, into `model`.

    Raises: ValueError naming the tensor that is missing, unknown or of another shape.
    """
    from jaxllm.convert.tensors import read_tensors

    path, own = Path(path), model.state_dict()
    if not path.exists():
        raise ValueError(f"--init_from {path} does not exist: give a file or a folder")
    tensors = dict(read_tensors(path))
    if model.config.tie_word_embeddings and "tok_embeddings.weight" in tensors:
        # A tied head may be left out, as save_pretrained does.
        embedding = tensors["tok_embeddings.weight"]
        head = tensors.setdefault("output.weight", embedding)
        if not np.array_equal(head, embedding):
            raise ValueError(
                f"{path}: output.weight differs from tok_embeddings.weight, but this "
                f"model ties them: take weights of a tied model"
            )
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            what = "lacks" if name in own else "holds the unknown tensor"
            raise ValueError(
                f"{path} {what} {name!r}: check that the weights are in the k_model "
                f"format and belong to this model"
            )
        theirs, ours = tensors[name].shape, tuple(own[name].shape)
        if theirs != ours:
            raise ValueError(
                f"{path}: {name!r} has shape {theirs}, this model's is {ours}: check "
                f"that the weights belong to this model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            wide = np.float64 if tensor.dtype == torch.float64 else np.float32
            tensor.copy_(torch.from_numpy(np.array(tensors[name], dtype=wide)))


def save(out: Path, model, optimizer, config: RunConfig, step: int) -> None:
    """Writes the checkpoint after `step` updates, and drops all but the newest `keep`.

    Its folder appears whole or not at all.
    """
    folder = out / f"step_{step:08d}"
    temporary = out / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    trainer = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(config),
    }
    torch.save(trainer, temporary / TRAINER)
    temporary.rename(folder)
    for old in checkpoints(out)[: -config.train.keep]:
        shutil.rmtree(old)


def restore(folder: Path, model, optimizer, config: RunConfig) -> int:
    """Reads what `save` wrote into model and optimizer; returns the updates done.

    Raises: ValueError naming a field in which the saved run differs from `config`.
    """
    saved = torch.load(folder / TRAINER, weights_only=True, map_location="cpu")
    ours = dataclasses.asdict(config)
    for section, names in DECISIVE.items():
        for name in names or ours[section]:
            was, now = saved["config"][section].get(name), ours[section][name]
            if was != now:
                raise ValueError(
                    f"{folder} was made with {section}.{name}={was!r}, not {now!r}: "
                    f"resume with the former, or start another run with --out"
                )
    load_weights(model, folder)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(out.glob("step_*"))


class Log:
    """metrics.jsonl with every update, and a line on stdout now and then.

    Metrics are kept as they come and read when a line is due, so that the device is
    waited for only then.
    """

    def __init__(
        self,
        out: Path,
        *,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        as_json: bool = False,
    ):
        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS
        lines = path.read_text().splitlines() if start and path.exists() else []
        # A run that was cut off may have logged more updates than it saved.
        lines = [line for line in lines if json.loads(line)["step"] < start]
        path.write_text("".join(line + "\n" for line in lines))
        self.path, self.as_json = path, as_json
        self.total_steps = total_steps
        self.steps_per_epoch = min(steps_per_epoch, total_steps)
        self.pending: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.began, self.seen = time.perf_counter(), 0

    def add(self, metrics: dict[str, Any]) -> None:
        """Takes the metrics of an update, tensors and all."""
        self.pending.append(metrics)
        self.seen += 1

    def flush(self) -> None:
        """Writes what is pending.

        Raises: FloatingPointError naming the first update whose loss is not finite.
        """
        with self.path.open("a") as file:
            for metrics in self.pending:
                self.last = {
                    name: value.item() if isinstance(value, torch.Tensor) else value
                    for name, value in metrics.items()
                }
                if not math.isfinite(self.last["loss"]):
                    raise FloatingPointError(
                        f"the loss of step {self.last['step']} is {self.last['loss']}: "
                        f"lower --learning_rate, or raise --warmup_steps"
                    )
                file.write(json.dumps(self.last) + "\n")
        self.pending.clear()

    def show(self) -> None:
        """Prints the newest update: the seed's line, then our fields."""
        self.flush()
        seconds = (time.perf_counter() - self.began) / self.seen
        line = json.dumps(self.last) if self.as_json else self._line(seconds)
        print(line, flush=True)

    def _line(self, seconds: float) -> str:
        last = self.last
        epoch, index = divmod(last["step"], self.steps_per_epoch)
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        left = (self.steps_per_epoch - index - 1) * seconds / 60
        return (
            f"Epoch:[{epoch + 1}/{epochs}]({index}/{self.steps_per_epoch}) "
            f"loss:{last['loss']:.3f} lr:{last['lr']:.7f} epoch_Time:{left:.1f}min; "
            f"grad_norm:{last['grad_norm']:.3f} "
            f"tokens_per_s:{last['tokens'] / seconds:.0f}"
        )
