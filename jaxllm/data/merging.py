"""Parts -> the data folder: drops copies, draws the splits, writes shards."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


def parts_so_far(work: Path) -> list[FinishedPart]:
    """Lists the parts that are finished at this moment, in the order of the text."""
    paths = sorted(p for p in (work / "parts").glob("*.json") if p.name[0] != ".")
    return [FinishedPart(json.loads(path.read_bytes()), path) for path in paths]


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
    first = np.cumsum([0, *(part.counts["documents"] for part in parts)])
    stored = np.dtype(dtype).newbyteorder("<")
    splits: dict[str, list[Shard]] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for split, wanted in (("train", keep & ~held_out), ("val", keep & held_out)):
            pieces = [
                _Piece(part, np.flatnonzero(wanted[start:stop]))
                for part, start, stop in zip(parts, first, first[1:], strict=False)
            ]
            shards = _cut_into_shards(pieces, shard_tokens)
            if shards:
                (result / split).mkdir(exist_ok=True)
            names = [f"{split}/{i:05d}.ds" for i in range(len(shards))]
            write = partial(_write_shard, result, stored)
            splits[split] = list(pool.map(write, names, shards))
    quarantined = write_quarantine(result / "quarantine.jsonl", parts, plan)
    tokenizer.save(result / "tokenizer.json")
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        splits=splits,
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
    write_atomically(result / "manifest.json", _utf8(manifest.to_json()))
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
    # A small corpus may draw none, or all: then one document changes sides, with its
    # copies.
    if len(kept) and not held_out[kept].any():
        first = point == point[kept].min()
        if not first[kept].all():
            held_out |= first
    elif len(kept) and held_out[kept].all():
        held_out &= point != point[kept].max()
    return keep, held_out


class _Piece(NamedTuple):
    """Documents of one part that go into one shard, in order."""

    part: FinishedPart
    documents: np.ndarray
    """Which: int [n], ascending."""


def _cut_into_shards(pieces: list[_Piece], shard_tokens: int) -> list[list[_Piece]]:
    """Deals pieces out: a shard is full with the document that fills it."""
    shards: list[list[_Piece]] = []
    room = 0
    for part, documents in pieces:
        if not len(documents):
            continue
        ends = np.cumsum(part.documents()["tokens"][documents], dtype=np.int64)
        first = 0
        while first < len(documents):
            if room <= 0:
                shards.append([])
                room = shard_tokens
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + room)) + 1
            last = min(last, len(documents))
            shards[-1].append(_Piece(part, documents[first:last]))
            room -= int(ends[last - 1]) - before
            first = last
    return shards


def _write_shard(
    result: Path, dtype: np.dtype, name: str, pieces: list[_Piece]
) -> Shard:
    """Writes a shard's tokens and index, and hashes them on the way."""
    path = result / name
    hashes = hashlib.sha256(), hashlib.sha256()
    n_documents = n_tokens = text_bytes = 0
    with open(path, "wb") as tokens, open(index_path(path), "wb") as index:
        for part, documents in pieces:
            rows = part.documents()
            bounds = np.cumsum([0, *rows["tokens"]], dtype=np.int64)
            stored = np.fromfile(part.path.with_suffix(".tokens"), dtype)
            # What stands together is copied together.
            breaks = np.flatnonzero(np.diff(documents) != 1)
            runs = zip(
                bounds[documents[np.append(0, breaks + 1)]],
                bounds[documents[np.append(breaks, -1)] + 1],
                strict=True,
            )
            data = np.concatenate([stored[start:stop] for start, stop in runs])
            ends = n_tokens + np.cumsum(rows["tokens"][documents], dtype=np.int64)
            for file, sha, values in (
                (tokens, hashes[0], data),
                (index, hashes[1], ends.astype(INDEX_DTYPE)),
            ):
                file.write(values.data)
                sha.update(values.data)
            n_documents += len(documents)
            n_tokens += len(data)
            text_bytes += int(rows["bytes"][documents].sum(dtype=np.int64))
        for file in (tokens, index):
            file.flush()
            os.fsync(file.fileno())
    counts = (n_documents, n_tokens, text_bytes)
    return Shard(name, *counts, *(sha.hexdigest() for sha in hashes))


def write_quarantine(path: Path, parts: list[FinishedPart], plan: Plan) -> int:
    """Writes one JSON object for each damaged record; gives their number.

    Where a part before is not finished yet, the line is null: nobody counted them.
    """

    def lines() -> Iterator[bytes]:
        before: dict[tuple[int, str], int | None] = {}
        following: dict[str, int] = {}
        for part in parts:
            file, _, index = part.path.stem.rpartition("-")
            known = int(index) == following.get(file, 0)
            following[file] = int(index) + 1
            for source, member, _ in part.counts["segments"]:
                before.setdefault((source, member), 0)
                if not known:
                    before[source, member] = None
            for source, member, record in part.counts["damaged"]:
                counted = before[source, member]
                entry = {"file": plan.sources[source].path}
                if member:
                    entry["member"] = member
                entry["line"] = None if counted is None else counted + record["line"]
                entry["reason"] = record["reason"]
                entry["start"] = record["start"]
                yield _utf8(json.dumps(entry, ensure_ascii=False)) + b"\n"
            for source, member, count in part.counts["segments"]:
                counted = before[source, member]
                if counted is not None:
                    before[source, member] = counted + count

    count = sum(len(part.counts["damaged"]) for part in parts)
    path.unlink(missing_ok=True)
    if count:
        write_atomically(path, lines())
    return count


def _utf8(text: str) -> bytes:
    """Encodes JSON, also with file names that are not UTF-8: Python holds their bytes
    as lone surrogates, whose escapes are JSON's as well."""
    return text.encode("utf-8", "backslashreplace")


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
