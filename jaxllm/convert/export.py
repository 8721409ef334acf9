"""What an exported folder holds beside its proof: weights, configuration, tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.convert.configs import generation_config, k_model_config, llama_config
from jaxllm.convert.dtypes import cast
from jaxllm.convert.folder import write_json, write_tokenizer
from jaxllm.convert.names import Format, from_state_dict, to_state_dict
from jaxllm.convert.tensors import SHARD_BYTES, write_tensors
from jaxllm.data.tokenizer import Tokenizer


def round_params(
    params: Mapping[str, Any], config: ModelConfig, dtype: str
) -> dict[str, Any]:
    """Rounds our parameters to `dtype`, as NumPy arrays.

    Raises: ValueError naming a tensor that is not finite or does not fit.
    """
    tensors = to_state_dict(params, config, format="k_model")
    return from_state_dict(cast(tensors, dtype), config, format="k_model")


def write_export(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    format: Format,
    tokenizer: Tokenizer | None,
    name: str = "model",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all that `format` needs to be opened by others, in the dtype of `params`.

    Raises: ValueError naming what does not fit the format.
    """
    dtype = str(np.asarray(params["norm"]["weight"]).dtype)
    if format == "gguf":
        from jaxllm.convert.gguf_file import write_gguf

        path = folder / f"{name}-{dtype}.gguf"
        write_gguf(path, params, config, tokenizer=tokenizer, name=name)
        return
    describe = {"llama": llama_config, "k_model": k_model_config}[format]
    write_json(folder / "config.json", describe(config, dtype=dtype))
    write_json(folder / "generation_config.json", generation_config())
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, config)
    tensors = to_state_dict(params, config, format=format)
    write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)
