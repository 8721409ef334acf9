"""A digest is one number per array, whatever holds it, and notices every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_worker import make_mesh, make_state
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.train import digest
from jaxllm.train.digest import digest_array, digest_state, flatten

SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 4), (300, 500)]
DTYPES = {
    "bool": bool, "int8": np.int8, "int16": np.int16, "int32": np.int32,
    "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32, "float64": np.float64,
}  # fmt: skip


def random_bits(shape, dtype, seed=0) -> np.ndarray:
    """Any bit pattern at all, NaNs with payloads and subnormals included."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_device_and_host_agree(dtype, shape):
    host = random_bits(shape, dtype)
    with jax.enable_x64(True):
        device = digest_state({"a": {"b": jnp.asarray(host)}})
    assert device == {"a/b": digest_array("a/b", host)}
    assert device == digest_state({"a": {"b": host}})  # a NumPy leaf


def test_all_supported_dtypes_are_tested():
    assert set(DTYPES) == set(digest.DTYPES)


def test_strided_and_blocked_host_arrays(monkeypatch):
    array = random_bits((60, 50), np.float32)
    expected = digest_array("x", array)
    monkeypatch.setattr(digest, "BLOCK", 7)
    assert digest_array("x", array) == expected
    assert digest_array("x", np.asfortranarray(array)) == expected
    assert digest_array("x", np.repeat(array, 2, axis=0)[::2]) == expected


def test_independent_of_the_mesh():
    digests = [
        digest_state(make_state(7, mesh))
        for mesh in (None, make_mesh(1, 8, 1), make_mesh(2, 2, 2), make_mesh(8, 1, 1))
    ]
    assert all(d == digests[0] for d in digests)


def test_no_array_moves_between_devices():
    mesh = make_mesh(2, 2, 2)
    layout = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    for dtype in (jnp.float32, jnp.bfloat16):
        array = jax.ShapeDtypeStruct((4, 64, 64), dtype, sharding=layout)
        seeds = digest._seeds("x", array)
        compiled = digest._sum_device.lower(array, seeds).compile()
        text = compiled.as_text() or ""
        assert "all-reduce" in text
        for stray in ("all-gather", "all-to-all", "collective-permute"):
            assert stray not in text
        # Nothing of the array's size either: the mixing is fused into the sum.
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 4096


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_changed_element_changes_every_lane(data):
    dtype = np.dtype(data.draw(st.sampled_from([*DTYPES.values()])))
    shape = data.draw(st.sampled_from([(1,), (5, 3), (2, 3, 4)]))
    array = random_bits(shape, dtype, seed=data.draw(st.integers(0, 99)))
    if dtype.kind == "b":
        changed = array.copy()
        changed.flat[data.draw(st.integers(0, array.size - 1))] ^= True
    else:
        raw = bytearray(array.tobytes())
        first = data.draw(st.integers(0, array.size - 1)) * dtype.itemsize
        # The lanes of the two halves of a 64-bit element are apart: change one half.
        width = min(4, dtype.itemsize)
        one_bit = st.integers(0, 8 * width - 1).map(lambda bit: 1 << bit)
        flips = data.draw(one_bit | st.integers(1, 256**width - 1))
        for i in range(width):
            raw[first + i] ^= flips >> 8 * i & 255
        changed = np.frombuffer(bytes(raw), dtype).reshape(shape)
    before, after = digest_array("x", array), digest_array("x", changed)
    for lane in range(digest.LANES):
        assert before[8 * lane : 8 * lane + 8] != after[8 * lane : 8 * lane + 8]


def test_moved_elements_renamed_and_reshaped_arrays_differ():
    array = random_bits((8, 6), np.float32)
    digests = {digest_array("x", array)}
    others = [
        ("y", array),
        ("x", array.reshape(6, 8)),
        ("x", array.T.copy()),
        ("x", array[::-1]),
        ("x", array[:, ::-1]),
        ("x", np.roll(array, 1, axis=0)),
        ("x", np.roll(array, 1, axis=1)),
        ("x", array.view(np.int32)),
        ("x", array[np.r_[1, 0, 2:8]]),
        ("x", np.concatenate([array, np.zeros((1, 6), np.float32)])),
    ]
    digests.update(digest_array(path, other) for path, other in others)
    assert len(digests) == 1 + len(others)
    zeros = [np.zeros(n, np.float32) for n in range(5)]
    assert len({digest_array("x", z) for z in zeros}) == 5
    assert digest_array("x", zeros[1]) != digest_array("x", -zeros[1])


def test_signs_of_a_weak_mix_are_absent():
    """Counters, equal values and one-bit differences give digests without repeats."""
    seen = set()
    for i in range(3000):
        seen.add(digest_array("x", np.full(4, i, np.int32)))
        seen.add(digest_array("x", np.arange(i, i + 4, dtype=np.int16)))
    # Two lanes: 6,000 numbers of 64 bits. One lane alone would repeat here and there.
    assert len(seen) == 6000
    ones = np.mean([bin(int(d, 16)).count("1") for d in seen])
    assert abs(ones - 32) < 0.3  # measured 32.0; standard deviation 4 / sqrt(6000)


def test_the_digest_does_not_change_between_versions():
    """Checkpoints outlive the code: these were computed once."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest_array("params/x", array) == "2bab08350fb3f785"
    assert digest_array("step", np.asarray(7, np.int32)) == "e852617456125ebb"
    assert digest_array("x", np.arange(3.0)) == "92a839ff76258f586572ab3639da9621"


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a": [1]}, r"state\['a'\] is a list"),
        ({"a": {"b": 1.5}}, r"state\['a/b'\] is a float"),
        ({"a": np.zeros(2, np.complex64)}, "complex64, which is not stored"),
        ({"a": jax.eval_shape(lambda: jax.random.key(0))}, "key<.*not stored"),
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, "two leaves at 'a/b'"),
    ],
)
def test_what_has_no_digest_is_refused_by_name(state, message):
    with pytest.raises(ValueError, match=message):
        digest_state(state)


def test_flatten_joins_paths():
    assert list(flatten({"b": {"x": np.zeros(1)}, "a": np.zeros(1), "c": {}})) == [
        "a",
        "b/x",
    ]
