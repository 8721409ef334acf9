"""A watchdog for hangs: a silence far beyond the usual is reported, with all stacks.

A dead peer, a stuck collective or a vanished file system shows as a step that never
ends. Nothing in the program can mend that; it can say where it stands, and end, for the
scheduler to start it again from the last checkpoint.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

PAUSE = 6
"""How much longer a pause, or the first steps, may take than a silence between two."""
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""


class Watchdog:
    """Watches from a thread of its own that `beat` is called often enough.

    A beat is a moment at which the devices are known to have come as far as a step, not
    at which one was dispatched. It may be `factor` times the usual interval away (the
    median of the last ones), and `least_s` in any case. Evaluations and saves happen
    under `paused`, and may take PAUSE times `least_s`; so may each step before three
    intervals are known, the first of which includes compiling and, with several
    processes, their first exchange.
    """

    def __init__(
        self,
        *,
        factor: float = 20.0,
        least_s: float = 300.0,
        exit_when_hung: bool = False,
        report: Path | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        on_hang: Callable[[int, float], None] = lambda step, waited_s: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Writes the stacks to `report`, or to stderr, and calls `on_hang` with the
        step and the seconds of silence; `exit_when_hung` then ends the process with
        EXIT_CODE. A `least_s` of 0 watches nothing."""
        self.factor = factor
        self.least_s = least_s
        self.exit_when_hung = exit_when_hung
        self.report = report
        self.say = say
        self.on_hang = on_hang
        self.clock = clock
        self._usual_s: deque[float] = deque(maxlen=50)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._step = -1
        self._since: float | None = None
        self._pause = ""
        self._reported = False

    def __enter__(self) -> "Watchdog":
        if self.least_s > 0:
            self._thread = threading.Thread(
                target=self._watch, name="watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, step: int) -> None:
        """Notes that `step` has ended."""
        now = self.clock()
        with self._lock:
            if self._since is not None:
                self._usual_s.append(now - self._since)
            self._step, self._since, self._reported = step, now, False

    @contextlib.contextmanager
    def paused(self, what: str = "a pause") -> Iterator[None]:
        """Expects no beat within, but an end; `what` names it in a report."""
        with self._lock:
            self._since, self._pause = self.clock(), what
        try:
            yield
        finally:
            with self._lock:
                self._since, self._pause = self.clock(), ""
                self._reported = False

    def limit_s(self) -> float:
        """Seconds between two beats to accept by now."""
        if self._pause or len(self._usual_s) < 3:
            return PAUSE * self.least_s
        return max(self.least_s, self.factor * statistics.median(self._usual_s))

    def check(self) -> bool:
        """Reports a hang, once a step; returns whether there is one."""
        with self._lock:
            limit, since, step = self.limit_s(), self._since, self._step
            if since is None or self._reported:
                return False
            waited = self.clock() - since
            if waited <= limit:
                return False
            self._reported = True
            pause = self._pause
            usual = statistics.median(self._usual_s) if self._usual_s else 0.0
        since_what = f"since step {step} ended"
        self.say(
            f"nothing has been heard for {waited:.1f} s "
            + (f"from {pause}, " if pause else f"(usually {usual:.2f} s) ")
            + f"{since_what}: the stacks of all threads are in {self._dump()}"
        )
        self.on_hang(step, waited)
        if self.exit_when_hung:
            self.say(f"exiting with code {EXIT_CODE}: start again to continue")
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        return True

    def _dump(self) -> str:
        if self.report is not None:
            with contextlib.suppress(OSError), self.report.open("a") as file:
                file.write(f"step {self._step}, {time.strftime('%F %T')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                return str(self.report)
        faulthandler.dump_traceback(2, all_threads=True)
        return "stderr"

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.least_s / 4)):
            self.check()
