"""Compressed and damaged files as plain bytes: what can be read is, then it is said."""

import lzma
import tarfile
import zlib
from collections.abc import Callable
from typing import IO, Any

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


class Readable:
    """The least that tarfile asks of a file."""

    def __init__(self, read: Read):
        self._read = read
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            chunk = self._read(max(size - len(self._rest), 1 << 16))
            if not chunk:
                break
            self._rest += chunk
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def unpacked(file: IO[bytes], packing: str, *, piecewise: bool = False) -> Read:
    """Gives a read function over unpacked bytes.

    read1 hands over what came before damage; read would lose it. `piecewise` says that
    reading `file` itself can fail so.
    """
    if packing == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=file).read1
    if packing == ".bz2":
        import bz2

        return bz2.BZ2File(file).read1
    if packing == ".xz":
        return lzma.LZMAFile(file).read1
    if packing == ".zst":
        return _zstd(file)
    return file.read1 if piecewise else file.read  # type: ignore[attr-defined]


def _zstd(file: IO[bytes]) -> Read:
    """Unpacks zstandard frame after frame; its own reader ends a cut frame silently."""
    import zstandard

    state: dict[str, Any] = {"frame": None, "rest": b""}

    def read(size: int) -> bytes:
        while True:
            chunk = state["rest"] or file.read(1 << 17)
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
