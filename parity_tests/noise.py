"""The yardstick: how far PyTorch is from itself, by depth and by tensor."""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch

from parity_tests import cases, oracle, sides
from parity_tests.cases import SMALL
from parity_tests.precision import FP32, FP64
from parity_tests.rungs_training import LONG, LONG_RECIPES, Run, our_run, their_run

DEEP = dataclasses.replace(SMALL, n_layers=8)


def measured(quick: bool = False) -> dict[str, Any]:
    """Relative L2 of logits by depth and of gradients by tensor, ours and torch's.

    Torch's own noise is its float32 against its float64, and its fused attention
    against its plain one in float32.
    """
    return {"by_depth": _by_depth(3 if quick else 1), "by_tensor": _by_tensor()}


def trajectories() -> dict[str, Any]:
    """The losses of 200 steps on both sides in float32, beside torch's float64."""
    found = {}
    for recipe in LONG_RECIPES:
        run = Run(recipe, LONG, 0)
        found[recipe] = {
            "ours, float32": our_run(run, FP32).losses,
            "reference, float32": their_run(run, FP32).losses,
            "reference, float64": their_run(run, FP64).losses,
        }
    return found


def _by_depth(every: int) -> list[dict[str, float]]:
    params = cases.spread(DEEP, 0, FP32)
    tokens = cases.text(0, (2, 128), DEEP.vocab_size)
    rows = []
    for depth in range(1, DEEP.n_layers + 1, every):
        config = dataclasses.replace(DEEP, n_layers=depth)
        cut = params | {"layers": jax.tree.map(lambda x: x[:depth], params["layers"])}  # noqa: B023
        truth = _logits(cut, config, FP64, tokens)
        fused = _logits(cut, config, FP32, tokens)
        plain = _logits(cut, config, FP32, tokens, flash_attn=False)
        mine = sides.our_logits(cut, config, FP32, tokens)
        rows.append(
            {
                "layers": depth,
                "ours to reference": _relative(mine, fused),
                "ours to float64": _relative(mine, truth),
                "reference to float64": _relative(fused, truth),
                "reference to itself": _relative(plain, fused),
            }
        )
    return rows


def _by_tensor() -> list[dict[str, Any]]:
    params = cases.trained(0, FP32)
    batch = cases.batch(0, (1, 3, 144), SMALL.vocab_size)
    grads = {
        precision.name: {
            name: grad.double().numpy()
            for name, grad in oracle.backward(
                sides.theirs(params, SMALL, precision), batch, "token"
            )[1].items()
        }
        for precision in (FP32, FP64)
    }
    run = sides.run_config(SMALL, FP32.compute(), rows=3)
    _, mine = sides.our_loss_and_grads(run, FP32, params, batch)
    ours = cases.to_torch(mine, SMALL)
    return [
        {
            "tensor": name,
            "ours to reference": _relative(ours[name], grads["fp32"][name]),
            "ours to float64": _relative(ours[name], truth),
            "reference to float64": _relative(grads["fp32"][name], truth),
        }
        for name, truth in grads["fp64"].items()
    ]


def _logits(params, config, precision, tokens, **changes) -> np.ndarray:
    with torch.no_grad():
        model = sides.theirs(params, config, precision, **changes)
        return model(torch.from_numpy(tokens)).logits.numpy()


def _relative(a, b) -> float:
    return float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))
