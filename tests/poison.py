"""Poison for a run: a factor on the loss and the gradient of chosen batches."""

from collections.abc import Callable

import jax
import numpy as np

from jaxllm.data.batches import Batches
from jaxllm.train import step as step_module


def poison(factors: dict[int, float], set_attribute: Callable = setattr) -> None:
    """Multiplies by `factors`, from training batches of the data to a factor such as
    NaN, in all runs of this process; `set_attribute` may undo itself, as pytest's."""
    true_read, true_grads = Batches.read, step_module.loss_and_grads

    def read(self, step, rows=slice(None)):
        batch = true_read(self, step, rows)
        factor = factors.get(int(step), 1.0) if self.split == "train" else 1.0
        shape = batch["inputs"].shape
        return batch | {"poison": np.full(shape, factor, np.float32)}

    def loss_and_grads(config, graphdef, params, batch, step):
        factor = batch["poison"][0, 0, 0]
        batch = {name: x for name, x in batch.items() if name != "poison"}
        loss, grads = true_grads(config, graphdef, params, batch, step)
        return loss * factor, jax.tree.map(lambda g: g * factor, grads)

    set_attribute(Batches, "read", read)
    set_attribute(step_module, "loss_and_grads", loss_and_grads)
