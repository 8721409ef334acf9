"""A packed file is read by one worker, tokenised by all; garbage ends a run early."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_data_prepare import content_of, lines_of, quarantine_of, record, write_lines

from jaxllm.data import parts, progress
from jaxllm.data.budget import Budget
from jaxllm.data.corpus import prepare
from jaxllm.data.merging import FinishedPart, write_quarantine
from jaxllm.data.parts import Options, Plan
from jaxllm.data.reading import Part, Segment
from jaxllm.data.sources import find_sources
from jaxllm.data.spool import _SILENCE_S, Reader, Spool


def part(name, data=b"line\n"):
    return Part(name, [Segment(3, "member", "lines", data, damage="cut")], 17)


def test_a_part_goes_through_the_spool_as_it_is_and_to_one_taker(tmp_path):
    spool = Spool(tmp_path, room=20)
    data = {f"{i:07d}": b'{"text":\n\0\xff' * i for i in range(20)}
    for name, content in data.items():
        assert spool.offer(part(name, content))
    assert not spool.offer(part("one more"))

    def take(_):
        return Spool(tmp_path, room=20).take()

    with ThreadPoolExecutor(8) as pool:
        taken = [p for p in pool.map(take, range(40)) if p is not None]
    assert len(taken) == 20
    assert {p.name: p for p in taken} == {n: part(n, c) for n, c in data.items()}


def test_a_lone_worker_has_no_spool(tmp_path):
    spool = Spool(tmp_path / "spool", room=0)
    assert not spool.offer(part("0")) and spool.take() is None
    assert not (tmp_path / "spool").exists()


def test_a_reader_is_given_up_after_silence_only(tmp_path):
    now = 0.0
    claim = tmp_path / "0.stream"
    claim.touch()
    reader = Reader(claim, clock=lambda: now)
    for _ in range(5):
        reader.beat()
        now += 0.9 * _SILENCE_S
        assert not reader.has_ended()
    now += 1.1 * _SILENCE_S
    assert reader.has_ended()


@pytest.fixture
def packed(tmp_path):
    lines = list(map(record, lines_of(3000)))
    lines[100:100] = [b"damaged"] * 30
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    plain = write_lines(tmp_path / "plain.jsonl", map(record, lines_of(500, seed=1)))
    return [path, plain]


OPTIONS: dict = {"vocab_size": 300, "part_bytes": 10_000}


def test_workers_share_the_parts_of_a_packed_file_that_one_of_them_reads(
    tmp_path, packed, monkeypatch
):
    """Threads stand for the workers, so that what they do can be counted."""
    prepare(packed, tmp_path / "alone", workers=1, **OPTIONS)
    opened, done = [], []

    def counted(source, *rest):
        opened.append(source.path)
        return stream(source, *rest)

    from jaxllm.data import corpus, reading

    stream = reading._stream_parts

    def crew(work, run, plan, workers, executor):
        def worker(number):
            names = [c["text_bytes"] for c in parts.tokenize_parts(work, run, 4)]
            done.append(len(names))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(worker, range(4)))

    monkeypatch.setattr(corpus, "_run", crew)
    given = tmp_path / "alone" / "tokenizer.json"
    monkeypatch.setattr(reading, "_stream_parts", counted)
    prepare(packed, tmp_path / "together", tokenizer=given, **OPTIONS)
    assert opened == [str(packed[0])]
    expected = content_of(tmp_path / "alone")
    found = content_of(tmp_path / "together")
    assert all(found[n] == expected[n] for n in expected if n != "manifest.json")
    # Whoever reads, others had parts to do.
    assert sum(done) > 20 and sorted(done)[-2] > 0


def test_a_reader_that_fails_lets_the_others_go(tmp_path, packed, monkeypatch):
    from jaxllm.data import corpus

    ends = []

    def crew(work, run, plan, workers, executor):
        def failing(self, part):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Spool, "offer", failing)
        with pytest.raises(OSError, match="No space"):
            list(parts.tokenize_parts(work, run, 2))
        monkeypatch.undo()
        ends.append(len(list(parts.tokenize_parts(work, run, 2))))

    monkeypatch.setattr(corpus, "_run", crew)
    with pytest.raises(ValueError, match="not finished"):
        prepare(packed, tmp_path / "data", **OPTIONS)
    plain = packed[1].stat().st_size // OPTIONS["part_bytes"] + 1
    assert ends == [plain]
    prepare(packed, tmp_path / "data", workers=1, **OPTIONS)


def test_a_worker_that_fails_stops_the_others(tmp_path, packed, monkeypatch):
    from jaxllm.data import corpus
    from jaxllm.data.executors import TokenizeParts

    left = []

    def crew(work, run, plan, workers, executor):
        def failing(path, *made):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(parts, "_save", failing)
        with pytest.raises(OSError, match="No space"):
            TokenizeParts(work, run).run()
        monkeypatch.undo()
        left.extend(parts.tokenize_parts(work, run, 2))

    monkeypatch.setattr(corpus, "_run", crew)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(ValueError, match="not finished"):
        prepare(packed, tmp_path / "data", **OPTIONS)
    assert not left


@pytest.mark.parametrize(
    ("bad_lines", "damaged", "records", "share", "hopeless"),
    [
        (0.1, 2000, 2000, 0.05, False),  # the rest may be good
        (0.1, 2000, 2000, 0.15, True),
        (0.1, 2000, 2000, 0.0, False),
        (0.1, 900, 900, 0.9, False),  # too few to tell
        (0.1, 2000, 18_000, 0.95, False),  # a bad beginning, perhaps
        (0.6, 2000, 2000, 0.9, False),
        (1500, 1500, 9_000, 0.1, False),
        (1500, 1501, 9_000_000, 0.1, True),
        (0.0, 1, 9_000, 0.0, True),
        (0.0, 0, 0, 0.0, False),
    ],
)
def test_a_run_is_hopeless_when_the_rest_cannot_mend_it(
    bad_lines, damaged, records, share, hopeless
):
    assert Budget(bad_lines).is_hopeless(damaged, records, share) is hopeless


def test_garbage_ends_a_run_early_and_a_larger_budget_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    lines = [record(t) for t in lines_of(300)] + [b"garbage, no JSON"] * 6_000
    path = write_lines(tmp_path / "lines.jsonl", lines)
    options: dict = {"vocab_size": 300, "part_bytes": 1500, "workers": 1}
    shares = []
    with pytest.raises(ValueError, match="^stopped after .*--bad-lines 0.1") as error:
        prepare(
            [path],
            tmp_path / "data",
            progress=lambda at: shares.append(at.share),
            **options,
        )
    assert "line 301: not JSON" in str(error.value)
    assert 0.1 < shares[-1] < 0.7, "was that early?"
    listed = quarantine_of(tmp_path / ".data.partial")
    assert [e["line"] for e in listed] == list(range(301, 301 + len(listed)))

    saved, save = [], parts._save

    def counted(path, *made):
        saved.append(path.name)
        return save(path, *made)

    monkeypatch.setattr(parts, "_save", counted)
    prepare([path], tmp_path / "data", bad_lines=0.999, **options)
    prepare([path], tmp_path / "whole", bad_lines=0.999, **options)
    assert content_of(tmp_path / "data") == content_of(tmp_path / "whole")
    twice = len(saved) - len(set(saved))
    assert twice < len(set(saved)), "all parts were done again"
    assert len(quarantine_of(tmp_path / "data")) == 6_000


def test_a_line_is_not_numbered_where_lines_before_it_are_missing(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", [b"x"] * 10)
    plan = Plan(find_sources([path]), [], Options("text", 0, 4, 99))

    def finished(index):
        damage = {"line": 1, "reason": "not JSON", "start": "x"}
        counts = {"damaged": [(0, "", damage)], "segments": [(0, "", 2)]}
        return FinishedPart(counts, tmp_path / f"0000000-000000-{index:07d}.json")

    write_quarantine(tmp_path / "q", [finished(i) for i in (0, 1, 3, 4)], plan)
    lines = (tmp_path / "q").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 3, None, None]


def test_shards_are_cut_where_the_stream_of_all_parts_is(tmp_path):
    """Small shards over many parts hold the documents of one large shard, in order."""
    path = write_lines(tmp_path / "lines.jsonl", map(record, lines_of(400)))
    options: dict = {"vocab_size": 300, "part_bytes": 1500, "val_fraction": 0.2}
    one = prepare([path], tmp_path / "one", **options)
    many = prepare([path], tmp_path / "many", shard_tokens=700, **options)
    for split in ("train", "val"):
        shards = many.splits[split]
        assert len(shards) > 1 and one.splits[split][0].documents > 10
        assert all(s.tokens >= 700 for s in shards[:-1])
        joined = b"".join((many.folder / s.name).read_bytes() for s in shards)
        assert joined == (one.folder / one.splits[split][0].name).read_bytes()
        ends, at = [], 0
        for s in shards:
            found = np.fromfile(many.folder / f"{s.name}.index", "<u8")
            # Full with its last document, and not before.
            assert len(found) == 1 or found[-2] < 700
            ends.append(found + at)
            at += s.tokens
        whole = np.fromfile(one.folder / f"{one.splits[split][0].name}.index", "<u8")
        np.testing.assert_array_equal(np.concatenate(ends), whole)
