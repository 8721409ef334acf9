"""One worker's task: claim parts, tokenise them, and leave each whole on disk.

WORK/plan.json            sources, units and options; the same for all workers
WORK/tokenizer.json
WORK/parts/NAME.tokens    ids of the part's documents, one after another
WORK/parts/NAME.docs      one DOCUMENT record for each
WORK/parts/NAME.json      counts and damage; written last: then the part is done
WORK/parts/SOURCE.end     members of a compressed source and their parts
WORK/parts/SOURCE.sha256  hash of a source file
WORK/claims/RUN/NAME      who came first, among the workers of one run
WORK/claims/RUN/stop      begin no further part
WORK/spool/RUN/           parts of packed files, on their way to another worker
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.files import write_atomically
from jaxllm.data.reading import Part, Unit, part_name, read_units, stream_name
from jaxllm.data.records import Damage, Text, count_lines, read_records, text_digest
from jaxllm.data.shards import file_sha256, token_dtype
from jaxllm.data.sources import Source
from jaxllm.data.spool import Reader, Spool
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


def tokenize_parts(work: Path, run: str, workers: int = 1) -> Iterator[dict[str, Any]]:
    """Tokenises every part that is not done and that no other worker of `run` has.

    Yields the counts of each part it did, when it is on disk: that happens beside the
    tokenising of the next.
    """
    plan = Plan.load(work / "plan.json")
    tokenizer = Tokenizer.load(work / "tokenizer.json")
    parts = work / "parts"
    claims = work / "claims" / run
    claims.mkdir(parents=True, exist_ok=True)
    # First, since it is one piece of work for each file, however long.
    for i, source in enumerate(plan.sources):
        path = parts / f"{i:07d}.sha256"
        if not path.exists() and claim_once(claims / path.name):
            write_atomically(path, file_sha256(Path(source.path)).encode())
    with ThreadPoolExecutor(1) as disk:
        writing: Future | None = None
        for part in _parts_to_do(plan, work, run, workers):
            made = _tokenize(part, plan, tokenizer)
            if writing is not None:
                yield writing.result()
            writing = disk.submit(_save, parts / part.name, *made)
        if writing is not None:
            yield writing.result()


def _parts_to_do(plan: Plan, work: Path, run: str, workers: int) -> Iterator[Part]:
    """Reads the parts that this worker gets: claimed, or unpacked by another."""
    parts = work / "parts"
    claims = work / "claims" / run
    spool = Spool(work / "spool" / run, room=2 * (workers - 1))
    done = {i for i in range(len(plan.sources)) if stream_is_done(parts, i)}
    units = [unit for unit in plan.units if unit.first not in done]
    readers = {
        unit.first: Reader(claims / stream_name(unit.first))
        for unit in units
        if not plan.sources[unit.first].seekable
    }
    mine: list[Reader] = []

    def claim(name: str) -> bool:
        if (claims / "stop").exists():
            raise _Stopped
        if (parts / f"{name}.json").exists():
            return False
        granted = claim_once(claims / name)
        mine.extend(r for r in readers.values() if granted and r.path.name == name)
        return granted

    def ended(source: int, members: list[tuple[str, int]]) -> None:
        write_atomically(parts / f"{source:07d}.end", json.dumps(members).encode())
        readers[source].end()

    try:
        for part in read_units(
            plan.sources,
            units,
            claim,
            part_bytes=plan.options.part_bytes,
            line_bytes=plan.options.line_bytes,
            field=plan.options.field,
            on_end=ended,
        ):
            reader = readers.get(part.segments[0].source)
            if reader is not None:
                reader.beat()
                if spool.offer(part):
                    continue
            yield part
    except _Stopped:
        return
    finally:
        for reader in mine:
            reader.end()
    for part in spool.take_all(list(readers.values())):
        if (claims / "stop").exists():
            return
        yield part


class _Stopped(Exception):
    """The run was told to begin no further part."""


def stop_run(work: Path, run: str) -> None:
    """Tells all workers of a run to begin no further part."""
    (work / "claims" / run).mkdir(parents=True, exist_ok=True)
    (work / "claims" / run / "stop").touch()


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


def _tokenize(
    part: Part, plan: Plan, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Makes a part's tokens, its DOCUMENT records and its counts."""
    options = plan.options
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    # Takes a list of ids in half the time that numpy needs for it.
    tokens = array(dtype.char)
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
        for ids in encoded:
            tokens.append(BEGIN_ID)
            tokens.fromlist(ids)
            tokens.append(END_ID)
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
    made = np.frombuffer(tokens, dtype)
    # A tokenizer is tried out when it is loaded; this looks at all that it gives.
    if np.count_nonzero(tokenizer.is_special[made]) != 2 * len(rows):
        raise ValueError(
            "the tokenizer makes special tokens of text that spells them: leave "
            "--tokenizer out to train one of our own"
        )
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
    return made, rows, counts


def _save(
    path: Path, tokens: np.ndarray, rows: np.ndarray, counts: dict[str, Any]
) -> dict[str, Any]:
    """Writes a part's files, the one that says it is done last."""
    stored = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    write_atomically(path.with_suffix(".tokens"), stored.tobytes())
    write_atomically(path.with_suffix(".docs"), rows.tobytes())
    write_atomically(path.with_suffix(".json"), json.dumps(counts).encode())
    return counts
