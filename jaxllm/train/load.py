"""Loads the trained weights of a run, for those who only read."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ComputeConfig, RunConfig
from jaxllm.kernels.native import has_native
from jaxllm.model import Transformer
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.run_folder import RunFolder
from jaxllm.train.step import resolve_compute


@dataclass(frozen=True)
class Loaded:
    """Weights of a run at one step, with what is needed to compute with them."""

    config: RunConfig
    graphdef: Any
    params: dict
    step: int


def load_params(
    folder: RunFolder, *, step: int | None = None, compute: ComputeConfig | None = None
) -> Loaded:
    """Reads a run's weights onto the first device; the newest undamaged step's.

    Raises: ValueError if `folder` holds no run, or no such step that is undamaged.
    """
    config = folder.load_config()
    graphdef = network(replace(config, compute=compute or config.compute))
    step, params = Checkpoints(folder.checkpoints).read_arrays("params/", step=step)
    return Loaded(config, graphdef, jax.tree.map(jnp.asarray, params), step)


def network(config: RunConfig) -> Any:
    """The graph of a run's network, as it is computed on the first device."""
    device = jax.devices()[0]
    config = replace(config, compute=for_device(config.compute, device))
    compute = resolve_compute(config, device)
    return nnx.split(
        nnx.eval_shape(lambda: Transformer(config.model, compute, rngs=nnx.Rngs(0)))
    )[0]


def for_device(compute: ComputeConfig, device: Any) -> ComputeConfig:
    """The settings of a run that was trained elsewhere: what asks for kernels that
    `device` does not have is auto."""
    asked = {"gemm": compute.ours}
    if compute.attention == "native":
        asked["attention"] = "native"
    lacking = {
        name: "auto"
        for name, method in asked.items()
        if method and not has_native(device, method)
    }
    return replace(compute, **lacking)
