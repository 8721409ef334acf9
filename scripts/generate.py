#!/usr/bin/env python3
"""Writes text with a trained run: python scripts/generate.py RUN --prompt "import " """

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import tyro


@dataclass(frozen=True)
class Arguments:
    """Goes on from a prompt with a model that scripts/pretrain.py trained."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/demo."""
    prompt: tuple[str, ...] = ()
    """Texts to go on from, one row each. None: a new document, or with --chat what is
    typed, line by line."""
    chat: bool = False
    """Take each prompt as a user's message and answer it, by the chat template."""
    system: str = ""
    """With --chat, the system message before the first; empty for none."""
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
    from jaxllm.data.tokenizer import BEGIN_ID
    from jaxllm.train.run_folder import RunFolder

    if arguments.system and not arguments.chat:
        raise ValueError("--system belongs to a chat: give --chat as well")
    writer = Writer(arguments)
    tokenizer = read_tokenizer(RunFolder(arguments.run), chat=arguments.chat)
    writer.load(tokenizer)
    if arguments.chat and not arguments.prompt:
        return converse(writer, arguments)
    texts = arguments.prompt or ("",)
    if arguments.chat:
        rows = [writer.chat(_opened(arguments, text)) for text in texts]
        writer.write(rows, shown_from=[len(row) for row in rows])
    else:
        rows = [[BEGIN_ID, *tokenizer.encode(text)] for text in texts]
        writer.write(rows, shown_from=[0] * len(rows))


def converse(writer: "Writer", arguments: Arguments) -> None:
    """Answers line after line of standard input, until it ends."""
    messages = _opened(arguments)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        row = writer.chat(messages)
        room = max(writer.context - arguments.max_new_tokens, 1)
        first = len(_opened(arguments))
        while len(row) > room and len(messages) > first + 1:
            # The oldest message and its answer go, but never the system's word.
            del messages[first : first + 2]
            row = writer.chat(messages)
        answer = writer.write([row], shown_from=[len(row)])[0]
        messages.append({"role": "assistant", "content": answer})


def read_tokenizer(folder: Any, *, chat: bool) -> Any:
    """Reads the run's tokenizer.

    Raises: ValueError if it has none, or none of our kind.
    """
    from jaxllm.data.tokenizer import Tokenizer

    folder.load_config()  # says so where there is no run at all
    if not folder.tokenizer.is_file():
        raise ValueError(
            f"{folder.path} has no tokenizer.json, as after an import of weights "
            f"without one of our kind: import them again with --tokenizer FILE"
        )
    try:
        return Tokenizer.load(folder.tokenizer)
    except ValueError as error:
        if not chat:
            raise
        raise ValueError(
            f"--chat needs <|im_start|> and <|im_end|> as special tokens: {error}"
        ) from None


class Writer:
    """A run's network and tokenizer, which go on from rows of ids."""

    def __init__(self, arguments: Arguments):
        from jaxllm.generate import Sampling

        self.arguments = arguments
        self.sampling = Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        )

    def load(self, tokenizer: Any) -> None:
        """Reads the weights."""
        from jaxllm.train.load import load_params
        from jaxllm.train.run_folder import RunFolder

        self.tokenizer = tokenizer
        self.loaded = load_params(
            RunFolder(self.arguments.run), step=self.arguments.step
        )
        self.context = self.loaded.config.model.max_seq_len

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a chat, with the answer begun."""
        from jaxllm.convert.chat import chat_ids

        return chat_ids(messages, self.tokenizer)

    def write(self, rows: list[list[int]], *, shown_from: Sequence[int]) -> list[str]:
        """Goes on from each row and prints it from an index on, a single one as it
        comes; returns what was printed."""
        from jaxllm.data.tokenizer import END_ID
        from jaxllm.generate import stream

        prompts = [list(row) for row in rows]
        single, shown = len(rows) == 1, ""
        for tokens in stream(
            self.loaded.graphdef, self.loaded.params, prompts,
            max_new_tokens=self.arguments.max_new_tokens, sampling=self.sampling,
            stop_ids=() if self.arguments.ignore_end else (END_ID,),
        ):  # fmt: skip
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
            if single:
                # A character may still lack bytes that the next token brings.
                text = self._whole(rows[0][shown_from[0] :])
                if len(text) > len(shown):
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        texts = [
            self._whole(row[first:])
            for row, first in zip(rows, shown_from, strict=True)
        ]
        if single:
            print(texts[0][len(shown) :])
        else:
            for text in texts:
                print(text, end="\n---\n")
        return texts

    def _whole(self, ids: list[int]) -> str:
        """The text of some ids, without a character at its end that is not whole."""
        return self.tokenizer.decode(ids).rstrip("\ufffd")


def _opened(arguments: Arguments, text: str | None = None) -> list[dict[str, str]]:
    """The messages of a chat before the first answer."""
    messages = [("system", arguments.system)] if arguments.system else []
    messages += [("user", text)] if text is not None else []
    return [{"role": role, "content": content} for role, content in messages]


def _lines() -> Iterator[str]:
    """Lines as they are typed, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Arguments)))
