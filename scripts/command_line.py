"""What commands share: a user's mistake ends in one line and a non-zero exit code."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help keeps its lines and whose errors are one line."""

    def __init__(self, **options: Any):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(kind: type[T], *, args: Sequence[str] | None = None, **options: Any) -> T:
    """Reads the command line into the dataclass `kind` by tyro.

    A mistake is said in one line instead of tyro's box, so that a log keeps it whole.
    """
    import tyro

    words = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help"} & set(words):
        _join_lines(kind)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, **options)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        print(f"error: {_one_line(said.getvalue())} (see --help)", file=sys.stderr)
        sys.exit(2)


def _one_line(box: str) -> str:
    """The message in tyro's box: a title line, the message, references to help texts.
    The box is drawn with ASCII where the terminal has no other characters."""
    lines = [re.sub(r"^ *[│|]|[│|] *$", " ", line) for line in box.splitlines()]
    _, *lines = [line for line in lines if line.strip(" ─╭╮╰╯+-")]
    # Flags stand four places to the right of a line that ends in a colon, and their
    # sentences further to the right.
    inner = len(lines[0]) - len(lines[0].lstrip()) + 4
    flags = [line.split()[0] for line in lines if re.match(rf" {{{inner}}}[\w-]", line)]
    message = " ".join(" ".join(lines).split())
    message = re.split(r"(?:Argument|For full) helptext", message)[0].strip()
    if message.startswith("Missing from"):
        return f"{' and '.join(f for f in flags if '/' not in f)} must be given"
    message, _, meant = message.partition(" Perhaps you meant:")
    message += f"; is it {' or '.join(flags)}?" if meant else ""
    message = re.sub(r"^(Error parsing )?([A-Za-z][\w.]*: )?", "", message)
    message = re.sub(r"invalid literal for int.*: ", "no whole number: ", message)
    return message.replace("could not convert string to float", "no number")


def _join_lines(kind: Any) -> None:
    """Gives tyro the sentences of a dataclass's fields in one line each: of those that
    go on in a second line it keeps the break, in the middle of the help's lines."""
    import docstring_parser  # comes with tyro

    found = docstring_parser.parse_from_object(kind).params
    texts = {one.arg_name: one.description or "" for one in found}
    for field in dataclasses.fields(kind):
        text = " ".join(texts.get(field.name, "").split())
        if dataclasses.is_dataclass(field.type):
            _join_lines(field.type)
        elif text:
            field.metadata = {"help": text}  # type: ignore[assignment]


def compute_changes(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Reads NAME=VALUE pairs that name fields of the compute configuration.

    Raises: ValueError for a pair that does not, or whose number is none.
    """
    from jaxllm.config import ComputeConfig

    kinds = {field.name: field.type for field in dataclasses.fields(ComputeConfig)}
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not value or name not in kinds:
            raise ValueError(
                f"{flag} {pair}: write NAME=VALUE, NAME one of {', '.join(kinds)}"
            )
        try:
            changes[name] = int(value) if kinds[name] is int else value
        except ValueError:
            raise ValueError(f"{flag} {pair}: {name} is a whole number") from None
    return changes


def call(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit code, which is what it returns, or 0; errors
    that a user can mend become one line and exit code 2, or the error's own."""
    # A terminal that lacks a character shows another instead of ending the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does: so does the command.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return getattr(error, "exit_code", 2)  # 74: checkpoints cannot be saved
    except MemoryError as error:
        said = str(error) or "no more to be had"
        _say(f"error: out of memory: {said}; ask for less at once")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # where nobody listens the code still counts
        print(line, file=sys.stderr, flush=True)


def run(command: Callable[[], object]) -> NoReturn:
    """Runs a command as `call` does, and ends the process."""
    sys.exit(call(command))
