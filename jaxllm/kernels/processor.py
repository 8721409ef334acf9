"""What this machine's processor can do."""

import functools
from pathlib import Path


@functools.cache
def features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's instruction sets in Linux's words; none where it is not told."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())
