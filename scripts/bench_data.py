"""Measures the way of the data: preparing, memory, and reading batches.

    python scripts/bench_data.py --megabytes 200
    python scripts/bench_data.py --megabytes 4000 --folder /big/disk/bench

Generates a corpus, prepares it with all cores, and compares with what the tokenizer
does alone on the same text, in as many processes, in the same run. Prints one JSON
object; figures in the documentation are from it.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tyro

from jaxllm.data.batches import Batches
from jaxllm.data.corpus import prepare
from jaxllm.data.tokenizer import Tokenizer


@dataclass
class Arguments:
    """Measures preparing and reading data."""

    megabytes: int = 200
    """Size of the generated corpus, in MB of JSON lines."""
    workers: int = 0
    """Processes that tokenise; 0 means one per core."""
    folder: Path | None = None
    """Where to put corpus and data; empty takes a temporary folder, removed after."""
    seconds: float = 5.0
    """Length of each measurement of the tokenizer alone and of the loader."""


def main() -> None:
    args = tyro.cli(Arguments, description=__doc__)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bench_data."))
    folder.mkdir(parents=True, exist_ok=True)
    workers = args.workers or len(os.sched_getaffinity(0))
    try:
        report = bench_prepare(folder, args.megabytes, workers, args.seconds)
        report |= bench_batches(folder / "data", args.seconds)
        print(json.dumps(report, indent=1))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def write_corpus(path: Path, megabytes: int) -> list[str]:
    """Writes JSON lines whose words follow Zipf's law, in two scripts; gives a sample.

    Enough different words that the tokenizer's cache does not do all the work.
    """
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    hanzi = np.array([chr(0x4E00 + i) for i in range(3000)])
    weights = 1.0 / np.arange(1, 3001)
    words = [
        "".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(40_000)
    ] + [
        "".join(rng.choice(hanzi, rng.integers(1, 5), p=weights / weights.sum()))
        for _ in range(40_000)
    ]
    rng.shuffle(words)
    table = np.array(words, object)
    sample: list[str] = []
    written = 0
    with open(path, "wb") as file:
        while written < megabytes * 1e6:
            drawn = table[np.minimum(rng.zipf(1.3, 200_000), len(table)) - 1]
            cuts = np.cumsum(rng.integers(50, 600, 700))
            for piece in np.split(drawn, cuts[cuts < len(drawn)]):
                text = " ".join(piece)
                written += file.write(orjson.dumps({"text": text}) + b"\n")
                if len(sample) < 4000:
                    sample.append(text)
    return sample


def raw_rate(tokenizer: Path, texts: list[str], seconds: float) -> float:
    """Measures encode_batch_fast alone in this process: bytes of text a second."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inner = Tokenizer.load(tokenizer).inner
    sizes = [len(text.encode()) for text in texts]
    done, at = 0, 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        inner.encode_batch_fast(texts[at : at + 200], add_special_tokens=False)
        done += sum(sizes[at : at + 200])
        at = (at + 200) % len(texts)
    return done / (time.perf_counter() - began)


def raw_rates(tokenizer: Path, texts: list[str], workers: int, seconds: float) -> float:
    """Adds up the rates of as many processes at the same time."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tasks = [
            pool.submit(raw_rate, tokenizer, texts, seconds) for _ in range(workers)
        ]
        return sum(task.result() for task in tasks)


def bench_prepare(
    folder: Path, megabytes: int, workers: int, seconds: float
) -> dict[str, Any]:
    """Prepares a generated corpus; measures the tokenizer alone before and after."""
    corpus, out = folder / "corpus.jsonl", folder / "data"
    texts = write_corpus(corpus, megabytes)
    prepare([write_small(folder, texts)], folder / "tokenizer", vocab_size=6144)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    before = raw_rates(tokenizer, texts, workers, seconds)
    marks: dict[str, float] = {}

    def mark(line: str) -> None:
        marks[line] = time.perf_counter()

    with peak_memory() as peak:
        began = time.perf_counter()
        manifest = prepare(
            [corpus],
            out,
            tokenizer=tokenizer,
            workers=workers,
            say=mark,
        )
        total = time.perf_counter() - began
    after = raw_rates(tokenizer, texts, workers, seconds)
    size = sum(manifest.text_bytes(split) for split in manifest.splits)
    tokenising = marks["writing shards"] - began
    raw = (before + after) / 2
    return {
        "cores": workers,
        "text_mb": round(size / 1e6),
        "tokens": sum(manifest.tokens(split) for split in manifest.splits),
        "raw_mb_per_s": [round(rate / 1e6, 2) for rate in (before, after)],
        "prepare_mb_per_s": round(size / total / 1e6, 2),
        "prepare_share_of_raw": round(size / total / raw, 3),
        "tokenising_s": round(tokenising, 1),
        "merging_s": round(total - tokenising, 1),
        "peak_worker_mb": round(peak["worker"] / 1e6),
        "peak_main_mb": round(peak["main"] / 1e6),
        "hours_for_32_gb_on_16_cores": round(
            32e9 / size * (tokenising * workers / 16 + total - tokenising) / 3600, 2
        ),
    }


def write_small(folder: Path, texts: list[str]) -> Path:
    """Writes the sample as a corpus of its own, to train the tokenizer on."""
    path = folder / "sample.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in texts))
    return path


class peak_memory:
    """Watches this process and its children: largest resident bytes of each kind."""

    def __enter__(self) -> dict[str, int]:
        self.peak = {"main": 0, "worker": 0}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self.peak

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.2):
            self.peak["main"] = max(self.peak["main"], resident_bytes(os.getpid()))
            for child in children(os.getpid()):
                self.peak["worker"] = max(self.peak["worker"], resident_bytes(child))


def children(pid: int) -> Iterator[int]:
    """Lists the processes that this one started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def resident_bytes(pid: int) -> int:
    """Gives the resident memory of a process; 0 if it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def bench_batches(data: Path, seconds: float) -> dict[str, Any]:
    """Reads packed batches of 32 rows of 512 tokens at random places, on one core."""
    import grain  # noqa: F401  (importing it is not part of the start)

    report: dict[str, Any] = {}
    layouts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("packed", {}),
        ("isolated", {"isolate_documents": True}),
        ("rows", {"layout": "rows"}),
    )
    for name, options in layouts:
        began = time.perf_counter()
        batches = Batches(data, seq_len=512, batch_size=32, **options)
        batches[10**6]
        started = time.perf_counter() - began
        memory = resident_bytes(os.getpid())
        steps = 0
        began, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            batches[steps]
            steps += 1
        busy = time.process_time() - busy
        report[f"{name}_m_tokens_per_s"] = round(steps * 32 * 512 / busy / 1e6, 2)
        report[f"{name}_start_s"] = round(started, 3)
        report[f"{name}_grew_mb"] = round(
            (resident_bytes(os.getpid()) - memory) / 1e6, 1
        )
        report[f"{name}_epochs_read"] = round(steps / batches.steps_per_epoch, 2)
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
