"""Text files -> a data folder, in one call that can be killed and called again."""

import json
import os
import sysconfig
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jaxllm.data.merging import FinishedPart, finished_parts, merge, write_quarantine
from jaxllm.data.parts import Options, Plan, tokenize_parts
from jaxllm.data.progress import Progress, reporting
from jaxllm.data.reading import plan_units
from jaxllm.data.records import text_digest
from jaxllm.data.sampling import sample_texts
from jaxllm.data.shards import (
    Manifest,
    load_manifest,
    sync_folder,
)
from jaxllm.data.sources import find_sources
from jaxllm.data.tokenizer import SMALLEST_VOCAB, Tokenizer, train_tokenizer
from jaxllm.data.work import existing_result, work_folder

__all__ = ["Manifest", "Progress", "load_manifest", "prepare", "prepare_demo"]

PART_BYTES = 4 << 20
LINE_BYTES = 8 << 20
SHARD_TOKENS = 1 << 28
DEMO_BYTES = 8 << 20
"""How much of the standard library's source the demo corpus takes at most."""
_SMALL_BYTES = 12 << 20
"""Inputs up to this are tokenised in this process, by threads."""
_FEW = 10
"""Damaged records that a small corpus may have, while they are the minority."""


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 6144,
    tokenizer: str | os.PathLike[str] | None = None,
    field: str = "text",
    val_fraction: float = 0.01,
    seed: int = 0,
    bad_lines: float = 0.1,
    dedup: Literal["none", "exact"] = "none",
    sample_bytes: int = 32 << 20,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda progress: None,
    part_bytes: int = PART_BYTES,
    line_bytes: int = LINE_BYTES,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turns text files into a data folder; see `jaxllm.data.shards` for what is in it.

    Trains a tokenizer on an even sample of the text unless one is given. `out` appears
    at the end, whole; until then the work is in a hidden folder beside it, and the same
    call goes on where an earlier one was stopped. If `out` holds the result already it
    is returned as it is. `bad_lines` is the share (below 1) or number of damaged
    records that is tolerated; `workers` 0 means one per core.

    Raises: ValueError for a bad argument or input, a budget that is exceeded, a corpus
    without documents, and an `out` that holds something else.
    """
    out = Path(out)
    _check_arguments(vocab_size, val_fraction, seed, bad_lines, dedup, workers)
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    sources = find_sources(inputs)
    options = Options(field, seed, part_bytes, line_bytes)
    plan = Plan(sources, plan_units(sources, part_bytes), options)
    recorded = asdict(options) | {
        "val_fraction": val_fraction,
        "dedup": dedup,
        "shard_tokens": shard_tokens,
        "tokenizer": given.sha256 if given else f"trained, {vocab_size} entries",
        "sample_bytes": 0 if given else sample_bytes,
    }
    if (ready := existing_result(out, plan, recorded)) is not None:
        say(f"{out} holds this data already")
        return ready
    with work_folder(out, plan, recorded) as work:
        if not (work / "tokenizer.json").exists():
            made = given or _train(plan, vocab_size, sample_bytes, say)
            made.save(work / "tokenizer.json")
        with reporting(work, plan, progress):
            _run(work, plan, workers)
        parts = finished_parts(work, plan)
        _check_unchanged(plan)
        _check_budget(parts, plan, work, bad_lines)
        say("writing shards")
        merge(work, parts, plan, options=recorded, shard_tokens=shard_tokens)
        os.replace(work / "result", out)
        sync_folder(out.absolute().parent)
    return load_manifest(out)


def prepare_demo(
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 4096,
    max_bytes: int = DEMO_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Makes a data folder of the Python standard library's own source, offline.

    The same on every start with one Python; distributions differ in what they ship.
    Takes files in an order that mixes the packages, up to `max_bytes`.
    """
    return prepare(
        list(_demo_files(max_bytes)),
        out,
        vocab_size=vocab_size,
        val_fraction=0.03,
        sample_bytes=max_bytes // 2,
        say=say,
    )


def _demo_files(max_bytes: int) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # No tests, and no tables of characters and tags: they teach a model nothing.
    skipped = {"test", "tests", "idlelib", "encodings", "pydoc_data"}
    skipped |= {"site-packages", "dist-packages"}
    paths = [
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts)
    ]
    # By hash of the name: an order that mixes the packages and is the same everywhere.
    paths.sort(key=lambda p: text_digest(p.relative_to(root).as_posix().encode(), 0))
    total = 0
    for path in paths:
        try:
            data = path.read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if data and total + len(data) <= max_bytes:
            total += len(data)
            yield str(path)


def _check_arguments(
    vocab_size: int,
    val_fraction: float,
    seed: int,
    bad_lines: float,
    dedup: str,
    workers: int,
) -> None:
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the special tokens and 256 bytes "
            f"need at least {SMALLEST_VOCAB}"
        )
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} must lie in [0, 1)")
    if seed < 0:
        raise ValueError(f"seed={seed} must be an integer >= 0")
    if not bad_lines >= 0:
        raise ValueError(f"bad_lines={bad_lines} must be a share or a number >= 0")
    if dedup not in ("none", "exact"):
        raise ValueError(f"dedup={dedup!r} must be none or exact")
    if workers < 0:
        raise ValueError(f"workers={workers} must be >= 0 (0 means one per core)")


def _train(
    plan: Plan,
    vocab_size: int,
    sample_bytes: int,
    say: Callable[[str], None],
) -> Tokenizer:
    texts, damaged = sample_texts(plan, sample_bytes)
    if not texts:
        reason = "every record is empty"
        if damaged:
            reason = f"all records are damaged; the first, line {damaged[0].line}: "
            reason += damaged[0].reason
        raise ValueError(f"the input has no documents: {reason}")
    size = sum(len(text.encode()) for text in texts)
    say(f"training a tokenizer of {vocab_size} entries on {size / 1e6:.1f} MB of text")
    return train_tokenizer(texts, vocab_size)


def _run(work: Path, plan: Plan, workers: int) -> None:
    """Tokenises all parts that are not done."""
    run = uuid.uuid4().hex[:12]
    small = sum(source.bytes for source in plan.sources) <= _SMALL_BYTES
    if workers == 1 or (workers == 0 and small):
        for _ in tokenize_parts(work, run):
            pass
        return
    from jaxllm.data.executors import run_local

    run_local(work, run, workers or len(os.sched_getaffinity(0)))


def _check_unchanged(plan: Plan) -> None:
    for source in plan.sources:
        status = os.stat(source.path)
        if (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified_ns):
            raise ValueError(
                f"input {source.path} changed while it was read: run the same command "
                f"again"
            )


def _check_budget(
    parts: list[FinishedPart], plan: Plan, work: Path, bad_lines: float
) -> None:
    """Stops a run whose input is damaged beyond what was allowed."""
    records = sum(part.counts["records"] for part in parts)
    bad = sum(len(part.counts["damaged"]) for part in parts)
    allowed = bad_lines if bad_lines >= 1 else bad_lines * records
    if 0 < bad_lines < 1:
        allowed = max(allowed, min(_FEW, records // 2))
    if bad <= allowed:
        return
    path = work / "quarantine.jsonl"
    write_quarantine(path, parts, plan)
    with open(path, encoding="utf-8") as file:
        first = json.loads(file.readline())
    raise ValueError(
        f"{bad} of {records} records are damaged, more than --bad-lines {bad_lines:g} "
        f"allows; the first: {first['file']} line {first['line']}: {first['reason']}; "
        f"all are in {path}; repair the input or raise --bad-lines"
    )
