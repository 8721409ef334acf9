"""Files that hold more or less than their names and beginnings say: nothing is lost
without a word, and what cannot be read costs only itself."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from typing import Any

import numpy as np
import pytest
from test_data_prepare import lines_of, quarantine_of, record, texts_in, write_lines

from jaxllm.data import corpus, work
from jaxllm.data.corpus import prepare
from jaxllm.data.sources import find_sources
from jaxllm.data.unpack import LineReader, unpacked

zstandard = pytest.importorskip("zstandard")

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = lines_of(40)
CONTENT = b"".join(record(text) + b"\n" for text in TEXTS)


def prepared(path, out, **options):
    """Prepares one input; gives the texts and what is wrong with it."""
    recipe: Any = {"vocab_size": 300, "val_fraction": 0, "workers": 1} | options
    prepare([path], out, bad_lines=0.6, **recipe)
    quarantine = out / "quarantine.jsonl"
    return texts_in(out)["train"], quarantine_of(out) if quarantine.exists() else []


@pytest.mark.parametrize("packing", PACKERS)
def test_what_follows_a_stream_and_is_none_is_named(tmp_path, packing):
    """bzip2 and xz call it trailing garbage, and would leave the rest out silently."""
    second = bytearray(PACKERS[packing](CONTENT))
    second[0] ^= 1
    path = tmp_path / f"lines.jsonl{packing}"
    path.write_bytes(PACKERS[packing](CONTENT) + second)
    texts, damage = prepared(path, tmp_path / "data")
    assert texts == TEXTS
    assert [entry["line"] for entry in damage] == [len(TEXTS) + 1]
    assert "unreadable from here on" in damage[0]["reason"]


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_zeros_between_streams_are_padding(tmp_path, packing):
    path = tmp_path / f"lines.jsonl{packing}"
    stream = PACKERS[packing](CONTENT)
    path.write_bytes(stream + bytes(512) + stream + bytes(1024))
    assert prepared(path, tmp_path / "data") == (TEXTS * 2, [])


def test_little_zstandard_does_not_become_much_memory_at_once():
    packed = zstandard.ZstdCompressor().compress(bytes(300_000_000))
    read = unpacked(io.BytesIO(packed).read, ".zst")
    sizes = []
    while data := read(1 << 20):
        sizes.append(len(data))
    assert sum(sizes) == 300_000_000
    assert max(sizes) <= 33 << 20


def make_tar(*members):
    whole = io.BytesIO()
    with tarfile.open(
        fileobj=whole, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8"
    ) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return whole.getvalue()


def a_damaged_header(whole, edge):
    return whole[: edge + 2] + b"\xff" + whole[edge + 3 :]


def the_end_at_a_members_edge(whole, edge):
    return whole[:edge]


def two_archives_in_a_row(whole, edge):
    return make_tar(("a.jsonl", CONTENT)) + whole


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (a_damaged_header, "header is damaged"),
        (the_end_at_a_members_edge, "without the mark of its end"),
        (two_archives_in_a_row, "something behind the archive's end"),
    ],
)
def test_an_archive_that_stops_too_soon_is_named(tmp_path, packing, damage, reason):
    """All of these are a good end to tarfile."""
    whole = make_tar(("a.jsonl", CONTENT), ("b.jsonl", CONTENT))
    edge = whole.index(b"b.jsonl")
    assert edge % 512 == 0
    path = tmp_path / f"texts.tar{packing}"
    hurt = damage(whole, edge)
    path.write_bytes(gzip.compress(hurt) if packing else hurt)
    texts, entries = prepared(path, tmp_path / "data")
    assert texts == TEXTS
    assert len(entries) == 1 and reason in entries[0]["reason"]


def test_an_archive_without_any_text_by_its_names_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(make_tar(("part-0000", CONTENT)))
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    texts, (entry,) = prepared(tmp_path, tmp_path / "data")
    assert texts == TEXTS
    assert "part-0000" in entry["reason"]


def test_names_that_are_no_utf8_go_through_quarantine_and_manifest(tmp_path):
    content = CONTENT + b"damaged\n"
    name = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / "a.tar").write_bytes(make_tar((name, content)))
    (tmp_path / name).write_bytes(content)
    texts, entries = prepared(tmp_path, tmp_path / "data")
    assert texts == TEXTS * 2
    assert entries[0]["member"] == name
    assert entries[1]["file"] == str(tmp_path / name)
    again = prepare(
        [tmp_path], tmp_path / "data", vocab_size=300, val_fraction=0, bad_lines=0.6
    )
    assert again.sources[1].path == str(tmp_path / name)


def test_folders_behind_links_are_searched_once(tmp_path):
    real = tmp_path / "elsewhere"
    real.mkdir()
    write_lines(real / "a.jsonl", [record("behind a link")])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(real)
    (folder / "circle").symlink_to(folder)
    (folder / "twice").symlink_to(real)
    (source,) = find_sources([folder])
    assert source.path == str(folder / "link" / "a.jsonl")


def test_a_field_within_an_object_is_named_by_a_path(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            b'{"m": {"text": "inside"}}',
            b'{"m": 3}',
            b'{"m": {"other": 1}}',
            b'{"m.text": "by its own name", "m": {"text": "not this"}}',
        ],
    )
    texts, damage = prepared(path, tmp_path / "data", field="m.text")
    assert texts == ["inside", "by its own name"]
    assert [(e["line"], e["reason"]) for e in damage] == [
        (2, "no field 'm.text'"),
        (3, "no field 'm.text'"),
    ]


def test_a_part_without_the_beginning_of_a_line_does_not_read_to_its_end():
    """Else one line of many GB would be read again for every part of the file."""
    asked = []

    def read(size):
        asked.append(size)
        return b"x" * size

    lines = LineReader(read, 10_000_000)
    lines.skip(10_000_001, give_up=14_000_000)
    assert sum(asked) <= 6_000_000
    assert lines.take(14_000_000, keep=100) == b""
    short = io.BytesIO(b"xxxx\nabc\ndef\n")
    lines = LineReader(short.read, 0)
    lines.skip(2, give_up=7)
    assert lines.take(7, keep=100) == b"abc\n"


# ---- Parquet


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table(columns), path, row_group_size=3, compression="none")
    return path


def strings(*values):
    """A column of strings that nobody checked for being UTF-8."""
    pyarrow = pytest.importorskip("pyarrow")
    ends = pyarrow.array(np.cumsum([0, *map(len, values)]), pyarrow.int32())
    data = pyarrow.py_buffer(b"".join(values))
    return pyarrow.StringArray.from_buffers(len(values), ends.buffers()[1], data)


def test_a_parquet_text_that_is_no_utf8_costs_itself_alone(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=strings(b"one", b"\xff\xfe", b"two"))
    texts, (entry,) = prepared(path, tmp_path / "data")
    assert texts == ["one", "two"]
    assert (entry["line"], entry["reason"]) == (2, "not UTF-8: byte 0xff at 0")


def test_a_parquet_text_is_measured_in_bytes(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["\u4e2d" * 40, "short"])
    texts, (entry,) = prepared(path, tmp_path / "data", line_bytes=100)
    assert texts == ["short"] and entry["reason"] == "text longer than 100 bytes"


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_all_parquet_forms_of_strings_are_text(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    values = pyarrow.array(["one", "two", None, "two"])
    values = (
        values.dictionary_encode()
        if kind == "dictionary"
        else values.cast(getattr(pyarrow, kind)())
    )
    texts, (entry,) = prepared(
        parquet(tmp_path / "a.parquet", text=values), tmp_path / "data"
    )
    assert texts == ["one", "two", "two"] and entry["line"] == 3


def test_a_parquet_column_within_a_struct_is_named_by_a_path(tmp_path):
    rows = [{"text": "one", "n": 1}, None, {"text": "two", "n": 2}]
    path = parquet(tmp_path / "a.parquet", m=rows, text=["not", "these", "here"])
    texts, (entry,) = prepared(path, tmp_path / "data", field="m.text")
    assert texts == ["one", "two"] and entry["line"] == 2
    with pytest.raises(ValueError, match="column 'm.n' of input .* holds int64"):
        prepared(path, tmp_path / "other", field="m.n")
    with pytest.raises(ValueError, match=r"no column 'm': name one of m\.text, m\.n"):
        prepared(path, tmp_path / "other", field="m")


def test_a_damaged_parquet_page_costs_its_row_group_alone(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=TEXTS)
    whole = path.read_bytes()
    at = whole.index(TEXTS[3].encode()[:20])
    path.write_bytes(whole[: at - 12] + b"\xff" * 8 + whole[at - 4 :])
    texts, damage = prepared(path, tmp_path / "data")
    assert texts == TEXTS[:3] + TEXTS[6:]
    assert [entry["line"] for entry in damage] == [4]
    assert "unreadable from here on" in damage[0]["reason"]


# ---- splits and the work folder


@pytest.mark.parametrize("texts", [["same"] * 3 + ["other"], ["same"] * 3, ["one"]])
def test_copies_are_never_on_both_sides_however_few_documents_there_are(
    tmp_path, texts
):
    path = write_lines(tmp_path / "a.jsonl", map(record, texts))
    for seed in range(6):
        out = tmp_path / f"data{seed}"
        prepare([path], out, vocab_size=261, val_fraction=1e-9, seed=seed)
        split = texts_in(out)
        assert not set(split["train"]) & set(split["val"])
        assert sorted(split["train"] + split["val"]) == sorted(texts)
        assert bool(split["val"]) == (len(set(texts)) > 1)


def test_a_run_that_was_killed_after_the_rename_leaves_nothing(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", map(record, TEXTS))

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    monkeypatch.setattr(corpus, "sync_folder", kill)
    with pytest.raises(Killed):
        prepare([path], tmp_path / "data", vocab_size=300)
    monkeypatch.undo()
    assert (tmp_path / ".data.partial").exists()
    prepare([path], tmp_path / "data", vocab_size=300)
    assert not (tmp_path / ".data.partial").exists()


def test_a_process_that_comes_as_the_folder_is_removed_is_not_robbed(
    tmp_path, monkeypatch
):
    """It may open the lock before the first removes it, and lock it afterwards."""
    place = tmp_path / ".data.partial"
    flock, times = work.fcntl.flock, []

    def late(lock, how):
        times.append(1)
        if len(times) == 1:
            work._remove(place)  # what the first process does
        flock(lock, how)

    monkeypatch.setattr(work.fcntl, "flock", late)
    path = write_lines(tmp_path / "a.jsonl", map(record, TEXTS))
    prepare([path], tmp_path / "data", vocab_size=300, val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == TEXTS
    assert len(times) == 2 and not place.exists()


def test_a_result_that_another_process_just_made_is_taken(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", map(record, TEXTS))
    given: Any = {"vocab_size": 300, "val_fraction": 0}
    found, looks = corpus.existing_result, []

    def late(*arguments):
        looks.append(1)
        if len(looks) == 1:
            monkeypatch.setattr(corpus, "existing_result", found)
            prepare([path], tmp_path / "data", **given)
            return None
        return found(*arguments)

    monkeypatch.setattr(corpus, "existing_result", late)
    manifest = prepare([path], tmp_path / "data", **given)
    assert json.loads((tmp_path / "data" / "manifest.json").read_bytes())
    assert manifest.documents("train") == len(TEXTS)
