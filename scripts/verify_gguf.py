"""Opens a GGUF file in llama.cpp, through xllamacpp; a part of verify_weights.py."""

import importlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from verify_weights import NEW_TOKENS, Logits, Text, padded, same_tokenizer

from jaxllm.convert.compare import check_greedy
from jaxllm.convert.gguf_file import read_gguf
from jaxllm.data.tokenizer import Tokenizer

KL_GATES = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-2}
"""Largest KL divergence in nats from llama.cpp, which rounds what it multiplies 16-bit
weights with to 16 bits as well."""


def with_llama_cpp(
    file: Path, ours: Logits, text: Text, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Compares distributions, greedy continuations and token ids of a GGUF file in
    llama.cpp with ours; entries as in `verify_weights.verify`."""
    ask = _llama_cpp(file, text.tokens_BT.shape[1])

    def said(prompt: np.ndarray, new: int, **more: Any) -> dict[str, Any]:
        return ask(
            "/completion", prompt=prompt.tolist(), n_predict=new, temperature=0.0,
            return_tokens=True, cache_prompt=False, **more,
        )  # fmt: skip

    tokens, prompt = text.tokens_BT, text.prompt
    logits, noise, kl = ours(tokens), 0.0, 0.0
    compared = 0
    for b, row in enumerate(tokens):
        # One place a row, ever further on; a prompt may not fill the whole context.
        at = (b + 1) * (len(row) - 1) // len(tokens) - 1
        reply = said(row[: at + 1], 1, n_probs=logits.shape[-1])
        log_p = _log_softmax(logits[b, at].astype(np.float64))
        # Empty where the best token is part of a character: nothing to print yet.
        for entry in reply.get("completion_probabilities", []):
            ids = [top["id"] for top in entry["top_logprobs"]]
            log_q = np.array([top["logprob"] for top in entry["top_logprobs"]])
            likely = log_p[ids] > -20  # theirs are floored far below that
            log_q = log_q[likely]
            gaps = np.abs(log_p[ids][likely] - log_q)
            noise = float(np.maximum(noise, gaps.max()))
            # Normalised over the same ids: KL is of second order in the differences,
            # and a sum that is off by a rounding error is of first.
            p, q = (_log_softmax(x) for x in (log_p[ids][likely], log_q))
            kl = float(np.maximum(kl, (np.exp(p) * (p - q)).sum()))
            compared += 1
    gate = KL_GATES[_matrix_type(file)]
    checks: list[dict[str, Any]] = [
        {
            "name": "distributions in llama.cpp",
            "positions": compared,
            "max_abs_difference": noise,
            "max_kl_nats": kl,
            "max_kl_gate": gate,
            "passed": kl <= gate,
        }
    ]
    results = []
    for row in tokens:
        new = said(row[:prompt], min(NEW_TOKENS, len(row) - prompt))["tokens"]
        both = np.array([[*row[:prompt], *new]])
        scored = ours(padded(both, len(row)))[:, : both.shape[1]]
        results.append(check_greedy(scored, both, prompt=prompt, noise=3 * noise))
    checks.append(
        {
            "name": "greedy continuations in llama.cpp",
            "prompts": len(results),
            "prompt_tokens": prompt,
            "new_tokens": sum(result["new_tokens"] for result in results),
            "same": sum(result["same"] for result in results),
            "noise": noise,
            "near_ties": [tie for result in results for tie in result["near_ties"]],
            "different": [one for result in results for one in result["different"]],
            "passed": all(result["passed"] for result in results),
        }
    )
    if tokenizer is not None:
        checks.append(
            same_tokenizer(
                "tokenizer in llama.cpp", text, tokenizer,
                lambda t: ask("/tokenize", content=t, parse_special=False)["tokens"],
                lambda ids: ask("/detokenize", tokens=ids)["content"],
            )
        )  # fmt: skip
    return checks


def _llama_cpp(file: Path, context: int) -> Callable[..., dict[str, Any]]:
    """Opens a GGUF file in llama.cpp; returns a function that asks its server, which
    listens on this machine alone and ends with the function."""
    # Compiled, and without types.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    # Its defaults round keys and values to 16 bits.
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    kinds = xllamacpp.llama_flash_attn_type
    options.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.n_ctx, options.n_parallel, options.n_gpu_layers = context + 8, 1, 0
    options.warmup, options.verbosity = False, -1
    server = xllamacpp.Server(options)

    def ask(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(
                    f"llama.cpp refused {path}: {error.read().decode(errors='replace')}"
                ) from None

    return ask


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _matrix_type(file: Path) -> str:
    return str(read_gguf(file)["token_embd.weight"].dtype)
