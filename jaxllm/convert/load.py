"""Reads weights that others wrote: a Hugging Face Llama, a k_model, with its config."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.convert.configs import config_from
from jaxllm.convert.dtypes import cast, require_finite
from jaxllm.convert.names import Format, from_state_dict
from jaxllm.convert.tensors import read_json, read_tensors

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
"""Endings of files that may hold code."""


def read_config(path: Path, given: Path | None = None) -> tuple[Format, ModelConfig]:
    """Reads the config.json that belongs to the weights at `path`: the given one, or
    that in the folder, or beside the file.

    Raises: ValueError if there is none, or if it asks for what we cannot represent.
    """
    file = given or (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: weights alone do not tell how many heads they "
            f"have; give the file with --config"
        )
    values = read_json(file)
    try:
        format, config = config_from(values)
    except ValueError as error:
        raise ValueError(
            f"{file}: {str(error).removeprefix('config.json: ')}"
        ) from None
    return format, config  # type: ignore[return-value]


def read_params(path: Path, config: ModelConfig, *, format: Format) -> dict[str, Any]:
    """Reads a .safetensors file, or a folder with one or with shards, into our tree.

    Raises: ValueError naming the file and the tensor that is wrong.
    """
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file: give one, or its folder")
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{path} holds its weights only as a pickle, {pickles[0]}: convert it "
                f"to safetensors, or give that file with --allow-pickle"
            )
    return params_from(read_tensors(path), config, format=format, where=str(path))


def params_from(
    tensors: Mapping[str, Any], config: ModelConfig, *, format: Format, where: str
) -> dict[str, Any]:
    """Builds our tree from a state dict, and checks that every number is one.

    Raises: ValueError naming `where` and the tensor that is wrong.
    """
    try:
        kept = _without_buffers(tensors, config) if format == "llama" else tensors
        params = from_state_dict(kept, config, format=format)
        for name, tensor in kept.items():
            require_finite(name, np.asarray(tensor))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return params


def cast_tree(tree: dict[str, Any], dtype: str, *, where: str = "") -> dict[str, Any]:
    """Rounds every leaf of our tree to `dtype`.

    Raises: ValueError naming a leaf that is not finite, or too large for `dtype`.
    """
    leaves = {f"{where}{name}": leaf for name, leaf in tree.items()}
    rounded = cast({k: v for k, v in leaves.items() if not isinstance(v, dict)}, dtype)
    return {
        name: cast_tree(leaf, dtype, where=f"{where}{name}/")
        if isinstance(leaf, dict)
        else rounded[f"{where}{name}"]
        for name, leaf in tree.items()
    }


def _without_buffers(
    tensors: Mapping[str, Any], config: ModelConfig
) -> Mapping[str, Any]:
    """Leaves out the rotary frequencies that old Llama folders store for each layer,
    if they are the ones that the configuration gives.

    Raises: ValueError if they are others: the embedding was scaled.
    """
    buffers = [n for n in tensors if re.fullmatch(r".*\.rotary_emb\.inv_freq", n)]
    assert config.head_dim is not None
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    for name in buffers:
        found = np.asarray(tensors[name]).astype(np.float64)
        expected = config.rope_theta**-exponents
        # Stored in 16 bits at times, hence the tolerance.
        if found.shape != expected.shape or not np.allclose(found, expected, 1e-2):
            raise ValueError(
                f"tensor {name!r} differs from the frequencies of rope_theta="
                f"{config.rope_theta}: scaled rotary embeddings cannot be represented"
            )
    return {name: t for name, t in tensors.items() if name not in buffers}
