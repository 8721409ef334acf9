"""Adam's moments between our state and a checkpoint of torch_ref/ddp_pretrain.py; a
part of export_weights.py and import_weights.py. Needs torch."""

import dataclasses
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from jaxllm.config import ModelConfig, RunConfig, from_dict
from jaxllm.convert.dtypes import FLOATS
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
        tensor = _dense(name, tensor, where)
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.numpy()
    return arrays


def _dense(name: Any, tensor: Any, where: str) -> torch.Tensor:
    """Checks one entry of a state dict, and lays it out row by row.

    Raises: ValueError for anything but a name and a plain tensor of numbers that the
    file holds: an expanded one claims any size for free.
    """
    wrong = ""
    if not isinstance(name, str):
        wrong = "is no name"
    elif not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        wrong = f"is a {type(tensor).__name__} and not a dense tensor"
    elif tensor.is_nested or tensor.device.type != "cpu":
        wrong = "is a tensor without numbers of its own"
    elif str(tensor.dtype).removeprefix("torch.") not in FLOATS:
        wrong = f"has dtype {tensor.dtype}, and weights must be {', '.join(FLOATS)}"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        wrong = f"has shape {tuple(tensor.shape)}, more numbers than the file holds"
    if wrong:
        raise ValueError(f"{where}: {name!r} {wrong}: save model.state_dict()")
    return tensor.detach().resolve_neg().contiguous()


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


def read_trainer(folder: Path, model: ModelConfig) -> tuple[RunConfig, dict[str, Any]]:
    """Reads what ddp_pretrain.py saved beside its weights: the run's configuration, and
    our state but for params. `model` is the network of those weights.

    Raises: ValueError naming what is missing, what belongs to another network, or
    anything but tensors and plain values.
    """
    path = folder / TRAINER
    saved = load(path)
    if not isinstance(saved, dict) or {"step", "optimizer", "config"} - set(saved):
        raise ValueError(f"{path} is no checkpoint of torch_ref/ddp_pretrain.py")
    try:
        config = from_dict(RunConfig, saved["config"], where="config")
        if config.model != dataclasses.replace(model, dropout=config.model.dropout):
            raise ValueError("it describes another model than config.json")
        opt = _read_moments(saved["optimizer"]["state"], config)
        step = np.int32(_count(saved["step"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): take another checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, {"step": step, "opt": opt}


def _read_moments(entries: Any, config: RunConfig) -> dict[str, Any]:
    """Gives Adam's moments and their count from the state of torch's optimizer.

    Raises: ValueError if they are not those of this network after one and the same
    number of updates; KeyError, TypeError or AttributeError if they are none at all.
    """
    names, _ = _optimizer(config)
    counts = {_count(entry["step"]) for entry in entries.values()}
    if set(entries) - set(range(len(names))) or len(counts) > 1:
        raise ValueError("parameters were updated unequally often")
    if entries and len(entries) != len(names):
        raise ValueError(f"{len(names) - len(entries)} parameters have no moments")
    opt: dict[str, Any] = {"count": np.int32(max(counts, default=0))}
    for ours, theirs in OURS.items():
        moment = {names[i]: entry[theirs] for i, entry in entries.items()}
        if not entries:
            moment = _zeros(config.model)
        arrays = to_arrays(moment, where=theirs)
        opt[ours] = params_from(arrays, config.model, format="k_model", where=theirs)
        if ours == "v" and any(array.min() < 0 for array in arrays.values()):
            raise ValueError(
                f"{theirs} holds negative numbers, and is a mean of squares"
            )
    return opt


def _count(value: Any) -> int:
    """Reads a number of updates, which torch keeps as a tensor."""
    number = (
        value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    )
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"a number of updates is {str(value)[:80]!r}")
    if not 0 <= number < 2**31:
        raise ValueError(f"a number of updates is {number}: it must lie in [0, 2^31)")
    return number


def load(path: Path) -> Any:
    """Unpickles tensors and plain values; whatever else a pickle can hold is refused
    before it acts.

    Raises: ValueError naming the file.
    """
    try:
        _require_plain_zip(path)
        with warnings.catch_warnings():  # about what its pickle lacks, to be refused
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch raise all sorts
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as tensors alone ({reason[0][:200]}): it is "
            f"damaged, or it holds code, which is never run"
        ) from None


def _require_plain_zip(path: Path) -> None:
    # torch unpacks whatever it finds, and torch.save packs nothing: what would grow in
    # memory beyond the file was made to do so.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        size = sum(member.file_size for member in members)
        if packed or size > path.stat().st_size:
            raise ValueError(f"a zip that unpacks to {size:,} bytes")


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
