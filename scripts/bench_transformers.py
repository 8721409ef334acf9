"""What torch_ref/k_model.py takes from transformers, for machines that lack it.

The network and its arithmetic are k_model's own; transformers gives it configuration,
saving and generation, none of which a benchmark uses. Import this before torch_ref.
"""

import contextlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn


class PretrainedConfig:
    """Keeps what it is given."""

    def __init__(self, **values: Any):
        vars(self).update(values)


class GenerationMixin:
    """Nothing: no text is generated here."""


class PreTrainedModel(nn.Module):
    """A module that initialises its weights and ties its head, in this order."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        self.apply(self._init_weights)  # type: ignore[arg-type]
        if self.config.tie_word_embeddings:
            table = self.get_input_embeddings()  # type: ignore[operator]
            self.get_output_embeddings().weight = table.weight  # type: ignore[operator]


@dataclass
class CausalLMOutputWithPast:
    """The two results of a forward pass."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def stand_in() -> None:
    """Puts the above in the place of transformers, if that is not installed."""
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401

        return
    top = ModuleType("transformers")
    outputs = ModuleType("transformers.modeling_outputs")
    logging = ModuleType("transformers.utils.logging")
    vars(top).update(
        __version__="none", PretrainedConfig=PretrainedConfig,
        PreTrainedModel=PreTrainedModel, GenerationMixin=GenerationMixin,
    )  # fmt: skip
    vars(outputs)["CausalLMOutputWithPast"] = CausalLMOutputWithPast
    vars(logging)["disable_progress_bar"] = lambda: None
    for module in (top, outputs, ModuleType("transformers.utils"), logging):
        sys.modules[module.__name__] = module
