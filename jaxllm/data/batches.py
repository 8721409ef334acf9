"""Token shards -> batches. The position in the data is one integer, the step.

Row r of the run is a function of (seed, r) alone, so the order is the same for any
number of devices, any accumulation and after any interruption: epoch = r // n_rows,
and in every epoch each row comes exactly once.
Shapes: B rows of a batch, T tokens of a row.
"""

import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.data.shards import Manifest, load_manifest, load_tokenizer
from jaxllm.data.stream import TokenStream

Layout = Literal["packed", "rows"]
Row = dict[str, np.ndarray]


class PackedRows(Sequence):
    """Windows over the stream: T + 1 tokens each, T apart, so that every target of the
    stream is in exactly one. The last window is padded, and the padding masked."""

    def __init__(self, stream: TokenStream, seq_len: int, *, isolate: bool = False):
        self.stream = stream
        self.seq_len = seq_len
        self.isolate = isolate

    def __len__(self) -> int:
        return math.ceil((self.stream.n_tokens - 1) / self.seq_len)

    def __getitem__(self, index: Any) -> Row:
        start = int(index) * self.seq_len
        tokens = self.stream.read(start, self.seq_len + 1)
        row = _shifted(tokens, self.seq_len)
        if self.isolate:
            # Position j of the window is in the document that the first end above it
            # closes; the target at j is the token at j + 1.
            ends = self.stream.ends_between(start, start + len(tokens)) - start
            document = np.searchsorted(ends, np.arange(len(tokens)), side="right")
            n = len(tokens) - 1
            row["segment_ids"] = _padded(document[:-1] + 1, self.seq_len)
            starts = np.concatenate([[0], ends])[document[:-1]]
            row["positions"] = _padded(np.arange(n) - starts, self.seq_len)
            row["loss_mask"][:n] = document[1:] == document[:-1]
        return row

    def documents(self, index: int) -> tuple[int, int]:
        """The first and the last document of which a row has tokens."""
        first = index * self.seq_len
        last = min(first + self.seq_len, self.stream.n_tokens - 1)
        return self.stream.document_at(first), self.stream.document_at(last)

    @property
    def n_targets(self) -> int:
        """Targets that bear loss, in all rows together."""
        joints = self.stream.n_documents - 1 if self.isolate else 0
        return self.stream.n_tokens - 1 - joints


class DocumentRows(Sequence):
    """One document a row, as the reference reads it: begin and text without the end
    token, cut at T + 1 tokens, padded; the padding is masked by position."""

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self.stream.n_documents

    def __getitem__(self, index: Any) -> Row:
        start, end = self.stream.bounds(int(index))
        length = min(end - 1 - start, self.seq_len + 1)
        return _shifted(self.stream.read(start, length), self.seq_len)

    def documents(self, index: int) -> tuple[int, int]:
        """The first and the last document of which a row has tokens."""
        return index, index

    @cached_property
    def n_targets(self) -> int:
        """Targets that bear loss, in all rows together; reads the whole index once."""
        return sum(
            int(np.clip(lengths - 2, 0, self.seq_len).sum())
            for lengths in self.stream.document_lengths()
        )


def _shifted(tokens: np.ndarray, seq_len: int) -> Row:
    """Makes inputs and targets [T] of up to T + 1 tokens."""
    n = len(tokens) - 1
    loss_mask = np.zeros(seq_len, bool)
    loss_mask[:n] = True
    return {
        "inputs": _padded(tokens[:-1], seq_len),
        "targets": _padded(tokens[1:], seq_len),
        "loss_mask": loss_mask,
    }


def _padded(values: np.ndarray, seq_len: int) -> np.ndarray:
    """Fills up to int32 [T] with zeros."""
    padded = np.zeros(seq_len, np.int32)
    padded[: len(values)] = values
    return padded


