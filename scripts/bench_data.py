"""The benchmark of the data's way: preparing, its memory, and reading batches.

`bench.py --data` runs it. The corpus is generated; the tokenizer alone is timed in as
many processes, on the same text, before and after each preparing in the same run.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

BASE_BYTES = 32_000_000
"""Text that is drawn; a longer corpus says it again, every time with other numbers."""
VOCAB_SIZE = 6144
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("packed", {}),
    ("packed, isolated documents", {"isolate_documents": True}),
    ("rows", {"layout": "rows"}),
)
PROJECTED = (32e9, 16)
"""Bytes of text and cores that the measured slope is extended to."""


def base_texts() -> list[str]:
    """Draws texts whose words follow Zipf's law, in two scripts.

    With 80,000 words, so that the tokenizer's cache of 10,000 does not do all the work.
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
    texts: list[str] = []
    size = 0
    while size < BASE_BYTES:
        drawn = table[np.minimum(rng.zipf(1.3, 200_000), len(table)) - 1]
        cuts = np.cumsum(rng.integers(50, 600, 700))
        for piece in np.split(drawn, cuts[cuts < len(drawn)]):
            texts.append(" ".join(piece))
            size += len(texts[-1].encode())
    return texts


def write_corpus(path: Path, texts: list[str], size: int) -> None:
    """Writes JSON lines of about so many bytes, no two documents equal."""
    import orjson

    written = number = 0
    with open(path, "wb", 1 << 20) as file:
        while written < size:
            record = {"text": f"{number} {texts[number % len(texts)]}"}
            written += file.write(orjson.dumps(record) + b"\n")
            number += 1


def raw_rate(tokenizer: Path, texts: list[str], seconds: float) -> float:
    """Measures encode_batch_fast alone in this process: bytes of text a second."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(tokenizer))
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


def versions() -> dict[str, str]:
    """The packages whose speed this is."""
    names = ("tokenizers", "datatrove", "grain", "orjson", "numpy")
    return {name: version(name) for name in names}


def measure(
    folder: Path,
    *,
    megabytes: int,
    workers: int,
    keep: Callable[[str, Any], None],
    seconds: float = 5.0,
) -> None:
    """Runs everything in a folder; `keep(name, result)` gets each result as it comes.

    Prepares a tenth of the corpus and the whole: what the whole costs more is the
    slope, and memory that grew would show.
    """
    texts = base_texts()
    tokenizer = _train(folder, texts, keep)
    raws = [raw_rates(tokenizer, texts, workers, seconds)]
    runs: list[dict[str, Any]] = []
    for size in (megabytes * 100_000, megabytes * 1_000_000):
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, texts, size)
        run = _prepare(corpus, folder / f"data{len(runs)}", tokenizer, workers)
        raws.append(raw_rates(tokenizer, texts, workers, seconds))
        raw = (raws[-2] + raws[-1]) / 2
        rate = run["text_bytes"] / run["seconds"]
        run |= {"raw_bytes_per_s": raws[-2:], "bytes_per_s": rate}
        run |= {"share_of_raw": rate / raw}
        run |= {
            "tokenising_share_of_raw": run["text_bytes"] / run["tokenising_s"] / raw
        }
        runs.append(run)
        keep("prepare", runs)
    keep("projection", _projection(runs, workers))
    keep("batches", _batches(folder / "data1", seconds))


def _train(folder: Path, texts: list[str], keep: Callable[[str, Any], None]) -> Path:
    """Trains the tokenizer, which is timed by itself."""
    from jaxllm.data.tokenizer import train_tokenizer

    began = time.perf_counter()
    train_tokenizer(texts, VOCAB_SIZE).save(folder / "tokenizer.json")
    took = time.perf_counter() - began
    size = sum(len(text.encode()) for text in texts)
    keep("train_tokenizer", {"bytes": size, "seconds": took, "entries": VOCAB_SIZE})
    return folder / "tokenizer.json"


def _prepare(corpus: Path, out: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """Prepares a corpus; times it, and watches the memory of all processes."""
    from jaxllm.data.corpus import prepare

    marks: dict[str, float] = {}

    def mark(line: str) -> None:
        marks[line] = time.perf_counter()

    with Memory() as memory:
        began = time.perf_counter()
        manifest = prepare(
            [corpus], out, tokenizer=tokenizer, workers=workers, say=mark
        )
        ended = time.perf_counter()
    splits = manifest.splits
    return {
        "workers": workers,
        "documents": sum(map(manifest.documents, splits)),
        "text_bytes": sum(map(manifest.text_bytes, splits)),
        "tokens": sum(map(manifest.tokens, splits)),
        "seconds": ended - began,
        "tokenising_s": marks["writing shards"] - began,
        "merging_s": ended - marks["writing shards"],
        "worker_peak_bytes": max(memory.worker),
        "main_peak_bytes": max(memory.main),
        # Flat, or growing? The largest in each tenth of the time.
        "worker_bytes_by_tenth": memory.tenths(memory.worker),
        "main_bytes_by_tenth": memory.tenths(memory.main),
    }


def _projection(runs: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Extends the difference of the two runs to another size and number of cores.

    Tokenising is divided by the cores. Merging is not: there the disk may be the limit.
    """
    small, large = runs
    grown = large["text_bytes"] - small["text_bytes"]
    tokenising = (large["tokenising_s"] - small["tokenising_s"]) / grown
    merging = (large["merging_s"] - small["merging_s"]) / grown
    fixed = max(small["seconds"] - (tokenising + merging) * small["text_bytes"], 0.0)
    size, cores = PROJECTED
    return {
        "text_bytes": size,
        "cores": cores,
        "tokenising_s_per_gb_and_core": tokenising * workers * 1e9,
        "merging_s_per_gb": merging * 1e9,
        "fixed_s": fixed,
        "seconds": fixed + size * (tokenising * workers / cores + merging),
    }


