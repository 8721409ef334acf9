"""The step folders of a run: listed, given room, set aside, pruned. Knows no arrays.

Every change is one rename between a visible name, which is the plain step number, and
one that `list_steps` does not take for a step: nothing half-made is ever visible.
"""

import shutil
from pathlib import Path

UNFINISHED = ".unfinished"
"""Holds what is on its way in or out; whatever is in it may be deleted at a start."""


class CheckpointError(ValueError):
    """A checkpoint could not be saved or restored; the text is one line for the user.

    After a failed save the run may go on: no earlier step was touched.
    """


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


def make_unfinished(folder: Path) -> None:
    """Makes an empty UNFINISHED in `folder`, clearing away what a dead run left there.

    Raises: OSError.
    """
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
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
    if target.exists():
        shutil.rmtree(target)
    return (folder / str(step)).rename(target)


def prune(folder: Path, *, keep: int, keep_every: int) -> None:
    """Deletes all steps but the `keep` newest and the multiples of `keep_every`.

    Raises: OSError.
    """
    steps = list_steps(folder)
    for step in steps[:-keep]:
        if not keep_every or step % keep_every:
            doomed = folder / UNFINISHED / f"pruned-{step}"
            (folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)
