"""The seal of a finished folder: a SHA256SUMS that notices any later change to it.

`sha256sum -c SHA256SUMS` reads the same file. Its last line, a comment to sha256sum,
holds the digest of the lines above, so that the list protects itself too.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "SHA256SUMS"
LAST_LINE = "# sha256 of the lines above: "


class Damaged(Exception):
    """What is on disk is not what was written; the text says which file and how."""


def seal(folder: Path) -> None:
    """Writes SHA256SUMS over every file below `folder`, durably.

    Raises: OSError.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in files]
    lines = "".join(
        f"{digest}  {name}\n"
        for digest, name in zip(_sha256_all(files), names, strict=True)
        if name != NAME
    )
    text = f"{lines}{LAST_LINE}{hashlib.sha256(lines.encode()).hexdigest()}\n"
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def check_seal(folder: Path) -> None:
    """Checks that every file that was below `folder` when it was sealed is unchanged.

    Files that were added later are not looked at.

    Raises: Damaged naming the first file that is missing or differs; OSError.
    """
    try:
        text = (folder / NAME).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    lines, mark, digest = text.rpartition(LAST_LINE)
    if not mark or digest != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise Damaged(f"{NAME} is damaged")
    entries = [line.split("  ", 1) for line in lines.splitlines()]
    files = [folder / name for _, name in entries]
    for (_, name), file in zip(entries, files, strict=True):
        if not file.is_file():
            raise Damaged(f"file {name} is missing")
    for (expected, name), found in zip(entries, _sha256_all(files), strict=True):
        if found != expected:
            raise Damaged(f"file {name} does not hold the bytes that were written")


def sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable, as fsync does for the bytes of a file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_cached(folder: Path) -> None:
    """Makes all files and folders below `folder` durable, and asks the system to drop
    its cached copy, so that the next reading comes from the disk.

    The second is a hint: it does nothing where it is not supported, and nothing to what
    is not durable yet.

    Raises: OSError.
    """
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise") and path.is_file():
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _sha256_all(files: list[Path]) -> list[str]:
    # hashlib and read() release the interpreter lock: threads do run side by side.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, files))


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
