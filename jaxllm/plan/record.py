"""What scaling.py computes from: steps compiled at two depths, in figures."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from math import prod
from typing import Any

from jaxllm.config import ComputeConfig, RunConfig, TrainConfig
from jaxllm.parallel import ParallelConfig
from jaxllm.plan import hlo
from jaxllm.plan.compile import Plan, plan
from jaxllm.plan.report import roofline
from jaxllm.plan.scaling import CHECKS, DEPTHS, MESHES, NEEDED, SIZES
from jaxllm.plan.targets import TARGETS
from jaxllm.train.metrics import flops_per_token


def versions() -> dict[str, str]:
    """The versions that decide what is compiled."""
    return {name: version(name) for name in ("jax", "jaxlib", "jax-cuda12-plugin")}


def compiled(size: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The figures of one size for H100s, with their mesh and depth.

    Raises: RuntimeError if the CUDA plugin is not there.
    """
    meshes = MESHES if size in CHECKS else NEEDED
    todo = [(mesh, depth) for mesh in meshes for depth in DEPTHS]
    todo += [(mesh, SIZES[size][0].n_layers) for mesh in CHECKS.get(size, ())]
    for mesh, depth in todo:
        yield mesh, depth, figures(compile_step(size, mesh, depth))


def compile_step(size: str, mesh: str, depth: int) -> Plan:
    """Compiles the step of `size` with `depth` layers on `mesh`."""
    model, rows = SIZES[size]
    gpus = prod(MESHES[mesh])
    config = RunConfig(
        model=replace(model, n_layers=depth),
        compute=ComputeConfig(residual_dtype="bfloat16", remat="products"),
        parallel=ParallelConfig(*MESHES[mesh]),
        train=TrainConfig(batch_size=rows * gpus),
    )
    return plan(config, TARGETS["h100"], count=gpus)


def figures(step: Plan) -> dict[str, Any]:
    """Per GPU: tokens, FLOPs, roofline, memory, and what is exchanged, summed by kind
    and group; `bare` is the part with no product between its start and its end."""
    config = step.program.config
    guess = roofline(step)
    assert guess is not None
    sums: dict[tuple[str, int], dict[str, int]] = {}
    for one in hlo.Program(step.text).collectives():
        empty = {"runs": 0, "bytes": 0, "bare_runs": 0, "bare_bytes": 0}
        total = sums.setdefault((one.kind, one.group), empty)
        for part in ("", "bare_") if one.behind == 0 else ("",):
            total[part + "runs"] += one.runs
            total[part + "bytes"] += one.bytes * one.runs
    return {
        "tokens": step.tokens,
        "flops": flops_per_token(config.model, config.seq_len)[0] * step.tokens,
        "matmul_s": guess["matmul_s"],
        "attention_s": guess["attention_s"],
        "rest_s": guess["rest_s"],
        "argument_bytes": step.argument_bytes,
        "temporary_bytes": step.temp_bytes,
        "collectives": [
            {"kind": kind, "group": group} | total
            for (kind, group), total in sorted(sums.items())
        ],
    }
