"""Experiment trackers, none of which can hold up or end a run.

A thread of its own opens the tracker and feeds it from a bounded queue. What a tracker
raises is counted; one that keeps failing, or that takes nothing more, is given up.
"""

import importlib.util
import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""The package behind each value of train.track."""
QUEUE = 10_000
"""Records that may wait for a slow tracker."""
FAILURES = 10
"""Failures after which a tracker is given up."""
CLOSE_S = 10.0
"""Seconds that a tracker has at the end of a run to take what is left."""

Log = Callable[[dict[str, float], int], object]
Close = Callable[[], object]


def require_package(track: str) -> None:
    """Checks that what `track` needs is installed.

    Raises: ValueError saying what to install.
    """
    package = PACKAGES.get(track)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"train.track={track} needs the package {package}: "
            f"pip install {package} (or 'jaxllm[track]'), or leave --train.track out"
        )


def open_tracker(track: str, folder: Path, config: dict) -> tuple[Log, Close]:
    """Opens the tracker named `track`; returns how to log to it, and how to close it.

    The run is called as its folder is, its project "jaxllm"; files go to the folder
    where the tracker lets us choose.
    """
    name = folder.resolve().name
    if track == "tensorboard":
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

        writer = SummaryWriter(str(folder / "tensorboard"))

        def log(figures: dict[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    if track == "wandb":
        import wandb  # type: ignore[import-not-found]

        run = wandb.init(project="jaxllm", name=name, dir=str(folder), config=config)
        return lambda figures, step: run.log(figures, step=step), run.finish
    if track == "swanlab":
        import swanlab  # type: ignore[import-not-found]

        swanlab.init(
            project="jaxllm", experiment_name=name, config=config,
            logdir=str(folder / "swanlog"),
        )  # fmt: skip
        return lambda figures, step: swanlab.log(figures, step=step), swanlab.finish
    assert track == "trackio", track
    import trackio  # type: ignore[import-not-found]

    trackio.init(project="jaxllm", name=name, config=config)
    return lambda figures, step: trackio.log(figures, step=step), trackio.finish


class Tracker:
    """Hands a run's figures to a tracker, and never waits for it but in `close`."""

    def __init__(
        self,
        open: Callable[[], tuple[Log, Close]] | None,
        on_failure: Callable[[str], None],
        *,
        close_s: float = CLOSE_S,
    ):
        """`open` runs on the tracker's own thread; None tracks nothing. `on_failure`
        is told of each failure in one line, and may be called from that thread."""
        self.on_failure = on_failure
        self.close_s = close_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE)
        self._failures = 0
        self._given_up = open is None
        if open is not None:
            self._thread = threading.Thread(
                target=self._feed, args=(open,), name="tracker", daemon=True
            )
            self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Queues a record of metrics.jsonl; never waits for the tracker."""
        if self._given_up:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._give_up(f"it took nothing while {QUEUE} records came")

    def close(self) -> None:
        """Lets the tracker take what is queued and end, for `close_s` at most."""
        if self._given_up:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return self._give_up(f"it left {QUEUE} records")
        self._thread.join(self.close_s)
        if self._thread.is_alive():
            self._give_up(f"it did not end within {self.close_s:.0f} s")
        self._given_up = True

    def _feed(self, open: Callable[[], tuple[Log, Close]]) -> None:
        # BaseException: some trackers call sys.exit where they are not logged in.
        try:
            log, close = open()
        except BaseException as error:
            return self._give_up(f"it did not start: {_one_line(error)}")
        while (record := self._queue.get()) is not None and not self._given_up:
            try:
                log(_numbers(record), record["step"])
            except BaseException as error:
                self._failures += 1
                if self._failures == FAILURES:
                    return self._give_up(f"{FAILURES} failures: {_one_line(error)}")
                self.on_failure(f"the tracker failed: {_one_line(error)}")
        try:
            close()
        except BaseException as error:
            self.on_failure(f"the tracker failed to close: {_one_line(error)}")

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self.on_failure(f"the tracker is given up, training goes on: {reason}")


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record can be drawn."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
