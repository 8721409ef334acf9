"""The bytes of the input files as parts of whole lines, damage noted and stepped over.

A part is the unit of work and of resumption: the lines whose first byte lies in one
stretch of `part_bytes` of a file (of its unpacked content, if it is compressed), or a
bundle of whole small files. Parts depend on the files alone, never on who reads them,
so any number of workers gives the same result. A worker walks all parts in order and
reads those it can claim; a packed file is claimed as a whole, by the one that unpacks
it, and then part by part.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from jaxllm.data.parquet import column_values, parquet_file
from jaxllm.data.sources import Kind, Source, kind_of
from jaxllm.data.unpack import (
    Forward,
    LineReader,
    Read,
    check_end,
    is_damage,
    member_reader,
    unpacked,
)


@dataclass
class Segment:
    """Lines of one file or tar member."""

    source: int
    """Which source, counted from 0."""
    member: str
    kind: Kind
    data: bytes = b""
    values: Iterable[Any] = ()
    """The column's values, for Parquet, in the place of data (see column_values)."""
    rows: int = 0
    """Their number."""
    damage: str = ""
    """Why the file could not be read beyond this data; empty if it could."""


@dataclass
class Part:
    name: str
    segments: list[Segment]
    consumed: int
    """Bytes of the files themselves that this part stands for; for the progress."""


@dataclass(frozen=True)
class Unit:
    """Parts that are known before reading: whole small files, or one stretch."""

    first: int
    """The first source."""
    count: int = 1
    """How many sources are bundled."""
    index: int = 0
    """The stretch of a long file, or the row group of a Parquet file."""


Claim = Callable[[str], bool]


def part_name(source: int, member: int, index: int) -> str:
    """Names a part so that names sort in the order of the text."""
    return f"{source:07d}-{member:06d}-{index:07d}"


def stream_name(source: int) -> str:
    """Names the claim on unpacking a source."""
    return f"{source:07d}.stream"


def plan_units(sources: Sequence[Source], part_bytes: int) -> list[Unit]:
    """Cuts the sources into units; a compressed file is one, cut while reading."""
    units: list[Unit] = []
    bundled = 0
    for i, source in enumerate(sources):
        small = source.seekable and source.kind != "parquet"
        small = small and source.bytes < part_bytes
        if small and bundled and bundled + source.bytes <= part_bytes:
            last = units.pop()
            units.append(Unit(last.first, last.count + 1))
            bundled += source.bytes
            continue
        bundled = source.bytes if small else 0
        if small or not source.seekable:
            count = 1
        elif source.kind == "parquet":
            count = parquet_file(source).num_row_groups
        else:
            count = source.bytes // part_bytes + 1
        units += [Unit(i, 1, index) for index in range(count)]
    return units


def read_units(
    sources: Sequence[Source],
    units: Sequence[Unit],
    claim: Claim,
    *,
    part_bytes: int,
    line_bytes: int,
    field: str,
    stretch: int = 0,
    on_end: Callable[[int, list[tuple[str, int]]], None] = lambda *_: None,
) -> Iterator[Part]:
    """Walks all parts in order and yields those that `claim(name)` grants.

    Of a line longer than `line_bytes` one byte more than that is kept, so that it can
    be told. After a compressed source comes `on_end(source, [(member, parts), ...])`.
    With `stretch` only the lines that begin in so many bytes of a part are given.
    """
    stretch = min(stretch or part_bytes, part_bytes)
    for unit in units:
        source = sources[unit.first]
        if not source.seekable:
            if not claim(stream_name(unit.first)):
                continue
            members: list[tuple[str, int]] = []
            yield from _stream_parts(
                source, unit.first, claim, part_bytes, line_bytes, stretch, members
            )
            on_end(unit.first, members)
            continue
        name = part_name(unit.first, 0, unit.index)
        if not claim(name):
            continue
        if source.kind == "parquet":
            values = column_values(source, unit.index, field)
            file = parquet_file(source).metadata
            rows = file.row_group(unit.index).num_rows
            segment = Segment(unit.first, "", "parquet", values=values, rows=rows)
            yield Part(name, [segment], source.bytes // file.num_row_groups)
        elif unit.count == 1 and source.bytes >= part_bytes:
            start = unit.index * part_bytes
            data = _stretch(source, start, stretch, line_bytes)
            segment = Segment(unit.first, "", source.kind, data)
            yield Part(name, [segment], min(part_bytes, source.bytes - start))
        else:
            indices = range(unit.first, unit.first + unit.count)
            segments = [_whole(sources[i], i) for i in indices]
            yield Part(name, segments, sum(sources[i].bytes for i in indices))


def _whole(source: Source, index: int) -> Segment:
    with open(source.path, "rb") as file:
        return Segment(index, "", source.kind, file.read())


def _stretch(source: Source, start: int, length: int, line_bytes: int) -> bytes:
    with open(source.path, "rb") as file:
        position = max(start - 1, 0)
        file.seek(position)
        lines = LineReader(file.read, position)
        if start:
            lines.skip(start, give_up=start + length)
        return lines.take(start + length, keep=line_bytes)


def _stream_parts(
    source: Source,
    number: int,
    claim: Claim,
    part_bytes: int,
    line_bytes: int,
    stretch: int,
    members: list[tuple[str, int]],
) -> Iterator[Part]:
    """Yields the claimed parts of a compressed file or archive, read from its start."""
    with open(source.path, "rb") as raw:
        seen = 0
        hurt = False
        for name, kind, read in _members(source, raw):
            if hurt and source.archive and not name:
                break  # the archive fails where its last member did: said already
            lines = LineReader(read, 0)
            index = 0
            while not lines.ended:
                part = part_name(number, len(members), index)
                wanted = claim(part)
                start = index * part_bytes
                data = b""
                if wanted:
                    data = lines.take(start + stretch, keep=line_bytes)
                lines.skip(start + part_bytes)
                index += 1
                before, seen = seen, raw.tell()
                if wanted:
                    segment = Segment(number, name, kind, data, damage=lines.damage)
                    yield Part(part, [segment], seen - before)
            members.append((name, index))
            hurt = bool(lines.damage)


def _members(source: Source, raw: IO[bytes]) -> Iterator[tuple[str, Kind, Read]]:
    """Gives (name, kind, read) of each text in a compressed file or archive."""
    read = unpacked(raw.read, source.packing)
    if not source.archive:
        yield "", source.kind, read
        return
    file: Any = Forward(read)
    known = False
    other = ""
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            kind, packing, nested = kind_of(member.name, named=False)
            hidden = member.name.rpartition("/")[2].startswith(".")
            if hidden or not member.isreg():
                continue
            if kind in (None, "parquet") or nested:
                other = other or member.name
                continue
            assert kind is not None
            known = True
            if member.issparse():
                error = tarfile.ReadError("sparse member: unpack the archive with tar")
                yield member.name, kind, _failing(error)
            else:
                content = member_reader(file, member.offset_data, member.size)
                yield member.name, kind, unpacked(content, packing)
        check_end(file, archive.offset)
        if other and not known:
            raise tarfile.ReadError(f"no member is text by its name, such as {other!r}")
    except Exception as error:
        if not is_damage(error):
            raise
        # A member without a name, that holds nothing but the news.
        yield "", "lines", _failing(error)


def _failing(error: Exception) -> Read:
    def read(size: int) -> bytes:
        raise error

    return read
