"""What a run says while it goes: a live line on a terminal, plain lines in a file."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any


class Console:
    """Prints a run's messages and keeps them in train.log.

    On a terminal, log lines update one live line at the bottom; elsewhere (a file, a
    scheduler's log) each is printed. Only process 0 of a run says anything. Nobody has
    to listen: a closed pipe or terminal and a full disk end no run.
    """

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.log: Path | None = None
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> "Console":
        # A text sample may hold letters that the terminal's encoding has not.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        return self

    def __exit__(self, *_) -> None:
        try:
            if self._live is not None:
                self._live.stop()
            print(end="", flush=True)
        except OSError:
            # Else Python would try once more when it ends, and exit with 120.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.stdout.fileno())

    def say(self, text: str) -> None:
        """Prints a message, and logs it."""
        if self.quiet:
            return
        self._keep(text)
        with contextlib.suppress(OSError):
            if self._live is not None:
                # markup=False: a text sample may hold square brackets.
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def progress(self, text: str, *, step: int, total: int) -> None:
        """Shows a log line of step `step` of `total`."""
        if self.quiet:
            return
        self._keep(text)
        with contextlib.suppress(OSError):
            if self._live is None and sys.stdout and sys.stdout.isatty():
                self._start_live(total)
            if self._live is None:
                print(text, flush=True)
            else:
                self._live.update(self._task, completed=step, status=text)

    def _start_live(self, total: int) -> None:
        with contextlib.suppress(ImportError):
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[status]}", markup=False),
            )
            self._task = self._live.add_task("", total=total, status="")
            self._live.start()

    def _keep(self, text: str) -> None:
        if self.log is not None:
            # A log that can't be written must not end a run that can be saved.
            with (
                contextlib.suppress(OSError),
                self.log.open("a", encoding="utf-8") as file,
            ):
                file.write(text + "\n")
