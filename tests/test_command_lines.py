"""The commands as people type them: help, what they print, how they refuse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(script: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words],
        capture_output=True, text=True, timeout=120, cwd=cwd,
    )  # fmt: skip


def refused(script: str, *words: str, cwd: Path) -> str:
    """Runs a command that must fail; returns its one line on standard error."""
    result = call(script, *words, cwd=cwd)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    "script",
    ["pretrain.py", "generate.py", "prepare_data.py", "export_weights.py",
     "import_weights.py", "inspect_data.py", "evaluate.py"],
)  # fmt: skip
def test_every_flag_has_a_sentence_and_a_default(script):
    result = call(script, "--help")
    assert result.returncode == 0, result.stderr
    # One block a flag: the flag's line, then its sentence with "(default: ...)".
    text = re.sub(r"[│╭╮╰╯─]", " ", result.stdout)
    blocks = re.split(r"\n\s{0,4}(?=--)", text)[1:]
    assert blocks
    for block in blocks:
        words = " ".join(block.split())
        assert re.search(r"\((default:.*|required)\)", words), words
        assert "." in words, words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("demmo",), ["'demmo'", "demo", "k-215m"]),
        (("--data.path", "nowhere"), ["nowhere"]),
        (("--resume",), ["--resume", "runs/demo"]),
        (("--train.batch-size", "9", "--train.accumulate", "2"), ["9", "2"]),
        (("--model.n-kv-heads", "4"), ["n_kv_heads=4", "n_heads=6"]),
        (("--parallel.fsdp", "3"), ["parallel.fsdp=3", "1 device"]),
    ],
)
def test_pretrain_refuses_in_one_line_and_leaves_nothing(words, expected, tmp_path):
    line = refused("pretrain.py", *words, cwd=tmp_path)
    for part in expected:
        assert part in line
    assert not list(tmp_path.rglob("config.json"))


def test_pretrain_names_an_unknown_flag(tmp_path):
    result = call("pretrain.py", "--train.stepz", "5", cwd=tmp_path)
    assert result.returncode != 0
    assert "--train.stepz" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["export_weights.py", "import_weights.py"])
def test_a_mistyped_flag_is_named_in_one_line(script, tmp_path):
    assert "--no-verfy" in refused(script, "x", "--no-verfy", cwd=tmp_path)


PRINTS = """
import sys
sys.path.insert(0, "scripts")
import command_line
command_line.run(lambda: print("\u9053" * 100_000))
"""


def test_a_terminal_that_lacks_a_character_and_a_reader_that_leaves():
    command = f"{sys.executable} -c '{PRINTS}' | head -c 3; echo ${{PIPESTATUS[0]}}"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=environment,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("???141\n", "")


@pytest.mark.parametrize("script", ["generate.py", "export_weights.py"])
def test_readers_of_runs_refuse_what_is_no_run(script, tmp_path):
    assert "nowhere" in refused(script, "nowhere", cwd=tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(b"\x80\x02binary")
    assert "config.json" in refused(script, "run", cwd=tmp_path)


@pytest.mark.parametrize("flag", ["--verify-data", "--data.verify"])
def test_data_is_verified_on_request(flag):
    sys.path.insert(0, str(ROOT / "scripts"))
    import pretrain  # pyright: ignore[reportMissingImports]

    assert pretrain.parse([flag]).data.verify
    assert not pretrain.parse([]).data.verify
