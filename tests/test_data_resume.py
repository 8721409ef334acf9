"""Preparing can be killed at any moment, anywhere, and gives the same bytes."""

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_data_prepare import content_of, lines_of, record, texts_in, write_lines

from jaxllm.data.corpus import prepare
from jaxllm.data.executors import LocalExecutor, TokenizeParts

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"

PROGRAM = """
import sys
from jaxllm.data.corpus import prepare

if __name__ == "__main__":
    prepare(
        sys.argv[3:],
        sys.argv[1],
        vocab_size=400,
        val_fraction=0.1,
        dedup="exact",
        part_bytes=20_000,
        shard_tokens=60_000,
        workers=int(sys.argv[2]),
    )
"""


@pytest.fixture
def corpus(tmp_path):
    import gzip

    lines = list(map(record, lines_of(3000)))
    lines[100:100] = [b"damaged"] * 30
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\n".join(lines)))
    plain = write_lines(tmp_path / "plain.jsonl", map(record, lines_of(3000, seed=1)))
    text = tmp_path / "text.txt"
    text.write_text("some text\n\n" * 9000)
    return [packed, plain, text]


def start(tmp_path, out, corpus, workers):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, program, out, str(workers), *corpus],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill_main(process):
    """Kills the process alone: its workers have to notice, and let go of its output."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_killed_at_random_moments_it_gives_the_bytes_of_an_uninterrupted_run(
    tmp_path, corpus
):
    began = time.monotonic()
    process = start(tmp_path, tmp_path / "whole", corpus, 1)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed.decode()
    length = time.monotonic() - began
    expected = content_of(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("train/")]) > 2

    draw = random.Random(0)
    out = tmp_path / "killed"
    kills = 0
    finished = False
    while kills < 20:
        process = start(tmp_path, out, corpus, 1 + kills % 2)
        try:
            process.wait(draw.uniform(0.2, 1.0) * length)
        except subprocess.TimeoutExpired:
            kill_main(process)
            kills += 1
            # The folder is there whole, or not at all.
            if out.exists():
                assert content_of(out) == expected
        else:
            printed, _ = process.communicate()
            assert process.returncode == 0, printed.decode()
            assert content_of(out) == expected
            finished = True
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
    assert finished or kills == 20
    printed, _ = start(tmp_path, out, corpus, 2).communicate()
    assert content_of(out) == expected, printed.decode()
    assert not (tmp_path / ".killed.partial").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 7, 20])
def test_finished_parts_are_kept_and_the_rest_is_done_anew(
    tmp_path, corpus, monkeypatch, after
):
    """Stopped after some writes to disk, whichever file they are of."""
    from jaxllm.data import parts

    options: dict = {"vocab_size": 300, "part_bytes": 20_000, "workers": 1}
    prepare(corpus, tmp_path / "whole", **options)

    write, writes = parts.write_atomically, []

    def stopping(path, data):
        if len(writes) == after * 3 + 1:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise Killed
        writes.append(path.name)
        write(path, data)

    monkeypatch.setattr(parts, "write_atomically", stopping)
    with pytest.raises(Killed):
        prepare(corpus, tmp_path / "data", **options)
    monkeypatch.undo()
    assert not (tmp_path / "data").exists()
    again = []

    def counting(path, data):
        again.append(path.name)
        write(path, data)

    monkeypatch.setattr(parts, "write_atomically", counting)
    prepare(corpus, tmp_path / "data", **options)
    assert content_of(tmp_path / "data") == content_of(tmp_path / "whole")
    done = {name for name in writes if name.count("-") == 2 and ".json" in name}
    # The plan, three hashes and the end of the packed file are writes of their own.
    assert after - 2 <= len(done) <= after
    assert not done & set(again), "a finished part was done again"


def test_other_inputs_begin_anew(tmp_path, corpus, monkeypatch):
    from jaxllm.data import corpus as module

    def stop(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(module, "merge", stop)
    with pytest.raises(Killed):
        prepare(corpus, tmp_path / "data", vocab_size=300, workers=1)
    monkeypatch.undo()
    prepare(corpus[1:2], tmp_path / "data", vocab_size=300, val_fraction=0, workers=1)
    assert texts_in(tmp_path / "data")["train"] == lines_of(3000, seed=1)


class _Suicide(TokenizeParts):
    def run(self, data=None, rank=0, world_size=1):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_run_with_a_clear_error(tmp_path):
    executor = LocalExecutor(
        pipeline=[_Suicide(tmp_path, "run")],
        tasks=2,
        workers=2,
        logging_dir=str(tmp_path / "logs"),
        skip_completed=False,
    )
    with pytest.raises(ValueError, match="worker process was killed.*--workers"):
        executor.run()


FAKE_SLURM = {
    # Runs each task of the array at once, as Slurm would on its nodes.
    "sbatch": """
        #!/bin/bash
        script="${@: -1}"
        echo "$@" >> "$FAKE_SLURM_LOG"
        export SLURM_NODELIST=node SLURM_JOB_ID=7
        if grep -q -- "#SBATCH --array" "$script"; then
            last=$(sed -n 's/#SBATCH --array=0-//p' "$script")
            for i in $(seq 0 "$last"); do
                SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$FAKE_SLURM_LOG" 2>&1
            done
        else
            bash "$script" >> "$FAKE_SLURM_LOG" 2>&1
        fi
        echo "Submitted batch job 7"
    """,
    "srun": """
        #!/bin/bash
        while [ "${1:0:1}" = "-" ]; do
            [ "$1" = "-n" ] && shift
            shift
        done
        exec "$@"
    """,
    "scontrol": """
        #!/bin/bash
        echo node
    """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    place = tmp_path / "bin"
    place.mkdir()
    for name, script in FAKE_SLURM.items():
        path = place / name
        path.write_text(textwrap.dedent(script).lstrip())
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "slurm.log"
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM_LOG", str(log))
    return log


def run_script(*arguments, cwd):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.slow
def test_slurm_gives_the_bytes_of_a_local_run(tmp_path, corpus, slurm):
    inputs = ["--input", *(path.name for path in corpus), "--vocab-size", 400]
    local = run_script(*inputs, "--out", "local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    done = run_script(
        *inputs, "--out", "far", "--executor", "slurm", "--workers", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    log = slurm.read_text()
    assert "--dependency=afterany:7" in log
    assert log.count("launch_pickled_pipeline") >= 2
    assert content_of(tmp_path / "far") == content_of(tmp_path / "local"), log


def test_a_dry_run_prints_the_jobs_and_does_nothing(tmp_path, corpus, slurm):
    before = sorted(tmp_path.rglob("*"))
    done = run_script(
        *("--input", corpus[0], "--out", tmp_path / "data", "--executor", "slurm"),
        *("--workers", 12, "--partition", "batch", "--dry-run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-11" in done.stdout
    assert "#SBATCH --partition=batch" in done.stdout
    assert "launch_pickled_pipeline" in done.stdout
    assert "--executor local --workers 1" in done.stdout
    assert "--dry-run" not in done.stdout  # the merging job is to do something
    assert sorted(tmp_path.rglob("*")) == before


def test_slurm_without_sbatch_is_refused(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = run_script(
        *("--input", corpus[0], "--out", "data", "--executor", "slurm"), cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "sbatch" in done.stderr


@pytest.mark.slow
def test_ray_gives_the_bytes_of_a_local_run(tmp_path, corpus):
    pytest.importorskip("ray")
    inputs = ["--input", *(path.name for path in corpus), "--vocab-size", 400]
    assert run_script(*inputs, "--out", "local", cwd=tmp_path).returncode == 0
    done = run_script(
        *inputs, "--out", "ray", "--executor", "ray", "--workers", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert content_of(tmp_path / "ray") == content_of(tmp_path / "local")
