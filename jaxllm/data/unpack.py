"""Compressed and damaged files as plain bytes: what can be read is, then it is said."""

import bz2
import gzip
import io
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

CHUNK = 1 << 20
Read = Callable[[int], bytes]
"""Gives up to so many bytes, at least one, or none at the end."""


class LineReader:
    """Reads bytes forward and hands out stretches of whole lines."""

    def __init__(self, read: Read, position: int):
        self._read = read
        self._rest = b""
        self.position = position
        """Where the next line to hand out begins."""
        self.ended = False
        self.damage = ""

    def take(self, stop: int, *, keep: int) -> bytes:
        """Hands out the lines that begin before `stop`.

        The last may reach beyond `stop`; of what is more than `keep` bytes beyond, one
        byte is kept. What stands before damage without a line end is dropped.
        """
        limit = stop + keep + 1
        pieces = [piece[: max(limit - start, 0)] for start, piece in self._pieces(stop)]
        data = b"".join(pieces)
        return data[: data.rfind(b"\n") + 1] if self.damage else data

    def skip(self, stop: int, *, give_up: float = math.inf) -> None:
        """Goes on to the first line that begins at `stop` or behind it, or as far as
        `give_up` if the lines before do not end earlier."""
        for start, _ in self._pieces(stop):
            if start >= give_up:
                return

    def _pieces(self, stop: int) -> Iterator[tuple[int, bytes]]:
        """Walks to the end of the lines that begin before `stop`; gives each piece and
        where it starts."""
        inside = False  # a line that began before `stop` and has not ended
        while (self.position < stop or inside) and not self.ended:
            if not self._rest:
                self._rest = self._more()
                if self.ended:
                    break
            at = self._rest.find(b"\n", max(stop - 1 - self.position, 0))
            end = at + 1 if at >= 0 else len(self._rest)
            piece, self._rest = self._rest[:end], self._rest[end:]
            start, self.position = self.position, self.position + end
            inside = at < 0
            yield start, piece

    def _more(self) -> bytes:
        try:
            chunk = self._read(CHUNK)
        except Exception as error:
            if not is_damage(error):
                raise
            self.damage = f"unreadable from here on: {damage_reason(error)}"
            chunk = b""
        self.ended = not chunk
        return chunk


_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)


def is_damage(error: Exception) -> bool:
    """Tells damaged content from a disk or a program that fails."""
    if isinstance(error, OSError):
        return error.errno is None  # bz2 and gzip report damage so; the system does not
    zstd = type(error).__name__ == "ZstdError"
    return zstd or isinstance(error, (tarfile.TarError, *_DAMAGE))


def damage_reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Forward:
    """Read, tell and seek over a stream that only goes forward, for tarfile.

    A seek may go back as little as tarfile does, a byte. What was read before damage is
    given; only a read that has nothing to give raises it.
    """

    _KEPT = 512

    def __init__(self, read: Read):
        self._read = read
        self._buffer = b""
        self._start = 0
        self._at = 0
        self._error: Exception | None = None

    def tell(self) -> int:
        """Gives the position of the next byte."""
        return self._at

    def seek(self, position: int) -> int:
        """Goes to a position, or to the end if that comes first."""
        assert position >= self._start
        while self._start + len(self._buffer) < position and self._fill():
            self._at = self._start + len(self._buffer)
        self._at = min(position, self._start + len(self._buffer))
        return self._at

    def read(self, size: int) -> bytes:
        """Reads so many bytes, fewer only at the end or before damage."""
        while self._start + len(self._buffer) < self._at + size and self._fill():
            pass
        first = self._at - self._start
        data = self._buffer[first : first + size]
        self._at += len(data)
        if size and not data and self._error:
            raise self._error
        return data

    def _fill(self) -> bool:
        if self._error:
            return False
        try:
            chunk = self._read(CHUNK)
        except Exception as error:
            if not is_damage(error):
                raise
            self._error = error
            return False
        gone = max(self._at - self._KEPT - self._start, 0)
        self._buffer = self._buffer[gone:] + chunk
        self._start += gone
        return bool(chunk)


def member_reader(file: Forward, start: int, size: int) -> Read:
    """Reads the content of an archive's member, which begins at `start`."""
    left = size
    file.seek(start)

    def read(count: int) -> bytes:
        nonlocal left
        data = file.read(min(count, left))
        if left and not data:
            raise EOFError("the archive ends inside this member")
        left -= len(data)
        return data

    return read


def check_end(file: Forward, offset: int) -> None:
    """Checks that an archive has its end mark at `offset`, and nothing behind it.

    tarfile takes a damaged or cut header for the end.
    Raises: EOFError or tarfile.ReadError, which is damage.
    """
    file.seek(offset)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        where = "inside a header" if mark else "without the mark of its end"
        raise EOFError(f"the archive ends {where}")
    if mark.strip(b"\0"):
        raise tarfile.ReadError("the next member's header is damaged")
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("there is something behind the archive's end")


def unpacked(read: Read, packing: str) -> Read:
    """Gives a read function over the unpacked bytes of a stream."""
    if packing == ".gz":
        file: Any = _ReadOnly(read)
        # read1 hands over what came before damage; read would lose it.
        return gzip.GzipFile(fileobj=file).read1
    if packing == ".bz2":
        return _stream_after_stream(read, bz2.BZ2Decompressor)
    if packing == ".xz":
        return _stream_after_stream(read, lzma.LZMADecompressor)
    if packing == ".zst":
        return _stream_after_stream(read, _ZstdFrame)
    return read


class _ReadOnly(io.RawIOBase):
    """A read function as the file that the unpackers ask for."""

    def __init__(self, read: Read):
        self._read_some = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _stream_after_stream(unread: Read, start: Callable[[], Any]) -> Read:
    """Unpacks one stream after another to the end of the file; zeros between pass.

    The files of bz2 and lzma take what is no stream behind the first for nothing, and
    zstandard's reader a cut frame for its end: both would lose the rest silently.
    """
    stream: Any = None
    rest = b""
    behind = False

    def read(size: int) -> bytes:
        nonlocal stream, rest, behind
        while True:
            if not rest and (stream is None or stream.needs_input):
                rest = unread(CHUNK)
                if not rest and stream is not None:
                    raise EOFError("compressed file ended inside a stream")
                if not rest:
                    return b""
            if stream is None:
                rest = rest.lstrip(b"\0") if behind else rest
                if not rest:
                    continue
                stream = start()
            data = stream.decompress(rest, size)
            rest = b""
            if stream.eof:
                rest, stream, behind = stream.unused_data, None, True
            if data:
                return data

    return read


class _ZstdFrame:
    """A zstandard frame with the interface of bz2.BZ2Decompressor.

    zstandard gives all that its input makes: the input goes in by small slices, so that
    32 MiB at most come out at once, whatever the file holds.
    """

    _SLICE = 1024

    def __init__(self):
        import zstandard

        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._input = b""
        self._at = 0
        self.eof = False

    @property
    def needs_input(self) -> bool:
        return self._at >= len(self._input)

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + self._input[self._at :]

    def decompress(self, data: bytes, size: int) -> bytes:
        if data:
            self._input, self._at = self._input[self._at :] + data, 0
        made: list[bytes] = []
        length = 0
        while length < size and not self.needs_input and not self.eof:
            piece = self._input[self._at : self._at + self._SLICE]
            self._at += len(piece)
            made.append(self._frame.decompress(piece))
            length += len(made[-1])
            self.eof = self._frame.eof
        return b"".join(made)
