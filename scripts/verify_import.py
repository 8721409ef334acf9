"""Opens a folder the way its authors do, and compares it with what we read from it.

What import_weights.py does before it publishes a run.
"""

from pathlib import Path
from typing import Any

from verify_weights import (
    Text,
    our_logits,
    read_text,
    uncached,
    with_torch,
    with_transformers,
)

from jaxllm.config import ModelConfig
from jaxllm.convert.names import Format
from jaxllm.data.tokenizer import Tokenizer


def verify_import(
    source: Path,
    params: dict[str, Any],
    config: ModelConfig,
    *,
    format: Format,
    tokenizer: Tokenizer | None,
) -> list[dict[str, Any]]:
    """Compares what a folder of others computes, opened by what its authors open it
    with, with what the `params` read from it compute; entries as in `verify`.

    Two rows of text and short continuations: it is the layout that can go wrong.
    """
    text = read_text([], config, tokenizer)
    text = Text(text.tokens_BT[:2], text.source)
    ours = our_logits(params, config)
    if format == "llama":
        return with_transformers(source, ours, text, None, new=16)
    import torch

    from torch_ref import k_model

    model = k_model.Transformer.from_pretrained(
        source, dtype=torch.float32, local_files_only=True
    ).eval()
    return with_torch(model, uncached(model), ours, text, new=16)
