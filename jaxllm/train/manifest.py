"""What a checkpoint says about itself: the meta, and every array's digest.

The manifest is one JSON dict, saved in the same commit as the arrays and protected by a
digest of its own:

    {"format": 1, "step": 1000, "meta": {...}, "sha256": "...",
     "arrays": {"params/norm/weight": {"shape": [64], "dtype": "float32",
                                       "digest": "..."}, ...}}
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.train.digest import digest_array, digest_state, flatten
from jaxllm.train.processes import agree, is_first, one_line
from jaxllm.train.seal import Damaged, check_seal
from jaxllm.train.step_folders import CheckpointError

FORMAT = 1
FILE = "meta/metadata"
"""Where Orbax puts the JSON item named meta, below the step's folder."""


def make_manifest(step: int, state: dict, meta: dict) -> dict:
    """Takes the digests of a state on its devices; waits for it to be computed.

    Raises: TypeError or ValueError where `meta` is not JSON or `state` not arrays.
    """
    digests = digest_state(state)
    body = {
        "format": FORMAT,
        "step": step,
        "meta": meta,
        "arrays": {
            path: {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "digest": digests[path],
            }
            for path, leaf in flatten(state).items()
        },
    }
    body = json.loads(json.dumps(body))  # tuples to lists, as they will come back
    return body | {"sha256": _sha256(body)}


def read_manifest(folder: Path, step: int) -> dict:
    """Reads and checks the manifest of the checkpoint `step` in `folder`.

    Raises: Damaged; CheckpointError when another version of jaxllm wrote it; OSError.
    """
    try:
        body = json.loads((folder / FILE).read_bytes())
        digest = body.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"file {FILE} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"file {FILE} does not hold the manifest") from None
    if digest != _sha256(body):
        raise Damaged(f"file {FILE} differs from the manifest that was written")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {body['format']}, and this jaxllm reads "
            f"{FORMAT}: install the version that wrote it"
        )
    if body["step"] != step:
        raise Damaged(f"it holds step {body['step']}")
    return body


def verify_arrays(folder: Path, manifest: dict) -> None:
    """Reads every array of a checkpoint back from disk and compares its digest.

    Reads through TensorStore, beneath Orbax: nothing here may touch the barriers and
    counters that Orbax shares between processes, since this runs in the background of
    one of them. Holds one array in memory at a time.

    Raises: Damaged naming an array; ValueError from TensorStore; OSError.
    """
    for path, expected in manifest["arrays"].items():
        _read_array(folder, path, expected)


def load_arrays(folder: Path, step: int, prefix: str) -> dict:
    """Returns the arrays of a checkpoint whose paths begin with `prefix`, on the host.

    For readers that want the weights without Adam's moments. Each array's digest is
    checked; the rest of the checkpoint is not looked at.

    Raises: Damaged, naming what is; CheckpointError when there is no such array.
    """
    manifest = read_manifest(folder, step)
    tree: dict = {}
    for path, expected in manifest["arrays"].items():
        if not path.startswith(prefix):
            continue
        try:
            array = _read_array(folder, path, expected)
        except (ValueError, OSError) as error:
            raise Damaged(f"array {path} cannot be read: {one_line(error)}") from None
        node = tree
        *parents, leaf = path.removeprefix(prefix).split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    if not tree:
        raise CheckpointError(f"checkpoint {step} in {folder} has no array {prefix}...")
    return tree


def _read_array(folder: Path, path: str, expected: dict) -> np.ndarray:
    # Orbax's layout: Zarr arrays in an OCDBT database, keys joined by dots. The
    # nested form of the path, unlike a URL, takes folders of any spelling.
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder.absolute() / 'state'}/"},
            "path": path.replace("/", ".") + "/",
        },
    }
    array = np.asarray(tensorstore.open(spec).result().read().result())
    if _describe(array) != _describe_expected(expected):
        raise Damaged(f"array {path} reads back as {_describe(array)}")
    if digest_array(path, array) != expected["digest"]:
        raise Damaged(f"array {path} does not read back as it was in memory")
    return array


