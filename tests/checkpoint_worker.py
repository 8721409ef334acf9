"""A small train state, and processes that save it: what the checkpoint tests share.

As a script: checkpoint_worker.py MODE FOLDER [...]; see `main`.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.train import checkpoint
from jaxllm.train.checkpoint import CheckpointError, Checkpoints
from jaxllm.train.digest import digest_state, flatten
from jaxllm.train.seal import Damaged

SPECS = {"kernel": P(None, "fsdp", "tensor"), "embedding": P("fsdp", "tensor")}


def make_mesh(*shape: int) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first devices."""
    devices = jax.devices()[: int(np.prod(shape))]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, names, (AxisType.Auto,) * 3, devices=devices)


def abstract_state(mesh: Mesh | None = None) -> dict:
    """Shapes of the state of a model of 3 layers; every kind of dtype a state has."""

    def leaf(name, shape, dtype=jnp.float32):
        layout = NamedSharding(mesh, SPECS.get(name, P())) if mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    def weights(dtype):
        return {
            "layers": {
                "attention": {"wq": {"kernel": leaf("kernel", (3, 16, 8), dtype)}},
                "norm": {"weight": leaf("weight", (3, 16))},
            },
            "tok_embeddings": {"embedding": leaf("embedding", (32, 16), dtype)},
        }

    return {
        "step": leaf("step", (), jnp.int32),
        "params": weights(jnp.float32),
        "opt": {
            "count": leaf("count", (), jnp.int32),
            "m": weights(jnp.bfloat16),
            "v": weights(jnp.float32),
        },
    }


def make_state(step: int, mesh: Mesh | None = None) -> dict:
    """A state whose every array is random but decided by `step`, on any mesh."""

    def leaf(path, like):
        seed = [step, *"/".join(key.key for key in path).encode()]
        if like.shape == ():
            host = np.asarray(step, like.dtype)
        else:
            host = np.random.default_rng(seed).normal(size=like.shape)
            host = host.astype(like.dtype)
        if mesh is None:
            return jnp.asarray(host)
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: host[index]
        )

    return jax.tree_util.tree_map_with_path(leaf, abstract_state(mesh))


def assert_same_bits(state: dict, expected: dict) -> None:
    """Compares two states leaf by leaf: path, shape, dtype and every bit."""
    found, wanted = flatten(state), flatten(expected)
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        mine, theirs = np.asarray(leaf), np.asarray(wanted[path])
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), path
        assert mine.tobytes() == theirs.tobytes(), path


def save_forever(folder: Path) -> None:
    """Continues from the newest step and saves one after the other, until killed."""
    checkpoints = Checkpoints(folder, keep=2)
    newest = max(checkpoints.steps(), default=0)
    if newest:
        restored = checkpoints.restore(abstract_state())
        assert restored.step == newest and not restored.skipped, restored.skipped
    for step in range(newest + 1, 10**9):
        checkpoints.save(step, make_state(step), {"step": step})
        print(step, flush=True)


def save_in_one_of_two(folder: Path, address: str, rank: str) -> None:
    """One of two processes, 2 devices each: saves, falls back, shares every error."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, int(rank))
    mesh = make_mesh(1, 4, 1)
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(step, mesh), {"step": step})
    checkpoints.wait()
    report: dict = {"digests": digest_state(make_state(2, mesh))}
    restored = checkpoints.restore(abstract_state(mesh))
    report["restored"] = [restored.step, digest_state(restored.state)]
    multihost_utils.sync_global_devices("restored")
    if rank == "0":
        (folder / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    multihost_utils.sync_global_devices("damaged")
    restored = checkpoints.restore(abstract_state(mesh))
    report["fallback"] = [restored.step, restored.skipped]
    if rank == "0":

        def lying_disk(folder, manifest):
            raise Damaged("the disk lies")

        original, checkpoint.verify_arrays = checkpoint.verify_arrays, lying_disk
    checkpoints.save(2, make_state(2, mesh), {})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        report["error"] = str(error)
    if rank == "0":
        checkpoint.verify_arrays = original
    checkpoints.save(3, make_state(3, mesh), {"step": 3})
    checkpoints.close()
    report["steps"] = checkpoints.steps()
    print(json.dumps(report), flush=True)


def main(mode: str, folder: str, *rest: str) -> None:
    modes = {"forever": save_forever, "one_of_two": save_in_one_of_two}
    modes[mode](Path(folder), *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
