"""From batches on the host to their places on the devices, of all processes."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxllm.data.batches import Batches
from jaxllm.train.run import Run
from jaxllm.train.step import Batch, Program, to_device


def prefetched(run: Run, first: int) -> Iterator[tuple[int, Batch, float]]:
    """Reads batches ahead on a thread and puts them on the devices.

    Yields the step, its batch, and the seconds waited.
    """

    offset = run.position.data_offset

    def read(step: int) -> Batch:
        parts = run.config.train.accumulate
        return read_batch(run.program, run.train, step + offset, parts=parts)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = deque(
            pool.submit(read, step)
            for step in range(first, min(first + 2, run.total_steps))
        )
        try:
            for step in range(first, run.total_steps):
                begun = time.perf_counter()
                batch = ahead.popleft().result()
                if step + 2 < run.total_steps:
                    ahead.append(pool.submit(read, step + 2))
                yield step, batch, time.perf_counter() - begun
        finally:
            for future in ahead:
                future.cancel()


def read_batch(program: Program, batches: Batches, step: int, *, parts: int) -> Batch:
    """Reads the batch of a step as A = `parts` micro-batches, arrays (A, B, T).

    Each process reads only the rows of its own devices.
    """
    if jax.process_count() == 1:
        return to_device(program, batches[step], parts=parts)
    b = batches.batch_size // parts
    shape = (parts, b, batches.seq_len)
    first, last = own_rows(program, shape)
    cuts = [
        batches.read(step, slice(part * b + first, part * b + last))
        for part in range(parts)
    ]

    def put(name: str) -> jax.Array:
        local = np.stack([cut[name] for cut in cuts])

        def piece(index):
            start, stop, _ = index[1].indices(b)
            return local[index[0], start - first : stop - first, index[2]]

        return jax.make_array_from_callback(shape, program.batch_sharding, piece)

    return {name: put(name) for name in cuts[0]}


def own_rows(program: Program, shape: tuple[int, ...]) -> tuple[int, int]:
    """The first row of a micro-batch that this process's devices hold, and the one
    after the last; `shape` is (A, B, T)."""
    places = program.batch_sharding.addressable_devices_indices_map(shape).values()
    ends = [place[1].indices(shape[1])[:2] for place in places if place is not None]
    return min(first for first, _ in ends), max(last for _, last in ends)
