"""Loss on held-out documents, in nats a token and in bits per byte of their text."""

import math
from typing import Any

import jax
import numpy as np

from jaxllm.data.batches import Batches
from jaxllm.train.step import Program, to_device


def evaluate(
    program: Program,
    params: dict,
    batches: Batches,
    token_bytes: np.ndarray,
    *,
    max_rows: int,
) -> dict[str, float]:
    """Returns val_loss (nats a token), val_bpb (bits a byte) and val_tokens.

    Reads the first `max_rows` rows. `token_bytes` holds the bytes of text of each id,
    0 for special ones: their losses count, they have no bytes.
    """
    n_rows = min(max_rows, batches.n_rows)
    pending: list[Any] = []
    n_bytes = 0
    for step in range(math.ceil(n_rows / batches.batch_size)):
        batch = dict(batches[step])
        # The stream of rows has no end: what is past the last row counts nothing.
        real = np.arange(batches.batch_size) < n_rows - step * batches.batch_size
        batch["loss_mask"] = batch["loss_mask"] & real[:, None]
        n_bytes += int(token_bytes[batch["targets"]][batch["loss_mask"]].sum())
        pending.append(program.eval_step(params, to_device(program, batch, parts=1)))
    sums = jax.device_get(pending)
    loss_sum = float(sum(float(loss) for loss, _ in sums))
    n_tokens = int(sum(int(count) for _, count in sums))
    return {
        "val_loss": loss_sum / max(n_tokens, 1),
        "val_bpb": loss_sum / math.log(2) / max(n_bytes, 1),
        "val_tokens": n_tokens,
    }
