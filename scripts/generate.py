#!/usr/bin/env python3
"""Writes text with a trained run: python scripts/generate.py RUN --prompt "import " """

from dataclasses import dataclass
from pathlib import Path

import command_line
import tyro


@dataclass(frozen=True)
class Arguments:
    """Goes on from a prompt with a model that scripts/pretrain.py trained."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/demo."""
    prompt: tuple[str, ...] = ("",)
    """Texts to go on from, one row each; an empty one begins a new document."""
    max_new_tokens: int = 256
    """Most tokens to add to each row."""
    temperature: float = 0.8
    """Divides the logits before the choice; 0 takes the likeliest token."""
    top_k: int = 50
    """Choose among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have occurred become less likely."""
    seed: int = 0
    """Seed of the choice: the same seed gives the same text."""
    step: int | None = None
    """Checkpoint to read, by its step; None takes the newest undamaged one."""
    ignore_end: bool = False
    """Go on after the model ends the document."""


def main(arguments: Arguments) -> None:
    """Loads the run and prints as the tokens come."""
    from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer
    from jaxllm.generate import Sampling, stream
    from jaxllm.train.load import load_params
    from jaxllm.train.run_folder import RunFolder

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    folder = RunFolder(arguments.run)
    loaded = load_params(folder, step=arguments.step)
    tokenizer = Tokenizer.load(folder.tokenizer)
    rows = [[BEGIN_ID, *tokenizer.encode(text)] for text in arguments.prompt]
    prompts = [list(row) for row in rows]
    single = len(rows) == 1
    shown = ""
    for tokens in stream(
        loaded.graphdef, loaded.params, prompts,
        max_new_tokens=arguments.max_new_tokens, sampling=sampling,
        stop_ids=() if arguments.ignore_end else (END_ID,),
    ):  # fmt: skip
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
        if single:
            text = tokenizer.decode(rows[0])
            # A character may still lack bytes that the next token brings.
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    if single:
        print(tokenizer.decode(rows[0])[len(shown) :])
    else:
        for row in rows:
            print(tokenizer.decode(row), end="\n---\n")


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Arguments)))
