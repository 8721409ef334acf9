"""Batches: exactly once an epoch, in an order that seed and position decide alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.batches import Batches, endless_rows, parse_mixture
from jaxllm.data.corpus import load_manifest, prepare
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import BEGIN_ID, END_ID

WORDS = ["the", "jade", "moon", "river", "lamp", "seven", "cold", "crane", "and"]


def make_lines(count, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        words = rng.choice(WORDS, rng.integers(1, 60))
        lines.append(f"{i} " + " ".join(words))
    return lines


def write_corpus(folder, lines, name="corpus.jsonl"):
    import orjson

    path = folder / name
    path.write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in lines))
    return path


@pytest.fixture(scope="module")
def lines():
    return make_lines(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lines):
    place = tmp_path_factory.mktemp("batches")
    # Small shards, so that windows and documents cross and fill them.
    prepare(
        [write_corpus(place, lines)],
        place / "data",
        vocab_size=300,
        val_fraction=0.1,
        shard_tokens=3000,
    )
    return place / "data"


def documents_of(folder, split):
    stream = TokenStream(load_manifest(folder), split)
    return [
        stream.read(start, end - start).tolist()
        for start, end in map(stream.bounds, range(stream.n_documents))
    ]


def rows_of(batches, first, count):
    """Rows by number in the endless stream, read one at a time."""
    b = batches.batch_size
    found = []
    for row in range(first, first + count):
        one = batches.read(row // b, slice(row % b, row % b + 1))
        found.append({name: array[0] for name, array in one.items()})
    return found


def key(row):
    return tuple(array.tobytes() for _, array in sorted(row.items()))


def test_documents_on_disk_are_begin_text_end(folder, lines):
    batches = Batches(folder, seq_len=8, batch_size=1)
    texts = []
    for split in ("train", "val"):
        for document in documents_of(folder, split):
            assert document[0] == BEGIN_ID and document[-1] == END_ID
            assert min(document[1:-1]) > END_ID
            texts.append(batches.tokenizer.decode(document[1:-1]))
    assert sorted(texts) == sorted(lines)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000, 10**6])
def test_packed_rows_hold_every_target_exactly_once(folder, seq_len):
    stream = sum(documents_of(folder, "train"), [])
    batches = Batches(folder, seq_len=seq_len, batch_size=4, shuffle=False)
    inputs, targets = [], []
    for row in rows_of(batches, 0, batches.n_rows):
        mask = row["loss_mask"]
        assert row["inputs"].shape == (seq_len,)
        assert np.all(np.diff(mask.astype(int)) <= 0), "padding is at the end"
        assert not row["inputs"][~mask].any() and not row["targets"][~mask].any()
        inputs += row["inputs"][mask].tolist()
        targets += row["targets"][mask].tolist()
    assert inputs == stream[:-1]
    assert targets == stream[1:]
    assert batches.n_tokens == len(targets)


@pytest.mark.parametrize("seq_len", [1, 8, 40, 500])
def test_a_row_of_the_reference_is_begin_and_text_cut_and_padded(folder, seq_len):
    batches = Batches(
        folder, layout="rows", seq_len=seq_len, batch_size=3, shuffle=False
    )
    documents = documents_of(folder, "train")
    assert batches.n_rows == len(documents)
    total = 0
    for row, document in zip(
        rows_of(batches, 0, batches.n_rows), documents, strict=True
    ):
        x = document[:-1][: seq_len + 1]
        n = len(x) - 1
        pad = [0] * (seq_len - n)
        assert row["inputs"].tolist() == x[:-1] + pad
        assert row["targets"].tolist() == x[1:] + pad
        assert row["loss_mask"].tolist() == [True] * n + [False] * (seq_len - n)
        total += n
    assert batches.n_tokens == total


@pytest.mark.parametrize("seq_len", [3, 9, 64, 700])
def test_isolated_documents_restart_and_never_predict_across(folder, seq_len):
    documents = documents_of(folder, "train")
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    batches = Batches(
        folder, seq_len=seq_len, batch_size=4, shuffle=False, isolate_documents=True
    )
    plain = Batches(folder, seq_len=seq_len, batch_size=4, shuffle=False)
    total = 0
    for i in range(batches.n_rows):
        row, other = rows_of(batches, i, 1)[0], rows_of(plain, i, 1)[0]
        n = int(other["loss_mask"].sum())
        np.testing.assert_array_equal(row["inputs"], other["inputs"])
        np.testing.assert_array_equal(row["targets"], other["targets"])
        window = owner[i * seq_len : i * seq_len + n + 1]
        expected = window[:-1] - window[0] + 1
        np.testing.assert_array_equal(row["segment_ids"][:n], expected)
        np.testing.assert_array_equal(row["segment_ids"][n:], 0)
        np.testing.assert_array_equal(row["loss_mask"][:n], window[1:] == window[:-1])
        positions = [
            j - next(k for k in range(n) if expected[k] == expected[j])
            for j in range(n)
        ]
        np.testing.assert_array_equal(row["positions"][:n], positions)
        assert not row["loss_mask"][n:].any() and not row["positions"][n:].any()
        total += int(row["loss_mask"].sum())
    assert batches.n_tokens == total


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_every_epoch_has_every_row_once_in_another_order(folder, layout):
    batches = Batches(folder, layout=layout, seq_len=32, batch_size=16, seed=5)
    plain = Batches(folder, layout=layout, seq_len=32, batch_size=16, shuffle=False)
    n = batches.n_rows
    assert n % 16, "the last batch of an epoch holds rows of the next"
    expected = sorted(map(key, rows_of(plain, 0, n)))
    epochs = [list(map(key, rows_of(batches, e * n, n))) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(map(key, rows_of(plain, 0, n)))


def test_another_seed_is_another_order(folder):
    a, b = (Batches(folder, seq_len=32, batch_size=16, seed=s) for s in (0, 1))
    assert not np.array_equal(a[0]["inputs"], b[0]["inputs"])


def test_the_order_is_pinned():
    """The order is part of the format: a run must go on with a newer grain."""
    rows = endless_rows([range(561)], [1.0], seed=3, shuffle=True)
    assert [rows[i] for i in range(12)] == [
        104,
        380,
        217,
        363,
        318,
        66,
        503,
        251,
        278,
        134,
        2,
        117,
    ]
    assert [rows[5 * 561 + i] for i in range(6)] == [193, 516, 78, 167, 339, 401]
    mixed = endless_rows([range(100), range(1000, 1050)], [0.75, 0.25], 3, True)
    assert [mixed[i] for i in range(12)] == [
        29,
        30,
        31,
        1029,
        86,
        26,
        66,
        1030,
        61,
        19,
        80,
        1031,
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    devices=st.sampled_from([1, 2, 4, 8]),
)
def test_interruptions_and_devices_do_not_change_the_order(folder, seed, cuts, devices):
    """A new object after every cut, each device reading its own rows only."""
    steps = 12
    whole = Batches(folder, seq_len=32, batch_size=8, seed=seed)
    expected = [whole[step] for step in range(steps)]
    step = 0
    for cut in [*cuts, steps]:
        batches = Batches(folder, seq_len=32, batch_size=8, seed=seed)
        while step < min(cut, steps):
            share = 8 // devices
            parts = [
                batches.read(step, slice(d * share, (d + 1) * share))
                for d in range(devices)
            ]
            for name, array in expected[step].items():
                joined = np.concatenate([part[name] for part in parts])
                np.testing.assert_array_equal(joined, array)
            step += 1


def test_batches_have_the_promised_shapes_and_dtypes(folder):
    batch = Batches(folder, seq_len=16, batch_size=4, isolate_documents=True)[7]
    kinds = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert kinds == {
        "inputs": ((4, 16), "int32"),
        "targets": ((4, 16), "int32"),
        "loss_mask": ((4, 16), "bool"),
        "segment_ids": ((4, 16), "int32"),
        "positions": ((4, 16), "int32"),
    }


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    size = load_manifest(folder).vocab_size
    Batches(folder, seq_len=8, batch_size=1, vocab_size=size)
    with pytest.raises(ValueError, match=rf"has {size} ids.*model.vocab_size=299") as e:
        Batches(folder, seq_len=8, batch_size=1, vocab_size=299)
    assert f"--model.vocab-size {size}" in str(e.value)


def test_a_missing_split_is_refused(tmp_path, lines):
    corpus = write_corpus(tmp_path, lines[:20])
    prepare([corpus], tmp_path / "data", vocab_size=300, val_fraction=0)
    with pytest.raises(ValueError, match="has no val documents.*--val-fraction"):
        Batches(tmp_path / "data", split="val", seq_len=8, batch_size=1)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path, lines):
    corpus = write_corpus(tmp_path, lines[:50])
    prepare([corpus], tmp_path / "data", vocab_size=300)
    batches = Batches(tmp_path / "data", seq_len=16, batch_size=4, shuffle=False)
    with open(tmp_path / "data/train/00000.ds", "r+b") as file:
        file.truncate(40)
    with pytest.raises(ValueError, match="00000.ds ends early"):
        batches[3]


@pytest.fixture(scope="module")
def second(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("second")
    corpus = write_corpus(place, make_lines(200, seed=1))
    prepare([corpus], place / "data", tokenizer=folder / "tokenizer.json")
    return place / "data"


def test_a_mixture_draws_rows_in_the_given_shares(folder, second):
    names = [set(), set()]
    for place, found in zip((folder, second), names, strict=True):
        part = Batches(place, seq_len=16, batch_size=8, shuffle=False)
        found.update(map(key, rows_of(part, 0, part.n_rows)))
    path = f"{folder}=0.75,{second}=0.25"
    batches = Batches(path, seq_len=16, batch_size=8, seed=1)
    assert batches.n_rows == len(names[0]) + len(names[1])
    drawn = list(map(key, rows_of(batches, 0, 400)))
    assert sum(row in names[0] for row in drawn) == 300
    assert sum(row in names[1] for row in drawn) == 100
    again = Batches(path, seq_len=16, batch_size=8, seed=1)
    assert list(map(key, rows_of(again, 200, 200))) == drawn[200:]


def test_a_mixture_runs_each_folder_through_whole_epochs(folder, second):
    part = Batches(second, seq_len=64, batch_size=8)
    mix = Batches(f"{folder}=1,{second}=1", seq_len=64, batch_size=8)
    names = set(map(key, rows_of(part, 0, part.n_rows)))
    drawn = [r for r in map(key, rows_of(mix, 0, 4 * part.n_rows)) if r in names]
    assert set(drawn[: part.n_rows]) == names
    assert set(drawn[part.n_rows : 2 * part.n_rows]) == names


def test_a_mixture_of_different_tokenizers_is_refused(folder, tmp_path):
    corpus = write_corpus(tmp_path, make_lines(50, seed=2))
    prepare([corpus], tmp_path / "data", vocab_size=280)
    with pytest.raises(ValueError, match="different tokenizers.*--tokenizer"):
        Batches(f"{folder}=1,{tmp_path / 'data'}=1", seq_len=8, batch_size=1)


@pytest.mark.parametrize(
    "text", ["a=0.7,b", "a=0.5,b=x", "a=1,b=-1", "a=0", "=1", "a="]
)
def test_a_mixture_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="is not DIR=SHARE"):
        parse_mixture(text)


def test_a_folder_named_twice_in_a_mixture_is_refused():
    with pytest.raises(ValueError, match="names a folder twice"):
        parse_mixture("a=1,./a=2")


def test_isolation_of_single_document_rows_is_refused(folder):
    with pytest.raises(ValueError, match="data.isolate_documents"):
        Batches(folder, layout="rows", seq_len=8, batch_size=1, isolate_documents=True)


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_the_documents_of_a_batch_are_those_its_tokens_are_from(folder, second, layout):
    mixture = f"{folder}=0.6,{second}=0.4"
    batches = Batches(mixture, layout=layout, seq_len=24, batch_size=16, seed=3)
    texts = {place: documents_of(place, "train") for place in (folder, second)}
    for step in (0, 9):
        batch = batches[step]
        for row, (place, first, last) in enumerate(batches.documents(step)):
            n = int(batch["loss_mask"][row].sum())
            tokens = [*batch["inputs"][row][:n], batch["targets"][row][n - 1]]
            joined = sum(texts[place][first : last + 1], [])
            at = [
                i for i in range(len(joined)) if joined[i : i + len(tokens)] == tokens
            ]
            assert at, (row, place, first, last)
            # Neither document could be left out.
            assert any(i < len(texts[place][first]) for i in at)
            assert any(
                i + len(tokens) > len(joined) - len(texts[place][last]) for i in at
            )
