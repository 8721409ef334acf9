"""Greedy text of our cache, judged by full passes: our own, the reference's, Llama's.

Position by position on our own text: where every choice is the one that the other would
have made after the same tokens, both write the same text, by induction.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm.config import ModelConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.configs import llama_config
from jaxllm.generate import generate
from parity_tests import cases, sides
from parity_tests.precision import FP32, FP64, Precision

CONFIG = dataclasses.replace(cases.SMALL, max_seq_len=288)
PROMPTS, NEW = 100, 256


def measured() -> list[dict[str, Any]]:
    """Every comparison in both precisions."""
    return [
        {"against": name, "precision": precision.name} | compared(name, precision)
        for precision in (FP64, FP32)
        for name in OTHERS
    ]


def compared(name: str, precision: Precision) -> dict[str, Any]:
    """How many tokens were compared, the noise of the logits, and where another token
    would have been chosen: row, position, and by how much its logit is ahead."""
    tokens, lengths = decoded(precision)
    logits = OTHERS[name](precision, tokens)
    mine = _ours(precision, tokens[:10])
    if name == "our full pass":  # the yardstick of two equal forms is the reference
        mine = _reference(precision, tokens[:10])
    noise = float(np.max(np.abs(mine - logits[:10])))
    differ = []
    for row, length in enumerate(lengths.tolist()):
        at = np.arange(length - 1, length - 1 + NEW)
        scores, chosen = logits[row, at], tokens[row, at + 1]
        gaps = scores.max(-1) - scores[np.arange(NEW), chosen]
        differ += [
            {"row": row, "position": int(at[i]), "gap": float(gaps[i])}
            for i in np.flatnonzero(scores.argmax(-1) != chosen)
        ]
    return {"tokens": PROMPTS * NEW, "noise": noise, "differ": differ}


@functools.cache
def decoded(precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Greedy text of 100 prompts of different lengths; and the prompts' lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, PROMPTS)
    texts = cases.text(0, (PROMPTS, 32), CONFIG.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, lengths, strict=True)]
    rows = decode(CONFIG, precision, _params(precision), prompts, NEW)
    tokens = np.zeros((PROMPTS, CONFIG.max_seq_len), np.int64)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert len(row) == NEW
        tokens[i, : len(prompt) + NEW] = [*prompt, *row]
    return tokens, lengths


def decode(
    config: ModelConfig,
    precision: Precision,
    params: dict,
    prompts,
    new: int,
    **options,
) -> list[list[int]]:
    """Our `generate` in a precision."""
    graphdef = sides.ours(sides.run_config(config, precision.compute())).graphdef
    with precision.active():
        on_device = jax.tree.map(jnp.asarray, params)
        return generate(graphdef, on_device, prompts, max_new_tokens=new, **options)


def _params(precision: Precision) -> dict:
    return cases.trained(0, precision)


def _ours(precision: Precision, tokens: np.ndarray) -> np.ndarray:
    parts = np.split(tokens, len(tokens) // 10)
    run = functools.partial(sides.our_logits, _params(precision), CONFIG, precision)
    return np.concatenate([run(part) for part in parts])


def _reference(precision: Precision, tokens: np.ndarray) -> np.ndarray:
    model = sides.theirs(_params(precision), CONFIG, precision)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def _transformers(precision: Precision, tokens: np.ndarray) -> np.ndarray:
    import transformers  # slow to import: where it is used

    tensors = to_state_dict(_params(precision), CONFIG, format="llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(llama_config(CONFIG))
    )
    torch.nn.Module.to(model, dtype=precision.torch_dtype)
    model.load_state_dict({n: torch.tensor(np.array(x)) for n, x in tensors.items()})
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


OTHERS: dict[str, Callable[[Precision, np.ndarray], np.ndarray]] = {
    "our full pass": _ours,
    "the reference": _reference,
    "transformers": _transformers,
}
