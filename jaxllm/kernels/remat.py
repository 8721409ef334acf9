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

    `body(h_BTD, layer, fullest=...)` returns the stream after the layer, and None. The
    last layer's backward pass comes first, while all layers' activations are there:
    where each layer has code of its own, it is told so.
    """
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    parts = [(False, layers)]
    if compute.remat == "products" and compute.unroll >= n_layers > 1:
        parts = list(zip((False, True), _cut(layers, n_layers - 1), strict=True))
    for fullest, part in parts:
        h_BTD, _ = jax.lax.scan(
            _rematerialised(functools.partial(body, fullest=fullest), compute),
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


def _rematerialised(body, compute: ComputeConfig):
    # The fused layer chooses by itself what to keep of a layer.
    if compute.remat == "none" or (
        compute.remat == "products" and compute.layer == "fused"
    ):
        return body
    # Unrolled, XLA would merge the recomputation with the original and undo it.
    prevent_cse = compute.unroll > 1
    if compute.remat == "layer":
        return jax.checkpoint(body, prevent_cse=prevent_cse)
    names = ("q", "k", "v", "gate", "up")
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)
