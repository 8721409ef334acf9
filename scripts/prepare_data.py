"""Turns text files into a data folder: a tokenizer, token shards and a manifest.

    python scripts/prepare_data.py --input poems.jsonl.gz --out data/poems

Reads JSON lines (.jsonl, plain or packed as .gz .zst .bz2 .xz, or inside a .tar),
Parquet and plain text; files, folders and patterns. Can be killed at any moment: the
same command goes on where it stopped, and the result is the same to the byte.
"""

import errno
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import command_line
import tyro

from jaxllm.data.corpus import Manifest, Progress, prepare, submit


@dataclass
class Arguments:
    """Turns text files into a data folder for scripts/pretrain.py."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")]
    """Files, folders or quoted patterns to read: JSON lines, Parquet or plain text."""
    out: Path
    """Folder to make; it appears when everything is done."""
    vocab_size: int = 6144
    """Entries of the tokenizer that is trained, at least 261; small texts give less."""
    tokenizer: Path | None = None
    """A tokenizer.json, or data folder with one, to use instead of training one."""
    field: str = "text"
    """Field of a JSON record, or column of a Parquet file, that holds the text."""
    val_fraction: float = 0.01
    """Share of the documents, from 0 up to 1, that is held out; drawn by their hash."""
    seed: int = 0
    """Seed of the hash that draws the held-out documents."""
    dedup: Literal["none", "exact"] = "none"
    """exact: of documents with the same text only the first is kept."""
    bad_lines: float = 0.1
    """Damaged records that are tolerated: a share below 1 (up to 10 records always, if
    they are not the majority), a number from 1 on, 0 for none. They are left out and
    listed in quarantine.jsonl; with more of them the command fails."""
    sample_mb: float = 32.0
    """Text that the tokenizer is trained on, in MB, taken evenly from all the input."""
    workers: int = 0
    """Processes that tokenise; 0 means one per core. With slurm: tasks of the array."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where they run: on this machine, as a Slurm array job, or on a Ray cluster. The
    work folder beside --out must be on a file system that all of them see."""
    partition: str = "cpu"
    """Slurm partition."""
    time_limit: str = "12:00:00"
    """Longest a Slurm task may take, as hours:minutes:seconds."""
    memory_gb: int = 4
    """Memory of a Slurm task, in GB."""
    dry_run: bool = False
    """With slurm: print the job scripts and submit nothing."""


def main() -> int:
    """Prepares the folder; returns the exit code."""
    args = command_line.parse(Arguments, description=__doc__)
    try:
        prepare_folder(args)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{error}: make room beside --out; the same command goes on from here"
        ) from None
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def prepare_folder(args: Arguments) -> None:
    """Prepares the folder, or submits the jobs that will.

    Raises: ValueError, or OSError, naming what is wrong.
    """
    began = time.monotonic()
    if not 0 < args.sample_mb < math.inf:
        raise ValueError(f"--sample-mb {args.sample_mb} must be a number above 0")
    recipe = {
        "vocab_size": args.vocab_size,
        "tokenizer": args.tokenizer,
        "field": args.field,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "dedup": args.dedup,
        "sample_bytes": int(args.sample_mb * 1e6),
    }
    if args.dry_run and args.executor != "slurm":
        raise ValueError("--dry-run is for --executor slurm: there is no job to print")
    if args.executor == "slurm":
        submit_to_slurm(args, recipe)
        return
    manifest = prepare(
        args.input,
        args.out,
        bad_lines=args.bad_lines,
        workers=args.workers,
        executor=args.executor,
        say=say,
        progress=show_progress,
        **recipe,
    )
    print_summary(manifest, args.out, time.monotonic() - began)


def submit_to_slurm(args: Arguments, recipe: dict[str, Any]) -> None:
    """Submits the array job and the job that merges, or prints them."""
    from jaxllm.data.executors import SlurmJob

    job = SlurmJob(
        partition=args.partition,
        tasks=args.workers or 16,
        time=args.time_limit,
        memory_gb=args.memory_gb,
        # The merging run is this command itself: it goes on where the tasks stopped.
        finish=(
            *(word for word in sys.argv if word not in ("--dry-run", "--dry_run")),
            *("--executor", "local", "--workers", "1"),
        ),
    )
    scripts = submit(args.input, args.out, job, dry_run=args.dry_run, say=say, **recipe)
    for name, script in zip(("tasks", "merging"), scripts, strict=True):
        print(f"# ---- {name} ----\n{script}")
    if not args.dry_run:
        print(f"submitted; {args.out} appears when the second job has ended")


def say(line: str) -> None:
    """Prints a line at once, also into a file."""
    print(line, flush=True)


def show_progress(progress: Progress) -> None:
    """Prints one line, over the last one on a terminal."""
    line = (
        f"{progress.share:6.1%}  {progress.documents:,} documents  "
        f"{progress.tokens / 1e6:,.2f} M tokens  "
        f"{progress.text_bytes_per_s / 1e6:.1f} MB/s  {_left(progress.seconds_left)}"
    )
    if sys.stdout.isatty():
        print("\r\x1b[K" + line, end="\n" if progress.done else "", flush=True)
    elif progress.done or int(progress.seconds) % 10 == 0:
        print(line, flush=True)


def _left(seconds: float) -> str:
    if seconds == float("inf"):
        return "..."
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"


def print_summary(manifest: Manifest, out: Path, seconds: float) -> None:
    """Prints what the folder holds and what to do with it."""
    print()
    for split, shards in manifest.splits.items():
        tokens, text_bytes = manifest.tokens(split), manifest.text_bytes(split)
        documents = manifest.documents(split)
        print(
            f"{split:>6}: {documents:,} documents, {tokens:,} tokens, "
            f"{text_bytes:,} bytes of text, {len(shards)} shards"
        )
    tokens = sum(manifest.tokens(split) for split in manifest.splits)
    documents = sum(manifest.documents(split) for split in manifest.splits)
    text_bytes = sum(manifest.text_bytes(split) for split in manifest.splits)
    text_tokens = max(tokens - 2 * documents, 1)
    print(
        f"tokenizer: {manifest.vocab_size:,} entries, "
        f"{text_bytes / text_tokens:.3f} bytes of text a token"
    )
    if manifest.empty:
        print(f"left out: {manifest.empty:,} records without any text")
    if manifest.duplicates:
        print(f"left out: {manifest.duplicates:,} copies of earlier documents")
    if manifest.quarantined:
        print(
            f"quarantined: {manifest.quarantined:,} damaged records of "
            f"{manifest.records:,}, listed in {out / 'quarantine.jsonl'}"
        )
    print(f"time: {seconds:.1f} s")
    print(
        f"\nnext: python scripts/pretrain.py --data.path {out} "
        f"--model.vocab-size {manifest.vocab_size}"
    )


if __name__ == "__main__":
    command_line.run(main)
