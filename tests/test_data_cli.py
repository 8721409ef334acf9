"""The command lines: every bad input is one clear line, and leaves nothing behind."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data_prepare import lines_of, record, write_lines

ROOT = Path(__file__).parents[1]
POEMS = ROOT.parent / "shared" / "data" / "poems_100k.jsonl.gz"


def run(script, *arguments, cwd, timeout=300):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
    )


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    for word in words:
        assert str(word) in line
    return line


def make(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def a_missing_file(place):
    return ["--input", "nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]


def an_empty_file(place):
    make(place / "empty.jsonl")
    return ["--input", "empty.jsonl"], ["empty.jsonl", "is empty"]


def a_folder_without_text(place):
    make(place / "folder" / "picture.png", b"\x89PNG")
    return ["--input", "folder"], ["folder", "no text", ".jsonl"]


def a_pattern_without_a_match(place):
    return ["--input", "*.nothing"], ["*.nothing", "matches no file"]


def a_json_array(place):
    make(place / "array.json", b'[{"text": "a"}]')
    return ["--input", "array.json"], ["array.json", "JSON array"]


def records_without_the_field(place):
    write_lines(place / "a.jsonl", [b'{"body": "x"}'] * 20)
    return ["--input", "a.jsonl"], ["no documents", "no field 'text'"]


def only_empty_texts(place):
    write_lines(place / "a.jsonl", [b'{"text": ""}'] * 20)
    return ["--input", "a.jsonl"], ["no documents", "empty"]


def too_much_damage(place):
    lines = [record("good")] * 10 + [b"bad"] * 90
    write_lines(place / "a.jsonl", lines)
    return ["--input", "a.jsonl"], ["90 of 100", "--bad-lines", "a.jsonl line 11"]


def a_gzip_that_is_none(place):
    make(place / "a.jsonl.gz", b'{"text": "a"}\n')
    return ["--input", "a.jsonl.gz"], ["no documents", "gzip"]


def a_vocabulary_too_small(place):
    write_lines(place / "a.jsonl", [record("a")])
    return ["--input", "a.jsonl", "--vocab-size", "10"], ["vocab_size=10", "261"]


def a_vocabulary_beyond_memory(place):
    write_lines(place / "a.jsonl", [record("a")])
    words = ["vocab_size=99999999999", "lower it"]
    return ["--input", "a.jsonl", "--vocab-size", "99999999999"], words


def a_sample_that_is_no_number(place):
    write_lines(place / "a.jsonl", [record("a")])
    return ["--input", "a.jsonl", "--sample-mb", "nan"], ["--sample-mb nan"]


def an_unknown_flag(place):
    return ["--input", "a.jsonl", "--vocab", "300"], ["--vocab", "--help"]


def a_tokenizer_that_is_missing(place):
    write_lines(place / "a.jsonl", [record("a")])
    return ["--input", "a.jsonl", "--tokenizer", "t.json"], ["t.json", "not exist"]


def an_out_that_is_something_else(place):
    write_lines(place / "a.jsonl", [record("a")])
    make(place / "data" / "thesis.tex", b"precious")
    return ["--input", "a.jsonl"], ["data", "not empty"]


def an_out_that_is_a_file(place):
    write_lines(place / "a.jsonl", [record("a")])
    make(place / "data", b"precious")
    return ["--input", "a.jsonl"], ["data", "is a file"]


def a_split_out_of_range(place):
    write_lines(place / "a.jsonl", [record("a")])
    return ["--input", "a.jsonl", "--val-fraction", "1"], ["val_fraction=1.0"]


def a_dry_run_without_slurm(place):
    write_lines(place / "a.jsonl", [record("a")])
    return ["--input", "a.jsonl", "--dry-run"], ["--dry-run", "slurm"]


@pytest.mark.parametrize(
    "case",
    [
        a_missing_file,
        an_empty_file,
        a_folder_without_text,
        a_pattern_without_a_match,
        a_json_array,
        records_without_the_field,
        only_empty_texts,
        too_much_damage,
        a_gzip_that_is_none,
        a_vocabulary_too_small,
        a_vocabulary_beyond_memory,
        a_sample_that_is_no_number,
        an_unknown_flag,
        a_tokenizer_that_is_missing,
        an_out_that_is_something_else,
        an_out_that_is_a_file,
        a_split_out_of_range,
        a_dry_run_without_slurm,
    ],
    ids=lambda case: case.__name__,
)
def test_bad_input_is_one_clear_line_and_changes_nothing(tmp_path, case):
    arguments, words = case(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = run("prepare_data.py", *arguments, "--out", "data", cwd=tmp_path)
    refused(done, *words)
    kept = (p for p in tmp_path.rglob("*") if ".data.partial" not in str(p))
    assert {p: p.read_bytes() for p in kept if p.is_file()} == before
    partial = tmp_path / ".data.partial"
    # Only what was done before the budget was known to be exceeded is kept.
    assert partial.exists() == (case is too_much_damage)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_one_clear_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [record("a")])
    (tmp_path / "closed").mkdir(mode=0o500)
    done = run(
        "prepare_data.py", "--input", "a.jsonl", "--out", "closed/data", cwd=tmp_path
    )
    refused(done, "closed")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    lines = list(map(record, lines_of(300)))
    lines[10] = b"{damaged"
    write_lines(place / "a.jsonl", lines)
    (place / "b.jsonl.gz").write_bytes(gzip.compress(record("another file") + b"\n"))
    done = run(
        *("prepare_data.py", "--input", "a.jsonl", "b.jsonl.gz", "--out", "data"),
        *("--vocab-size", 300, "--val-fraction", 0.1),
        cwd=place,
    )
    return place, done


def test_the_summary_tells_what_was_made_and_what_to_do_next(prepared):
    place, done = prepared
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "train: ",
        "val: ",
        "bytes of text a token",
        "quarantined: 1 damaged records of 301, listed in data/quarantine.jsonl",
        "100.0%",
        "next: python scripts/pretrain.py --data.path data --model.vocab-size 300",
    ):
        assert words in done.stdout
    assert sorted(p.name for p in place.iterdir()) == ["a.jsonl", "b.jsonl.gz", "data"]


def test_a_second_call_finds_the_data_there(prepared):
    place, _ = prepared
    done = run(
        *("prepare_data.py", "--input", "a.jsonl", "b.jsonl.gz", "--out", "data"),
        *("--vocab-size", 300, "--val-fraction", 0.1),
        cwd=place,
    )
    assert done.returncode == 0 and "holds this data already" in done.stdout


def test_every_flag_of_the_command_lines_is_explained(tmp_path):
    for script in ("prepare_data.py", "inspect_data.py"):
        done = run(script, "--help", cwd=tmp_path)
        assert done.returncode == 0
        flags = [line for line in done.stdout.splitlines() if line.startswith("│ --")]
        assert len(flags) > 8
        text = " ".join(done.stdout.replace("│", " ").split())
        for flag in flags:
            name = flag.split()[1].rstrip(",")
            after = text.split(f" {name}", 1)[1][:250]
            assert "." in after, f"{script} {name} has no sentence"


def test_inspecting_shows_rows_statistics_and_sources(prepared):
    place, _ = prepared
    done = run(
        *("inspect_data.py", "data", "--seq-len", 16, "--isolate-documents"),
        *("--documents", 1, "--verify", "--histogram", "lengths.png"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "verified: ",
        "301 records read: 1 damaged, 0 empty, 0 dropped as copies",
        "a.jsonl",
        "b.jsonl.gz",
        "document 0:",
        "segment_ids",
        "<|im_",
        "bear loss",
    ):
        assert words in done.stdout
    assert (place / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspecting_what_is_no_data_folder_is_one_clear_line(prepared):
    place, _ = prepared
    refused(run("inspect_data.py", "nowhere", cwd=place), "nowhere", "does not exist")
    refused(run("inspect_data.py", ".", cwd=place), "is not a data folder")
    refused(run("inspect_data.py", "data", "--rows", -1, cwd=place), "--rows -1")
    refused(run("inspect_data.py", "data", "--row", 1, cwd=place), "--row,", "--help")
    words = "inspect_data.py", "data", "--seq-len", 1 << 40
    refused(run(*words, cwd=place), f"--seq-len {1 << 40}")


@pytest.mark.slow
def test_the_poems_or_their_like_keep_every_document_and_byte(tmp_path):
    """The real collection where it is at hand; else generated text of its form."""
    if POEMS.exists():
        source, documents, size = POEMS, 100_000, None
    else:
        rng = np.random.default_rng(0)
        characters = [chr(0x4E00 + i) for i in range(2000)]
        texts = [
            "".join(rng.choice(characters, rng.integers(20, 120))) + "。"
            for _ in range(20_000)
        ]
        source = tmp_path / "poems.jsonl.gz"
        source.write_bytes(gzip.compress(b"\n".join(map(record, texts))))
        documents, size = len(texts), sum(len(text.encode()) for text in texts)
    done = run(
        *("prepare_data.py", "--input", source, "--out", "data"),
        *("--vocab-size", 6144, "--sample-mb", 4),
        cwd=tmp_path,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    from jaxllm.data.corpus import load_manifest

    manifest = load_manifest(tmp_path / "data")
    assert sum(manifest.documents(split) for split in manifest.splits) == documents
    assert manifest.quarantined == 0
    if size is not None:
        assert sum(manifest.text_bytes(split) for split in manifest.splits) == size
