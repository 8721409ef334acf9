"""The rung of dropout: the reference drops by the very masks that ours derives."""

import dataclasses

import jax
import numpy as np
import torch

from parity_tests import cases, sides
from parity_tests.cases import TINY
from parity_tests.compare import Pairs
from parity_tests.oracle import backward
from parity_tests.precision import Precision
from parity_tests.rungs_paths import CPU

DROPPED = dataclasses.replace(TINY, dropout=0.2)


def dropout(precision: Precision, seed: int) -> Pairs:
    """Loss and gradients with dropout, the reference dropping by the very same masks.

    The masks are derived here from the keys as model.py and step.py document them: the
    run's seed, the step, the micro-batch, then embedding, layer, and place in a layer.
    """
    run_seed = min(seed, 1)  # part of the compiled step: two of them show that it is
    params = cases.spread(DROPPED, seed, precision)
    other = sides.theirs(params, DROPPED, precision)
    pairs: Pairs = {}
    for at, n_micro in ((0, 2), (5, 2), (3, 1)):
        batch = cases.batch(seed, (n_micro, 2, 20), DROPPED.vocab_size)
        run = sides.run_config(
            DROPPED,
            precision.compute(**CPU),
            rows=2,
            accumulate=n_micro,
            seed=run_seed,
        )
        masks = _Masks(0.2)
        other.add_module("dropout", masks)
        for layer in other.layers:
            layer.add_module("dropout", masks)
        for micro in range(n_micro):
            with precision.active():  # which decides how many random bits are drawn
                masks.queue += _keep_masks(run_seed, at, micro, (2, 20, TINY.dim))
        mine, grads = sides.our_loss_and_grads(run, precision, params, batch, at=at)
        theirs, their_grads = backward(other, batch, "token")
        assert not masks.queue
        by_name = cases.to_torch(grads, DROPPED)
        pairs[f"step {at}: loss"] = (mine, theirs)
        for tensor, grad in their_grads.items():
            pairs[f"step {at}: d {tensor}"] = (by_name[tensor], grad.numpy().copy())
    return pairs


class _Masks(torch.nn.Module):
    """nn.Dropout with masks that are known beforehand, in the order of their use."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.queue = rate, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drops by the next mask and scales up what is kept."""
        return x * self.queue.pop(0) / (1 - self.rate)


def _keep_masks(seed: int, at: int, micro: int, shape) -> list[torch.Tensor]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), at), micro)
    first, rest = jax.random.split(key)
    keys = [first]
    for layer_key in jax.random.split(rest, DROPPED.n_layers):
        keys += list(jax.random.split(layer_key))
    return [torch.tensor(np.asarray(jax.random.bernoulli(k, 0.8, shape))) for k in keys]
