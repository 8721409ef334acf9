"""Stopping on a signal: the step is finished, the state saved, the run exits with 0.

SIGTERM is what schedulers send before they kill (Slurm with --signal=TERM@120,
Kubernetes, a preempted machine), SIGINT what Ctrl-C sends. The first one asks; another
one ends the process at once, with nothing but what is on disk.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 0.1
"""Seconds within which a repeated signal is the same request: timeout(1) and job
launchers signal a process and then its whole group."""


class Stop:
    """Listens for a request to stop while it is entered as a context.

    Outside the main thread, where Python takes no signals, only `request` asks.
    """

    def __init__(self):
        self.requested = False
        self._since = 0.0
        self._earlier: dict[int, Any] = {}
        self._sums: list[jax.Array] = []

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        # A thread acts on the signals. A handler in Python has to wait until the main
        # thread is back from whatever it is in, such as compiling for minutes.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._earlier_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._earlier[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._earlier:
            return
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()
        signal.set_wakeup_fd(self._earlier_fd)
        os.close(self._writer)  # ends the thread's reading
        self._thread.join()
        os.close(self._reader)

    def request(self) -> None:
        """Asks for a stop after the running step, as the first signal does."""
        self.requested = True

    def reached(self) -> bool:
        """Whether to stop after this step; to be called once a step, on every process.

        All processes get the same answer at the same step, whichever of them was asked:
        two steps later, so that none waits for its devices to hear of the others.
        """
        if jax.process_count() == 1:
            return self.requested
        self._sums.append(_sum_over_processes(self.requested))
        if len(self._sums) < 3:
            return False
        return bool(np.asarray(self._sums.pop(0)))

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] in SIGNALS:
                self._on_signal(number[0])

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            _say(f"{name}: finishing the step, then saving; once more stops at once")
        elif now - self._since > SAME_S:
            _say(f"{name} again: stopping at once")
            os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone has sent the signal
        os.write(2, f"{text}\n".encode())


def _sum_over_processes(flag: bool) -> jax.Array:
    """Adds up the flags of all processes on their devices, without waiting for it."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    mine = np.full(jax.local_device_count(), flag, np.int32)
    flags = jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), mine)
    return _summed(mesh)(flags)


@functools.cache
def _summed(mesh: Mesh):
    whole = NamedSharding(mesh, P())
    return jax.jit(lambda flags: flags.sum(), out_shardings=whole)
