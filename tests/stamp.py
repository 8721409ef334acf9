"""What a record was made with, so that it can be seen to be out of date."""

import subprocess
from pathlib import Path

from jaxllm.train.run import versions


def stamp() -> dict:
    """The commit, marked where the code differs from it, and the versions."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    return {"commit": done.stdout.strip() or "unknown", "versions": versions()}
