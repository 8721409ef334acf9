"""Both sides of every comparison: our functions, jitted, and the reference's model."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import (
    ComputeConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from jaxllm.model import Transformer
from jaxllm.train import step
from jaxllm.train.sharding import make_mesh
from parity_tests.cases import reference_config, to_torch
from parity_tests.precision import Precision
from torch_ref import k_model


def run_config(
    model: ModelConfig,
    compute: ComputeConfig,
    *,
    optim: OptimConfig | None = None,
    rows: int = 1,
    accumulate: int = 1,
    seed: int = 0,
) -> RunConfig:
    """A run of `accumulate` micro-batches of `rows` rows."""
    return RunConfig(
        model=model,
        compute=compute.resolve(n_layers=model.n_layers),
        optim=OptimConfig() if optim is None else optim,
        train=TrainConfig(
            batch_size=rows * accumulate, accumulate=accumulate, seed=seed
        ),
    )


@dataclass(frozen=True)
class Ours:
    """Our model's functions for one configuration. Parameters come as arguments."""

    graphdef: Any
    logits: Any
    """(params, tokens, **inputs of Transformer.__call__) to logits_BTV."""
    loss_and_grads: Any
    """(params, batch) to the loss of one update and its gradients, before the clip."""


@functools.cache
def ours(config: RunConfig) -> Ours:
    """Builds and jits them once; `forget` drops them when a mutant comes or goes."""

    def create():
        return Transformer(config.model, config.compute, rngs=nnx.Rngs(0))

    with jax.enable_x64(config.compute.param_dtype == "float64"):
        graphdef, _ = nnx.split(nnx.eval_shape(create))

    def logits(params, tokens, **inputs):
        return nnx.merge(graphdef, params)(tokens, **inputs)

    def loss_and_grads(params, batch, at):
        return step.loss_and_grads(config, graphdef, params, batch, at)

    return Ours(graphdef, jax.jit(logits), jax.jit(loss_and_grads))


def our_logits(
    params: dict, config: ModelConfig, precision: Precision, tokens, **changes
) -> np.ndarray:
    """Logits of `tokens` (B, T); `changes` are fields of ComputeConfig."""
    functions = ours(run_config(config, precision.compute(**changes)))
    with precision.active():
        return np.asarray(functions.logits(params, np.asarray(tokens, np.int32)))


def our_loss_and_grads(
    config: RunConfig, precision: Precision, params: dict, batch: dict, at: int = 0
) -> tuple[np.ndarray, dict]:
    """Loss and gradients of one update, as NumPy arrays."""
    with precision.active():
        loss, grads = ours(config).loss_and_grads(params, batch, np.int32(at))
        return np.asarray(loss), jax.tree.map(np.asarray, grads)


@functools.cache
def program(config: RunConfig, total_steps: int, devices: tuple[int, int, int]):
    """Our compiled step on a (data, fsdp, tensor) mesh of CPU devices."""
    with jax.enable_x64(config.compute.param_dtype == "float64"):
        return step.build(config, mesh(devices), total_steps=total_steps)


def mesh(devices: tuple[int, int, int] = (1, 1, 1)) -> Mesh:
    """A mesh of the first devices there are."""
    count = int(np.prod(devices))
    return make_mesh(ParallelConfig(*devices), jax.devices()[:count])


def forget() -> None:
    """Drops every traced function, so that patched code is traced anew."""
    ours.cache_clear()
    program.cache_clear()


def theirs(
    params: dict, config: ModelConfig, precision: Precision, **changes
) -> k_model.Transformer:
    """The reference with our weights, loaded strictly, dropout off."""
    model = k_model.Transformer(reference_config(config, **changes))
    torch.nn.Module.to(model, dtype=precision.torch_dtype)
    state = {
        name: torch.tensor(np.asarray(tensor), dtype=precision.torch_dtype)
        for name, tensor in to_torch(params, config).items()
    }
    model.load_state_dict(state, strict=True)
    return model.eval()


def as_torch(x: Any) -> torch.Tensor:
    """A copy of an array; ids become int64, which the reference wants."""
    tensor = torch.tensor(np.asarray(x))
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained tensors, a tied head once."""
    return dict(model.named_parameters())
