"""One worker's task: claim parts, tokenise them, and leave each whole on disk.

WORK/plan.json            sources, units and options; the same for all workers
WORK/tokenizer.json
WORK/parts/NAME.tokens    ids of the part's documents, one after another
WORK/parts/NAME.docs      one DOCUMENT record for each
WORK/parts/NAME.json      counts and damage; written last: then the part is done
WORK/parts/SOURCE.end     members of a compressed source and their parts
WORK/parts/SOURCE.sha256  hash of a source file
WORK/claims/RUN/NAME      who came first, among the workers of one run
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.files import write_atomically
from jaxllm.data.reading import Part, Unit, part_name, read_units
from jaxllm.data.records import Damage, Text, count_lines, read_records, text_digest
from jaxllm.data.shards import file_sha256, token_dtype
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer

DOCUMENT = np.dtype(
    [("tokens", "<u4"), ("bytes", "<u4"), ("source", "<u4"), ("digest", ">u8", (2,))]
)
_BATCH_BYTES = 1 << 18
"""Text that is encoded at once: enough to spread the cost of a call, little memory."""


@dataclass(frozen=True)
class Options:
    """What decides the content of the data, beside the sources and the tokenizer."""

    field: str
    seed: int
    part_bytes: int
    line_bytes: int


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to know."""

    sources: list[Source]
    units: list[Unit]
    options: Options

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads what `save` wrote."""
        values = json.loads(path.read_bytes())
        return cls(
            [Source(**source) for source in values["sources"]],
            [Unit(**unit) for unit in values["units"]],
            Options(**values["options"]),
        )


def tokenize_parts(work: Path, run: str) -> Iterator[dict[str, Any]]:
    """Tokenises every part that is not done and that no other worker of `run` has.

    Yields the counts of each part it did.
    """
    plan = Plan.load(work / "plan.json")
    tokenizer = Tokenizer.load(work / "tokenizer.json")
    parts = work / "parts"
    claims = work / "claims" / run
    claims.mkdir(parents=True, exist_ok=True)

    def claim(name: str) -> bool:
        if (parts / f"{name}.json").exists():
            return False
        return claim_once(claims / name)

    def ended(source: int, members: list[tuple[str, int]]) -> None:
        write_atomically(parts / f"{source:07d}.end", json.dumps(members).encode())

    done = {i for i in range(len(plan.sources)) if stream_is_done(parts, i)}
    units = [unit for unit in plan.units if unit.first not in done]
    for part in read_units(
        plan.sources,
        units,
        claim,
        part_bytes=plan.options.part_bytes,
        line_bytes=plan.options.line_bytes,
        field=plan.options.field,
        on_end=ended,
    ):
        yield _tokenize(part, plan, tokenizer, parts)
    for i, source in enumerate(plan.sources):
        path = parts / f"{i:07d}.sha256"
        if not path.exists() and claim_once(claims / path.name):
            write_atomically(path, file_sha256(Path(source.path)).encode())


def claim_once(path: Path) -> bool:
    """Creates a file if nobody has: True for one caller only, on any machine."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def stream_is_done(parts: Path, source: int) -> bool:
    """Tells whether all parts of a compressed source are there."""
    try:
        members = json.loads((parts / f"{source:07d}.end").read_bytes())
    except FileNotFoundError:
        return False
    return all(name.exists() for name in stream_parts(parts, source, members))


def stream_parts(parts: Path, source: int, members: Iterable[Any]) -> Iterator[Path]:
    """Names the part files of a compressed source, given its members."""
    for member, (_, count) in enumerate(members):
        for index in range(count):
            yield parts / f"{part_name(source, member, index)}.json"


def _tokenize(part: Part, plan: Plan, tokenizer: Tokenizer, parts: Path) -> dict:
    options = plan.options
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    tokens: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    segments = []
    batch: list[Text] = []
    size = records = empty = 0
    damaged = []

    def flush(source: int) -> None:
        encoded = tokenizer.encode_documents([text.text for text in batch])
        rows = np.zeros(len(batch), DOCUMENT)
        rows["tokens"] = [len(ids) + 2 for ids in encoded]
        rows["bytes"] = [len(text.data) for text in batch]
        rows["source"] = source
        digests = [text_digest(text.data, options.seed) for text in batch]
        rows["digest"] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
        framed = chain.from_iterable(([BEGIN_ID], ids, [END_ID]) for ids in encoded)
        count = int(rows["tokens"].sum())
        tokens.append(np.fromiter(chain.from_iterable(framed), dtype, count))
        documents.append(rows)
        batch.clear()

    for segment in part.segments:
        for record in read_records(segment, options.field, options.line_bytes):
            records += 1
            if isinstance(record, Text):
                batch.append(record)
                size += len(record.data)
                if size >= _BATCH_BYTES:
                    flush(segment.source)
                    size = 0
            elif isinstance(record, Damage):
                damaged.append((segment.source, segment.member, asdict(record)))
            else:
                empty += 1
        if batch:
            flush(segment.source)
            size = 0
        segments.append((segment.source, segment.member, count_lines(segment)))
    rows = np.concatenate([np.zeros(0, DOCUMENT), *documents])
    write_atomically(parts / f"{part.name}.tokens", (t.tobytes() for t in tokens))
    write_atomically(parts / f"{part.name}.docs", rows.tobytes())
    counts = {
        "records": records,
        "documents": len(rows),
        "tokens": int(rows["tokens"].sum(dtype=np.int64)),
        "text_bytes": int(rows["bytes"].sum(dtype=np.int64)),
        "empty": empty,
        "damaged": damaged,
        "segments": segments,
        "consumed": part.consumed,
    }
    write_atomically(parts / f"{part.name}.json", json.dumps(counts).encode())
    return counts
