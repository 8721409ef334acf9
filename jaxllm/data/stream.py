"""One split of a data folder as one long sequence of tokens, read by position."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from jaxllm.data.shards import INDEX_DTYPE, Manifest, index_path

_BLOCK = 1024
"""Document ends between two that are kept in memory."""


class TokenStream:
    """The tokens of a split, shards joined in order.

    Reads with pread instead of a memory map: resident memory then does not grow with
    what was read, and a file that shrinks under us is an error, not a SIGBUS. Memory is
    8 bytes per 1,024 documents. Safe to use from several threads.
    """

    def __init__(self, manifest: Manifest, split: str):
        shards = manifest.splits[split]
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_documents = sum(shard.documents for shard in shards)
        self._first_token = [0, *accumulate(shard.tokens for shard in shards)]
        self._first_document = [0, *accumulate(shard.documents for shard in shards)]
        paths = [manifest.folder / shard.name for shard in shards]
        self._tokens = [_File(path) for path in paths]
        self._ends = [_File(index_path(path)) for path in paths]
        self._every: list[np.ndarray | None] = [None] * len(shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads up to `count` tokens from a position on; fewer at the end: int [n]."""
        count = min(count, self.n_tokens - start)
        shard = bisect_right(self._first_token, start) - 1
        pieces = []
        while count > 0:
            offset = start - self._first_token[shard]
            n = min(count, self._first_token[shard + 1] - start)
            pieces.append(self._tokens[shard].read(offset, n, self.dtype))
            start, count, shard = start + n, count - n, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def bounds(self, document: int) -> tuple[int, int]:
        """Gives a document's first position and the one behind its last."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        shard = bisect_right(self._first_document, document) - 1
        i = document - self._first_document[shard]
        ends = self._ends[shard].read(max(i - 1, 0), 2 if i else 1, INDEX_DTYPE)
        base = self._first_token[shard]
        return base + (int(ends[0]) if i else 0), base + int(ends[-1])

    def document_at(self, position: int) -> int:
        """Gives the document that holds the token at a position."""
        shard = bisect_right(self._first_token, position, hi=len(self._tokens)) - 1
        at = position - self._first_token[shard]
        block = max(int(np.searchsorted(self._sparse(shard), at, side="right")) - 1, 0)
        first = block * _BLOCK
        n = self._first_document[shard + 1] - self._first_document[shard]
        ends = self._ends[shard].read(first, min(_BLOCK, n - first), INDEX_DTYPE)
        within = first + int(np.searchsorted(ends, at, side="right"))
        return self._first_document[shard] + within

    def ends_between(self, start: int, stop: int) -> np.ndarray:
        """Gives the document ends e with start < e < stop, ascending: int64 [n]."""
        found = []
        shard = bisect_right(self._first_token, start) - 1
        while shard < len(self._tokens) and self._first_token[shard] < stop:
            base = self._first_token[shard]
            every = self._sparse(shard)
            low = max(int(np.searchsorted(every, start - base, side="right")) - 1, 0)
            high = int(np.searchsorted(every, stop - base, side="left"))
            n = self._first_document[shard + 1] - self._first_document[shard]
            first, last = low * _BLOCK, min(high * _BLOCK + 1, n)
            ends = self._ends[shard].read(first, last - first, INDEX_DTYPE)
            ends = ends.astype(np.int64) + base
            found.append(ends[(ends > start) & (ends < stop)])
            shard += 1
        return np.concatenate(found)

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Walks the lengths of all documents in tokens, in blocks of int64 [n]."""
        for shard, file in enumerate(self._ends):
            n = self._first_document[shard + 1] - self._first_document[shard]
            previous = 0
            for first in range(0, n, 1 << 16):
                ends = file.read(first, min(1 << 16, n - first), INDEX_DTYPE)
                ends = ends.astype(np.int64)
                yield np.diff(ends, prepend=previous)
                previous = int(ends[-1])

    def _sparse(self, shard: int) -> np.ndarray:
        """Every 1,024th document end of a shard, from its first on."""
        every = self._every[shard]
        if every is None:
            n = self._first_document[shard + 1] - self._first_document[shard]
            file = self._ends[shard]
            every = np.array(
                [int(file.read(i, 1, INDEX_DTYPE)[0]) for i in range(0, n, _BLOCK)]
            )
            self._every[shard] = every
        return every


class _File:
    """An open file of equal items."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, first: int, count: int, dtype: np.dtype) -> np.ndarray:
        size = count * dtype.itemsize
        data = os.pread(self._descriptor, size, first * dtype.itemsize)
        if len(data) != size:
            raise ValueError(
                f"shard {self.path} ends early: {len(data)} of {size} bytes at item "
                f"{first}; it changed while in use, prepare or copy the data again"
            )
        return np.frombuffer(data, dtype)

    def __del__(self):
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def __reduce__(self):
        return _File, (self.path,)
