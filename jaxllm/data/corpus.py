"""Text files -> a data folder, in one call that can be killed and called again."""

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.data.budget import Budget
from jaxllm.data.demo import demo_files
from jaxllm.data.files import sync_folder
from jaxllm.data.merging import finished_parts, merge, parts_so_far
from jaxllm.data.parts import Options, Plan, stop_run, tokenize_parts
from jaxllm.data.progress import Progress, reporting
from jaxllm.data.reading import plan_units
from jaxllm.data.sampling import sample_texts
from jaxllm.data.shards import Manifest, load_manifest
from jaxllm.data.sources import find_sources
from jaxllm.data.tokenizer import Tokenizer, require_vocab_size, train_tokenizer
from jaxllm.data.work import (
    existing_result,
    remove_leftovers,
    work_folder,
    work_path,
)

if TYPE_CHECKING:
    from jaxllm.data.executors import SlurmJob

__all__ = [
    "Manifest",
    "Progress",
    "Recipe",
    "load_manifest",
    "prepare",
    "prepare_demo",
    "submit",
]

DEMO_BYTES = 8 << 20
"""How much of the standard library's source the demo corpus takes at most."""
_SMALL_BYTES = 12 << 20
"""Inputs up to this are tokenised in this process, by threads."""


@dataclass(frozen=True)
class Recipe:
    """What decides the content of a data folder, beside the input."""

    vocab_size: int = 6144
    """Entries of the tokenizer that is trained."""
    tokenizer: str | os.PathLike[str] | None = None
    """A tokenizer.json, or a folder with one, to use instead."""
    field: str = "text"
    """Field of a record that holds the text."""
    val_fraction: float = 0.01
    """Share of the documents that is held out."""
    seed: int = 0
    """Seed of the hash that draws them."""
    dedup: Literal["none", "exact"] = "none"
    """exact keeps the first of equal documents only."""
    sample_bytes: int = 32 << 20
    """Text that the tokenizer is trained on."""
    part_bytes: int = 4 << 20
    """Length of a part, the unit of work that a kill can cost."""
    line_bytes: int = 8 << 20
    """Longest record; a longer one is damage. It bounds the memory of a worker."""
    shard_tokens: int = 1 << 28
    """Tokens of a shard, about."""

    def __post_init__(self):
        require_vocab_size(self.vocab_size)
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in [0, 1)")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be an integer >= 0")
        if self.dedup not in ("none", "exact"):
            raise ValueError(f"dedup={self.dedup!r} must be none or exact")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes={self.sample_bytes} must be at least 1")


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    bad_lines: float = 0.1,
    workers: int = 0,
    executor: Literal["local", "ray"] = "local",
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda progress: None,
    **recipe: Any,
) -> Manifest:
    """Turns text files into a data folder; see `jaxllm.data.shards` for what is in it.

    `recipe` are fields of `Recipe`. `out` appears at the end, whole; until then the
    work is in a hidden folder beside it, and the same call goes on where an earlier one
    was stopped. If `out` holds the result already it is returned as it is. `bad_lines`
    is the share (below 1) or number of damaged records that is tolerated; `workers` 0
    means one per core.

    Raises: ValueError for a bad argument or input, a budget that is exceeded, a corpus
    without documents, and an `out` that holds something else.
    """
    out = Path(out)
    budget = Budget(bad_lines)
    if workers < 0:
        raise ValueError(f"workers={workers} must be >= 0 (0 means one per core)")
    plan, given, options = _plan(inputs, Recipe(**recipe))
    if (ready := existing_result(out, plan, options)) is not None:
        say(f"{out} holds this data already")
        remove_leftovers(out)
        return ready
    with work_folder(out, plan, options) as work:
        # Another process may have been just before us.
        if (ready := existing_result(out, plan, options)) is not None:
            return ready
        _make_tokenizer(work, plan, given, Recipe(**recipe), say)
        stopped = _tokenize_all(work, plan, workers, executor, budget, progress)
        try:
            parts = finished_parts(work, plan)
        except ValueError:
            if stopped:
                budget.give_up(parts_so_far(work), plan, work, stopped.share)
            raise
        _check_unchanged(plan)
        budget.check(parts, plan, work)
        say("writing shards")
        shard_tokens = options["shard_tokens"]
        merge(work, parts, plan, options=options, shard_tokens=shard_tokens)
        os.replace(work / "result", out)
        sync_folder(out.absolute().parent)
    return load_manifest(out)


