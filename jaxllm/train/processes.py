"""What the processes of a run must decide alike.

Each process of jax.distributed runs the same program; one that raises alone leaves the
others waiting for it. Call these from the main thread, in the same order everywhere.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

MESSAGE_BYTES = 1024


def is_first() -> bool:
    """Whether this is the process that writes, logs and decides for all."""
    return jax.process_index() == 0


def agree(problem: str) -> str:
    """Returns the first process's `problem` that is not empty, the same on each.

    Costs nothing in a single process; else a small collective on the devices.
    """
    if jax.process_count() == 1:
        return problem
    mine = np.zeros(MESSAGE_BYTES, np.uint8)
    text = np.frombuffer(problem.encode()[:MESSAGE_BYTES], np.uint8)
    mine[: text.size] = text
    for row in np.asarray(multihost_utils.process_allgather(mine)):
        if row.any():
            return row.tobytes().rstrip(b"\0").decode(errors="replace")
    return ""


def one_line(problem: object) -> str:
    """Returns an error's text as one line of at most some 400 characters."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
