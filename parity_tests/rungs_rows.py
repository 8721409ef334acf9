"""The rung of rows that arrive: cut, padded, masked, shuffled, batched, mixed."""

import atexit
import functools
import tempfile
from pathlib import Path

import numpy as np

from jaxllm.data.batches import Batches
from jaxllm.data.shards import Manifest, Shard, file_sha256, index_path
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, train_tokenizer
from parity_tests.compare import Pairs
from parity_tests.precision import Precision


def rows(precision: Precision, seed: int) -> Pairs:
    """What Batches yields, against rows cut by hand from the same documents."""
    del precision
    documents, folder = folder_of(seed)
    seq_len = 16
    begin_text = [[BEGIN_ID, *text] for text in documents]
    stream = np.concatenate([[*text, END_ID] for text in begin_text])
    pairs: Pairs = {}

    settings: dict = {"seq_len": seq_len, "batch_size": 1, "shuffle": False}
    packed = Batches(folder.name, layout="packed", **settings)
    windows = [
        stream[start : start + seq_len + 1]
        for start in range(0, len(stream) - 1, seq_len)
    ]
    _rows_pairs(pairs, "packed", packed, windows, seq_len)
    seed_rows = Batches(folder.name, layout="rows", **settings)
    cut = [np.array(text[: seq_len + 1]) for text in begin_text]
    _rows_pairs(pairs, "rows", seed_rows, cut, seq_len)

    isolated = Batches(folder.name, layout="packed", isolate_documents=True, **settings)
    owner = np.repeat(np.arange(len(documents)), [len(d) + 2 for d in documents])
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for i, start in enumerate(range(0, len(stream) - 1, seq_len)):
        row, n = isolated[i], min(seq_len, len(stream) - 1 - start)
        own = owner[start : start + n + 1]
        at = np.arange(start, start + n)
        expected = at - np.maximum(starts[own[:-1]], start)
        pairs[f"isolated {i} positions"] = (row["positions"][0, :n], expected)
        same = row["segment_ids"][0, :n, None] == row["segment_ids"][0, None, :n]
        pairs[f"isolated {i} segments"] = (same, own[:-1, None] == own[None, :-1])
        pairs[f"isolated {i} mask"] = (row["loss_mask"][0, :n], own[1:] == own[:-1])

    joints = len(documents) - 1
    pairs["isolated: targets"] = (isolated.n_tokens, len(stream) - 1 - joints)
    return pairs | _order(seed_rows, folder.name, seed)


def _order(one: Batches, folder: str, seed: int) -> Pairs:
    """Rows in batches, in epochs of different order by seed, and mixed."""
    count = one.n_rows
    settings: dict = {"layout": "rows", "seq_len": one.seq_len}
    pairs: Pairs = {}
    three = Batches(folder, batch_size=3, shuffle=False, **settings)
    pairs["steps of an epoch"] = (three.steps_per_epoch, -(-count // 3))
    for step in range(three.steps_per_epoch):  # the last one begins the next epoch
        rows = [one[i % count] for i in range(3 * step, 3 * step + 3)]
        for name, x in three[step].items():
            where = f"batch {step} {name}"
            pairs[where] = (x, np.concatenate([row[name] for row in rows]))
            pairs[f"{where}, a part"] = (three.read(step, slice(1, 3))[name], x[1:3])

    plain = [one[i]["inputs"][0].tobytes() for i in range(count)]

    def indices(batches: Batches, n: int) -> list[int]:
        return [plain.index(batches[i]["inputs"][0].tobytes()) for i in range(n)]

    shuffled = Batches(folder, batch_size=1, **settings)
    order = indices(shuffled, 2 * count)
    epochs = [order[:count], order[count:]]
    for number, epoch in enumerate(epochs):
        everything = (sorted(epoch), list(range(count)))
        pairs[f"epoch {number} has each row once"] = everything
    other = indices(Batches(folder, batch_size=1, seed=1, **settings), count)
    orders = [list(range(count)), *epochs, other]
    pairs["no two orders alike"] = (len(set(map(tuple, orders))), len(orders))

    _, beside = folder_of(seed + 100)
    mixed = Batches(f"{folder}=0.75,{beside.name}=0.25", batch_size=40, **settings)
    known = [row.tobytes() in plain for row in mixed[0]["inputs"]]
    pairs["rows of a mixture's larger share"] = (sum(known), 30)
    return pairs


def _rows_pairs(pairs: Pairs, name: str, batches: Batches, rows, seq_len: int) -> None:
    pairs[f"{name}: count"] = (batches.n_rows, len(rows))
    pairs[f"{name}: targets"] = (batches.n_tokens, sum(len(r) - 1 for r in rows))
    for i, row in enumerate(rows):
        n, got = len(row) - 1, batches[i]
        pairs[f"{name} {i} inputs"] = (got["inputs"][0, :n], row[:-1])
        pairs[f"{name} {i} targets"] = (got["targets"][0, :n], row[1:])
        pairs[f"{name} {i} mask"] = (got["loss_mask"][0], np.arange(seq_len) < n)


@functools.cache
def folder_of(seed: int) -> tuple[list[list[int]], tempfile.TemporaryDirectory]:
    """A data folder of 23 documents, written by hand; distinct, some longer than T."""
    rng = np.random.default_rng((41, seed))
    documents = [
        [5 + i, *(5 + rng.integers(0, 200, rng.integers(1, 40))).tolist()]
        for i in range(23)
    ]
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    tokenizer = train_tokenizer(["one two three"], 261)
    tokenizer.save(root / "tokenizer.json")
    shards = []
    (root / "train").mkdir()
    for number, part in enumerate((documents[:9], documents[9:])):
        texts = [[BEGIN_ID, *text, END_ID] for text in part]
        path = root / f"train/{number:05d}.ds"
        np.concatenate(texts).astype("<u2").tofile(path)
        np.cumsum([len(t) for t in texts]).astype("<u8").tofile(index_path(path))
        shards.append(
            Shard(
                name=f"train/{number:05d}.ds", documents=len(texts),
                tokens=sum(map(len, texts)), text_bytes=1, sha256=file_sha256(path),
                index_sha256=file_sha256(index_path(path)),
            )
        )  # fmt: skip
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
        dtype="uint16", splits={"train": shards, "val": []}, sources=[], options={},
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.to_json())
    return documents, folder
