"""The commands as people type them: help, what they print, how they refuse."""

import io
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
command_line, plan, pretrain = map(import_module, ("command_line", "plan", "pretrain"))


def call(script: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words],
        capture_output=True, text=True, timeout=120, cwd=cwd,
    )  # fmt: skip


def refused(script: str, *words: str, cwd: Path = ROOT) -> str:
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.stepz", "5"], "--train.stepz, 5; is it --train.steps or"),
        (["--train.steps", "1e3"], "--train.steps: no whole number: '1e3' (see"),
        (["--train.steps", "-1"], "error: train.steps=-1 must be an integer >= 0"),
        (["--train.steps", str(1 << 31)], "=2147483648 must be at most 2147483647"),
        (["--resume", "--fresh"], "error: --resume and --fresh contradict"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_flag_that_is_wrong_is_named(words, said, encoding, monkeypatch, capsys):
    # tyro draws its box with the characters that the terminal has.
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="2"):
        pretrain.parse(words)
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and "--- " not in line


def test_what_must_be_given_is_named():
    assert "error: --input and --out must be given" in refused("prepare_data.py")
    assert "error: PATH must be given" in refused("inspect_data.py")


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
    assert pretrain.parse([flag]).data.verify
    assert not pretrain.parse([]).data.verify


def test_help_breaks_sentences_only_where_lines_end(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        pretrain.parse(["--help"])
    # The docstring in config.py has a line's end within these words.
    assert "unfinished run with the same configuration" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["plan.py", "scaling.py"])
def test_commands_of_developers_answer_in_one_line(script):
    said = call(script, "--help")
    assert said.returncode == 0 and f"python scripts/{script}" in said.stdout
    assert "--bogus" in refused(script, "--bogus")
