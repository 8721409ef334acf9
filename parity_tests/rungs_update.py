"""Rungs of single updates: the optimizer alone, accumulation, meshes, skipped steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm.config import OptimConfig
from jaxllm.train import optim as ours_optim
from parity_tests import cases, oracle, sides
from parity_tests.cases import TINY
from parity_tests.compare import Pairs
from parity_tests.oracle import backward
from parity_tests.precision import Precision
from parity_tests.rungs_training import MODERN, RECIPES, REFERENCE, Run, paired

SHORT = 24
"""Tokens of a row where only the step around the model is looked at."""
OPTIMIZERS: dict[str, OptimConfig] = {
    "adam as the seed": REFERENCE,
    "adamw": dataclasses.replace(MODERN, warmup_steps=3),
    "adamw, no momentum, wide eps": dataclasses.replace(
        MODERN, beta1=0.0, beta2=0.0, eps=1e-3, clip_norm=0.0, weight_decay=0.3
    ),
    "adam told to decay, which it does not": dataclasses.replace(
        REFERENCE, weight_decay=0.3, clip_norm=0.05
    ),
}


def update(precision: Precision, seed: int) -> Pairs:
    """Six updates of a few tensors by given gradients: schedule, clip and Adam."""
    rng = np.random.default_rng((51, seed))
    shapes = {
        "norm": {"weight": (7,)},
        "layers": {
            "wq": {"kernel": (2, 5, 3)},
            # A vector that is a matrix here, because layers are stacked.
            "ffn_norm": {"weight": (2, 5)},
        },
        "tok_embeddings": {"embedding": (11, 4)},
        "output": {"kernel": (4, 11)},
    }
    is_shape: Any = lambda x: isinstance(x, tuple)  # noqa: E731

    def draw(scale):
        return jax.tree.map(
            lambda shape: (scale * rng.standard_normal(shape)).astype(precision.dtype),
            shapes, is_leaf=is_shape,
        )  # fmt: skip

    start, total = draw(1.0), 8
    # Some gradients are clipped and some are not; the last is nearly nothing.
    grads = [draw(scale) for scale in (1.0, 0.01, 3.0, 0.1, 1e-3, 1e-9)]
    pairs: Pairs = {}
    for name, optim in OPTIMIZERS.items():
        weights = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(start)]
        decay = optim.weight_decay if optim.algorithm == "adamw" else 0.0
        leaves = jax.tree_util.tree_leaves_with_path(start)
        matrix = [path[-1].key != "weight" for path, _ in leaves]
        groups = [
            {"params": [weight], "weight_decay": decay * is_matrix}
            for weight, is_matrix in zip(weights, matrix, strict=True)
        ]
        kind = torch.optim.AdamW if optim.algorithm == "adamw" else torch.optim.Adam
        adam = kind(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        with precision.active():
            params = jax.tree.map(jnp.asarray, start)
            opt = ours_optim.init(params)
            for at, grad in enumerate(grads):
                lr = ours_optim.learning_rate(optim, jnp.int32(at), total_steps=total)
                clip = ours_optim.clip_coefficient(optim, ours_optim.global_norm(grad))
                params, opt = ours_optim.update(optim, params, grad, opt, lr, clip)
                rate = oracle.learning_rate(optim, at, total_steps=total)
                for group in adam.param_groups:
                    group["lr"] = rate
                for weight, g in zip(weights, jax.tree.leaves(grad), strict=True):
                    weight.grad = torch.tensor(g)
                if optim.clip_norm:
                    torch.nn.utils.clip_grad_norm_(weights, optim.clip_norm)
                adam.step()
            moved = [jax.tree.leaves(tree) for tree in (params, opt["m"], opt["v"])]
        for i, weight in enumerate(weights):
            where = f"{name}: {jax.tree_util.keystr(leaves[i][0])}"
            state = adam.state[weight]
            pairs[where] = (moved[0][i], weight.detach().numpy())
            pairs[f"{where} m"] = (moved[1][i], state["exp_avg"].numpy())
            pairs[f"{where} v"] = (moved[2][i], state["exp_avg_sq"].numpy())
    return pairs


def accumulation(precision: Precision, seed: int) -> Pairs:
    """Loss and gradients of 3 micro-batches, in both means; one of them is empty."""
    params = cases.spread(TINY, seed, precision)
    other = sides.theirs(params, TINY, precision)
    pairs: Pairs = {}
    batch = cases.batch(seed, (3, 2, SHORT), TINY.vocab_size)
    batch["loss_mask"][1] = False
    for loss_norm in ("token", "micro_batch"):
        run = sides.run_config(
            TINY, precision.compute(), rows=2, accumulate=3,
            optim=dataclasses.replace(MODERN, loss_norm=loss_norm),
        )  # fmt: skip
        mine, grads = sides.our_loss_and_grads(run, precision, params, batch)
        theirs, their_grads = backward(other, batch, loss_norm)
        pairs[f"{loss_norm}: loss"] = (mine, theirs)
        by_name = cases.to_torch(grads, TINY)
        for tensor, grad in their_grads.items():
            pairs[f"{loss_norm}: d {tensor}"] = (by_name[tensor], grad.numpy())
        # Nothing to learn from is no reason for a NaN, which would skip the step.
        nothing = batch | {"loss_mask": np.zeros_like(batch["loss_mask"])}
        mine, grads = sides.our_loss_and_grads(run, precision, params, nothing)
        pairs[f"{loss_norm}, all masked: loss"] = (mine, np.zeros_like(mine))
        for tensor, grad in cases.to_torch(grads, TINY).items():
            where = f"{loss_norm}, all masked: d {tensor}"
            pairs[where] = (grad, np.zeros_like(grad))
    return pairs


def one_recipe(precision: Precision, seed: int) -> Pairs:
    """Three compiled steps of the accumulating AdamW recipe: all that they leave."""
    run = Run("adamw, token mean, A=4", 3, seed, length=SHORT)
    return _all_kinds(run, precision)


ON_GPU: dict = {
    "layer": "fused", "gate_up": "joined", "embedding": "sorted",
    "cross_entropy": "chunked",
}  # fmt: skip
ON_MESH = dataclasses.replace(TINY, vocab_size=96, tie_word_embeddings=False)


def mesh(precision: Precision, seed: int) -> Pairs:
    """The same steps over 8 devices, cut along data, fsdp, tensor; fast forms too."""
    recipe = "reference, A=4"
    assert RECIPES[recipe][1] == 4
    run = Run(recipe, 2, seed, model=ON_MESH, rows=4, length=SHORT, mesh=(2, 2, 2))
    pairs = _all_kinds(run, precision)
    if seed == 0 and precision.name == "fp64":
        run = dataclasses.replace(run, recipe="adamw, token mean, A=1")
        fast = _all_kinds(run, precision, **ON_GPU)
        pairs |= {f"fast forms: {name}": pair for name, pair in fast.items()}
    return pairs


def _all_kinds(run: Run, precision: Precision, **compute) -> Pairs:
    return {
        f"{kind} {name}": pair
        for kind, pairs in paired(run, precision, **compute).items()
        for name, pair in pairs.items()
    }


def skipped(precision: Precision, seed: int) -> Pairs:
    """A step that is not finite moves nothing but the step, and says so."""
    config = sides.run_config(TINY, precision.compute(), optim=MODERN, rows=2)
    batch = cases.batch(seed, (1, 2, SHORT), TINY.vocab_size)
    good = cases.spread(TINY, seed, precision)
    bad = cases.spread(TINY, seed, precision)
    bad["norm"]["weight"][3] = np.nan
    pairs: Pairs = {}
    with precision.active():
        program = sides.program(config, 10, (1, 1, 1))
        for name, params in (("good", good), ("bad", bad)):
            before = jax.tree.map(jnp.asarray, params)
            state = {"step": jnp.int32(4), "params": before,
                     "opt": ours_optim.init(before)}  # fmt: skip
            state = jax.tree.map(jnp.array, state)
            state, metrics = program.train_step(state, batch)
            state = jax.tree.map(np.asarray, state)
            is_bad = name == "bad"
            pairs[f"{name}: skipped"] = (int(metrics["skipped"]), int(is_bad))
            pairs[f"{name}: step"] = (state["step"], 5)
            pairs[f"{name}: count"] = (state["opt"]["count"], int(not is_bad))
            pairs[f"{name}: tokens"] = (metrics["tokens"], batch["loss_mask"].sum())
            opt, zeros = state["opt"], ours_optim.init(before)
            for part, now, then in (
                ("params", state["params"], before),
                ("m", opt["m"], zeros["m"]),
                ("v", opt["v"], zeros["v"]),
            ):
                both = jax.tree.leaves(now), jax.tree.leaves(then)
                moved = [not _equal(a, b) for a, b in zip(*both, strict=True)]
                expected = [not is_bad] * len(moved)
                pairs[f"{name}: {part} moved"] = (moved, expected)
    return pairs


def _equal(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
