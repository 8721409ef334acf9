"""Parts -> the data folder: drops copies, draws the splits, writes shards."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxllm.data.files import sync_folder, write_atomically
from jaxllm.data.parts import DOCUMENT, Plan, stream_is_done, stream_parts
from jaxllm.data.reading import part_name
from jaxllm.data.shards import (
    INDEX_DTYPE,
    Manifest,
    Shard,
    SourceFile,
    index_path,
    token_dtype,
)
from jaxllm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class FinishedPart:
    """A part on disk: its counts and where its files are."""

    counts: dict[str, Any]
    path: Path

    def documents(self) -> np.ndarray:
        """Reads one DOCUMENT record for each document."""
        return np.fromfile(self.path.with_suffix(".docs"), DOCUMENT)


def finished_parts(work: Path, plan: Plan) -> list[FinishedPart]:
    """Lists all parts in the order of the text.

    Raises: ValueError if one is missing, or has another size than it says.
    """
    parts = work / "parts"
    paths: list[Path] = []
    for unit in plan.units:
        if plan.sources[unit.first].seekable:
            paths.append(parts / f"{part_name(unit.first, 0, unit.index)}.json")
        elif stream_is_done(parts, unit.first):
            end = parts / f"{unit.first:07d}.end"
            members = json.loads(end.read_bytes())
            paths += stream_parts(parts, unit.first, members)
        else:
            _unfinished(plan.sources[unit.first].path)
    finished = []
    itemsize = np.dtype(token_dtype(_tokenizer(work).vocab_size)).itemsize
    for path in paths:
        if not path.exists():
            _unfinished(path.name)
        part = FinishedPart(json.loads(path.read_bytes()), path)
        for suffix, size in (
            (".tokens", part.counts["tokens"] * itemsize),
            (".docs", part.counts["documents"] * DOCUMENT.itemsize),
        ):
            file = path.with_suffix(suffix)
            if not file.exists() or file.stat().st_size != size:
                raise ValueError(
                    f"{file} does not have the {size} bytes it should: remove {work} "
                    f"and prepare the data again"
                )
        finished.append(part)
    return finished


def _unfinished(what: str) -> None:
    raise ValueError(
        f"preparing is not finished ({what} is still to do): run the same command again"
    )


def _tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.load(work / "tokenizer.json")


def merge(
    work: Path,
    parts: list[FinishedPart],
    plan: Plan,
    *,
    options: dict[str, Any],
    shard_tokens: int,
) -> Manifest:
    """Writes shards, quarantine and manifest into WORK/result.

    A document is held out if its hash, as a number in [0, 1), lies below
    options["val_fraction"]: which ones does not depend on what else there is.

    Raises: ValueError if there is no document at all.
    """
    result = work / "result"
    result.mkdir(exist_ok=True)
    tokenizer = _tokenizer(work)
    dtype = token_dtype(tokenizer.vocab_size)
    keep, held_out = _choose(parts, options["val_fraction"], options["dedup"])
    if not keep.any():
        raise ValueError("the input has no documents: every record is empty or damaged")
    writers = {
        split: _ShardWriter(result, split, shard_tokens, np.dtype(dtype))
        for split in ("train", "val")
    }
    stored = np.dtype(dtype).newbyteorder("<")
    at = 0
    for part in parts:
        rows = part.documents()
        tokens = np.fromfile(part.path.with_suffix(".tokens"), stored)
        here = slice(at, at + len(rows))
        for split, wanted in (("train", ~held_out[here]), ("val", held_out[here])):
            wanted = wanted & keep[here]
            writers[split].add(tokens, rows, wanted)
        at += len(rows)
    quarantined = write_quarantine(result / "quarantine.jsonl", parts, plan)
    tokenizer.save(result / "tokenizer.json")
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        splits={split: writer.close() for split, writer in writers.items()},
        sources=_sources(work, parts, plan),
        options=options,
        records=sum(part.counts["records"] for part in parts),
        quarantined=quarantined,
        empty=sum(part.counts["empty"] for part in parts),
        duplicates=int((~keep).sum()),
    )
    for split in ("train", "val"):
        if (result / split).is_dir():
            sync_folder(result / split)
    write_atomically(result / "manifest.json", manifest.to_json().encode())
    return manifest


def _choose(
    parts: list[FinishedPart], val_fraction: float, dedup: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decides of every document: is it kept, is it held out? bool [documents] each."""
    digests = np.concatenate(
        [np.zeros((0, 2), ">u8"), *(part.documents()["digest"] for part in parts)]
    )
    keep = np.ones(len(digests), bool)
    if dedup == "exact" and len(digests):
        # The first copy stays. Sorting is stable, so it leads its run of equals.
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        keep[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    if val_fraction <= 0:
        return keep, np.zeros(len(digests), bool)
    point = digests[:, 0].astype(np.float64) / 2.0**64
    held_out = point < val_fraction
    kept = np.flatnonzero(keep)
    # A small corpus may draw none, or all: then one document changes sides.
    if len(kept) > 1 and not held_out[kept].any():
        held_out[kept[np.argmin(point[kept])]] = True
    elif len(kept) and held_out[kept].all():
        held_out[kept[np.argmax(point[kept])]] = False
    return keep, held_out


class _ShardWriter:
    """Writes documents into the shards of one split."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, dtype: np.dtype):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.itemsize = dtype.itemsize
        self.shards: list[Shard] = []
        self.files: tuple[BinaryIO, BinaryIO] | None = None

    def add(self, tokens: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> None:
        """Appends the wanted ones of a part's documents."""
        if not wanted.any():
            return
        tokens = tokens[np.repeat(wanted, rows["tokens"])]
        rows = rows[wanted]
        ends = np.cumsum(rows["tokens"], dtype=np.int64)
        first = 0
        while first < len(rows):
            if self.files is None:
                self._open()
            # Documents are whole in a shard: it is full with the one that fills it.
            base = int(ends[first - 1]) if first else 0
            room = self.shard_tokens - self.tokens
            last = int(np.searchsorted(ends, base + room)) + 1
            last = min(last, len(rows))
            self._write(tokens, rows, ends, first, last)
            if self.tokens >= self.shard_tokens:
                self._finish()
            first = last

    def close(self) -> list[Shard]:
        """Ends the last shard and gives the list of all."""
        if self.files is not None:
            self._finish()
        return self.shards

    def _open(self) -> None:
        name = f"{self.split}/{len(self.shards):05d}.ds"
        self.path = self.folder / name
        self.path.parent.mkdir(exist_ok=True)
        self.files = open(self.path, "wb"), open(index_path(self.path), "wb")  # noqa: SIM115
        self.hashes = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.documents = self.text_bytes = 0

    def _write(
        self,
        tokens: np.ndarray,
        rows: np.ndarray,
        ends: np.ndarray,
        first: int,
        last: int,
    ) -> None:
        assert self.files is not None
        start = int(ends[first - 1]) if first else 0
        stop = int(ends[last - 1])
        index = (ends[first:last] - start + self.tokens).astype(INDEX_DTYPE)
        for file, sha, data in zip(
            self.files, self.hashes, (tokens[start:stop], index), strict=True
        ):
            view = np.ascontiguousarray(data).data
            file.write(view)
            sha.update(view)
        self.tokens += stop - start
        self.documents += last - first
        self.text_bytes += int(rows["bytes"][first:last].sum(dtype=np.int64))

    def _finish(self) -> None:
        assert self.files is not None
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.files = None
        tokens, index = (sha.hexdigest() for sha in self.hashes)
        name = self.path.relative_to(self.folder).as_posix()
        counts = (self.documents, self.tokens, self.text_bytes)
        self.shards.append(Shard(name, *counts, tokens, index))


def write_quarantine(path: Path, parts: list[FinishedPart], plan: Plan) -> int:
    """Writes one JSON object for each damaged record; gives their number."""

    def lines() -> Iterator[bytes]:
        before: Counter[tuple[int, str]] = Counter()
        for part in parts:
            for source, member, record in part.counts["damaged"]:
                entry = {"file": plan.sources[source].path}
                if member:
                    entry["member"] = member
                entry["line"] = before[source, member] + record["line"]
                entry["reason"] = record["reason"]
                entry["start"] = record["start"]
                yield json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            for source, member, count in part.counts["segments"]:
                before[source, member] += count

    count = sum(len(part.counts["damaged"]) for part in parts)
    path.unlink(missing_ok=True)
    if count:
        write_atomically(path, lines())
    return count


def _sources(work: Path, parts: list[FinishedPart], plan: Plan) -> list[SourceFile]:
    """Adds up what came of every source."""
    totals = np.zeros((len(plan.sources), 4), np.int64)
    for part in parts:
        rows = part.documents()
        for column, values in enumerate((1, rows["bytes"], rows["tokens"])):
            np.add.at(totals[:, column], rows["source"], values)
        for source, _, _ in part.counts["damaged"]:
            totals[source, 3] += 1
    return [
        SourceFile(
            source.path,
            source.bytes,
            (work / "parts" / f"{i:07d}.sha256").read_text(),
            *map(int, totals[i]),
        )
        for i, source in enumerate(plan.sources)
    ]
