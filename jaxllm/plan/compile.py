"""Compiles a run's train step for a GPU that this machine does not have."""

import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

# Read by the CUDA plugin and by XLA when they load, so set before either does. Without
# a device there is no autotuning; without a driver the plugin would not register.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    ).strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from jaxllm.config import RunConfig  # noqa: E402
from jaxllm.plan import hlo  # noqa: E402
from jaxllm.plan.targets import Target  # noqa: E402
from jaxllm.train.sharding import make_mesh  # noqa: E402
from jaxllm.train.step import Program, build  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """A compiled step, per device, and what it was compiled for."""

    target: Target | None
    program: Program
    devices: int
    tokens: int
    """Tokens of a step on one device, over all micro-batches."""
    text: str
    kernels: list[hlo.Kernel]
    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    alias_bytes: int
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """Arguments, temporaries, and outputs that reuse no argument."""
        return (
            self.argument_bytes
            + self.temp_bytes
            + max(0, self.output_bytes - self.alias_bytes)
        )

    @property
    def copies(self) -> list[hlo.Kernel]:
        """Plain copies of more than 1 MB."""
        return [k for k in self.kernels if k.kind == "copy" and k.written > 1e6]

    def per_token(self, *kinds: str) -> float:
        """KiB a token that kernels of these kinds (all of them if none) move."""
        total = sum(
            k.moved * k.runs for k in self.kernels if not kinds or k.kind in kinds
        )
        return total / self.tokens / 1024


def devices(target: Target, count: int) -> list[Any]:
    """Descriptions of `count` GPUs, to make a mesh of: one node, or nodes of 8.

    Raises: RuntimeError saying what to install if the CUDA plugin is not there.
    """
    nodes = count // 8 if count % 8 == 0 else 1
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target.description,
            topology=f"1x{nodes}x{count // nodes}",
        )
    except Exception as error:
        raise RuntimeError(
            "compiling for a GPU needs the CUDA plugin of the same version as jax "
            f"{jax.__version__}: pip install 'jaxllm[gpu-compile]'"
        ) from error
    return list(topology.devices)


def plan(
    config: RunConfig,
    target: Target | None,
    *,
    count: int = 1,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Compiles the step of `config` for `count` GPUs; None is this machine's CPU, as
    `count` devices.

    Raises: ValueError if the run does not fit so many; RuntimeError as `devices` does.
    """
    if target is None:
        jax.config.update("jax_num_cpu_devices", count)
        chosen = jax.devices("cpu")
    else:
        chosen = devices(target, count)
    program = build(config, make_mesh(config.parallel, chosen), total_steps=1000)
    start = time.monotonic()
    lowered = program.train_step.lower(program.abstract_state, batch(program))
    compiled = lowered.compile(compiler_options=options)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None
    return Plan(
        target=target,
        program=program,
        devices=count,
        tokens=config.train.batch_size * config.seq_len // count,
        text=text,
        kernels=hlo.Program(text).kernels(),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        compile_s=time.monotonic() - start,
    )


def batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and layouts of a step's batch."""
    config = program.config
    micro = config.train.batch_size // config.train.accumulate
    shape = (config.train.accumulate, micro, config.seq_len)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.batch_sharding)
        for name in ("inputs", "targets", "loss_mask")
    }


def with_batch(config: RunConfig, rows: int) -> RunConfig:
    """The same run with `rows` rows a step in one micro-batch."""
    return replace(config, train=replace(config.train, batch_size=rows, accumulate=1))


def attention_calls(text: str) -> tuple[int, int]:
    """How many cuDNN attention calls a program makes, forward and backward."""
    backward = len(re.findall(r'custom_call_target="__cudnn\$fmha\w*Backward"', text))
    every = len(re.findall(r'custom_call_target="__cudnn\$fmha', text))
    return every - backward, backward