def load_step(
    folder: Path,
    step: int,
    abstract: dict,
    optional: tuple[str, ...] = (),
    stranger: Callable[[dict], str] = lambda meta: "",
) -> tuple[dict, dict]:
    """Returns the state, on its devices, and the meta of the checkpoint in `folder`.

    What is `optional` at the top of the state is left out where the checkpoint or
    `abstract` lacks it. `stranger` may say of its meta why it is none of this run's.

    Raises: Damaged, on every process alike, unless the state proves to be the one that
    was saved; CheckpointError when it is, but is not of the form of `abstract`.
    """
    manifest: dict = {}
    state: dict = {}
    problem = ""
    try:
        # One process reads all files: the rest would only read the same again.
        if is_first():
            check_seal(folder)
        manifest = read_manifest(folder, step)
        problem = stranger(manifest["meta"])
    except (Damaged, OSError) as error:
        problem = one_line(error)
    # Agreed on before Orbax reads, whose barriers would leave the others waiting.
    if problem := agree(problem):
        raise Damaged(problem)
    wanted = _with_optional(manifest, abstract, optional)
    require_same_arrays(step, manifest, wanted)
    try:
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore(folder / "state", with_shardings(wanted))
    except Exception as error:
        problem = one_line(error)
    if problem := agree(problem):
        raise Damaged(problem)
    # The files are whole; what counts is what has arrived on the devices.
    for path, digest in digest_state(state).items():
        if digest != manifest["arrays"][path]["digest"]:
            raise Damaged(f"array {path} arrived otherwise than it was saved")
    state = {name: part for name, part in state.items() if name in abstract}
    return state, manifest["meta"]


def _with_optional(manifest: dict, abstract: dict, optional: tuple[str, ...]) -> dict:
    """The shapes to ask a checkpoint for: all that it holds, and whatever it lacks
    unless that is optional."""
    held = manifest["arrays"]
    there = {path.partition("/")[0] for path in held}
    wanted = {
        name: part
        for name, part in abstract.items()
        if name in there or name not in optional
    }
    # Read, proven and dropped: Orbax restores a step as a whole.
    layout = getattr(next(iter(flatten(abstract).values()), None), "sharding", None)
    if isinstance(layout, NamedSharding):
        layout = NamedSharding(layout.mesh, PartitionSpec())
    for name in sorted(there.intersection(optional).difference(abstract)):
        wanted[name] = {}
        for path, entry in held.items():
            top, _, below = path.partition("/")
            if top == name:
                wanted[name][below] = jax.ShapeDtypeStruct(
                    entry["shape"], np.dtype(entry["dtype"]), sharding=layout
                )
    return wanted


def state_bytes(abstract: dict) -> int:
    """Returns the bytes of all arrays of a state, given as arrays or as their shapes,
    over all devices but each element once: what a checkpoint takes on disk at most."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in flatten(abstract).values()
    )


def require_same_arrays(step: int, manifest: dict, abstract: dict) -> None:
    """Compares the arrays that a checkpoint holds with those that are asked for.

    Not left to Orbax, which casts to another dtype and cuts or pads to another shape
    without a word.

    Raises: CheckpointError naming the first array that differs, and how.
    """
    held = manifest["arrays"]
    wanted = flatten(abstract)
    for path in sorted(held.keys() | wanted.keys()):
        has = _describe_expected(held[path]) if path in held else "no such array"
        asks = _describe(wanted[path]) if path in wanted else "no such array"
        if has != asks:
            raise CheckpointError(
                f"checkpoint {step} was written by another configuration: {path} is "
                f"{has} there and {asks} here; use the configuration it was saved with"
            )


def with_shardings(abstract: dict) -> dict:
    """Puts each shape that has no sharding on the first device of this process."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first
        ),
        abstract,
    )


def open_manager(folder: Path) -> ocp.CheckpointManager:
    """Orbax's writer of step folders below `folder`, which deletes nothing."""
    # By default Orbax deletes nothing. What is pruned is decided here, after the proof.
    options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    return ocp.CheckpointManager(folder, options=options)


def _sha256(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"


def _describe_expected(entry: dict) -> str:
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"
