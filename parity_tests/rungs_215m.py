"""The true size: 215,127,040 parameters in float32, logits, loss, every gradient."""

import functools

import jax
import numpy as np
import torch

from jaxllm.presets import preset
from parity_tests import cases, sides
from parity_tests.compare import Pairs
from parity_tests.oracle import backward
from parity_tests.precision import FP32, Precision

TOKENS = 256


@functools.lru_cache(maxsize=1)
def _computed(seed: int) -> dict[str, Pairs]:
    config = preset("reference").model
    params = cases.spread(config, seed, FP32)
    assert sum(x.size for x in jax.tree.leaves(params)) == 215_127_040
    batch = cases.batch(seed, (1, 1, TOKENS), config.vocab_size)
    batch["loss_mask"][..., -20:] = False
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    other = sides.theirs(params, config, FP32)
    theirs, their_grads = backward(other, batch, "token")
    with torch.no_grad():
        their_logits = other(sides.as_torch(batch["inputs"][0])).logits.numpy()
    torch.set_num_threads(threads)
    run = sides.run_config(config, FP32.compute())
    mine, grads = sides.our_loss_and_grads(run, FP32, params, batch)
    by_name = cases.to_torch(grads, config)
    logits = sides.our_logits(params, config, FP32, batch["inputs"][0])
    gradients: Pairs = {
        f"d {name}": (by_name[name], grad.numpy()) for name, grad in their_grads.items()
    }
    return {
        "logits": {"logits": (logits, their_logits)},
        "loss": {"loss": (mine, np.array(theirs))},
        "gradients": gradients,
    }


def logits(precision: Precision, seed: int) -> Pairs:
    """Logits of 256 tokens; as relative L2 and as the worst divergence of a token."""
    del precision
    return _computed(seed)["logits"]


def loss(precision: Precision, seed: int) -> Pairs:
    """The masked loss of those tokens."""
    del precision
    return _computed(seed)["loss"]


def gradients(precision: Precision, seed: int) -> Pairs:
    """Every gradient tensor, 164 of them."""
    del precision
    found = _computed(seed)["gradients"]
    assert len(found) == 164, len(found)
    return found
