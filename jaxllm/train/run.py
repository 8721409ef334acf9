"""The parts of a run, and how they are put together before the first step."""

import contextlib
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import config as configuration
from jaxllm.config import RunConfig
from jaxllm.data.batches import Batches
from jaxllm.data.files import write_atomically
from jaxllm.data.shards import verify_hashes
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train import guard, origin
from jaxllm.train.checkpoint import Checkpoints, Restored
from jaxllm.train.console import Console
from jaxllm.train.device import keep_compiled
from jaxllm.train.incidents import Incidents
from jaxllm.train.metrics import Meter
from jaxllm.train.position import Position
from jaxllm.train.processes import is_first, on_all, on_first
from jaxllm.train.run_folder import RunFolder, Unwritable, first_difference
from jaxllm.train.step import Program, build
from jaxllm.train.track import Tracker, open_tracker, require_package
from jaxllm.train.watchdog import Watchdog


@dataclass
class Run:
    """The parts of a run that its phases share."""

    config: RunConfig
    folder: RunFolder
    console: Console
    program: Program
    train: Batches
    val: Batches
    tokenizer: Tokenizer
    token_bytes: np.ndarray
    checkpoints: Checkpoints
    total_steps: int
    watchdog: Watchdog
    incidents: Incidents
    tracker: Tracker
    position: Position = field(default_factory=Position)
    meter: Meter = field(default_factory=Meter)
    pending: list[dict] = field(default_factory=list)
    failed_saves: list[str] = field(default_factory=list)
    trained_s_at: dict[int, float] = field(default_factory=dict)
    """What the meter showed when each step was saved."""
    saved_since: float = 0.0
    """When the last save began, on the monotonic clock."""

    def save_failed(self, error: Exception) -> None:
        """Says and counts a failed save, which stops nothing."""
        self.console.say(f"WARNING: {error}")
        self.failed_saves.append(str(error))
        self.incidents.note("failed_save", error=str(error))


def prepare(config: RunConfig, folder: RunFolder, console: Console, mesh: Any) -> Run:
    """Opens the data, builds the step, writes what describes the run.

    Raises: ValueError, on all processes alike.
    """

    def check() -> None:
        require_package(config.train.track)
        origin.require_data(config, folder)

    on_first(check)
    if not config.data.path:
        path = on_first(lambda: str(demo_data(folder, config, console)))
        config = replace(config, data=replace(config.data, path=path))
    train, val = on_all(lambda: open_batches(config))
    on_first(lambda: origin.require_fit(config, folder, train.tokenizer))
    if config.data.verify:
        on_first(lambda: verify(train, console))
    total_steps = config.train.steps or -(
        -train.n_rows * config.train.epochs // config.train.batch_size
    )
    program = build(config, mesh, total_steps=total_steps)
    tokenizer = train.tokenizer
    token_bytes = np.zeros(config.model.vocab_size, np.int32)
    token_bytes[: tokenizer.vocab_size] = tokenizer.token_bytes()

    def write() -> None:
        try:
            write_atomically(folder.config, configuration.to_json(config).encode())
            tokenizer.save(folder.tokenizer)
            folder.summary.unlink(missing_ok=True)
        except OSError as error:
            raise Unwritable(
                f"the run folder {folder.path} takes no files: {error.strerror}; make "
                f"room or choose another with --out; what is saved there is untouched"
            ) from None

    on_first(write)
    console.log = folder.log
    keep_compiled(folder.cache)
    incidents = Incidents(folder.incidents)

    def tracker_failed(error: str) -> None:
        console.say(f"WARNING: {error}")
        incidents.note("tracker_failed", error=error)

    tracked = config.train.track != "none" and is_first()
    return Run(
        config=config, folder=folder, console=console, program=program, train=train,
        val=val, tokenizer=tokenizer, token_bytes=token_bytes, total_steps=total_steps,
        checkpoints=Checkpoints(
            folder.checkpoints, keep=config.train.keep,
            keep_every=config.train.keep_every,
        ),
        watchdog=watchdog(config, folder, console, incidents),
        incidents=incidents,
        tracker=Tracker(
            partial(open_tracker, config.train.track, folder.path, asdict(config))
            if tracked else None,
            tracker_failed,
        ),
    )  # fmt: skip


