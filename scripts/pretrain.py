#!/usr/bin/env python3
"""Trains a model: python scripts/pretrain.py [PRESET] [--flag value ...]"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import command_line

from jaxllm.config import RunConfig
from jaxllm.presets import PRESETS, preset
from jaxllm.train.allocator import keep_memory

USAGE = """Trains a model from a preset, with any field overridden by a flag.

With --resume and no preset named, the configuration is that of the run in --out; with
weights to begin from (--init-from), the network is theirs.

Presets:
"""


ALIASES = {"--verify-data": "--data.verify"}
"""Other spellings of flags."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and trains."""
    config = parse(list(sys.argv[1:] if argv is None else argv))
    keep_memory()
    from jaxllm.train.loop import run  # imports JAX: --help should not wait for it

    run(config)


def parse(argv: list[str]) -> RunConfig:
    """Builds the run's configuration.

    Raises: ValueError for an unknown preset; SystemExit for --help and bad values.
    """
    argv = [ALIASES.get(word, word) for word in argv]
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    base = preset(name or "demo")
    if name is None and "--resume" in argv and not {"-h", "--help"} & set(argv):
        from jaxllm.train.run_folder import RunFolder

        folder = RunFolder(_flag(argv, "--out") or base.out)
        if folder.config.exists() or folder.has_checkpoint():
            base = replace(folder.load_config(), out=str(folder.path))
    elif origin := _flag(argv, "--init-from"):
        from jaxllm.train.origin import find_weights

        base = replace(base, model=find_weights(origin).model)
    presets = "\n".join(f"  {n}: {_first_words(n)}" for n in PRESETS)
    # Every leaf field is a flag of its own; a dataclass as a whole is not.
    return command_line.parse(
        RunConfig,
        args=argv,
        default=underived(replace(base, resume=False, fresh=False)),
        description=USAGE + presets,
        prog="pretrain.py [PRESET]",
    )


def underived(config: RunConfig) -> RunConfig:
    """Forgets the widths that follow from others, so that a new --model.dim moves them.

    Only a default for the command line: parsing builds, and checks, a new one.
    """
    model = replace(config.model)
    plain = replace(model, hidden_dim=None, head_dim=None)
    for name in ("hidden_dim", "head_dim"):
        if getattr(model, name) == getattr(plain, name):
            object.__setattr__(model, name, None)
    config = replace(config)  # frozen, and checked anew if replaced with such a model
    object.__setattr__(config, "model", model)
    return config


def _flag(argv: list[str], name: str) -> str | None:
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return None


def _first_words(name: str) -> str:
    text = (PRESETS[name].__doc__ or "").split("\n\n")[1]
    return " ".join(text.split("Hardware:")[0].split())


if __name__ == "__main__":
    command_line.run(main)
