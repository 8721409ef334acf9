"""What the processes of a run must decide alike.

Each process of jax.distributed runs the same program; one that raises alone leaves the
others waiting for it. Call these from the main thread, in the same order everywhere.
"""

import json
import logging
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")
SHARED_WITHIN_S = 60.0


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


def on_first(action: Callable[[], str | None]) -> str:
    """Does something in the first process alone; returns what it returned, on each.

    Raises: ValueError, on each alike, when the action raises one (or an OSError).
    """
    problem, found, code = "", "", 2
    if is_first():
        try:
            found = action() or ""
        except (ValueError, OSError) as error:
            if jax.process_count() == 1:
                raise
            problem, code = str(error) or "failed", getattr(error, "exit_code", 2)
    _raise_agreed(problem, code)
    return from_first(found)


def on_all(action: Callable[[], Result]) -> Result:
    """Does something in every process; returns this one's result.

    Raises: ValueError, on each alike, when the action raises one (or an OSError)
    anywhere.
    """
    problem, code, result = "", 2, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        problem, code = str(error) or "failed", getattr(error, "exit_code", 2)
        if not is_first():
            problem = f"in process {jax.process_index()}: {problem}"
    _raise_agreed(problem, code)
    return cast(Result, result)


def require_same(text: str) -> None:
    """Checks that every process was started with the same configuration, as JSON.

    Raises: ValueError, on each alike, naming a field that differs.
    """

    def compare() -> None:
        mine, first = _flat(json.loads(text)), _flat(json.loads(of_first))
        for name in sorted(mine.keys() | first.keys()):
            if mine.get(name) != first.get(name):
                raise ValueError(
                    f"it was started with {name}={mine.get(name)!r}, and process 0 "
                    f"with {first.get(name)!r}: give all processes the same flags"
                )

    of_first = from_first(text)
    on_all(compare)


def require_shared(folder: Path) -> None:
    """Checks that all processes see the same folder.

    Raises: ValueError, on each alike, naming the process that does not.
    """
    if jax.process_count() == 1:
        return
    token = from_first(uuid.uuid4().hex)
    mark = folder / ".shared"
    on_first(lambda: str(mark.write_text(token)))

    def look() -> None:
        # Network file systems may show a new file only after a while.
        deadline = time.monotonic() + SHARED_WITHIN_S
        while not (mark.is_file() and mark.read_text() == token):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the folder {folder} on {platform.node()} is not the one that "
                    f"process 0 writes to: give an --out that all machines share"
                )
            time.sleep(0.1)

    on_all(look)
    on_first(lambda: mark.unlink(missing_ok=True))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": v for key, v in _flat(value).items()}
        else:
            flat[name] = value
    return flat


class Refused(ValueError):
    """An error of one process that all of them raise, with its exit code."""

    def __init__(self, text: str, exit_code: int = 2):
        super().__init__(text)
        self.exit_code = exit_code


def _raise_agreed(problem: str, code: int) -> None:
    if said := agree(problem and f"{code} {problem}"):
        number, _, text = said.partition(" ")
        raise Refused(text, int(number))


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


def warn(log: logging.Logger, text: str, *values: object) -> None:
    """Logs a warning, once for all processes."""
    if is_first():
        log.warning(text, *values)


def one_line(problem: object) -> str:
    """Returns an error's text as one line of at most some 400 characters.

    Leaves out the specification that TensorStore repeats at the end of its errors.
    """
    text = " ".join(str(problem).partition(" [tensorstore_spec")[0].split())
    text = text or type(problem).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
