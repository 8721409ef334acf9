#!/usr/bin/env python3
"""Times greedy decoding on a CPU: ours, torch_ref uncached, transformers with a cache.

    python scripts/bench_decode.py --json docs/benchmarks/decode-cpu.json

One network in all three, side by side in one process, each timed `rounds` times in
turn, after a first call that compiles or warms up. Same prompts, same count of tokens.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import command_line
import numpy as np

SIDES = ("jaxllm, cache", "torch_ref, no cache", "transformers, cache")


@dataclass(frozen=True)
class Arguments:
    """Times greedy decoding on a CPU, side by side."""

    preset: str = "demo"
    """Preset whose network is used, with random weights."""
    prompts: tuple[int, ...] = (8, 23, 64)
    """Lengths of the prompts in tokens, each decoded alone."""
    new_tokens: int = 256
    """Tokens to add to each."""
    rounds: int = 2
    """Timings of each side; the best counts."""
    threads: int = 0
    """Threads of PyTorch; 0 takes as many as there are cores."""
    json: Path | None = None
    """File for the record."""


def main(arguments: Arguments) -> None:
    """Times all sides, prints a line each, and writes the record if asked to.

    Raises: ValueError for a prompt that leaves no room in the context.
    """
    import jax
    import torch
    import transformers

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(arguments.threads or cores)
    prompts, sides = build(arguments)
    written = {name: side(prompts[0]) for name, side in sides.items()}
    if len({tuple(ids) for ids in written.values()}) > 1:
        print("note: sides differ at near-ties, as random weights have them")
    for prompt in prompts[1:]:
        for side in sides.values():
            side(prompt)  # another prompt length, another program
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            begun = time.perf_counter()
            for prompt in prompts:
                side(prompt)
            best[name] = min(best[name], time.perf_counter() - begun)
    tokens = len(prompts) * arguments.new_tokens
    ours = best[SIDES[0]]
    record: dict[str, Any] = {
        "arguments": {k: v for k, v in asdict(arguments).items() if k != "json"},
        "tokens_per_s": {name: tokens / seconds for name, seconds in best.items()},
        "times_ours": {name: seconds / ours for name, seconds in best.items()},
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(), "cores": cores,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    for name, seconds in best.items():
        print(
            f"{name:22} {tokens / seconds:8.1f} tokens/s, "
            f"{seconds / ours:5.2f} times ours in time"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def build(
    arguments: Arguments,
) -> tuple[list[list[int]], dict[str, Callable[[list[int]], list[int]]]]:
    """Makes prompts, and for each side a function from a prompt to the new ids."""
    import jax
    import torch
    import transformers
    from flax import nnx

    from jaxllm.config import ComputeConfig
    from jaxllm.convert import Format
    from jaxllm.convert.export import write_export
    from jaxllm.generate import generate
    from jaxllm.model import Transformer
    from jaxllm.presets import preset
    from torch_ref import k_model

    model, new = preset(arguments.preset).model, arguments.new_tokens
    if max(arguments.prompts) + new > model.max_seq_len:
        model = replace(model, max_seq_len=max(arguments.prompts) + new)
    if min(arguments.prompts) < 1 or new < 1 or arguments.rounds < 1:
        raise ValueError("--prompts, --new-tokens and --rounds must be at least 1")
    compute = ComputeConfig(compute_dtype="float32").resolve(n_layers=model.n_layers)
    graphdef, state = nnx.split(Transformer(model, compute, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, model.vocab_size, n).tolist() for n in arguments.prompts]
    host = jax.tree.map(np.asarray, params)
    loaded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        openers: dict[Format, Any] = {
            "llama": transformers.AutoModelForCausalLM,
            "k_model": k_model.Transformer,
        }
        for format, opener in openers.items():
            place = Path(folder) / format
            place.mkdir()
            write_export(place, host, model, format=format, tokenizer=None)
            loaded[format] = opener.from_pretrained(place).eval()
    llama, reference = loaded["llama"], loaded["k_model"]
    llama.generation_config.eos_token_id = None

    def ours(prompt: list[int]) -> list[int]:
        return generate(graphdef, params, [prompt], max_new_tokens=new)[0]

    def uncached(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        return reference.generate(ids, new, temperature=0.0)[0, len(prompt) :].tolist()

    def cached(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        said = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
            max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        return said[0, len(prompt) :].tolist()

    return prompts, dict(zip(SIDES, (ours, uncached, cached), strict=True))


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Arguments, description=__doc__)))
    sys.exit(0)
