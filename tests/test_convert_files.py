"""Files of weights: written whole, cut into shards, and never trusted."""

import json
import os
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from convert_cases import (
    MODELS,
    assert_same,
    one_thread,  # noqa: F401
    trained_like,
)

from jaxllm.convert import from_state_dict, to_state_dict
from jaxllm.convert.configs import llama_config
from jaxllm.convert.folder import MARK, new_folder, publish, write_json
from jaxllm.convert.tensors import INDEX, WEIGHTS, read_tensors, write_tensors

CONFIG = MODELS["all heads, untied"]
TENSORS = to_state_dict(trained_like(CONFIG), CONFIG, format="llama")


def some_dtypes():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, (4, 3), np.uint16)
    return {
        "f64": rng.standard_normal((2, 3)),
        "f32": rng.standard_normal((5,)).astype(np.float32),
        "f16": rng.standard_normal((1, 7)).astype(np.float16),
        "bf16": bits.view(ml_dtypes.bfloat16),
        "transposed": rng.standard_normal((3, 4)).astype(np.float32).T,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(3.5).reshape(()),
    }


def test_every_dtype_and_layout_survives(tmp_path):
    written = some_dtypes()
    write_tensors(tmp_path, written)
    found = read_tensors(tmp_path)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes(), name
    theirs = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert (theirs["transposed"].numpy() == written["transposed"]).all()


def test_weights_are_as_readable_as_their_folder(tmp_path):
    tmp_path.chmod(0o755)
    write_tensors(tmp_path, TENSORS)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("limit", [1, 50_000, 200_000, 10**9])
def test_shards_open_here_and_in_transformers(tmp_path, limit):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=limit)
    sizes = [p.stat().st_size for p in tmp_path.glob("*.safetensors")]
    biggest = max(tensor.nbytes for tensor in TENSORS.values())
    assert all(size <= max(limit, biggest) + 20_000 for size in sizes)
    assert (tmp_path / INDEX).exists() == (len(sizes) > 1)
    params = from_state_dict(read_tensors(tmp_path), CONFIG, format="llama")
    assert_same(params, trained_like(CONFIG))
    write_json(tmp_path / "config.json", llama_config(CONFIG))
    model, notes = transformers.LlamaForCausalLM.from_pretrained(  # type: ignore[misc]
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes.values()), notes
    for name, tensor in model.state_dict().items():
        assert (tensor.numpy() == TENSORS[name]).all()


# Damage


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(change):
    def edit(data: bytes) -> bytes:
        header, body = header_of(data)
        change(header)
        return with_header(header, body)

    return edit


NAME = "model.norm.weight"
DAMAGE = {
    "empty": lambda d: b"",
    "shorter than its length": lambda d: d[:5],
    "cut in the header": lambda d: d[:200],
    "cut in the data": lambda d: d[:-1],
    "a byte too many": lambda d: d + b"\0",
    "header length of 2**63": lambda d: struct.pack("<Q", 2**63) + d[8:],
    "header length beyond the file": lambda d: struct.pack("<Q", len(d)) + d[8:],
    "header of 200 MB": lambda d: struct.pack("<Q", 200 * 2**20) + d[8:],
    "header is no JSON": lambda d: with_header(b"{" * 64, header_of(d)[1]),
    "header is a list": lambda d: with_header([1], header_of(d)[1]),
    "deeply nested header": lambda d: with_header(b"[" * 9999, header_of(d)[1]),
    "zeros": lambda d: bytes(len(d)),
    "gzip": lambda d: zlib.compress(d),
    "unknown dtype": edited(lambda h: h[NAME].update(dtype="F31")),
    "integers": edited(lambda h: h[NAME].update(dtype="I32")),
    "half the bytes": edited(lambda h: h[NAME].update(dtype="F16")),
    "twice the bytes": edited(lambda h: h[NAME].update(dtype="F64")),
    "another shape": edited(lambda h: h[NAME].update(shape=[32])),
    "a negative size": edited(lambda h: h[NAME].update(shape=[-64])),
    "an overflowing shape": edited(lambda h: h[NAME].update(shape=[2**62, 2**62, 64])),
    "offsets outside": edited(lambda h: h[NAME].update(data_offsets=[0, 10**12])),
    "offsets backwards": edited(lambda h: h[NAME].update(data_offsets=[256, 0])),
    "overlapping": edited(lambda h: h[NAME].update(data_offsets=[0, 256])),
    "no offsets": edited(lambda h: h[NAME].pop("data_offsets")),
    "a missing tensor": edited(lambda h: h.pop(NAME)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    write_tensors(tmp_path, TENSORS)
    file = tmp_path / WEIGHTS
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError) as refusal:
        read_tensors(tmp_path)
    text = str(refusal.value)
    assert WEIGHTS in text and "\n" not in text and len(text) < 500


def test_a_flipped_bit_in_the_header_never_goes_unnoticed_as_another_type(tmp_path):
    write_tensors(tmp_path, {"a": np.arange(6, dtype=np.float32)})
    file = tmp_path / WEIGHTS
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    for bit in range(8 * size):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = read_tensors(tmp_path)
        except ValueError:
            continue
        for tensor in found.values():
            assert tensor.dtype == np.float32 and tensor.size == 6


def shards(tmp_path):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=100_000)
    return json.loads((tmp_path / INDEX).read_text())


