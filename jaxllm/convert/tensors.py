"""safetensors files, in one piece or in shards with an index, and nothing trusted."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest size in bytes of one file of weights, unless one tensor alone is larger."""

_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def write_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes model.safetensors, or shards and their index, as transformers names them.

    Returns the files. The caller makes `folder` durable and visible.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        _save(folder / WEIGHTS, shards[0])
        return [folder / WEIGHTS]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(path, shard)
        files.append(path)
        weight_map |= dict.fromkeys(shard, path.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, folder / INDEX]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of a .safetensors file, or of a folder's file or shards.

    Arrays are read-only views of the file: nothing is copied until it is used.

    Raises: ValueError naming the file and what is wrong with it: no weights, damaged,
    an index that points outside the folder or disagrees with the shards.
    """
    if path.is_file():
        return _open(path)
    if (path / WEIGHTS).is_file():
        return _open(path / WEIGHTS)
    if not (path / INDEX).is_file():
        raise ValueError(
            f"{path} holds neither {WEIGHTS} nor {INDEX}: give a folder that "
            f"save_pretrained or export_weights.py wrote"
        )
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path / INDEX} has no weight_map: take the file that belongs to the "
            f"shards"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file:
            raise ValueError(
                f"{path / INDEX} points to {file!r}: shards must lie beside the index"
            )
        if not (path / file).is_file():
            raise ValueError(
                f"{path / file} is missing, but {INDEX} names it: fetch it again"
            )
        for name, tensor in _open(path / file).items():
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{path / file} holds {name!r}, which {INDEX} places in "
                    f"{weight_map.get(name)!r}: shards and index do not belong together"
                )
            tensors[name] = tensor
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ValueError(
            f"{path / weight_map[lost[0]]} lacks {lost[0]!r}, which {INDEX} places "
            f"there: shards and index do not belong together"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises: ValueError naming the file, if it is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits
        raise ValueError(
            f"{path} is not valid JSON ({error}): fetch it again"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__} instead of an object: fetch it "
            f"again"
        )
    return values


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    # The writer takes the bytes of a strided view in storage order, without a word.
    dense = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(dense, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        size = sum(tensor.nbytes for tensor in dense.values())
        raise OSError(
            f"{path} was not written, {size:,} bytes ({error}): make room, or give "
            f"another --out"
        ) from None
    # The library makes it readable for its owner alone; its folder shall decide.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _open(path: Path) -> dict[str, np.ndarray]:
    try:
        # The library checks that the header is sane and that the tensors fill the
        # file exactly, without gap or overlap; then a view per tensor is safe.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not an intact safetensors file ({error}): fetch it again"
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size).decode()
    try:
        # Readers differ in which of two equal names they take.
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except ValueError as error:
        raise ValueError(
            f"{path} is not an intact safetensors file ({error}): fetch it again"
        ) from None
    header.pop("__metadata__", None)
    data = None
    if path.stat().st_size > 8 + size:  # an empty mapping is an error
        data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, and weights must "
                f"be {', '.join(_DTYPES)}: expand quantised weights first"
            )
        start, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if end - start != dtype.itemsize * math.prod(shape):
            raise ValueError(
                f"{path}: tensor {name!r} has {end - start} bytes, too few or too many "
                f"for {entry['dtype']} {shape}: fetch it again"
            )
        # A view at any offset: headers written by others need not align the data.
        tensors[name] = _view(data, start, end, dtype, shape)
    return tensors


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it holds {double!r} twice")
    return values


def _view(
    data: np.memmap | None,
    start: int,
    end: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
) -> np.ndarray:
    if data is None or start == end:
        return np.zeros(shape, dtype)
    return np.ndarray(shape, dtype, buffer=data[start:end])
