"""Compressed and damaged files as plain bytes: what can be read is, then it is said."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
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
        byte is kept. With keep=0 the lines are skipped. What stands before damage
        without a line end is dropped.
        """
        pieces: list[bytes] = []
        inside = False  # a line that began before `stop` and has not ended
        while self.position < stop or inside:
            if not self._rest:
                self._rest = self._more()
                if self.ended:
                    break
            at = self._rest.find(b"\n", max(stop - 1 - self.position, 0))
            end = at + 1 if at >= 0 else len(self._rest)
            piece, self._rest = self._rest[:end], self._rest[end:]
            if keep:
                pieces.append(piece[: max(stop + keep + 1 - self.position, 0)])
            self.position += end
            inside = at < 0
        data = b"".join(pieces)
        return data[: data.rfind(b"\n") + 1] if self.damage else data

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


def unpacked(read: Read, packing: str) -> Read:
    """Gives a read function over the unpacked bytes of a stream."""
    file: Any = _ReadOnly(read)
    # read1 hands over what came before damage; read would lose it.
    if packing == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=file).read1
    if packing == ".bz2":
        import bz2

        return bz2.BZ2File(file).read1
    if packing == ".xz":
        return lzma.LZMAFile(file).read1
    if packing == ".zst":
        return _zstd(read)
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


def _zstd(unread: Read) -> Read:
    """Unpacks zstandard frame after frame; its own reader ends a cut frame silently."""
    import zstandard

    state: dict[str, Any] = {"frame": None, "rest": b""}

    def read(size: int) -> bytes:
        while True:
            chunk = state["rest"] or unread(1 << 17)
            state["rest"] = b""
            if not chunk:
                if state["frame"] is not None:
                    raise EOFError("compressed file ended inside a frame")
                return b""
            frame = state["frame"] or zstandard.ZstdDecompressor().decompressobj()
            data = frame.decompress(chunk)
            state["rest"] = frame.unused_data if frame.eof else b""
            state["frame"] = None if frame.eof else frame
            if data:
                return data

    return read