@pytest.mark.parametrize("place", ["../stolen.safetensors", "/etc/passwd", "..", ""])
def test_an_index_cannot_point_outside_its_folder(tmp_path, place):
    index = shards(tmp_path)
    index["weight_map"][NAME] = place
    write_json(tmp_path / INDEX, index)
    with pytest.raises(ValueError, match="must lie beside the index|is missing"):
        read_tensors(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    index = shards(tmp_path)
    places = sorted(set(index["weight_map"].values()))
    moved = dict(index["weight_map"]) | {NAME: places[0]}
    for weight_map, says in (
        (moved, "places in"),
        ({k: v for k, v in index["weight_map"].items() if k != NAME}, "places in"),
        (index["weight_map"] | {"more": places[0]}, "lacks 'more'"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        write_json(tmp_path / INDEX, {"weight_map": weight_map})
        with pytest.raises(ValueError, match=says):
            read_tensors(tmp_path)
    write_json(tmp_path / INDEX, index)
    (tmp_path / places[1]).unlink()
    with pytest.raises(ValueError, match=f"{places[1]} is missing"):
        read_tensors(tmp_path)
    (tmp_path / INDEX).write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_tensors(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        read_tensors(tmp_path)


# Folders


def test_nothing_is_left_of_a_folder_that_was_not_published(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_whole_and_nothing_else_is(tmp_path):
    target = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        with new_folder(target) as draft:
            (draft / MARK).write_text(text)
            publish(draft, target)
    assert (target / MARK).read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("!")
    (tmp_path / "file").write_text("!")
    (tmp_path / "link").symlink_to(target)
    for name in ("mine", "file", "link"):
        with pytest.raises(ValueError, match="--out"), new_folder(tmp_path / name):
            pass


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_dead_processes_left_is_cleared_up_and_the_living_are_left_alone(tmp_path):
    target = tmp_path / "out[1]"
    with new_folder(target) as draft:
        write_json(draft / MARK, {})
        publish(draft, target)
    # Killed while it wrote, and killed between two renames.
    (tmp_path / ".out[1].partial-abcdefgh").mkdir()
    (tmp_path / ".out[1].partial-abcdefgh" / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".out[1].old-abcdefgh").mkdir()
    target.rename(tmp_path / ".out[1].old-abcdefgh" / "export")
    (tmp_path / ".other.partial-abcdefgh").mkdir()
    with new_folder(target) as living, new_folder(target):
        assert living.is_dir()
        assert (target / MARK).is_file()
        left = sorted(p.name for p in tmp_path.iterdir() if "abcdefgh" in p.name)
        assert left == [".other.partial-abcdefgh"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*left, "out[1]"]
