"""Adam's moments between our state and a checkpoint of torch_ref/ddp_pretrain.py; a
part of export_weights.py and import_weights.py. Needs torch."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from jaxllm.config import ModelConfig, RunConfig, from_dict
from jaxllm.convert.load import params_from
from jaxllm.convert.names import parameter_tree, to_state_dict
from torch_ref.ddp_pretrain import make_optimizer
from torch_ref.k_model import ModelConfig as TorchConfig
from torch_ref.k_model import Transformer
from torch_ref.run_folder import TRAINER

OURS = {"m": "exp_avg", "v": "exp_avg_sq"}


def to_torch(tree: dict[str, Any], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Gives our tree as a k_model state dict; a tied head shares its tensor."""
    made: dict[int, torch.Tensor] = {}
    state = {}
    for name, array in to_state_dict(tree, config, format="k_model").items():
        if id(array) not in made:
            # Row-major: a fused Adam pairs weights and moments by their place in
            # memory, and would take a transposed view for something else in silence.
            bits = np.array(array, order="C")
            half = bits.dtype == ml_dtypes.bfloat16
            tensor = torch.from_numpy(bits.view(np.int16) if half else bits)
            made[id(array)] = tensor.view(torch.bfloat16) if half else tensor
        state[name] = made[id(array)]
    return state


def to_arrays(tensors: Any, *, where: str) -> dict[str, np.ndarray]:
    """Gives the tensors of a state dict as NumPy arrays, bfloat16 included.

    Raises: ValueError naming `where` if it is not a dict from names to dense tensors.
    """
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{where} holds a {type(tensors).__name__} instead of a state dict: save "
            f"model.state_dict()"
        )
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"{where}: {name!r} is a {type(tensor).__name__} and not a dense "
                f"tensor: save model.state_dict()"
            )
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.numpy()
    return arrays


def write_trainer(folder: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Writes what ddp_pretrain.py --resume reads beside the weights: the updates done,
    the optimizer's state, and the configuration."""
    names, optimizer = _optimizer(config)
    count = int(state["opt"]["count"])
    moments = {
        theirs: to_torch(state["opt"][ours], config.model)
        for ours, theirs in OURS.items()
    }
    saved = optimizer.state_dict()
    if count:  # torch makes the entries of a parameter at its first update
        for i, name in enumerate(names):
            saved["state"][i] = {"step": torch.tensor(float(count))} | {
                theirs: tensors[name] for theirs, tensors in moments.items()
            }
    for group in saved["param_groups"]:
        group["fused"] = True  # as ddp_pretrain.py makes it; it cannot be made on meta
    content = {
        "step": int(state["step"]),
        "optimizer": saved,
        "config": dataclasses.asdict(config),
    }
    torch.save(content, folder / TRAINER)


def read_trainer(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Reads what ddp_pretrain.py saved beside its weights: the run's configuration, and
    our state but for params.

    Raises: ValueError naming what is missing, or anything but tensors and plain values.
    """
    path = folder / TRAINER
    saved = load(path)
    if not isinstance(saved, dict) or {"step", "optimizer", "config"} - set(saved):
        raise ValueError(f"{path} is no checkpoint of torch_ref/ddp_pretrain.py")
    config = from_dict(RunConfig, saved["config"], where=f"{path}: config")
    names, _ = _optimizer(config)
    try:
        entries = saved["optimizer"]["state"]
        counts = {int(entry["step"]) for entry in entries.values()}
        if set(entries) - set(range(len(names))) or len(counts) > 1:
            raise ValueError("parameters were updated unequally often")
        if entries and len(entries) != len(names):
            raise ValueError(f"{len(names) - len(entries)} parameters have no moments")
        opt: dict[str, Any] = {"count": np.int32(max(counts, default=0))}
        for ours, theirs in OURS.items():
            moment = {names[i]: entry[theirs] for i, entry in entries.items()}
            if not entries:
                moment = _zeros(config.model)
            where = f"{path}: {theirs}"
            arrays = to_arrays(moment, where=where)
            opt[ours] = params_from(arrays, config.model, format="k_model", where=where)
        step = np.int32(saved["step"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the optimizer's state lacks {error}") from None
    return config, {"step": step, "opt": opt}


def load(path: Path) -> Any:
    """Unpickles tensors and plain values; whatever else a pickle can hold is refused
    before it acts.

    Raises: ValueError naming the file.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch raise all sorts
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as tensors alone ({reason[0][:200]}): it is "
            f"damaged, or it holds code, which is never run"
        ) from None


def _optimizer(config: RunConfig) -> tuple[list[str], torch.optim.Optimizer]:
    """The trainer's optimizer over a model without memory, and the parameters' names in
    the order in which the optimizer counts them."""
    with torch.device("meta"):
        model = Transformer(TorchConfig(**dataclasses.asdict(config.model)))
    optimizer = make_optimizer(model, config.optim, fused=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return [names[p] for group in groups for p in group["params"]], optimizer


def _zeros(config: ModelConfig) -> dict[str, torch.Tensor]:
    return to_torch(parameter_tree(config, lambda s: np.zeros(s, np.float32)), config)
