"""The step folders of a run: listed, tried in turn, given room, set aside, pruned.

Every change is one rename between a visible name, which is the plain step number, and
one that `list_steps` does not take for a step: nothing half-made is ever visible.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxllm.train.processes import agree, from_first, is_first, one_line
from jaxllm.train.seal import Damaged

log = logging.getLogger(__name__)

Found = TypeVar("Found")

UNFINISHED = ".unfinished"
"""Holds what is on its way in or out; whatever is in it may be deleted at a start."""


class CheckpointError(ValueError):
    """A checkpoint could not be saved or restored; the text is one line for the user.

    After a failed save the run may go on: no earlier step was touched.
    """

    exit_code = 74
    """What a program that ends with it exits with: EX_IOERR of sysexits.h."""


def list_steps(folder: Path) -> list[int]:
    """Lists the steps in `folder`, ascending; none if there is no such folder.

    Raises: CheckpointError when the folder cannot be read.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot list {folder}: {error}") from error
    digits = (name for name in names if name.isascii() and name.isdigit())
    return sorted(int(name) for name in digits if str(int(name)) == name)


def candidates(folder: Path, step: int | None) -> list[int]:
    """Returns the steps to try: `step` alone, or all, the newest first.

    Raises: CheckpointError when there is none.
    """
    steps = list_steps(folder)
    if step is None and not steps:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    if step is None:
        return steps[::-1]
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "it is empty"
        raise CheckpointError(f"no checkpoint {step} in {folder}: {there}")
    return [step]


def agreed_candidates(folder: Path, step: int | None, at_most: int | None) -> list[int]:
    """Lists `candidates` by one process for all, since another may not see the latest
    rename yet. Those above `at_most` are left out, unless that leaves none: then the
    oldest stays.

    Raises: CheckpointError, on every process alike, when there is none.
    """
    problem, found = "", ""
    if is_first():
        try:
            listed = candidates(folder, step)
            if at_most is not None:
                listed = [s for s in listed if s <= at_most] or listed[-1:]
            found = " ".join(map(str, listed))
        except CheckpointError as error:
            problem = str(error)
    if problem := agree(problem):
        raise CheckpointError(problem)
    return [int(step) for step in from_first(found).split()]


def newest_whole(
    folder: Path, steps: list[int], read: Callable[[Path, int], Found]
) -> tuple[int, Found, list[tuple[int, str]]]:
    """Tries `read(step_folder, step)` on one step after the other.

    Returns the first step that can be read, what was read, and which were passed over
    and why, which is also said loudly.

    Raises: CheckpointError naming each with its reason when none can be read.
    """
    skipped: list[tuple[int, str]] = []
    for step in steps:
        try:
            found = read(folder / str(step), step)
        except (Damaged, OSError) as problem:
            skipped.append((step, one_line(problem)))
            if len(steps) > 1 and is_first():
                damaged = "CHECKPOINT %d IN %s IS DAMAGED and is passed over: %s"
                log.warning(damaged, step, folder, skipped[-1][1])
            continue
        if skipped and is_first():
            log.warning("continuing from the older checkpoint %d", step)
        return step, found, skipped
    each = "; ".join(f"{step}: {reason}" for step, reason in skipped)
    raise CheckpointError(
        f"no undamaged checkpoint in {folder} ({each}): restore it from a copy, "
        f"or start anew in another one"
    )


def make_unfinished(folder: Path) -> None:
    """Makes an empty UNFINISHED in `folder`, clearing away what a dead run left there.

    Raises: OSError.
    """
    _delete(folder / UNFINISHED)
    (folder / UNFINISHED).mkdir(parents=True)


def require_room(folder: Path, needed: int) -> None:
    """Checks that `needed` bytes fit on the disk of `folder`.

    Raises: CheckpointError naming both numbers; OSError.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"it needs up to {needed:,} bytes and the disk has {free:,} free: make "
            f"room or keep fewer checkpoints"
        )


def set_aside(folder: Path, step: int) -> Path:
    """Renames a damaged step to damaged-<step>, in place of an earlier one.

    Raises: OSError.
    """
    target = folder / f"damaged-{step}"
    _delete(target)
    return (folder / str(step)).rename(target)


def prune(folder: Path, *, keep: int, keep_every: int) -> None:
    """Deletes all steps but the `keep` newest and the multiples of `keep_every`.

    Raises: OSError.
    """
    steps = list_steps(folder)
    for step in steps[:-keep]:
        if not keep_every or step % keep_every:
            discard(folder, step)


def discard(folder: Path, step: int) -> None:
    """Deletes a step, which is invisible from the first moment on.

    Raises: OSError.
    """
    doomed = folder / UNFINISHED / f"pruned-{step}"
    (folder / str(step)).rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # someone's file of such a name
        path.unlink(missing_ok=True)
