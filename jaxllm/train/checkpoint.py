"""Checkpoints that can be believed: saved in the background, read back, sealed.

A save passes four stations. Orbax writes `.unfinished/<step>`; a background thread
reads every array back from there and compares its digest with the one taken on the
device before the save; the folder is sealed (seal.py); and one rename makes it visible
as `<step>`. Hence a step that can be seen has been proven readable, and death at any
moment leaves at worst an invisible remainder, which the next save clears away. Only
then are older steps pruned. `restore` checks the seal and what arrived on the devices,
and falls back to the newest older step where either differs.

    checkpoints/
      1000/            sealed by 1000/SHA256SUMS (try sha256sum -c)
        state/         the arrays, by Orbax
        meta/metadata  the manifest (manifest.py): the caller's meta, and every array's
                       path, shape, dtype and digest
      .unfinished/     saves that are not proven yet; pruned steps on their way out
      damaged-1500/    what restore passed over, set aside by the next save
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxllm.train.manifest import (
    load_arrays,
    load_step,
    make_manifest,
    open_manager,
    read_manifest,
    state_bytes,
    verify_arrays,
)
from jaxllm.train.processes import agree, is_first, one_line, warn
from jaxllm.train.seal import forget_cached, seal, sync_folder
from jaxllm.train.step_folders import (
    UNFINISHED,
    CheckpointError,
    agreed_candidates,
    candidates,
    discard,
    list_steps,
    make_unfinished,
    newest_whole,
    prune,
    require_room,
    set_aside,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found: the state on its devices, and the meta saved
    with it; `skipped` names each newer step that was damaged, and the reason."""

    step: int
    state: dict
    meta: dict
    skipped: list[tuple[int, str]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run in one folder.

    With several processes, each makes one for the same shared folder and all call
    `save`, `wait`, `restore` and `close` alike, from their main threads: errors are
    agreed on, so that all of them raise or none does. Reading (`steps`, `read_meta`,
    `restore`) changes nothing on disk; only one run at a time may save.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3, keep_every: int = 0):
        """Keeps the `keep` newest steps, and multiples of `keep_every` unless it is 0.

        Raises: ValueError on a `keep` below 1, a negative `keep_every`, or a folder
        whose path Orbax cannot write to.
        """
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"keep={keep} must be at least 1 and keep_every={keep_every} at least "
                f"0 (none): raise it"
            )
        self.folder = Path(folder).absolute()
        if strange := set(str(self.folder)) & set("[]*?\\"):
            # Orbax 0.12 looks for what its processes wrote by a glob over the whole
            # path; where that matches nothing it commits a checkpoint without arrays.
            raise ValueError(
                f"checkpoints cannot be saved below {str(self.folder)!r}: rename what "
                f"has {' '.join(sorted(strange))} in its name"
            )
        self.keep = keep
        self.keep_every = keep_every
        self._unfinished = self.folder / UNFINISHED
        self._manager: ocp.CheckpointManager | None = None
        self._background: threading.Thread | None = None
        self._failure = ""
        self._made = False
        self._damaged: set[int] = set()
        # Orbax would print every error too, with some hundred lines of traceback.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Starts to save `state` (nested dict of arrays) and `meta` (JSON) as `step`.

        Returns once the state may be donated; writing, reading back, publishing and
        pruning go on in the background. Waits for an earlier save to end first.

        Raises: CheckpointError when an earlier save failed in the background (this one
        is then not started: call again to try), when `step` is not above every step on
        disk, when the disk has too little room, or when writing cannot start.
        """
        self._settle(step, state)
        try:
            manifest = make_manifest(step, state, meta)
            if self._manager is None:
                self._manager = open_manager(self._unfinished)
            self._manager.reload()  # it still lists what has been published or failed
            # Forced: Orbax would skip a step by its own policy, and only return False.
            started = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(manifest)
                ),
                force=True,
            )
        except Exception as error:
            self._drop_manager()
            raise CheckpointError(self._about(step, error)) from error
        if not started:
            raise CheckpointError(self._about(step, "Orbax skipped it"))
        self._background = threading.Thread(
            target=self._publish, args=(step, manifest), name=f"checkpoint-{step}"
        )
        self._background.start()

    def wait(self) -> None:
        """Returns when the last save is on disk, proven and visible, others pruned.

        Raises: CheckpointError when a save failed in the background.
        """
        self._settle()

    def close(self) -> None:
        """Waits, then lets Orbax's threads go.

        Raises: CheckpointError, as `wait`, with everything closed all the same.
        """
        try:
            self.wait()
        finally:
            self._drop_manager()

    def let_finish(self, timeout_s: float = 60.0) -> None:
        """Waits for a save under way before the program dies; agrees with nobody."""
        if jax.process_count() == 1:
            with contextlib.suppress(CheckpointError):
                self.close()
        elif self._background is not None:
            self._background.join(timeout_s)

    def steps(self) -> list[int]:
        """Lists the steps on disk, ascending, as they are at this moment."""
        return list_steps(self.folder)

    def read_meta(self, step: int | None = None) -> dict:
        """Returns the meta of `step`, or of the newest step whose meta is intact.

        Raises: CheckpointError when there is none.
        """
        return newest_whole(
            self.folder,
            candidates(self.folder, step),
            lambda folder, candidate: read_manifest(folder, candidate)["meta"],
        )[1]

    def restore(
        self,
        abstract: dict,
        *,
        step: int | None = None,
        at_most: int | None = None,
        optional: tuple[str, ...] = (),
        stranger: Callable[[dict], str] = lambda meta: "",
    ) -> Restored:
        """Loads `step`, or without it the newest step that proves undamaged.

        `abstract` is a nested dict of ShapeDtypeStruct; each array is put under its
        sharding, whatever mesh it was saved from (without one, on the first device).
        Steps above `at_most` are looked at only if there is no other; what is
        `optional` in the state is left out where the checkpoint or `abstract` lacks it;
        a step of whose meta `stranger` says why it is another run's counts as damaged.
        A damaged step is passed over with a warning that names it and the reason, and
        set aside as damaged-<step> by the next save; an explicit step is not replaced.

        Raises: CheckpointError when no step is intact, naming each with its reason; or
        when an intact step holds arrays of other names, shapes or dtypes.
        """
        self._join()
        if self._failure:
            warn(log, "%s", self._failure)
        chosen, (state, meta), skipped = newest_whole(
            self.folder,
            agreed_candidates(self.folder, step, at_most),
            lambda at, s: load_step(at, s, abstract, optional, stranger),
        )
        self._damaged = {candidate for candidate, _ in skipped}
        return Restored(chosen, state, meta, skipped)

    def read_arrays(self, prefix: str, *, step: int | None = None) -> tuple[int, dict]:
        """Reads some arrays onto the host, such as "params/": their step and the tree.

        Falls back as `restore` does.

        Raises: CheckpointError when no step has them undamaged.
        """
        return newest_whole(
            self.folder,
            candidates(self.folder, step),
            lambda folder, candidate: load_arrays(folder, candidate, prefix),
        )[:2]

    def rewind(self, step: int) -> None:
        """Deletes the steps above `step`, the newest first; damaged ones are set aside.
        Raises: CheckpointError, on every process alike."""
        self._join()
        problem = ""
        if is_first():
            try:
                self._unfinished.mkdir(exist_ok=True)
                for newer in [s for s in self.steps()[::-1] if s > step]:
                    away = set_aside if newer in self._damaged else discard
                    away(self.folder, newer)
            except OSError as error:
                problem = f"cannot go back to checkpoint {step}: {one_line(error)}"
        if problem := agree(problem):
            raise CheckpointError(problem)
        self._damaged = {damaged for damaged in self._damaged if damaged <= step}

    def _make_ready(self, step: int, state: dict) -> None:
        """Prepares the folder for a save; one process does it for all.

        Raises: CheckpointError saying what forbids the save; OSError.
        """
        watched = self._unfinished if self._manager else self.folder
        if self._made and not watched.is_dir():
            # Not made again: a mount may be gone, and what is below it not the disk.
            raise CheckpointError("the folder has vanished; is its disk still mounted?")
        if self._manager is None:
            make_unfinished(self.folder)
            self._made = True
        for damaged in sorted(self._damaged.intersection(self.steps())):
            aside = set_aside(self.folder, damaged)
            warn(log, "the damaged checkpoint %d is now %s", damaged, aside)
        self._damaged.clear()
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise CheckpointError(
                f"it is not above the newest, {newest}: restore that, or move it away"
            )
        require_room(self.folder, state_bytes(state))

    def _publish(self, step: int, manifest: dict) -> None:
        """Waits for Orbax, proves what it wrote, makes it visible, prunes."""
        manager = self._manager
        assert manager is not None
        try:
            manager.wait_until_finished()
            if is_first():
                written = self._unfinished / str(step)
                forget_cached(written)
                verify_arrays(written, manifest)
                seal(written)
                written.rename(self.folder / str(step))
                sync_folder(self.folder)
        except Exception as error:
            self._failure = self._about(step, error)
            if is_first():
                # A full disk needs the room of the half-written step back.
                shutil.rmtree(self._unfinished, ignore_errors=True)
            return
        try:
            if is_first():
                prune(self.folder, keep=self.keep, keep_every=self.keep_every)
        except (CheckpointError, OSError) as error:
            warn(log, "could not delete old checkpoints: %s", one_line(error))

    def _join(self) -> None:
        if self._background is not None:
            self._background.join()
            self._background = None

    def _settle(self, step: int | None = None, state: dict | None = None) -> None:
        """Ends the earlier save, then makes ready for that of `step`, if given.

        Raises: CheckpointError, on every process alike, when either has a complaint.
        """
        self._join()
        problem, self._failure = self._failure, ""
        if not problem and step is not None and is_first():
            assert state is not None
            try:
                self._make_ready(step, state)
            except (CheckpointError, OSError) as error:
                problem = self._about(step, error)
        if problem := agree(problem):
            self._drop_manager()
            raise CheckpointError(problem)

    def _drop_manager(self) -> None:
        # After a failure Orbax may hold the step as its newest; a new one does not. It
        # raises the failure once more (it is reported by now) before it really closes.
        manager, self._manager = self._manager, None
        for _ in range(2):
            with contextlib.suppress(Exception):
                if manager is not None:
                    manager.close()
                break

    def _about(self, step: int, problem: object) -> str:
        return f"checkpoint {step} was not saved in {self.folder}: {one_line(problem)}"