def submit(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    job: "SlurmJob",
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **recipe: Any,
) -> list[str]:
    """Submits the same work to Slurm and gives the two scripts: tasks, then merging.

    The tokenizer is trained here, before; with `dry_run` nothing is done at all.

    Raises: ValueError as `prepare` does, or if Slurm does not take the jobs.
    """
    from jaxllm.data.executors import submit_slurm

    out = Path(out)
    plan, given, options = _plan(inputs, Recipe(**recipe))
    if existing_result(out, plan, options) is not None:
        raise ValueError(f"{out} holds this data already: nothing is submitted")
    logs = out.with_name(f"{out.name}.slurm")
    run = uuid.uuid4().hex[:12]
    if dry_run:
        return submit_slurm(work_path(out), run, job, logs=logs, dry_run=True)
    with work_folder(out, plan, options, keep=True) as work:
        _make_tokenizer(work, plan, given, Recipe(**recipe), say)
    # The folder is free again: the merging job takes it when the tasks have ended.
    return submit_slurm(work, run, job, logs=logs, dry_run=False)


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
        list(demo_files(max_bytes)),
        out,
        vocab_size=vocab_size,
        val_fraction=0.03,
        sample_bytes=max_bytes // 2,
        say=say,
    )


def _plan(
    inputs: Sequence[str | os.PathLike[str]], recipe: Recipe
) -> tuple[Plan, Tokenizer | None, dict[str, Any]]:
    """Gives the plan, the given tokenizer, and the options as the manifest has them."""
    given = None if recipe.tokenizer is None else Tokenizer.load(recipe.tokenizer)
    sources = find_sources(inputs)
    units = plan_units(sources, recipe.part_bytes)
    options = Options(recipe.field, recipe.seed, recipe.part_bytes, recipe.line_bytes)
    recorded = asdict(options) | {
        "val_fraction": recipe.val_fraction,
        "dedup": recipe.dedup,
        "shard_tokens": recipe.shard_tokens,
        "tokenizer": given.sha256 if given else f"trained, {recipe.vocab_size} entries",
        "sample_bytes": 0 if given else recipe.sample_bytes,
    }
    return Plan(sources, units, options), given, recorded


def _make_tokenizer(
    work: Path,
    plan: Plan,
    given: Tokenizer | None,
    recipe: Recipe,
    say: Callable[[str], None],
) -> None:
    """Puts the tokenizer into the work folder, unless an earlier run did."""
    path = work / "tokenizer.json"
    if path.exists():
        return
    made = given or _train(plan, recipe.vocab_size, recipe.sample_bytes, say)
    made.save(path)


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


def _tokenize_all(
    work: Path,
    plan: Plan,
    workers: int,
    executor: str,
    budget: Budget,
    progress: Callable[[Progress], None],
) -> Progress | None:
    """Tokenises all parts that are not done.

    If there is too much damage it ends sooner, when the parts begun are done, and says
    how far it was.
    """
    run = uuid.uuid4().hex[:12]
    hopeless = False
    last: list[Progress] = []

    def report(at: Progress) -> None:
        nonlocal hopeless
        last[:] = [at]
        progress(at)
        if not hopeless and budget.is_hopeless(at.damaged, at.records, at.share):
            hopeless = True
            stop_run(work, run)

    with reporting(work, plan, report):
        _run(work, run, plan, workers, executor)
    return last[0] if hopeless else None


def _run(work: Path, run: str, plan: Plan, workers: int, executor: str) -> None:
    """Runs the workers where they were asked for."""
    small = sum(source.bytes for source in plan.sources) <= _SMALL_BYTES
    cores = workers or len(os.sched_getaffinity(0))
    if executor == "ray":
        from jaxllm.data.executors import run_ray

        run_ray(work, run, cores)
    elif workers == 1 or (workers == 0 and small):
        for _ in tokenize_parts(work, run):
            pass
    else:
        from jaxllm.data.executors import run_local

        run_local(work, run, cores)


def _check_unchanged(plan: Plan) -> None:
    for source in plan.sources:
        status = os.stat(source.path)
        if (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified_ns):
            raise ValueError(
                f"input {source.path} changed while it was read: run the same command "
                f"again"
            )
