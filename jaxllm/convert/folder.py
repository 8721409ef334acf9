"""An exported folder: written beside its place, made durable, then moved there."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, SPECIAL_TOKENS, Tokenizer

MARK = "parity.json"
"""The file by which a folder is known to be an export of ours, safe to replace."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as a Jinja template: <|im_start|>role, a line break, content, <|im_end|>."""


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

    Whatever was not published when the block ends, by an error or not, is removed.

    Raises: ValueError as `check_target`; OSError if the parent cannot be written.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name}.partial-"
    draft = Path(tempfile.mkdtemp(prefix=name, dir=target.parent))
    draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, target: Path) -> None:
    """Moves a finished folder to its place in one step, replacing an earlier export.

    Everything is on disk before it becomes visible.

    Raises: ValueError as `check_target`; OSError.
    """
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    check_target(target)
    old = None
    if target.exists():
        # A folder cannot be renamed over one that has files: step aside first.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(old / "export")
    draft.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


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
