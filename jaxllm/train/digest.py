"""Digests of arrays: the same number on any mesh, on the device or on the host.

A digest certifies an array's bits, shape, dtype and place in the state. Each element is
read as unsigned words, mixed with its row-major position by a bijection, and the mixed
words are summed modulo 2**32 in independent lanes. Sums commute, so that the digest
does not depend on how the array is cut over devices or processes, and each device reads
only the part that it holds. Because the mix is a bijection in the word, a change of any
single element changes every lane; other changes pass both lanes by a chance of 2**-64.
It is no defence against a forger.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64",
)  # fmt: skip
LANES = 2
BLOCK = 1 << 16
"""Elements that the host form mixes at a time, so that its scratch stays in cache."""


def flatten(tree: dict) -> dict[str, Any]:
    """Maps the path of every leaf of a nested dict, keys joined by "/", to the leaf.

    Raises: ValueError where a container is not a dict, or two leaves share a path.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in _walk(tree, ""):
        if path in leaves:
            raise ValueError(f"state has two leaves at {path!r}: rename one")
        leaves[path] = leaf
    return leaves


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key in sorted(node, key=str):
            yield from _walk(node[key], f"{path}/{key}" if path else str(key))
    elif hasattr(node, "shape") and hasattr(node, "dtype"):
        yield path, node
    else:
        raise ValueError(
            f"state{f'[{path!r}]' if path else ''} is a {type(node).__name__}: a state "
            f"holds nested dicts of arrays; convert it"
        )


def digest_state(state: dict) -> dict[str, str]:
    """Maps each path of a nested dict of arrays to its array's digest in hexadecimal.

    Arrays of JAX are read where they lie, under any sharding, also over several
    processes, which must all call this; NumPy arrays are read on the host. Waits for
    the arrays to be computed.

    Raises: ValueError naming a leaf whose dtype is not in DTYPES.
    """
    # Dispatch everything before the first wait, so that small kernels queue up.
    sums = {
        path: _sum_device(leaf, _seeds(path, leaf))
        if isinstance(leaf, jax.Array)
        else _sum_host(leaf, _seeds(path, leaf))
        for path, leaf in flatten(state).items()
    }
    return {path: _hex(value) for path, value in sums.items()}


def digest_array(path: str, array: np.ndarray) -> str:
    """Returns the digest of a host array that lies at `path` in the state."""
    return _hex(_sum_host(array, _seeds(path, array)))


def _hex(sums: Any) -> str:
    return np.asarray(sums).astype(">u4").tobytes().hex()


def _seeds(path: str, leaf: Any) -> np.ndarray:
    """Returns uint32 [words, LANES, 3]: per word of an element and lane, what the row
    and the column are mixed with, and what the sum starts at."""
    dtype = leaf.dtype
    if dtype.name not in DTYPES:
        raise ValueError(
            f"state[{path!r}] has dtype {dtype}, which is not stored: use one of "
            f"{', '.join(DTYPES)} (of a random key, jax.random.key_data)"
        )
    words = math.ceil(dtype.itemsize / 4)
    text = f"{path}|{dtype.name}|{','.join(map(str, leaf.shape))}"
    digest = hashlib.shake_256(text.encode()).digest(4 * 3 * LANES * words)
    return np.frombuffer(digest, "<u4").reshape(words, LANES, 3)


def _mix(h: Any) -> Any:
    """Mixes uint32 words bijectively (the finalizer of MurmurHash3, Appleby 2011)."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


@jax.jit
def _sum_device(array: jax.Array, seeds: jax.Array) -> jax.Array:
    """Returns uint32 [words, LANES]. The seeds are an argument, so that arrays of one
    shape, as a weight and its two moments, share a compiled kernel."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = array.dtype.itemsize
    if size < 4:
        unsigned = jnp.uint8 if size == 1 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(array, unsigned)
        planes = [bits.astype(jnp.uint32)]
    else:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
        planes = [bits] if size == 4 else [bits[..., i] for i in range(size // 4)]
    # Per-axis iotas and no reshape: each device numbers the part that it holds, and
    # nothing moves between devices but the sums.
    shape = planes[0].shape or (1,)
    lead = (*shape[:-1], 1)
    row = jnp.zeros(lead, jnp.uint32)
    for axis in range(len(shape) - 1):
        stride = np.uint32(math.prod(shape[axis + 1 : -1]) % 2**32)
        row += jax.lax.broadcasted_iota(jnp.uint32, lead, axis) * stride
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    sums = []
    for plane, of_word in zip(planes, seeds, strict=True):
        for of_row, of_column, start in of_word:
            position = _mix((column ^ of_column) ^ _mix(row ^ of_row))
            mixed = _mix(plane.reshape(shape) ^ position)
            sums.append(start + jnp.sum(mixed, dtype=jnp.uint32))
    return jnp.stack(sums).reshape(seeds.shape[:2])


def _sum_host(array: Any, seeds: np.ndarray) -> np.ndarray:
    """Returns uint32 [words, LANES], as `_sum_device` but in NumPy, block by block."""
    array = np.ascontiguousarray(array)
    columns = array.shape[-1] if array.ndim else 1
    unsigned = {1: "u1", 2: "<u2"}.get(array.dtype.itemsize, "<u4")
    words = len(seeds)
    planes = array.reshape(-1).view(unsigned).reshape(-1, words)
    sums = seeds[:, :, 2].copy()
    for first in range(0, len(planes), BLOCK):
        block = planes[first : first + BLOCK].astype(np.uint32)
        index = np.arange(first, first + len(block), dtype=np.int64)
        row, column = (part.astype(np.uint32) for part in np.divmod(index, columns))
        for word in range(words):
            for lane in range(LANES):
                of_row, of_column, _ = seeds[word, lane]
                position = _mix((column ^ of_column) ^ _mix(row ^ of_row))
                mixed = _mix(block[:, word] ^ position)
                sums[word, lane : lane + 1] += np.sum(mixed, dtype=np.uint32)
    return sums
