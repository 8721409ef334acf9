"""What commands share: a user's mistake ends in one line and a non-zero exit code."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def parse(kind: type[T], **options: Any) -> T:
    """Reads the command line into the dataclass `kind` by tyro.

    A mistake is said in one line instead of tyro's box, so that a log keeps it whole.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        # A title line, the message, and references to help texts, all in a box.
        _, *lines = re.sub(r"[─-╿]", " ", said.getvalue()).strip().splitlines()
        message = " ".join(" ".join(lines).split())
        message = re.split(r"(?:Argument|For full) helptext", message)[0].strip()
        message = re.sub(r"^Error parsing [\w.]+: ", "", message)
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Runs a command; errors that a user can mend become one line and exit code 2."""
    # A terminal that lacks a character shows another instead of ending the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does: so does the command.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):  # where nobody listens the code still counts
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", 2))  # 74: checkpoints cannot be saved
    except KeyboardInterrupt:
        sys.exit(130)
