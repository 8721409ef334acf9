"""Runs the stacked decoder layers, keeping for the backward pass what was asked for."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxllm.compute import ComputeConfig


def scan_layers(
    body: Callable[..., tuple[jax.Array, Any]],
    h_BTD: jax.Array,
    layers: Any,
    compute: ComputeConfig,
) -> jax.Array:
    """Passes h_BTD through the layers, whose arrays all lead with L.

    `body(h_BTD, layer, keep_up=...)` returns the stream after the layer, and None. The
    first `compute.remat_up` layers are told not to keep their up projection.
    """
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    first = min(compute.remat_up, n_layers)
    if first in (0, n_layers):
        parts = [(first == 0, layers)]
    else:
        parts = list(zip((False, True), _cut(layers, first), strict=True))
    for keep_up, part in parts:
        h_BTD, _ = jax.lax.scan(
            _rematerialised(body, compute, keep_up),
            h_BTD,
            part,
            unroll=compute.unroll or 1,
        )
    return h_BTD


def _cut(layers, first):
    """The first layers, and the rest. Their gradients are joined again, which XLA does
    as one with joining those of single layers."""
    leaves, tree = jax.tree.flatten(layers)
    halves = [jax.lax.split(x, (first, x.shape[0] - first)) for x in leaves]
    one, other = zip(*halves, strict=True)
    return tree.unflatten(one), tree.unflatten(other)


def _rematerialised(body, compute: ComputeConfig, keep_up: bool):
    body = functools.partial(body, keep_up=keep_up)
    # The fused layer chooses by itself what to keep of a layer.
    if compute.remat == "none" or (
        compute.remat == "products" and compute.layer == "fused"
    ):
        return body
    # Unrolled, XLA would merge the recomputation with the original and undo it.
    prevent_cse = compute.unroll > 1
    if compute.remat == "layer":
        return jax.checkpoint(body, prevent_cse=prevent_cse)
    names = ("q", "k", "v", "gate", *(("up",) if keep_up else ()))
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)
