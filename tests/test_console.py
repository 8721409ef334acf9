"""Nobody has to listen to a run: what takes no more text ends nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TALK = """
import sys
from pathlib import Path
from jaxllm.train.console import Console
with Console() as console:
    console.log = Path(sys.argv[1])
    for step in range(3):
        console.say("\\u4e2d" * 5000)
        console.progress("y" * 5000, step=step, total=3)
"""


@pytest.mark.parametrize("where", ["a full disk", "a closed pipe", "a closed file"])
def test_output_that_nothing_takes_ends_no_run(where, tmp_path):
    log = tmp_path / "train.log"
    command = [sys.executable, "-c", TALK, str(log)]
    if where == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        heard, out = os.pipe()
        os.close(heard)
    if where == "a closed file":
        command = ["sh", "-c", 'exec "$0" "$@" >&-', *command]
    done = subprocess.run(
        command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=100,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    os.close(out)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(log.read_text(encoding="utf-8")) == 6 * 5001


def test_letters_that_a_terminal_has_not_are_written_otherwise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TALK, str(tmp_path / "train.log")],
        capture_output=True, timeout=100, cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u4e2d" in done.stdout
