"""One GGUF file for llama.cpp: weights, sizes and tokenizer under architecture `llama`.

llama.cpp rotates interleaved pairs for this architecture, as we do, so q and k go in
as they are. Its own converter from Hugging Face folders knows tokenizers by a hash and
rejects every newly trained one, hence a writer of our own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.convert.folder import CHAT_TEMPLATE
from jaxllm.convert.names import to_state_dict
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, SPECIAL_TOKENS, Tokenizer

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of weights that the format has, as llama.cpp computes with them."""


def write_gguf(
    path: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | None,
    name: str = "model",
) -> None:
    """Writes parameters in their own dtype; norm weights are widened to float32, the
    only dtype in which llama.cpp multiplies by them.

    Raises: ValueError if the dtype is none of DTYPES, the tokenizer is missing or has
    more ids than the model, or the gguf package is not installed.
    """
    gguf = import_gguf()
    tensors = to_state_dict(params, config, format="gguf")
    dtype = str(tensors["output_norm.weight"].dtype)
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype {dtype} is not one of GGUF's ({', '.join(DTYPES)}): give "
            f"--dtype float32"
        )
    if tokenizer is None:
        raise ValueError(
            "a GGUF file holds its tokenizer, and the run has no tokenizer.json: put "
            "the one that its data was prepared with into the run folder"
        )
    assert config.head_dim is not None and config.hidden_dim is not None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {"float32": kinds.ALL_F32, "float16": kinds.MOSTLY_F16,
         "bfloat16": kinds.MOSTLY_BF16}[dtype]
    )  # fmt: skip
    _add_tokenizer(gguf, writer, tokenizer, config)
    for key, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(key, np.ascontiguousarray(tensor, np.float32))
        elif dtype == "bfloat16":
            # The package knows no NumPy bfloat16: hand it bytes and the type's name.
            raw = np.ascontiguousarray(tensor).view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(key, raw, raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(tensor))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:  # NumPy only says how many items it lacked
        raise OSError(
            f"{path} was not written ({error}): make room, or give another --out"
        ) from None
    finally:
        writer.close()


def read_gguf(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file that `write_gguf` wrote, norms in the dtype of the
    rest again.

    Raises: ValueError naming a tensor of another type.
    """
    gguf = import_gguf()
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = tensor.data.view(ml_dtypes.bfloat16)
        elif str(tensor.data.dtype) in DTYPES:
            data = tensor.data
        else:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}, not one "
                f"of {', '.join(DTYPES)}"
            )
        tensors[tensor.name] = data
    dtype = tensors["token_embd.weight"].dtype
    return {name: data.astype(dtype, copy=False) for name, data in tensors.items()}


def import_gguf() -> Any:
    """Imports the optional gguf package.

    Raises: ValueError saying how to install it.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "--format gguf needs the gguf package: pip install 'jaxllm[gguf]'"
        ) from None
    return gguf


def _add_tokenizer(
    gguf: Any, writer: Any, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only "
            f"model.vocab_size={config.vocab_size}: they do not belong together"
        )
    # llama.cpp wants one entry for each row of the embedding, also for spare ones.
    tokens = [f"[UNUSED{i}]" for i in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, i in tokenizer.inner.get_vocab(with_added_tokens=True).items():
        tokens[i] = token
        types[i] = int(gguf.TokenType.NORMAL)
    for i, added in tokenizer.inner.get_added_tokens_decoder().items():
        control = gguf.TokenType.CONTROL if added.special else None
        types[i] = int(control or gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(BEGIN_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_pad_token_id(END_ID)
    writer.add_unk_token_id(SPECIAL_TOKENS.index("<unk>"))
    # As in tokenizer_config.json: the chat template writes its own <|im_start|>.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.inner.to_str())["model"]["merges"]
    return [m if isinstance(m, str) else " ".join(m) for m in merges]
