"""The folder of the unfinished work, and whether the finished one is there already."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllm.data.files import write_atomically
from jaxllm.data.parts import Plan
from jaxllm.data.shards import Manifest, file_sha256, load_manifest

_MERGE_OPTIONS = ("val_fraction", "dedup", "shard_tokens")
"""Options that the parts do not depend on: changing one keeps them."""


def existing_result(out: Path, plan: Plan, options: dict[str, Any]) -> Manifest | None:
    """Gives the data set in `out` if it is the one that is asked for.

    Raises: ValueError if `out` holds anything else.
    """
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder that is not there yet")
    if not any(out.iterdir()):
        return None
    if not (out / "manifest.json").exists():
        raise ValueError(
            f"--out {out} is not empty and no data folder: name another folder"
        )
    manifest = load_manifest(out)
    same = manifest.options == options and len(manifest.sources) == len(plan.sources)
    for made, source in zip(manifest.sources, plan.sources, strict=same):
        same = same and (made.path, made.bytes) == (source.path, source.bytes)
        same = same and made.sha256 == file_sha256(Path(source.path))
        if not same:
            break
    if not same:
        raise ValueError(
            f"--out {out} holds another data set (other inputs or options): name "
            f"another folder, or remove it first"
        )
    return manifest


@contextmanager
def work_folder(
    out: Path, plan: Plan, options: dict[str, Any], *, keep: bool = False
) -> Iterator[Path]:
    """Gives the hidden folder of the unfinished work, emptied if it is of another plan.

    It is removed afterwards, unless it is to `keep`, or there was an error and parts
    are done.

    Raises: ValueError if another process works in it.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = work_path(out)
    with _alone(work, out):
        ours = {k: v for k, v in options.items() if k not in _MERGE_OPTIONS}
        key = json.dumps([asdict(plan), ours])
        if not _holds(work / "key.json", key):
            _empty(work)
            plan.save(work / "plan.json")
            write_atomically(work / "key.json", key.encode())
        (work / "parts").mkdir(exist_ok=True)
        # What an earlier run claimed or half wrote means nothing now.
        for name in ("claims", "spool", "result", "logs"):
            shutil.rmtree(work / name, ignore_errors=True)
        try:
            yield work
        except BaseException:
            if not any((work / "parts").glob("*.json")):
                _remove(work)
            raise
        if not keep:
            _remove(work)


def work_path(out: Path) -> Path:
    """Names the hidden folder of the work for `out`."""
    out = out.absolute()
    return out.parent / f".{out.name}.partial"


def remove_leftovers(out: Path) -> None:
    """Removes what a run left that was killed when `out` was just done."""
    work = work_path(out)
    if work.is_dir():
        with contextlib.suppress(ValueError), _alone(work, out):  # or it is not done
            _remove(work)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(work: Path) -> None:
    """Removes the folder, its lock last: a process that comes meanwhile is refused, or
    begins in an empty folder."""
    with contextlib.suppress(OSError):
        _empty(work)
        (work / "lock").unlink()
        work.rmdir()


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Makes the folder and locks it; it may be removed while it is locked.

    Raises: ValueError if another process has the lock.
    """
    while True:
        work.mkdir(exist_ok=True)
        try:
            lock = open(work / "lock", "a")  # noqa: SIM115
        except FileNotFoundError:
            continue  # it was removed at this moment
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is preparing {out} at this moment: wait for it"
                ) from None
            # Was it removed, and perhaps made anew, between opening and locking?
            if os.fstat(lock.fileno()).st_nlink:
                yield
                return


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