class Batches:
    """Batches of one split, by step, without end.

    `batches[step]` is a dict of arrays: inputs and targets int32 [B, T], loss_mask bool
    [B, T]; with isolate_documents also segment_ids and positions int32 [B, T], where
    segments count from 1 in a row and padding is 0.

    Raises: ValueError if the folder is no data folder, has no such split, or its
    tokenizer has more ids than `vocab_size`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "val"] = "train",
        layout: Layout = "packed",
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        isolate_documents: bool = False,
        vocab_size: int | None = None,
    ):
        if not 0 <= seed < 2**32:
            raise ValueError(f"data.seed={seed} must lie in [0, 2**32)")
        if isolate_documents and layout != "packed":
            raise ValueError(
                f"data.isolate_documents has no meaning with data.layout={layout!r}: a "
                f"row holds one document already; leave it out"
            )
        self.mixture = parse_mixture(folder)
        self.manifests = [load_manifest(path) for path, _ in self.mixture]
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        _check_tokenizers(self.manifests, vocab_size)
        self.rows = [
            _rows(manifest, split, layout, seq_len, isolate_documents)
            for manifest in self.manifests
        ]
        self.n_rows = sum(map(len, self.rows))
        """Rows of one epoch."""
        self._order = ([weight for _, weight in self.mixture], seed, shuffle)
        self._stream = endless_rows(self.rows, *self._order)

    @cached_property
    def n_tokens(self) -> int:
        """Targets that bear loss in one epoch."""
        return sum(rows.n_targets for rows in self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that read every row at least once."""
        return math.ceil(self.n_rows / self.batch_size)

    @property
    def tokenizer(self):
        """The tokenizer that made the ids."""
        return load_tokenizer(self.manifests[0])

    def __getitem__(self, step: int) -> Row:
        return self.read(step)

    def read(self, step: int, rows: slice = slice(None)) -> Row:
        """Reads the batch of a step, or only some rows of it, such as one process's."""
        first = int(step) * self.batch_size
        indices = range(first, first + self.batch_size)[rows]
        if first < 0 or not indices:
            raise IndexError(f"step {step} has no rows {rows}")
        parts = [self._stream[index] for index in indices]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def documents(self, step: int) -> list[tuple[Path, int, int]]:
        """Says where the rows of a batch come from: for each the data folder, and the
        first and last document of the split there, counted from 0."""
        places = endless_rows(
            [_Places(i, len(rows)) for i, rows in enumerate(self.rows)], *self._order
        )
        found = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            folder, row = places[index]
            first, last = self.rows[folder].documents(row)
            found.append((self.manifests[folder].folder, first, last))
        return found


class _Places(Sequence):
    """Stands for the rows of a folder where only their places matter."""

    def __init__(self, folder: int, n_rows: int):
        self.folder = folder
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: Any) -> tuple[int, int]:
        return self.folder, int(index)


def parse_mixture(folder: str | os.PathLike[str]) -> list[tuple[Path, float]]:
    """Reads "DIR" or "DIR=0.7,DIR2=0.3" as folders and their shares of the rows.

    Raises: ValueError if a share is missing, not a positive number, or a folder comes
    twice.
    """
    text = os.fspath(folder)
    if os.path.isdir(text) or "=" not in text:
        return [(Path(text), 1.0)]
    mixture: list[tuple[Path, float]] = []
    for part in text.split(","):
        name, _, share = part.rpartition("=")
        try:
            weight = float(share)
        except ValueError:
            weight = math.nan
        if not name.strip() or not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"data.path={text!r}: {part!r} is not DIR=SHARE with a positive share; "
                f"write for example DIR=0.7,DIR2=0.3"
            )
        mixture.append((Path(name.strip()), weight))
    if len({path.resolve() for path, _ in mixture}) < len(mixture):
        raise ValueError(f"data.path={text!r} names a folder twice: give it one share")
    return mixture


def _check_tokenizers(manifests: list[Manifest], vocab_size: int | None) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"data folders {first.folder} and {other.folder} have different "
                f"tokenizers: prepare the second with --tokenizer "
                f"{first.folder / 'tokenizer.json'}"
            )
    if vocab_size is not None and first.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer of data folder {first.folder} has {first.vocab_size} ids, "
            f"more than model.vocab_size={vocab_size}: give --model.vocab-size "
            f"{first.vocab_size}, or prepare the data with --vocab-size {vocab_size}"
        )


def _rows(
    manifest: Manifest, split: str, layout: Layout, seq_len: int, isolate: bool
) -> PackedRows | DocumentRows:
    if not manifest.splits[split]:
        raise ValueError(
            f"data folder {manifest.folder} has no {split} documents: prepare it with "
            f"a --val-fraction above 0 from at least two documents"
        )
    stream = TokenStream(manifest, split)
    if layout == "rows":
        return DocumentRows(stream, seq_len)
    return PackedRows(stream, seq_len, isolate=isolate)


def endless_rows(
    rows: list[Any], weights: list[float], seed: int, shuffle: bool
) -> Any:
    """Chains shuffle and repeat over each folder's rows, and mixes the folders."""
    from grain import MapDataset

    parts = []
    for source in rows:
        part = MapDataset.source(source).seed(seed)
        # Reshuffled with another key in every repetition.
        parts.append((part.shuffle() if shuffle else part).repeat())
    return parts[0] if len(parts) == 1 else MapDataset.mix(parts, weights)
