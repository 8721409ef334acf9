"""The offline demo corpus: the source text of Python's own standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxllm.data.records import text_digest


def demo_files(max_bytes: int) -> Iterator[str]:
    """Names files that are valid UTF-8, up to so many bytes together."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # No tests, and no tables of characters and tags: they teach a model nothing.
    skipped = {"test", "tests", "idlelib", "encodings", "pydoc_data"}
    skipped |= {"site-packages", "dist-packages"}
    paths = [
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts)
    ]
    # By hash of the name: an order that mixes the packages and is the same everywhere.
    paths.sort(key=lambda p: text_digest(p.relative_to(root).as_posix().encode(), 0))
    total = 0
    for path in paths:
        try:
            data = path.read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if data and total + len(data) <= max_bytes:
            total += len(data)
            yield str(path)
