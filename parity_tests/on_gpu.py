"""What a GPU's fast arithmetic costs: TF32, bfloat16 and cuDNN against the truth.

The truth is the reference in float64, and the yardstick its bfloat16 autocast, both on
the CPU, where they are the same for everybody.
"""

import dataclasses
from typing import Any

import jax

from parity_tests import cases, rungs_bf16, sides
from parity_tests.cases import SMALL
from parity_tests.precision import FP32, FP64

MODEL = dataclasses.replace(
    SMALL, dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=None
)
"""Heads of 64, and rows of 128 tokens: what cuDNN's attention wants."""
HALF: dict[str, Any] = {"compute_dtype": "bfloat16"}
FAST: dict[str, Any] = HALF | {
    "attention": "cudnn", "layer": "fused", "embedding": "one_hot",
    "cross_entropy": "chunked",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"matmul_precision": "highest"},
    "float32, products in TF32": {},
    "bfloat16, plain": HALF,
    "bfloat16, cuDNN attention": HALF | {"attention": "cudnn"},
    "bfloat16, all fast forms": FAST,
    "bfloat16, all fast forms, bfloat16 logits": FAST | {"logits_dtype": "bfloat16"},
    "bfloat16, all fast forms, bfloat16 stream": FAST | {"residual_dtype": "bfloat16"},
    "bfloat16, goal lean": FAST
    | {"residual_dtype": "bfloat16", "logits_dtype": "bfloat16", "remat": "products"},
}


def measured(variants: dict[str, dict[str, Any]] = VARIANTS) -> dict[str, Any]:
    """Relative errors of logits, loss, gradients: autocast's, then each variant's."""
    params = cases.spread(MODEL, 0, FP32)
    batch = cases.batch(0, (1, 4, 128), MODEL.vocab_size)
    truth = rungs_bf16.torch_side(params, MODEL, FP64, batch, autocast=False)
    cast = rungs_bf16.torch_side(params, MODEL, FP32, batch, autocast=True)
    found = {"autocast": rungs_bf16.distance(cast, truth)}
    for name, changes in variants.items():
        settings = {"residual_dtype": "float32"} | changes
        config = sides.run_config(MODEL, FP32.compute(**settings), rows=4)
        with jax.default_matmul_precision(config.compute.matmul_precision):
            mine = rungs_bf16.our_side(params, config, batch)
        found[name] = rungs_bf16.distance(mine, truth)
    return found
