"""Held-out text as windows of tokens: from shards, or straight from text files.

Both are one stream of documents (begin, text, end), cut as training cuts it: windows of
seq_len + 1 tokens, seq_len apart, so that every token but the first is a target once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jaxllm.data.reading import Segment, plan_units, read_units
from jaxllm.data.records import Text, read_records
from jaxllm.data.shards import Manifest
from jaxllm.data.sources import find_sources
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer

_PART_BYTES = 4 << 20
_LINE_BYTES = 64 << 20
_TOGETHER = 64


@dataclass
class Read:
    """What was read so far."""

    documents: int = 0
    text_bytes: int = 0
    """Bytes of their text, as UTF-8."""
    damaged: int = 0
    """Records that hold no usable text."""
    first_damage: str = ""


def shard_tokens(manifest: Manifest, split: str, read: Read) -> Iterator[np.ndarray]:
    """Gives the tokens of a split, in pieces."""
    stream = TokenStream(manifest, split)
    read.documents = stream.n_documents
    read.text_bytes = manifest.text_bytes(split)
    for start in range(0, stream.n_tokens, 1 << 20):
        yield stream.read(start, 1 << 20)


def text_tokens(
    inputs: Sequence[str | Path], tokenizer: Tokenizer, read: Read, *, field: str
) -> Iterator[np.ndarray]:
    """Gives the tokens of text files, as prepare_data.py reads them, in pieces.

    Raises: ValueError naming an input that is missing, empty or of an unknown kind.
    """
    texts = _texts(inputs, read, field)
    while documents := list(islice(texts, _TOGETHER)):
        for ids in tokenizer.encode_documents(documents):
            yield np.array([BEGIN_ID, *ids, END_ID], np.int32)


def _texts(inputs: Sequence[str | Path], read: Read, field: str) -> Iterator[str]:
    sources = find_sources(inputs)
    parts = read_units(
        sources, plan_units(sources, _PART_BYTES), lambda _: True, field=field,
        part_bytes=_PART_BYTES, line_bytes=_LINE_BYTES,
    )  # fmt: skip
    segments: Iterator[Segment] = (s for part in parts for s in part.segments)
    for segment in segments:
        for record in read_records(segment, field, _LINE_BYTES):
            if isinstance(record, Text):
                read.documents += 1
                read.text_bytes += len(record.data)
                yield record.text
            elif record is not None:
                read.damaged += 1
                read.first_damage = read.first_damage or (
                    f"{sources[segment.source].path}: {record.reason}"
                )


def windows(pieces: Iterable[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Cuts a stream of tokens into windows of up to seq_len + 1, seq_len apart."""
    left = np.zeros(0, np.int32)
    for piece in pieces:
        left = np.concatenate([left, piece.astype(np.int32)])
        start = 0
        while len(left) - start > seq_len:
            yield left[start : start + seq_len + 1]
            start += seq_len
        left = left[start:]
    if len(left) > 1:
        yield left
