"""Preparing: good records arrive, bad ones are named, nothing is left half done."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.data.corpus import load_manifest, prepare, prepare_demo
from jaxllm.data.shards import index_path, load_tokenizer, verify_hashes
from jaxllm.data.stream import TokenStream


def record(text):
    return orjson.dumps({"text": text})


def lines_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        f"document {i}: " + " ".join(map(str, rng.integers(0, 50, rng.integers(1, 30))))
        for i in range(count)
    ]


def texts_in(folder):
    """All documents of a data folder as text, by split."""
    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(manifest)
    found = {}
    for split, shards in manifest.splits.items():
        found[split] = []
        if shards:
            stream = TokenStream(manifest, split)
            for i in range(stream.n_documents):
                start, end = stream.bounds(i)
                found[split].append(tokenizer.decode(stream.read(start, end - start)))
    return found


def all_texts(folder):
    return sum(texts_in(folder).values(), [])


def quarantine_of(folder):
    path = folder / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def content_of(folder):
    """Every file of a folder, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_lines(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("part_bytes", [1 << 10, 1 << 20])
def test_every_packing_gives_every_document_in_order(tmp_path, packing, part_bytes):
    texts = lines_of(300)
    path = tmp_path / f"corpus.jsonl{packing}"
    path.write_bytes(PACKERS[packing](b"\n".join(map(record, texts))))
    out = tmp_path / "data"
    manifest = prepare(
        [path], out, vocab_size=300, val_fraction=0, part_bytes=part_bytes
    )
    assert texts_in(out)["train"] == texts
    assert manifest.documents("train") == manifest.sources[0].documents == 300
    assert manifest.text_bytes("train") == sum(len(t.encode()) for t in texts)
    assert not manifest.quarantined and not (out / "quarantine.jsonl").exists()


@pytest.mark.parametrize("packing", [".gz", ".zst", ".bz2"])
def test_files_of_several_streams_are_read_to_the_end(tmp_path, packing):
    texts = lines_of(90)
    pack = PACKERS[packing]
    path = tmp_path / f"corpus.jsonl{packing}"
    data = b"".join(record(t) + b"\n" for t in texts)
    path.write_bytes(pack(data[:700]) + pack(data[700:1500]) + pack(data[1500:]))
    prepare([path], tmp_path / "data", vocab_size=300, val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == texts


def add_member(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:bz2", "w:xz"])
def test_members_of_archives_are_read_in_order(tmp_path, mode):
    texts = lines_of(300)
    suffix = mode[2:]
    path = tmp_path / (f"corpus.tar.{suffix}" if suffix else "corpus.tar")
    with tarfile.open(path, mode) as archive:
        add_member(archive, "a.jsonl", b"\n".join(map(record, texts[:100])))
        add_member(archive, "picture.png", b"\x89PNG not text \0\1")
        add_member(archive, "deep/._b.jsonl", b"a file of macOS's own")
        packed = gzip.compress(b"\n".join(map(record, texts[100:200])))
        add_member(archive, "deep/b.jsonl.gz", packed)
        add_member(archive, "deep/c.jsonl", b"\n".join(map(record, texts[200:])))
    prepare([path], tmp_path / "data", vocab_size=300, val_fraction=0, part_bytes=2000)
    assert texts_in(tmp_path / "data")["train"] == texts


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.lists(
        st.one_of(
            st.just(b""),
            st.just(b"\r"),
            st.text("ab\u4e2d", min_size=1, max_size=70).map(record),
            st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")),
        ),
        max_size=40,
    ),
    part_bytes=st.integers(1, 90),
    packing=st.sampled_from(["", ".gz", ".zst"]),
    ended=st.booleans(),
)
def test_parts_of_any_size_see_every_line_once(
    tmp_path_factory, data, part_bytes, packing, ended
):
    """Whatever the parts, the records are those of a plain walk over the lines."""
    from jaxllm.data.reading import plan_units, read_units
    from jaxllm.data.records import Damage, Text, count_lines, read_records
    from jaxllm.data.sources import find_sources

    place = tmp_path_factory.mktemp("parts")
    path = place / f"corpus.jsonl{packing}"
    content = b"\n".join(data) + (b"\n" if ended else b"")
    path.write_bytes(PACKERS[packing](content))
    if not path.stat().st_size or content.lstrip().startswith(b"["):
        return

    def records(size):
        sources = find_sources([path])
        units = plan_units(sources, size)
        options = {"part_bytes": size, "line_bytes": 64, "field": "text"}
        found, before = [], 0
        for part in read_units(sources, units, lambda name: True, **options):
            for segment in part.segments:
                for item in read_records(segment, "text", 64):
                    if isinstance(item, Damage):
                        found.append((before + item.line, item.reason, item.start))
                    elif isinstance(item, Text):
                        found.append(item.text)
                    else:
                        found.append(None)
                before += count_lines(segment)
        return found

    assert records(part_bytes) == records(1 << 20)


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_the_number_of_workers_and_the_parts_of_a_file_change_nothing(
    tmp_path, packing
):
    texts = lines_of(2000)
    path = tmp_path / f"corpus.jsonl{packing}"
    path.write_bytes(PACKERS[packing](b"\n".join(map(record, texts))))
    results = []
    for workers in (1, 3):
        out = tmp_path / f"data{workers}"
        prepare([path], out, vocab_size=300, workers=workers, part_bytes=4000)
        results.append(content_of(out))
    assert results[0] == results[1]


def test_damage_of_every_kind_is_stepped_over_and_named(tmp_path):
    good = lines_of(60)
    bad = {
        5: (b'{"text": "cut off', "not JSON"),
        11: (b'{"text": "\xff\xfe bytes"}', "not UTF-8: byte 0xff"),
        12: (b'{"other": "no text"}', "no field 'text'"),
        20: (b'{"text": 17}', "field 'text' is no string but int"),
        21: (b'{"text": null}', "field 'text' is no string but NoneType"),
        30: (b'"just a string"', "not a JSON object but a str"),
        31: (b"\0" * 100, "null byte"),
        40: (b'{"text": "\0"}', "null byte"),
        45: (b'{"text": "' + b"x" * 3000 + b'"}', "line longer than 2000 bytes"),
        50: (b'{"text": "\\ud800"}', "not JSON"),
        51: (b'{"text": "a"} {"text": "b"}', "not JSON"),
    }
    lines = list(map(record, good))
    for number in sorted(bad):
        lines.insert(number - 1, bad[number][0])
    path = write_lines(tmp_path / "corpus.jsonl", lines)
    for part_bytes in (100, 1 << 20):
        out = tmp_path / f"data{part_bytes}"
        manifest = prepare(
            [path],
            out,
            vocab_size=300,
            bad_lines=0.5,
            line_bytes=2000,
            part_bytes=part_bytes,
            val_fraction=0,
        )
        assert texts_in(out)["train"] == good
        found = quarantine_of(out)
        assert [entry["line"] for entry in found] == sorted(bad)
        for entry in found:
            assert entry["file"] == str(path)
            assert bad[entry["line"]][1] in entry["reason"]
        assert manifest.quarantined == len(bad)
        assert manifest.records == len(lines)
        assert manifest.sources[0].quarantined == len(bad)


def test_blank_lines_marks_and_empty_texts_are_no_damage(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": ""}\n{"text": "two"}'
    )
    manifest = prepare([path], tmp_path / "data", vocab_size=261, val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == ["one", "two"]
    assert (manifest.empty, manifest.quarantined) == (1, 0)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("part_bytes", [9000, 1 << 20])
def test_of_a_truncated_file_the_whole_lines_arrive(tmp_path, packing, part_bytes):
    rng = np.random.default_rng(0)  # random text, that packs badly
    texts = [f"{i} " + rng.bytes(400).hex() for i in range(600)]
    path = tmp_path / f"corpus.jsonl{packing}"
    packed = PACKERS[packing](b"".join(record(t) + b"\n" for t in texts))
    path.write_bytes(packed[: -len(packed) // 4])
    other = write_lines(tmp_path / "whole.jsonl", map(record, ["whole"] * 20))
    out = tmp_path / "data"
    manifest = prepare(
        [path, other], out, vocab_size=300, val_fraction=0, part_bytes=part_bytes
    )
    found = texts_in(out)["train"]
    n = len(found) - 20
    assert found == texts[:n] + ["whole"] * 20
    assert n > 100 or packing == ".bz2"
    (entry,) = quarantine_of(out)
    assert entry["file"] == str(path)
    assert entry["line"] == n + 1
    assert "unreadable from here on" in entry["reason"]
    assert manifest.quarantined == 1


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2"])
def test_of_a_truncated_archive_the_whole_lines_arrive(tmp_path, packing):
    rng = np.random.default_rng(0)
    texts = [f"{i} " + rng.bytes(40).hex() for i in range(400)]
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        add_member(archive, "a.jsonl", b"".join(record(t) + b"\n" for t in texts[:50]))
        add_member(archive, "b.jsonl", b"".join(record(t) + b"\n" for t in texts[50:]))
    packed = PACKERS[packing](whole.getvalue())
    path = tmp_path / f"corpus.tar{packing}"
    path.write_bytes(packed[: len(packed) // 2])
    out = tmp_path / "data"
    if packing == ".bz2":  # one block: nothing of it can be read
        with pytest.raises(ValueError, match="no documents.*all records are damaged"):
            prepare([path], out, vocab_size=300)
        return
    prepare([path], out, vocab_size=300, val_fraction=0)
    found = texts_in(out)["train"]
    assert 50 < len(found) < 350
    assert found == texts[: len(found)]
    (entry,) = quarantine_of(out)
    assert (entry["member"], entry["line"]) == ("b.jsonl", len(found) - 50 + 1)


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_an_archive_that_ends_inside_a_header_is_named(tmp_path, packing):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        add_member(archive, "a.jsonl", b"\n".join(map(record, lines_of(20))))
        second = archive.offset
        add_member(archive, "b.jsonl", record("lost"))
    path = tmp_path / f"corpus.tar{packing}"
    path.write_bytes(PACKERS[packing](whole.getvalue()[: second + 100]))
    prepare([path], tmp_path / "data", vocab_size=300, val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == lines_of(20)
    (entry,) = quarantine_of(tmp_path / "data")
    assert "ends inside a header" in entry["reason"]


def test_a_sparse_member_is_named_and_the_others_arrive(tmp_path):
    path = tmp_path / "corpus.tar"
    with tarfile.open(path, "w") as archive:
        for name, sparse in (("a.jsonl", False), ("b.jsonl", True), ("c.jsonl", False)):
            data = record(name) + b"\n"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if sparse:
                size = str(len(data))
                info.pax_headers = {
                    "GNU.sparse.map": f"0,{size}",
                    "GNU.sparse.size": size,
                }
            archive.addfile(info, io.BytesIO(data))
    prepare([path], tmp_path / "data", vocab_size=300)
    assert sorted(all_texts(tmp_path / "data")) == ["a.jsonl", "c.jsonl"]
    (entry,) = quarantine_of(tmp_path / "data")
    assert entry["member"] == "b.jsonl" and "sparse member" in entry["reason"]


def test_a_flipped_byte_in_a_packed_file_is_named(tmp_path):
    texts = lines_of(500)
    packed = bytearray(gzip.compress(b"\n".join(map(record, texts))))
    packed[-6] ^= 1  # in the checksum: all lines are there, but are they right?
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(packed)
    prepare([path], tmp_path / "data", vocab_size=300)
    (entry,) = quarantine_of(tmp_path / "data")
    assert "CRC" in entry["reason"]


def test_a_budget_stops_a_corpus_that_is_mostly_garbage(tmp_path):
    lines = list(map(record, lines_of(100)))
    lines[10:10] = [b"garbage"] * 150
    path = write_lines(tmp_path / "corpus.jsonl", lines)
    out = tmp_path / "data"
    with pytest.raises(ValueError, match="150 of 250 records are damaged") as caught:
        prepare([path], out, vocab_size=300)
    assert "corpus.jsonl line 11: not JSON" in str(caught.value)
    assert "--bad-lines" in str(caught.value)
    assert not out.exists()
    listed = str(caught.value).split("all are in ")[1].split(";")[0]
    assert Path(listed).read_text().count("\n") == 150
    # What was done is kept: a larger budget only has to merge.
    assert prepare([path], out, vocab_size=300, bad_lines=0.7).quarantined == 150
    assert not (tmp_path / ".data.partial").exists()


@pytest.mark.parametrize(
    ("good", "bad", "budget", "stops"),
    [
        (3, 1, 0.1, False),
        (3, 4, 0.1, True),
        (300, 10, 0.01, False),
        (300, 11, 0.01, True),
        (300, 11, 11, False),
        (300, 12, 11, True),
        (300, 1, 0, True),
        (300, 0, 0, False),
    ],
)
def test_the_budget_is_a_share_or_a_number(tmp_path, good, bad, budget, stops):
    lines = list(map(record, lines_of(good))) + [b"{"] * bad
    path = write_lines(tmp_path / "corpus.jsonl", lines)
    arguments = {"vocab_size": 270, "bad_lines": budget}
    if stops:
        with pytest.raises(ValueError, match=f"{bad} of {good + bad} records"):
            prepare([path], tmp_path / "data", **arguments)
    else:
        made = prepare([path], tmp_path / "data", **arguments)
        assert made.quarantined == bad


def test_adding_a_file_moves_no_document_to_the_other_split(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", map(record, lines_of(500)))
    prepare([first], tmp_path / "one", vocab_size=300, val_fraction=0.1)
    before = {k: set(v) for k, v in texts_in(tmp_path / "one").items()}
    assert 20 < len(before["val"]) < 100
    other = write_lines(tmp_path / "0.jsonl", map(record, lines_of(500, seed=9)))
    prepare([other, first], tmp_path / "two", vocab_size=300, val_fraction=0.1)
    after = {k: set(v) for k, v in texts_in(tmp_path / "two").items()}
    assert before["val"] <= after["val"] and before["train"] <= after["train"]


def test_another_seed_holds_out_other_documents(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(300)))
    held_out = []
    for seed in (0, 1):
        out = tmp_path / f"data{seed}"
        prepare([path], out, vocab_size=300, val_fraction=0.1, seed=seed)
        held_out.append(texts_in(out)["val"])
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_tiny_corpus_has_both_splits(tmp_path, count, seed):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(count, seed)))
    for fraction in (0.001, 0.999):
        out = tmp_path / f"data{fraction}"
        prepare([path], out, vocab_size=270, val_fraction=fraction, seed=seed)
        sizes = {split: len(texts) for split, texts in texts_in(out).items()}
        assert min(sizes.values()) == 1 and sum(sizes.values()) == count


def test_exact_copies_can_be_dropped(tmp_path):
    texts = lines_of(50)
    twice = [*texts, "other", *texts[:20], "other"]
    path = write_lines(tmp_path / "a.jsonl", map(record, twice))
    kept = prepare([path], tmp_path / "kept", vocab_size=300, val_fraction=0.2)
    assert Counter(all_texts(tmp_path / "kept")) == Counter(twice)
    assert kept.duplicates == 0
    prepared = prepare(
        [path], tmp_path / "one", vocab_size=300, val_fraction=0.2, dedup="exact"
    )
    assert Counter(all_texts(tmp_path / "one")) == Counter([*texts, "other"])
    assert prepared.duplicates == 21
    plain = prepare([path], tmp_path / "p", vocab_size=300, val_fraction=0)
    assert plain.documents("train") == len(twice)
    order = prepare(
        [path], tmp_path / "o", vocab_size=300, val_fraction=0, dedup="exact"
    )
    assert order.documents("train") == 51
    assert texts_in(tmp_path / "o")["train"] == [*texts, "other"]


def test_text_files_keep_every_byte_and_long_ones_are_cut_at_blank_lines(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    paragraphs = [f"Paragraph {i}.\r\nsecond line\r\n\r\n" * 20 for i in range(300)]
    long = "\ufeff" + "".join(paragraphs)
    (folder / "long.txt").write_bytes(long.encode())
    (folder / "short.md").write_bytes(b"# short\n\n\n\nwith blank lines\n\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_bytes(b"hidden")
    out = tmp_path / "data"
    prepare([folder], out, vocab_size=300, val_fraction=0)
    found = texts_in(out)["train"]
    assert "".join(found[:-1]) == long[1:]
    assert found[-1] == "# short\n\n\n\nwith blank lines\n\n"
    assert len(found) > 5
    assert all(text.endswith("\r\n\r\n") for text in found[:-1])


def test_a_text_file_with_bad_bytes_is_quarantined_not_mangled(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"line one\ncaf\xe9\n")
    (tmp_path / "good.txt").write_bytes(b"good text\n")
    (tmp_path / "more.txt").write_bytes(b"more text\n")
    prepare([str(tmp_path / "*.txt")], tmp_path / "data", vocab_size=270)
    assert sorted(all_texts(tmp_path / "data")) == ["good text\n", "more text\n"]
    (entry,) = quarantine_of(tmp_path / "data")
    assert entry["file"].endswith("latin.txt") and entry["line"] == 2
    assert "0xe9" in entry["reason"]


def test_many_small_files_are_one_part(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(f"document {i}\n")
    parts = []
    from jaxllm.data import parts as module

    original = module._tokenize
    module._tokenize = lambda part, *rest: parts.append(part) or original(part, *rest)
    try:
        prepare([folder], tmp_path / "data", vocab_size=270, val_fraction=0)
    finally:
        module._tokenize = original
    assert len(parts) == 1
    expected = [f"document {i}\n" for i in range(200)]
    assert texts_in(tmp_path / "data")["train"] == expected


def test_another_field_can_hold_the_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"body": "yes", "text": "no"}'] * 3)
    prepare([path], tmp_path / "data", vocab_size=261, field="body", val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == ["yes"] * 3


def test_parquet_columns_are_read_row_group_by_row_group(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = lines_of(250)
    values = [*texts[:100], None, *texts[100:]]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": values, "n": range(251)})
    parquet.write_table(table, path, row_group_size=60)
    prepare([path], tmp_path / "data", vocab_size=300, field="body", val_fraction=0)
    assert texts_in(tmp_path / "data")["train"] == texts
    (entry,) = quarantine_of(tmp_path / "data")
    assert entry["line"] == 101
    with pytest.raises(ValueError, match="has no column 'text'.*body, n"):
        prepare([path], tmp_path / "other", vocab_size=300)


def test_the_tokenizer_sees_all_of_the_corpus_evenly(tmp_path):
    """Two halves of different letters: a sample from the start would miss one."""
    lines = [record("abab " * 40)] * 2000 + [record("xyxy " * 40)] * 2000
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    plain = write_lines(tmp_path / "plain.jsonl", lines)
    for i, source in enumerate((path, plain)):
        out = tmp_path / f"data{i}"
        prepare([source], out, vocab_size=265, sample_bytes=20_000, part_bytes=100_000)
        tokenizer = load_tokenizer(load_manifest(out))
        assert len(tokenizer.encode("abab")) < 4
        assert len(tokenizer.encode("xyxy")) < 4


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    first = prepare([path], tmp_path / "one", vocab_size=280)
    second = prepare([path], tmp_path / "two", tokenizer=tmp_path / "one")
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert second.splits == first.splits


def test_more_than_65536_ids_are_stored_in_32_bits(tmp_path):
    from jaxllm.data.shards import token_dtype

    assert token_dtype(1 << 16) == "uint16"
    assert token_dtype((1 << 16) + 1) == "uint32"
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    prepare([path], tmp_path / "one", vocab_size=280, val_fraction=0)
    from jaxllm.data.tokenizer import Tokenizer

    inner = Tokenizer.load(tmp_path / "one").inner
    inner.add_tokens([f"<{i}>" for i in range(70_000)])
    inner.save(str(tmp_path / "big.json"))
    big = prepare(
        [path], tmp_path / "two", tokenizer=tmp_path / "big.json", val_fraction=0
    )
    assert big.dtype == "uint32" and big.vocab_size > 70_000
    assert texts_in(tmp_path / "two") == texts_in(tmp_path / "one")


def test_the_same_call_again_returns_what_is_there(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    first = prepare([path], tmp_path / "data", vocab_size=280)
    before = (tmp_path / "data/manifest.json").stat().st_mtime_ns
    assert prepare([path], tmp_path / "data", vocab_size=280) == first
    assert (tmp_path / "data/manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["content", "options", "inputs"])
def test_another_data_set_is_never_overwritten(tmp_path, change):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    prepare([path], tmp_path / "data", vocab_size=280)
    before = content_of(tmp_path / "data")
    options: dict = {"vocab_size": 280}
    inputs = [path]
    if change == "content":
        path.write_bytes(path.read_bytes().replace(b"document 7", b"document 8"))
    elif change == "options":
        options["val_fraction"] = 0.5
    else:
        inputs.append(write_lines(tmp_path / "b.jsonl", [record("more")]))
    with pytest.raises(ValueError, match="holds another data set"):
        prepare(inputs, tmp_path / "data", **options)
    assert content_of(tmp_path / "data") == before


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    from jaxllm.data import corpus

    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    run = corpus._run

    def run_and_change(*args):
        run(*args)
        path.write_bytes(path.read_bytes() + record("late"))

    monkeypatch.setattr(corpus, "_run", run_and_change)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read"):
        prepare([path], tmp_path / "data", vocab_size=280)
    assert not (tmp_path / "data").exists()


def test_two_processes_do_not_prepare_the_same_folder(tmp_path):
    import fcntl

    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(40)))
    (tmp_path / ".data.partial").mkdir()
    with open(tmp_path / ".data.partial/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare([path], tmp_path / "data", vocab_size=280)
    prepare([path], tmp_path / "data", vocab_size=280)


@pytest.fixture
def made(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", map(record, lines_of(200)))
    prepare([path], tmp_path / "data", vocab_size=280, val_fraction=0.2)
    return tmp_path / "data"


def test_an_untouched_folder_verifies(made):
    manifest = load_manifest(made)
    stored = sum(p.stat().st_size for p in made.rglob("*.ds*"))
    assert verify_hashes(manifest) == stored


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("index", [False, True])
def test_a_flipped_bit_in_a_shard_is_found_by_its_hash(made, split, index):
    path = made / split / "00000.ds"
    path = index_path(path) if index else path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    manifest = load_manifest(made)
    with pytest.raises(ValueError, match="is damaged: its sha256") as caught:
        verify_hashes(manifest)
    assert str(path) in str(caught.value)


def test_a_shard_of_another_size_is_refused(made):
    path = made / "train" / "00000.ds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"has {size - 2} bytes.*says {size}"):
        load_manifest(made)
    path.unlink()
    with pytest.raises(ValueError, match="00000.ds is missing"):
        load_manifest(made)


def test_another_tokenizer_in_the_folder_is_refused(made, tmp_path):
    path = write_lines(tmp_path / "b.jsonl", map(record, lines_of(50, seed=4)))
    prepare([path], tmp_path / "other", vocab_size=270)
    other = (tmp_path / "other/tokenizer.json").read_bytes()
    (made / "tokenizer.json").write_bytes(other)
    with pytest.raises(ValueError, match="is not the tokenizer that made these"):
        load_manifest(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"tokens"', '"tokenz"', 1),
        lambda text: text.replace('"train"', '"training"'),
        lambda text: text.replace("uint16", "uint17"),
        lambda text: text.replace('"version": 1', '"version": 99'),
    ],
)
def test_a_damaged_manifest_is_refused(made, change):
    path = made / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match="manifest.json (is damaged|has format vers)"):
        load_manifest(made)


def test_a_folder_without_manifest_is_no_data_folder(tmp_path):
    with pytest.raises(ValueError, match="does not exist.*prepare_data.py"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a data folder"):
        load_manifest(tmp_path)


def test_the_demo_corpus_is_python_source_and_the_same_twice(tmp_path):
    first = prepare_demo(tmp_path / "one", vocab_size=400, max_bytes=300_000)
    prepare_demo(tmp_path / "two", vocab_size=400, max_bytes=300_000)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert 200_000 < first.text_bytes("train") + first.text_bytes("val") <= 300_000
    assert first.documents("val") >= 1 and first.quarantined == 0
    assert any("def " in text for text in all_texts(tmp_path / "one"))
