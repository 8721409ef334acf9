"""Lines -> texts: what a record must be to count as a document, and why it does not."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxllm.data.reading import Segment
from jaxllm.data.unpack import damage_reason

TEXT_DOCUMENT_BYTES = 32 << 10
"""A text file up to this is one document. A longer one is cut at the first blank line
after each such stretch, or at the first line end after twice of it."""


@dataclass(frozen=True)
class Damage:
    """A record that holds no usable text."""

    line: int
    """Counted from 1 in the segment."""
    reason: str
    start: str = ""
    """The first characters, what is not printable ASCII escaped."""


class Text(NamedTuple):
    """A record's text, as str and as the UTF-8 bytes it was or will be."""

    text: str
    data: bytes


Record = Text | Damage | None
"""None is a record without any text: not damage, and no document."""


def read_records(segment: Segment, field: str, line_bytes: int) -> Iterator[Record]:
    """Walks the records of a segment; blank lines are none."""
    walk = {"lines": _json_lines, "text": _text_pieces, "parquet": _column_values}
    yield from walk[segment.kind](segment, field, line_bytes)
    if segment.damage:
        yield Damage(segment.data.count(b"\n") + 1, segment.damage)


def count_lines(segment: Segment) -> int:
    """Counts the lines of a segment, so that the next one's can be numbered."""
    if segment.kind == "parquet":
        return segment.rows
    lines = segment.data.count(b"\n")
    return lines + (bool(segment.data) and not segment.data.endswith(b"\n"))


def text_digest(text: bytes, seed: int) -> bytes:
    """Hashes a text to the 16 bytes that decide its split and mark its copies."""
    return hashlib.blake2b(text, digest_size=16, key=str(seed).encode()).digest()


def _json_lines(segment: Segment, field: str, line_bytes: int) -> Iterator[Record]:
    import orjson

    for number, line in enumerate(segment.data.split(b"\n"), 1):
        if len(line) > line_bytes:
            reason = f"line longer than {line_bytes} bytes"
            yield Damage(number, reason, _start(line))
            continue
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line or line.isspace():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield Damage(number, _json_reason(line, error), _start(line))
            continue
        yield _checked(value, number, field, line)


def _json_reason(line: bytes, error: Exception) -> str:
    if b"\0" in line:
        return "null byte in the line"
    try:
        line.decode()
    except UnicodeDecodeError as decoding:
        return f"not UTF-8: byte {line[decoding.start]:#04x} at {decoding.start}"
    return "not JSON: " + str(error).partition(": line ")[0]


def _checked(value: Any, number: int, field: str, line: bytes) -> Record:
    if not isinstance(value, dict):
        what = type(value).__name__
        return Damage(number, f"not a JSON object but a {what}", _start(line))
    if field in value:
        text = value[field]
    else:  # a.b is the field b of the object in a
        text = value
        for name in field.split("."):
            if not isinstance(text, dict) or name not in text:
                return Damage(number, f"no field {field!r}", _start(line))
            text = text[name]
    if not isinstance(text, str):
        reason = f"field {field!r} is no string but {type(text).__name__}"
        return Damage(number, reason, _start(line))
    return Text(text, text.encode()) if text else None


def _text_pieces(segment: Segment, field: str, line_bytes: int) -> Iterator[Record]:
    data = segment.data
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    line = 1
    while start < len(data):
        end = _cut(data, start)
        piece = data[start:end]
        if len(piece) > line_bytes:
            yield Damage(line, f"no line end in {line_bytes} bytes", _start(piece))
        elif b"\0" in piece:
            at = line + piece.count(b"\n", 0, piece.index(b"\0"))
            yield Damage(at, "null byte: not a text file", _start(piece))
        else:
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                at = line + piece.count(b"\n", 0, error.start)
                yield Damage(
                    at, f"not UTF-8: byte {piece[error.start]:#04x}", _start(piece)
                )
            else:
                yield Text(text, piece) if text.strip() else None
        line += piece.count(b"\n")
        start = end


def _cut(data: bytes, start: int) -> int:
    if len(data) - start <= TEXT_DOCUMENT_BYTES:
        return len(data)
    soft = start + TEXT_DOCUMENT_BYTES
    for blank in (b"\n\n", b"\n\r\n"):
        at = data.find(blank, soft - len(blank), soft + TEXT_DOCUMENT_BYTES)
        if at >= 0:
            return at + len(blank)
    at = data.find(b"\n", soft + TEXT_DOCUMENT_BYTES - 1)
    return at + 1 if at >= 0 else len(data)


def _column_values(segment: Segment, field: str, line_bytes: int) -> Iterator[Record]:
    for number, data in enumerate(segment.values, 1):
        if isinstance(data, Exception):
            yield Damage(number, f"unreadable from here on: {damage_reason(data)}")
        elif data is None:
            yield Damage(number, f"field {field!r} is no string but None")
        elif len(data) > line_bytes:
            yield Damage(number, f"text longer than {line_bytes} bytes", _start(data))
        else:
            try:
                yield Text(data.decode(), data) if data else None
            except UnicodeDecodeError as error:
                at = error.start
                reason = f"not UTF-8: byte {data[at]:#04x} at {at}"
                yield Damage(number, reason, _start(data))


def _start(line: bytes) -> str:
    return (
        line[:80]
        .decode("ascii", "backslashreplace")
        .encode("unicode_escape")
        .decode("ascii")
    )
