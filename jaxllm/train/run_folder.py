"""The folder of a run: where things lie, whether to start or go on, setting aside.

config.json      the configuration, as it was asked for
tokenizer.json   a copy of the data's tokenizer, for generating and exporting
data/            token shards of the demo corpus, where the run made its own
checkpoints/     one folder a step
cache/           compiled programs
train.log        the log lines; metrics.jsonl every step's figures; samples.txt
incidents.jsonl  what went wrong, over all restarts
diagnosis.json   which data was bad, if the run gave up
stacks.txt       where every thread stood, if the run ever hung
loss.png         the loss curve
summary.json     written last: how the run ended
archive/N/       an earlier run of the same name, set aside whole (.moving: not yet)
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jaxllm import config as configuration
from jaxllm.config import RunConfig
from jaxllm.train.metrics import read_jsonl

Start = Literal["new", "continue", "finished"]

# What may differ between two starts of one run: how it is computed, shown and kept.
FREE_FIELDS = {
    "": (
        "out", "resume", "fresh", "compute", "parallel", "distributed", "guard",
        "deterministic",
    ),
    "data": ("path", "verify"),
    "train": (
        "steps", "epochs", "log_every", "eval_every", "eval_rows", "sample_every",
        "sample_prompt", "sample_tokens", "save_every", "save_every_minutes", "keep",
        "keep_every", "track", "hang_s", "exit_when_hung", "when_finished",
    ),
}  # fmt: skip
KEPT_WHEN_SET_ASIDE = ("data", "cache", "archive", ".lock")


class Busy(ValueError):
    """Another process trains in the folder."""

    exit_code = 69
    """What a program that ends with it exits with: EX_UNAVAILABLE of sysexits.h."""


class Unwritable(ValueError):
    """The run folder takes no files."""

    exit_code = 74
    """As for a checkpoint that cannot be saved."""


class RunFolder:
    """Names the files of a run, and looks after them as a whole."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.data = self.path / "data"
        self.checkpoints = self.path / "checkpoints"
        self.cache = self.path / "cache"
        self.log = self.path / "train.log"
        self.metrics = self.path / "metrics.jsonl"
        self.incidents = self.path / "incidents.jsonl"
        self.diagnosis = self.path / "diagnosis.json"
        self.samples = self.path / "samples.txt"
        self.stacks = self.path / "stacks.txt"
        self.plot = self.path / "loss.png"
        self.summary = self.path / "summary.json"
        self._moving = self.path / "archive" / ".moving"

    def create(self) -> None:
        """Makes the folder.

        Raises: Unwritable if it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise Unwritable(
                f"the run folder {self.path} cannot be written: {error.strerror}; "
                f"choose another with --out"
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second training process out of the folder; the lock dies with us.

        Raises: Busy if another process trains here.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Busy(
                    f"process {file.read().strip() or '?'} is training in {self.path}: "
                    f"wait for it, stop it, or choose another folder with --out"
                ) from None
            except OSError:
                # Some network file systems have no locks; training goes before them.
                pass
            with contextlib.suppress(OSError):  # a full disk: who it is stays unsaid
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield

    def load_config(self) -> RunConfig:
        """Reads the run's configuration; where config.json is lost or damaged, that of
        the newest checkpoint.

        Raises: ValueError if there is neither.
        """
        try:
            values = json.loads(self.config.read_text(encoding="utf-8"))
            return configuration.from_dict(RunConfig, values, where=str(self.config))
        except FileNotFoundError:
            problem = (
                f"{self.path} is not a run folder: it has no config.json; give the "
                f"folder that scripts/pretrain.py wrote, such as runs/demo"
            )
        except (ValueError, TypeError, OSError) as error:
            problem = f"{self.config} cannot be read: {error}"
        if saved := self.saved_config():
            return saved
        raise ValueError(problem)

    def saved_config(self) -> RunConfig | None:
        """Reads the configuration that the newest checkpoint was saved with, which is
        protected by digests; None where there is none, or it says nothing."""
        if not self.has_checkpoint():
            return None
        from jaxllm.train.checkpoint import Checkpoints

        try:
            meta = Checkpoints(self.checkpoints).read_meta()
            return configuration.from_dict(RunConfig, meta["config"])
        except (ValueError, KeyError, TypeError):
            return None

    def has_checkpoint(self) -> bool:
        """Whether there is anything to go on from."""
        return self.checkpoints.is_dir() and any(
            child.name.isdigit() for child in self.checkpoints.iterdir()
        )

    def is_run(self) -> bool:
        """Whether anything of a run lies here."""
        return self.config.exists() or self._moving.is_dir() or self.has_checkpoint()

    def is_being_set_aside(self) -> bool:
        """Whether a start died while it set the earlier run aside."""
        return self._moving.is_dir()

    def has_trained(self) -> bool:
        """Whether figures are there, which come after the first checkpoint."""
        return bool(read_jsonl(self.metrics))

    def finished_at(self) -> int | None:
        """The step at which the run came to its end, or None."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
            return int(summary["step"]) if summary["finished"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def set_aside(self) -> Path | None:
        """Moves an earlier run into archive/N, but for its data and caches.

        A start that dies on the way leaves archive/.moving, and the next goes on with
        it, whatever it was asked for: half a run is none.
        """
        if not self.is_run():
            return None
        self._moving.mkdir(parents=True, exist_ok=True)
        for child in self.path.iterdir():
            if child.name not in KEPT_WHEN_SET_ASIDE:
                child.rename(self._moving / child.name)
        archive = self._moving.parent
        taken = [int(p.name) for p in archive.iterdir() if p.name.isdigit()]
        return self._moving.rename(archive / str(max(taken, default=0) + 1))


def decide(folder: RunFolder, config: RunConfig) -> Start:
    """Decides between a new run, going on, and having nothing left to do.

    Raises: ValueError if --resume finds no run, or if the run in the folder has another
    configuration.
    """
    if config.fresh:
        return "new"
    if folder.is_being_set_aside():
        if config.resume:
            raise ValueError(
                f"the run in {folder.path} is being set aside in its archive, and "
                f"--resume was given: leave it out to start a new run"
            )
        return "new"
    if not folder.has_checkpoint():
        if folder.has_trained():
            raise ValueError(
                f"the run in {folder.path} has trained, and its checkpoints are gone "
                f"from {folder.checkpoints}: bring them back (is their disk mounted?), "
                f"or give --fresh to set aside what is left and start anew"
            )
        if config.resume:
            raise ValueError(
                f"--resume found no checkpoint in {folder.path}: check --out, or leave "
                f"--resume out to start a new run"
            )
        return "new"
    finished = folder.finished_at()
    if finished is None:
        require_same_run(folder, config)
        return "continue"
    if config.train.when_finished == "again" and not config.resume:
        return "new"
    asked, had = config.train, folder.load_config().train
    if asked.steps:
        more = asked.steps > finished
    else:  # how many steps the epochs make is known once the data are open
        more = (asked.steps, asked.epochs) != (had.steps, had.epochs)
    if more or config.resume:
        require_same_run(folder, config)
    return "continue" if more else "finished"


def require_same_run(folder: RunFolder, config: RunConfig) -> None:
    """Compares what makes two starts one run.

    Raises: ValueError naming the first field that differs, with both values.
    """
    if found := first_difference(folder.load_config(), config):
        # Nothing protects config.json: what is in the checkpoint counts.
        saved = folder.saved_config()
        if saved is not None and not first_difference(saved, config):
            return
        name, earlier, now = found
        raise ValueError(
            f"{folder.path} holds a run with {name}={earlier!r}, and {name}={now!r} "
            f"was asked for: give the same value to go on, another folder with --out, "
            f"or --fresh to set the old run aside"
        )


def first_difference(one: RunConfig, other: RunConfig) -> tuple[str, Any, Any] | None:
    """Finds the first field that makes two configurations two runs, and both values."""
    ones, others = _identity(one), _identity(other)
    for name in others:
        if name in ones and ones[name] != others[name]:
            return name, ones[name], others[name]
    return None


def _identity(config: RunConfig) -> dict[str, Any]:
    values = asdict(config)
    same: dict[str, Any] = {"compute.param_dtype": values["compute"]["param_dtype"]}
    for room, fields in values.items():
        if room in FREE_FIELDS[""]:
            continue
        if not isinstance(fields, dict):
            same[room] = fields
            continue
        for name, value in fields.items():
            if name not in FREE_FIELDS.get(room, ()):
                same[f"{room}.{name}"] = value
    if config.optim.loss_norm == "token" and config.optim.schedule_unit == "update":
        # Then the cut into micro-batches changes nothing but rounding.
        del same["train.accumulate"]
    return same