class Memory:
    """Watches this process and its children: resident bytes, five times a second."""

    def __init__(self):
        self.main: list[int] = [0]
        self.worker: list[int] = [0]
        """Of the largest child."""

    def __enter__(self) -> "Memory":
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.2):
            self.main.append(resident_bytes(os.getpid()))
            self.worker.append(
                max(map(resident_bytes, children(os.getpid())), default=0)
            )

    def tenths(self, values: list[int]) -> list[int]:
        """The largest value of each tenth of the time."""
        return [int(part.max(initial=0)) for part in np.array_split(values, 10)]


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


def _batches(data: Path, seconds: float) -> list[dict[str, Any]]:
    """Reads batches of 32 rows of 512 tokens, shuffled, by one thread.

    A start is opening the folder and reading a batch, here at several places of a run;
    importing grain, once in a process, is no part of it.
    """
    import grain  # noqa: F401

    from jaxllm.data.batches import Batches

    results = []
    for layout, options in LAYOUTS:
        starts = {}
        for step in (0, 1_000_003, 500_000_000):
            began = time.perf_counter()
            batches = Batches(data, seq_len=512, batch_size=32, **options)
            batches[step]
            starts[str(step)] = time.perf_counter() - began
        memory = resident_bytes(os.getpid())
        steps = 0
        began, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            batches[steps]
            steps += 1
        busy = time.process_time() - busy
        results.append(
            {
                "layout": layout,
                "tokens_per_core_s": steps * 32 * 512 / busy,
                "start_s_at_step": starts,
                "grew_bytes": resident_bytes(os.getpid()) - memory,
                "epochs_read": steps / batches.steps_per_epoch,
            }
        )
    return results


def data_tables(record: dict[str, Any]) -> str:
    """A data record as Markdown tables."""
    lines = [
        "| preparing | MB/s | tokenizer alone, before / after | of it | tokenising "
        "alone, of it | merging s | memory MB, worker / main |",
        "|---" * 7 + "|",
    ]
    for run in record.get("prepare", []):
        raw = " / ".join(f"{rate / 1e6:.2f}" for rate in run["raw_bytes_per_s"])
        lines.append(
            f"| {run['text_bytes'] / 1e6:,.0f} MB, {run['workers']} workers, "
            f"{run['seconds']:.1f} s | {run['bytes_per_s'] / 1e6:.2f} | {raw} "
            f"| **{run['share_of_raw']:.1%}** | {run['tokenising_share_of_raw']:.1%} "
            f"| {run['merging_s']:.1f} | {run['worker_peak_bytes'] / 1e6:,.0f} / "
            f"{run['main_peak_bytes'] / 1e6:,.0f} |"
        )
    if training := record.get("train_tokenizer"):
        lines.append(
            f"\nTraining the tokenizer, {training['entries']:,} entries on "
            f"{training['bytes'] / 1e6:.0f} MB: {training['seconds']:.1f} s, once and "
            f"not counted above."
        )
    if record.get("prepare"):
        tenths = record["prepare"][-1]["worker_bytes_by_tenth"]
        memory = " ".join(f"{value / 1e6:.0f}" for value in tenths)
        lines.append(f"Largest worker in each tenth of the longer run, MB: {memory}.")
    if projected := record.get("projection"):
        lines.append(
            f"Projected for {projected['text_bytes'] / 1e9:.0f} GB on "
            f"{projected['cores']} such cores: {projected['seconds'] / 60:.0f} minutes "
            f"({projected['tokenising_s_per_gb_and_core']:.0f} core seconds a GB, "
            f"merging {projected['merging_s_per_gb']:.1f} s a GB)."
        )
    lines += [
        "\n| batches of 32 x 512 | M tokens/s of one core | start at step 0 / 10^6 / "
        "5 10^8, s | memory grew MB |",
        "|---" * 4 + "|",
    ]
    for row in record.get("batches", []):
        starts = " / ".join(f"{s:.3f}" for s in row["start_s_at_step"].values())
        lines.append(
            f"| {row['layout']} | {row['tokens_per_core_s'] / 1e6:.1f} | {starts} "
            f"| {row['grew_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)
