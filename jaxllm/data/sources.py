"""Input files: which there are, and what each is told to hold by its name."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

LINES = (".jsonl", ".ndjson", ".json", ".jsonlines")
TEXT = (".txt", ".text", ".md", ".rst")
PACKED = (".gz", ".bz2", ".zst", ".xz")
ARCHIVES = (".tar", ".tgz", ".tbz2", ".tbz", ".txz", ".tzst")

Kind = Literal["lines", "text", "parquet"]


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    bytes: int
    modified_ns: int
    kind: Kind
    """What its content (a tar's members aside) is."""
    packing: str = ""
    """Compression as a suffix; empty for none."""
    archive: bool = False
    """A tar, whose members are read one after another."""

    @property
    def seekable(self) -> bool:
        """Whether a part can be read without reading what is before it."""
        return not self.packing and not self.archive


def kind_of(name: str, *, named: bool) -> tuple[Kind | None, str, bool]:
    """Tells a file's kind, packing and whether it is a tar from its name.

    A name with an unknown suffix is text if the user `named` it, and nothing
    (None) if it was only found in a folder.
    """
    name = name.lower()
    archive = False
    packing = ""
    stem, suffix = os.path.splitext(name)
    if suffix in ARCHIVES:
        packing = {".tgz": ".gz", ".txz": ".xz", ".tzst": ".zst"}.get(suffix, "")
        packing = packing or (".bz2" if suffix in (".tbz2", ".tbz") else "")
        return "lines", packing, True
    if suffix in PACKED:
        packing = suffix
        stem, suffix = os.path.splitext(stem)
        archive = suffix == ".tar"
    if archive or suffix in LINES:
        return "lines", packing, archive
    if suffix == ".parquet":
        return "parquet", packing, False
    return ("text" if named or suffix in TEXT else None), packing, False


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Lists the input files: files as given, folders and patterns in sorted order.

    Raises: ValueError if an input is missing, empty or a folder without text, or if
    there is no input.
    """
    found: dict[str, Source] = {}
    for given in inputs:
        for source in _find(os.fspath(given)):
            # The same file by two ways counts once.
            found.setdefault(os.path.realpath(source.path), source)
    if not found:
        raise ValueError("--input is empty: name a file, a folder or a pattern")
    return list(found.values())


def _find(given: str) -> list[Source]:
    if os.path.isdir(given):
        paths = sorted(_walk(given))
        sources = [_source(path, named=False) for path in paths]
        sources = [s for s in sources if s is not None and s.bytes]
        if not sources:
            raise ValueError(
                f"input folder {given} has no text in it: known are files that end in "
                f"{' '.join((*LINES, *TEXT, '.parquet', '.tar'))}, also packed "
                f"({' '.join(PACKED)}); name others by a pattern, '{given}/**/*.py'"
            )
        return sources
    if not os.path.exists(given):
        if not glob.has_magic(given):
            raise ValueError(f"input {given} does not exist: check the path")
        paths = sorted(p for p in glob.glob(given, recursive=True) if os.path.isfile(p))
        sources = [_source(path, named=True) for path in paths]
        sources = [s for s in sources if s is not None and s.bytes]
        if not sources:
            raise ValueError(
                f"input pattern {given!r} matches no file that has any bytes: check it"
            )
        return sources
    if not os.path.isfile(given):
        raise ValueError(f"input {given} is neither a file nor a folder: give one")
    source = _source(given, named=True)
    assert source is not None
    if not source.bytes:
        raise ValueError(f"input {given} is empty (0 bytes): leave it out")
    return [source]


def _walk(folder: str) -> Iterator[str]:
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        # Links may lead round in a circle.
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if {"manifest.json", "tokenizer.json"} <= set(files):
            folders.clear()  # a data folder: it was made of such input, and is none
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield os.path.join(place, name)


def _source(path: str, *, named: bool) -> Source | None:
    kind, packing, archive = kind_of(path, named=named)
    if kind is None or not os.path.isfile(path):
        return None
    if kind == "parquet" and packing:
        raise ValueError(
            f"input {path} is a compressed Parquet file: unpack it first (Parquet "
            f"compresses its columns itself)"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise ValueError(f"input {path} cannot be read: {error.strerror}") from None
    if kind == "lines" and not packing and not archive and start.startswith(b"["):
        raise ValueError(
            f"input {path} is one JSON array, not JSON lines: write one object a line, "
            f"for example with jq -c '.[]'"
        )
    status = os.stat(path)
    return Source(path, status.st_size, status.st_mtime_ns, kind, packing, archive)
