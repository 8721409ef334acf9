"""What the processes of a run must decide alike.

Each process of jax.distributed runs the same program; one that raises alone leaves the
others waiting for it. Call these from the main thread, in the same order everywhere.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this is the process that writes, logs and decides for all."""
    return jax.process_index() == 0


def agree(problem: str) -> str:
    """Returns the first `problem` of any process that is not empty, the same on each.

    Costs nothing in a single process; else small collectives on the devices.
    """
    return next(filter(None, _gather(problem)), "")


def from_first(value: str) -> str:
    """Returns the `value` of the first process, on each."""
    return _gather(value)[0]


def _gather(text: str) -> list[str]:
    """Returns the text of every process, in their order."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    if not sizes.any():
        return [""] * sizes.size
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded))
    pairs = zip(rows, sizes.ravel(), strict=True)
    return [row[:size].tobytes().decode() for row, size in pairs]


def one_line(problem: object) -> str:
    """Returns an error's text as one line of at most some 400 characters.

    Leaves out the specification that TensorStore repeats at the end of its errors.
    """
    text = " ".join(str(problem).partition(" [tensorstore_spec")[0].split())
    text = text or type(problem).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