def restore(run: Run, *, at_most: int | None = None) -> Restored:
    """Loads the newest state that verifies, and the position that belongs to it.

    A guard that the checkpoint does not have, since it is older than guards or its run
    had none, begins anew; one that this run does not have is left behind.

    Raises: CheckpointError.
    """
    abstract = run.program.abstract_state
    found = run.checkpoints.restore(
        abstract, at_most=at_most, optional=("guard",), stranger=partial(_stranger, run)
    )
    for step, reason in found.skipped:
        run.incidents.note("fell_back", step=step, reason=reason)
    if "guard" in abstract and "guard" not in found.state:
        run.console.say(
            f"note: checkpoint {found.step} has no guard: the bound on spikes is off "
            f"until {guard.LEAST} steps are known"
        )
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["guard"])
        found.state["guard"] = jax.jit(guard.init, out_shardings=layout)()
    return found


def _stranger(run: Run, meta: dict[str, Any]) -> str:
    """Says by which field a checkpoint proves to be another run's, if it does."""
    try:
        theirs = configuration.from_dict(RunConfig, meta["config"])
    except (KeyError, ValueError):  # it does not say, or not in our words
        return ""
    if not (found := first_difference(theirs, run.config)):
        return ""
    name, there, here = found
    return f"it is another run's: {name} is {there!r} there and {here!r} here"


def watchdog(
    config: RunConfig, folder: RunFolder, console: Console, incidents: Incidents
) -> Watchdog:
    """Every process watches itself: each may hang elsewhere."""
    index = jax.process_index()
    report, say = folder.stacks, console.say
    if index:
        report = report.with_stem(f"{report.stem}-{index}")

        def say(text: str) -> None:
            with contextlib.suppress(OSError):
                print(f"process {index}: {text}", file=sys.stderr, flush=True)

    return Watchdog(
        least_s=config.train.hang_s, exit_when_hung=config.train.exit_when_hung,
        report=report, say=say,
        on_hang=lambda step, waited_s: incidents.note(
            "hung", lost_s=waited_s, after_step=step
        ),
    )  # fmt: skip


def verify(batches: Batches, console: Console) -> None:
    """Compares every shard with its hash.

    Raises: ValueError naming the first that differs.
    """
    n_bytes = sum(verify_hashes(manifest) for manifest in batches.manifests)
    console.say(f"data: {n_bytes:,} bytes are those that the manifest names")


def demo_data(folder: RunFolder, config: RunConfig, console: Console) -> Path:
    """Makes the demo corpus's shards in the run's data folder, or reuses them."""
    from jaxllm.data.corpus import prepare_demo
    from jaxllm.data.shards import load_manifest

    vocab_size = config.model.vocab_size
    if (folder.data / "manifest.json").exists():
        try:
            if load_manifest(folder.data).vocab_size <= vocab_size:
                console.say(f"data: reusing {folder.data}")
                return folder.data
        except ValueError as error:
            console.say(f"data: {error}; making it anew")
    console.say(
        f"data: training a tokenizer and writing token shards of the demo corpus "
        f"(Python's own library) to {folder.data}"
    )
    prepare_demo(folder.data, vocab_size=vocab_size)
    return folder.data


def open_batches(config: RunConfig) -> tuple[Batches, Batches]:
    """Opens the training rows, shuffled, and the held-out rows, in order."""
    common: dict[str, Any] = dict(
        layout=config.data.layout, seq_len=config.seq_len,
        isolate_documents=config.data.isolate_documents,
        vocab_size=config.model.vocab_size,
    )  # fmt: skip
    train = Batches(
        config.data.path, split="train", batch_size=config.train.batch_size,
        seed=config.data.seed, **common,
    )  # fmt: skip
    micro = config.train.batch_size // config.train.accumulate
    val = Batches(
        config.data.path, split="val", batch_size=micro, shuffle=False, **common
    )
    return train, val


def describe(run: Run) -> dict[str, Any]:
    """What a checkpoint says about itself, besides its arrays."""
    return {
        "config": asdict(run.config),
        "total_steps": run.total_steps,
        "position": run.position.to_meta(),
        "data": describe_data(run),
        "versions": versions(),
    }


def describe_data(run: Run) -> dict[str, Any]:
    """What must be the same for the order of the data to be the same."""
    return {"rows": run.train.n_rows, "tokenizer": run.tokenizer.sha256}


def versions() -> dict[str, str]:
    """The versions of what decides the figures."""
    found = {}
    for name in ("jaxllm", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a bare checkout
            found[name] = "unknown"
    return found
