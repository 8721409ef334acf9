"""Ten thousand lines with one in a hundred damaged in every way, at full size."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_data_prepare import all_texts, lines_of, quarantine_of, record

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"

KINDS = {
    "bad JSON": lambda text: record(text)[:-7],
    "bad UTF-8": lambda text: b'{"text": "' + text.encode() + b'\xc3\x28"}',
    "missing field": lambda text: json.dumps({"txt": text}).encode(),
    "no string": lambda text: json.dumps({"text": [text]}).encode(),
    "null bytes": lambda text: record(text)[:9] + b"\0\0\0" + record(text)[9:],
}
REASONS = {
    "bad JSON": "not JSON",
    "bad UTF-8": "not UTF-8",
    "missing field": "no field 'text'",
    "no string": "is no string but list",
    "null bytes": "null byte",
    "200 MB": "line longer than",
}
LONG = 200_000_000


# Says how much memory the largest of the processes took, in KiB.
WATCHED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", WATCHED, sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def write_damaged(path, texts):
    """Writes the lines, one in a hundred damaged in each way, and one of 200 MB.

    Gives the good texts and what is wrong with each damaged line by its number.
    """
    rng = np.random.default_rng(0)
    hurt = rng.permutation(len(texts))
    share = len(texts) // 100
    kind_of = {}
    for i, kind in enumerate(KINDS):
        kind_of |= dict.fromkeys(hurt[i * share : (i + 1) * share].tolist(), kind)
    long_at = 5000
    good, bad = [], {}
    with open(path, "wb") as file:
        number = 0
        for i, text in enumerate(texts):
            if i == long_at:
                number += 1
                bad[number] = "200 MB"
                file.write(b'{"text": "')
                for _ in range(LONG // 1_000_000):
                    file.write(b"x" * 1_000_000)
                file.write(b'"}\n')
            number += 1
            if i in kind_of:
                bad[number] = kind_of[i]
                file.write(KINDS[kind_of[i]](text) + b"\n")
            else:
                good.append(text)
                file.write(record(text) + b"\n")
    return good, bad


@pytest.mark.slow
def test_all_good_lines_arrive_and_all_bad_ones_are_listed(tmp_path):
    good, bad = write_damaged(tmp_path / "lines.jsonl", lines_of(10_000))
    rest = lines_of(2_000, seed=5)
    packed = gzip.compress(b"".join(record(t) + b"\n" for t in rest))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) * 3 // 4])
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        content = b"".join(record(t) + b"\n" for t in lines_of(3_000, seed=6))
        info = tarfile.TarInfo("member.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    (tmp_path / "cut.tar.gz").write_bytes(whole.getvalue()[: whole.tell() * 3 // 4])
    inputs = ["--input", "lines.jsonl", "cut.jsonl.gz", "cut.tar.gz"]
    arguments = ["--vocab-size", 1000, "--workers", 2]

    done = run(*inputs, "--out", "data", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"quarantined: {len(bad) + 2:,} damaged records" in done.stdout

    entries = quarantine_of(tmp_path / "data")
    named = {e["line"]: e for e in entries if e["file"] == "lines.jsonl"}
    assert sorted(named) == sorted(bad)
    for number, kind in bad.items():
        assert REASONS[kind] in named[number]["reason"], (number, kind)

    found = all_texts(tmp_path / "data")
    from_gzip = [t for t in rest if t in set(found) - set(good)]
    (cut,) = (e for e in entries if e["file"] == "cut.jsonl.gz")
    assert from_gzip == rest[: cut["line"] - 1] and len(from_gzip) > 1000
    (cut,) = (e for e in entries if e["file"] == "cut.tar.gz")
    member = lines_of(3_000, seed=6)[: cut["line"] - 1]
    assert cut["member"] == "member.jsonl" and len(member) > 1500
    assert sorted(found) == sorted(good + from_gzip + member)

    # A budget below the damage stops it, with one line and nothing at the place.
    strict = run(
        *inputs, "--out", "strict", *arguments, "--bad-lines", 0.01, cwd=tmp_path
    )
    assert strict.returncode == 2
    assert strict.stderr.count("\n") == 1 and "--bad-lines 0.01" in strict.stderr
    assert not (tmp_path / "strict").exists()
    for run_of in (done, strict):
        peak = int(run_of.stdout.split()[-1]) * 1024
        assert peak < LONG, f"{peak:,} bytes: was the long line held?"
