"""How likely a network finds given text: log-probabilities of tokens, in rows.

B rows, T tokens, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.kernels.cross_entropy import logits
from jaxllm.model import Transformer

ROWS = 8
"""Rows of one batch; fewer are filled up, so that one program serves all."""


class Scorer:
    """Scores rows of tokens with one set of weights; compiles once a row length."""

    def __init__(self, graphdef: Any, params: dict):
        self._graphdef, self._params = graphdef, params
        self.config = nnx.merge(graphdef, params).config

    def score(self, rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores up to ROWS rows of up to max_seq_len + 1 ids each.

        Returns for each row of n ids the log-probabilities in nats of its last n - 1,
        given those before in the row, as float32; and whether each was the likeliest.
        """
        assert 0 < len(rows) <= ROWS, len(rows)
        longest = max(max(map(len, rows)) - 1, 1)
        width = 16
        while width < longest:
            width *= 2
        inputs_BT = np.zeros((ROWS, min(width, self.config.max_seq_len)), np.int32)
        targets_BT = np.zeros_like(inputs_BT)
        for b, row in enumerate(rows):
            inputs_BT[b, : len(row) - 1] = row[:-1]
            targets_BT[b, : len(row) - 1] = row[1:]
        scored = _score(self._graphdef, self._params, inputs_BT, targets_BT)
        log_p_BT, best_BT = map(np.asarray, scored)
        return [
            (log_p_BT[b, : len(row) - 1], best_BT[b, : len(row) - 1])
            for b, row in enumerate(rows)
        ]


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, params, inputs_BT, targets_BT):
    model: Transformer = nnx.merge(graphdef, params)
    h_BTD, head_VD = model.hidden(inputs_BT)[0], model.head_VD()

    def row(_, inputs):
        # A row at a time: logits of all would be the largest array by far.
        h_TD, targets_T = inputs
        logits_TV = logits(h_TD, head_VD)
        picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        log_p_T = picked_T - jax.nn.logsumexp(logits_TV, axis=-1)
        return None, (log_p_T, jnp.argmax(logits_TV, axis=-1) == targets_T)

    return jax.lax.scan(row, None, (h_BTD, targets_BT))[1]
