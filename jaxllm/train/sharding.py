"""The device mesh, and one table that says how each parameter is laid out on it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import ParallelConfig, RunConfig

AXES = ("data", "fsdp", "tensor")

# The first pattern found in a leaf's path decides. Layer leaves lead with L, which is
# scanned over and never cut. Adam's moments have their parameter's path at the end.
RULES: tuple[tuple[str, P], ...] = (
    (r"tok_embeddings/embedding$", P("tensor", "fsdp")),
    (r"layers/attention/w[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/attention/wo/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/feed_forward/w[13]/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/feed_forward/w2/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/(attention|ffn)_norm/weight$", P()),
    (r"(^|/)norm/weight$", P()),
    (r"output/kernel$", P("fsdp", "tensor")),
    (r"^(step|opt/count|guard/(seen|logs))$", P()),
)


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges `devices` (default: all there are) as data x fsdp x tensor.

    Raises: ValueError naming the axes and the number of devices if they don't agree.
    """
    devices = jax.devices() if devices is None else devices
    shape = {axis: getattr(parallel, axis) for axis in AXES}
    given = math.prod(size for size in shape.values() if size != -1)
    for axis, size in shape.items():
        if size == -1:
            shape[axis] = max(1, len(devices) // given)
    if math.prod(shape.values()) != len(devices):
        wanted = " x ".join(f"parallel.{axis}={shape[axis]}" for axis in AXES)
        raise ValueError(
            f"{wanted} does not make {len(devices)} device(s): change the axes, or "
            f"the devices that are visible"
        )
    return Mesh(
        np.array(devices).reshape(tuple(shape.values())),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def check_divides(config: RunConfig, mesh: Mesh) -> None:
    """Checks that rows, tokens, heads, widths and vocabulary cut evenly.

    Raises: ValueError naming the field, its value and the axis.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = config.train.batch_size // config.train.accumulate
    if micro % rows:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} in {config.train.accumulate} "
            f"part(s) gives {micro} rows, which do not divide by {rows} devices "
            f"(parallel.data={mesh.shape['data']} x parallel.fsdp="
            f"{mesh.shape['fsdp']}): use a multiple of "
            f"{rows * config.train.accumulate}"
        )
    model = config.model
    for axis, fields in (
        ("fsdp", ("dim",)),
        ("tensor", ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")),
    ):
        for name in fields:
            if getattr(model, name) % mesh.shape[axis]:
                raise ValueError(
                    f"model.{name}={getattr(model, name)} does not divide by "
                    f"parallel.{axis}={mesh.shape[axis]}: change one"
                )
    if micro // rows * config.seq_len % mesh.shape["tensor"]:
        # The tokens of the loss are shared out over all axes.
        raise ValueError(
            f"data.seq_len={config.seq_len} with {micro // rows} row(s) a device does "
            f"not divide by parallel.tensor={mesh.shape['tensor']}: change one"
        )


def shardings(mesh: Mesh, tree: dict) -> dict:
    """Maps a tree of parameters or of train state to NamedShardings on `mesh`.

    Raises: AssertionError for a leaf that no row of RULES matches: add the row.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, spec(path)), tree
    )


def spec(path) -> P:
    """Finds the PartitionSpec of the leaf at a key path."""
    name = "/".join(key.key for key in path)
    for pattern, partition in RULES:
        if re.search(pattern, name):
            return partition
    raise AssertionError(f"no sharding rule matches the leaf {name}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of batch arrays (A, B, T): rows over data and fsdp."""
    return NamedSharding(mesh, P(None, ("data", "fsdp"), None))
