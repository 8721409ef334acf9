"""Token shards on disk: the folder, its manifest, and the checks before it is used.

    tokenizer.json        the tokenizer that made the ids
    manifest.json         what is here; a folder without it is no data folder
    quarantine.jsonl      damaged lines of the sources; only if there were any
    train/00000.ds        ids, flat, little-endian uint16 (uint32 above 65,536 ids)
    train/00000.ds.index  ends of the documents, in tokens from the file's start: uint64
    val/...               the held-out documents, the same way

A document is BEGIN_ID, the ids of its text, END_ID.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
INDEX_DTYPE = np.dtype("<u8")
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Shard:
    """One token file and its index."""

    name: str
    """Path of the token file inside the folder; the index is beside it."""
    documents: int
    tokens: int
    """Ids in the file, begin and end included."""
    text_bytes: int
    """Bytes of the text itself, as UTF-8."""
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class SourceFile:
    """One input file and what came of it."""

    path: str
    bytes: int
    sha256: str
    documents: int
    """Documents read from it, before duplicates are dropped."""
    text_bytes: int
    tokens: int
    quarantined: int


@dataclass(frozen=True)
class Manifest:
    """What a data folder holds. The same inputs and options give the same manifest."""

    tokenizer_sha256: str
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, list[Shard]]
    """Shards of "train" and "val", in the order of the stream."""
    sources: list[SourceFile]
    options: dict[str, Any]
    """The arguments of `prepare` that decide the content, split seed among them."""
    records: int = 0
    """All that was read: documents, empty ones, damaged ones."""
    quarantined: int = 0
    """Damaged records, listed in quarantine.jsonl."""
    empty: int = 0
    """Records without any text, which are left out."""
    duplicates: int = 0
    """Documents dropped as exact copies of an earlier one."""
    version: int = FORMAT_VERSION
    folder: Path = field(default=Path(), compare=False)
    """Where it was read from; not stored."""

    def documents(self, split: str) -> int:
        """Number of documents in a split."""
        return sum(shard.documents for shard in self.splits[split])

    def tokens(self, split: str) -> int:
        """Number of ids in a split, begin and end included."""
        return sum(shard.tokens for shard in self.splits[split])

    def text_bytes(self, split: str) -> int:
        """Bytes of text in a split."""
        return sum(shard.text_bytes for shard in self.splits[split])

    def to_json(self) -> str:
        """Writes the manifest as JSON text."""
        values = asdict(self)
        del values["folder"]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads a data folder's manifest and checks the size of every file it names.

    Raises: ValueError naming the folder or file, what was expected and what is there.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise ValueError(
            f"data folder {folder} does not exist: make it with "
            f"scripts/prepare_data.py --input FILE --out {folder}"
        )
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a data folder (it has no manifest.json): make one with "
            f"scripts/prepare_data.py --input FILE --out DIR"
        )
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        version = values.get("version")
        if version == FORMAT_VERSION:
            values["splits"] = {
                split: [Shard(**shard) for shard in shards]
                for split, shards in values["splits"].items()
            }
            values["sources"] = [SourceFile(**source) for source in values["sources"]]
            manifest = Manifest(**values, folder=folder)
            if set(manifest.splits) != {"train", "val"}:
                raise ValueError(f"splits are {sorted(manifest.splits)}")
            np.dtype(manifest.dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the data "
            f"again with scripts/prepare_data.py"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}: prepare the data again with scripts/prepare_data.py"
        )
    _check_files(manifest)
    return manifest


def _check_files(manifest: Manifest) -> None:
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in (s for shards in manifest.splits.values() for s in shards):
        path = manifest.folder / shard.name
        for file, expected in (
            (path, shard.tokens * itemsize),
            (index_path(path), shard.documents * INDEX_DTYPE.itemsize),
        ):
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"shard {file} {what}, the manifest says {expected} bytes: prepare "
                    f"the data again with scripts/prepare_data.py, or copy it again"
                )
    load_tokenizer(manifest)


def load_tokenizer(manifest: Manifest) -> Tokenizer:
    """Loads the folder's tokenizer and checks that it is the one that made the ids.

    Raises: ValueError if it is missing, damaged or another one.
    """
    path = manifest.folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{path} is not the tokenizer that made these shards (sha256 "
            f"{tokenizer.sha256[:12]}..., the manifest says "
            f"{manifest.tokenizer_sha256[:12]}...): put the right file back, or "
            f"prepare the data again"
        )
    return tokenizer


def verify_hashes(manifest: Manifest) -> int:
    """Hashes every shard and compares it with the manifest; gives the bytes read.

    Raises: ValueError naming the first file whose content changed.
    """
    total = 0
    for shard in (s for shards in manifest.splits.values() for s in shards):
        path = manifest.folder / shard.name
        pairs = ((path, shard.sha256), (index_path(path), shard.index_sha256))
        for file, expected in pairs:
            found = file_sha256(file)
            total += file.stat().st_size
            if found != expected:
                raise ValueError(
                    f"shard {file} is damaged: its sha256 is {found[:12]}..., the "
                    f"manifest says {expected[:12]}...; copy it again, or prepare the "
                    f"data again with scripts/prepare_data.py"
                )
    return total


def index_path(tokens: Path) -> Path:
    """Gives the path of the document ends that belong to a token file."""
    return tokens.with_name(tokens.name + ".index")


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Picks the narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_sha256(path: Path) -> str:
    """Hashes a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
