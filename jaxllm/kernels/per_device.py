"""Runs a kernel on each device's own rows, where XLA cannot cut it up by itself."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")
HEADS = "tensor"


def per_device(f: Callable, *, in_specs, out_specs) -> Callable:
    """Wraps `f` in jax.shard_map over the mesh of the step that is being traced.

    The model knows no mesh: the step names it with jax.sharding.use_abstract_mesh.
    Without one (a test, a notebook), `f` is returned as it is. On one device the
    wrapping keeps custom calls such as cuDNN's out of XLA's custom partitioning, whose
    callback pointer would make every start miss the persistent compilation cache.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def axes() -> tuple[str, ...]:
    """The axes of the mesh of the step that is being traced; none without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(mesh.axis_names)


def size() -> int:
    """The number of devices of that mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


__all__ = ["HEADS", "ROWS", "P", "axes", "per_device", "size"]
