"""An exported folder: written beside its place, made durable, then moved there."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.convert.chat import CHAT_TEMPLATE
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, SPECIAL_TOKENS, Tokenizer

MARK = "parity.json"
"""The file by which a folder is known to be an export of ours, safe to replace."""


def check_target(target: Path) -> None:
    """Refuses a folder that an export must not replace.

    Raises: ValueError if `target` exists and is anything but an earlier export.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} exists and is not a folder: give another --out")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise ValueError(
            f"{target} exists and is not an export of ours (it has no {MARK}): give "
            f"another --out, or remove it"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, for `publish` to move to its place.

    Whatever was not published when the block ends, by an error or not, is removed; so
    is what killed processes left there, and an export they had moved aside comes back.

    Raises: ValueError as `check_target`; OSError if the parent cannot be written.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(target)
    draft, lock = _hidden_folder(target, "partial")
    draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def publish(draft: Path, target: Path) -> None:
    """Moves a finished folder to its place in one step, replacing an earlier export.

    Everything is on disk before it becomes visible.

    Raises: ValueError as `check_target`; OSError.
    """
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    check_target(target)
    old, lock = None, -1
    if target.exists():
        # A folder cannot be renamed over one that has files: step aside first.
        old, lock = _hidden_folder(target, "old")
        target.rename(old / "export")
    draft.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON object, keys in their order."""
    path.write_text(
        json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )


def write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Writes tokenizer.json and the tokenizer_config.json that AutoTokenizer reads.

    The ids are those of our tokenizer, with one difference that users of transformers
    expect: special tokens spelled out in the text become their ids. No id is added at
    either end; a document begins with <|im_start|> only where the text says so.

    Raises: ValueError if the tokenizer has more ids than the model.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only "
            f"model.vocab_size={config.vocab_size}: they do not belong together"
        )
    tokenizer.save(folder / "tokenizer.json")
    begin, end = SPECIAL_TOKENS[BEGIN_ID], SPECIAL_TOKENS[END_ID]
    others = [token for token in SPECIAL_TOKENS[1:] if token not in (begin, end)]
    values = {
        # Not LlamaTokenizer: that one rebuilds its own pre-tokenizer around our merges.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "unk_token": SPECIAL_TOKENS[0],
        "additional_special_tokens": others,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
        "padding_side": "left",  # as batched generation needs it
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", values)


def _hidden_folder(target: Path, kind: str) -> tuple[Path, int]:
    """Makes a folder beside `target`, and a lock on it that ends with this process."""
    while True:
        prefix = f".{target.name}.{kind}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # another process took it for a left-over


def _clear_up(target: Path) -> None:
    """Removes what processes that are dead left beside `target`."""
    for kind in ("old", "partial"):
        name = f".{glob.escape(target.name)}.{kind}-????????"
        for folder in target.parent.glob(name):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if kind == "old" and not target.exists():
                    (folder / "export").rename(target)  # killed between two renames
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue  # at work at this moment, or no locks here
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
