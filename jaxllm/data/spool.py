"""Parts of a packed file, on their way from the worker that unpacks it to the others.

Only one worker of a run reads a packed file: unpacking it in each would cost as much
again per worker. It leaves parts here while the others can use more, and tokenises the
next one itself when they cannot.

SPOOL/NAME.part        one part: a line of JSON, then the bytes
SPOOL/NAME.part.UUID   the same, taken
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxllm.data.reading import Part, Segment

_LOOK_S = 0.02
_SILENCE_S = 120.0
"""After so long without a sign of its reader a packed file is given up: what is left of
it is for the next run. (Workers of one machine end with one another before that.)"""


class Spool:
    """The folder that a run's workers share, with room for so many parts."""

    def __init__(self, folder: Path, room: int):
        self.folder = folder
        self.room = room
        if room:
            folder.mkdir(parents=True, exist_ok=True)

    def offer(self, part: Part) -> bool:
        """Leaves a part for others; False if they have enough already."""
        if len(self._waiting()) >= self.room:
            return False
        (segment,) = part.segments
        head = {
            "consumed": part.consumed, "source": segment.source,
            "member": segment.member, "kind": segment.kind, "damage": segment.damage,
        }  # fmt: skip
        path = self.folder / f"{part.name}.part"
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(segment.data)
        os.replace(temporary, path)
        return True

    def take(self) -> Part | None:
        """Takes a part that nobody else gets; None if there is none now."""
        for name in self._waiting():
            path = self.folder / name
            mine = path.with_name(f"{name}.{uuid.uuid4().hex}")
            try:
                os.rename(path, mine)
            except FileNotFoundError:
                continue
            with open(mine, "rb") as file:
                head = json.loads(file.readline())
                consumed = head.pop("consumed")
                segment = Segment(data=file.read(), **head)
            mine.unlink()
            return Part(name.removesuffix(".part"), [segment], consumed)
        return None

    def take_all(self, readers: list["Reader"]) -> Iterator[Part]:
        """Takes what comes until every reader has said that it has ended."""
        while True:
            ended = all(reader.has_ended() for reader in readers)
            part = self.take()
            if part is not None:
                yield part
            elif ended:
                return
            else:
                time.sleep(_LOOK_S)

    def _waiting(self) -> list[str]:
        if not self.room:
            return []
        return sorted(n for n in os.listdir(self.folder) if n.endswith(".part"))


class Reader:
    """The claim on a packed file, as others see it: alive, ended, or silent."""

    def __init__(self, claim: Path, clock: Callable[[], float] = time.monotonic):
        self.path = claim
        self.clock = clock
        self._heard = (0, clock())

    def beat(self) -> None:
        """Says that the reader lives; only the one that has the claim may."""
        os.utime(self.path)

    def end(self) -> None:
        """Says that nothing more will come."""
        self.path.with_suffix(".ended").touch()

    def has_ended(self) -> bool:
        """Tells whether the reader ended, or is not to be heard any more."""
        if self.path.with_suffix(".ended").exists():
            return True
        try:
            beat = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            beat = 0
        if beat != self._heard[0]:
            self._heard = (beat, self.clock())
        return self.clock() - self._heard[1] > _SILENCE_S
