"""What a plan says, as text and as JSON: memory, kernels, collectives, a roofline."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax

from jaxllm.plan import hlo
from jaxllm.plan.compile import Plan, attention_calls
from jaxllm.plan.targets import (
    ATTENTION_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    RESERVED_BYTES,
    Target,
)
from jaxllm.train.metrics import flops_per_token


def group(kernel: hlo.Kernel) -> str:
    """The part of a step that a kernel belongs to."""
    if kernel.kind != "elementwise":
        return kernel.kind
    for name in ("optimizer", "loss", "embedding"):
        if f"/{name}/" in kernel.source or f"({name})" in kernel.source:
            return name
    return "elementwise"


def figures(plan: Plan) -> dict[str, Any]:
    """The figures of a plan, per device; sizes in KiB are per token."""
    moved = hlo.moved_by(plan.kernels, key=group)
    everything = plan.per_token()
    return {
        "devices": plan.devices,
        "tokens": plan.tokens,
        "arguments_bytes": plan.argument_bytes,
        **{f"{name}_bytes": held for name, held in state_bytes(plan).items()},
        "temporary_bytes": plan.temp_bytes,
        "temporary_kib": plan.temp_bytes / plan.tokens / 1024,
        "peak_bytes": plan.peak_bytes,
        "largest_rows_guess": largest_guess(plan) if plan.target else None,
        "moved_kib": {k: v / plan.tokens / 1024 for k, v in sorted(moved.items())},
        "moved_all_kib": everything,
        "moved_rest_kib": everything - plan.per_token("matmul", "attention"),
        "kernels": sum(k.runs for k in plan.kernels),
        "copies": len(plan.copies),
        "attention_forward": attention_calls(plan.text)[0],
        "attention_backward": attention_calls(plan.text)[1],
        "collectives": collectives(plan),
        "compile_s": plan.compile_s,
    }


def collectives(plan: Plan) -> list[dict[str, Any]]:
    """What the devices exchange in a step, alike exchanges taken together.

    bytes: of one of them, whole, that is what every device has after a gather and
    before a reduction; on average. apart: how many are started in one place and awaited
    in another; behind: how many of those have products or attention in between.
    """
    found: dict[tuple, list[hlo.Collective]] = {}
    for one in hlo.Program(plan.text).collectives():
        found.setdefault((one.kind, one.dtypes, one.group), []).append(one)
    return [
        {
            "kind": kind,
            "dtypes": list(dtypes),
            "group": group,
            "runs": sum(one.runs for one in alike),
            "bytes": sum(one.bytes * one.runs for one in alike)
            / sum(one.runs for one in alike),
            "sent_bytes": sum(one.sent * one.runs for one in alike),
            "apart": sum(one.runs for one in alike if one.asynchronous),
            "behind": sum(one.runs for one in alike if one.behind),
        }
        for (kind, dtypes, group), alike in sorted(found.items())
    ]


def state_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of one device's share of weights and of moments."""
    state = plan.program.abstract_state

    def share(tree) -> int:
        return sum(
            prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    return {"weights": share(state["params"]), "moments": share(state["opt"])}


def room(target: Target) -> float:
    """Bytes of the card's memory that a step may take."""
    return target.memory_bytes - RESERVED_BYTES


def largest_guess(plan: Plan) -> int:
    """Rows a device of the largest micro-batch that fits, a multiple of 8 from 16 on.

    Supposes that temporary memory grows in proportion to the rows, which it does but
    for some copies of the weights.
    """
    assert plan.target is not None
    train = plan.program.config.train
    by_row = plan.temp_bytes / (train.batch_size // train.accumulate // plan.devices)
    rows = int(max(0.0, room(plan.target) - plan.argument_bytes) / by_row)
    return rows // 8 * 8 if rows >= 16 else rows


def roofline(plan: Plan) -> dict[str, float] | None:
    """Seconds of a step on one device, if every kernel reached the shares above."""
    target = plan.target
    if target is None:
        return None
    model, seq_len = plan.program.config.model, plan.program.config.seq_len
    half, _ = flops_per_token(model, seq_len)
    assert model.head_dim is not None
    attention = 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
    matmul_s = (half - attention) * plan.tokens / (target.peak_flops * MATMUL_SHARE)
    attention_s = attention * plan.tokens / (target.peak_flops * ATTENTION_SHARE)
    rest = plan.per_token() - plan.per_token("matmul", "attention", "collective")
    rest_s = rest * 1024 * plan.tokens / (target.bandwidth * MEMORY_SHARE)
    link_s = sum(one["sent_bytes"] for one in collectives(plan)) / target.link
    step_s = matmul_s + attention_s + rest_s
    return {
        "matmul_s": matmul_s,
        "attention_s": attention_s,
        "rest_s": rest_s,
        "collectives_s": link_s,
        "step_s": max(step_s, link_s),
        "tokens_per_s": plan.tokens * plan.devices / max(step_s, link_s),
        "mfu": half * plan.tokens / (target.peak_flops * max(step_s, link_s)),
    }


def lines(plan: Plan) -> Iterator[str]:
    """The report for people."""
    name = plan.target.device if plan.target else "this machine's CPU"
    config, facts = plan.program.config, figures(plan)
    micro = config.train.batch_size // config.train.accumulate
    yield (
        f"{plan.devices} x {name}: {config.train.accumulate} micro-batch(es) of "
        f"{micro} x {config.seq_len} tokens, {plan.tokens:,} tokens a device and step"
    )
    compute = config.compute
    yield (
        f"compute {compute.compute_dtype}, stream {compute.residual_dtype}, attention "
        f"{compute.attention}, layer {compute.layer}, loss {compute.cross_entropy}, "
        f"embedding {compute.embedding}, remat {compute.remat}, unroll {compute.unroll}"
    )
    yield f"compiled in {plan.compile_s:.0f} s"
    yield ""
    held = state_bytes(plan)
    rest = plan.argument_bytes - sum(held.values())
    yield f"memory     weights                        {held['weights'] / 1e9:8.2f} GB"
    yield f"           Adam's moments                 {held['moments'] / 1e9:8.2f} GB"
    yield f"           batch                          {rest / 1e9:8.2f} GB"
    yield (
        f"           temporary                      {plan.temp_bytes / 1e9:8.2f} GB = "
        f"{facts['temporary_kib']:.0f} KiB a token"
    )
    yield f"           together                       {plan.peak_bytes / 1e9:8.2f} GB"
    if plan.target:
        there, rows = room(plan.target), largest_guess(plan)
        fits = "fits" if plan.peak_bytes < there else "DOES NOT FIT"
        yield f"           of                             {there / 1e9:8.2f} GB: {fits}"
        yield (
            f"           largest micro-batch that fits: about {rows} x "
            f"{config.seq_len} tokens a device (--largest makes sure)"
        )
    yield ""
    yield "kernels    KiB a token read and written, by group (runs)"
    runs: dict[str, int] = {}
    for kernel in plan.kernels:
        runs[group(kernel)] = runs.get(group(kernel), 0) + kernel.runs
    for name, kib in sorted(facts["moved_kib"].items(), key=lambda item: -item[1]):
        yield f"           {name:14s} {kib:8.1f}   ({runs[name]})"
    yield (
        f"           all {facts['moved_all_kib']:,.0f}; neither matmul nor attention "
        f"{facts['moved_rest_kib']:,.0f}; copies over 1 MB: {facts['copies']}; cuDNN "
        f"attention: {facts['attention_forward']} forward, "
        f"{facts['attention_backward']} backward"
    )
    if facts["collectives"]:
        yield ""
        yield "collectives, runs x MB whole, (group); awaited apart, products between"
        for one in facts["collectives"]:
            yield (
                f"           {one['kind']} {'+'.join(one['dtypes'])}: {one['runs']} x "
                f"{one['bytes'] / 1e6:,.1f} ({one['group']}); {one['apart']} apart, "
                f"{one['behind']} behind products"
            )
    if guess := roofline(plan):
        yield ""
        yield (
            f"roofline   {guess['step_s'] * 1e3:.0f} ms a step: matmul "
            f"{guess['matmul_s'] * 1e3:.0f}, attention "
            f"{guess['attention_s'] * 1e3:.0f}, the rest {guess['rest_s'] * 1e3:.0f}; "
            f"collectives {guess['collectives_s'] * 1e3:.0f} behind them"
        )
        yield (
            f"           {guess['tokens_per_s']:,.0f} tokens/s, MFU {guess['mfu']:.0%} "
            f"(attention counted half), if products reach {MATMUL_SHARE:.0%} and"
        )
        yield (
            f"           attention {ATTENTION_SHARE:.0%} of the peak, and the rest "
            f"{MEMORY_SHARE:.0%} of the memory's bandwidth: an estimate, no measurement"
        )


def heaviest(plan: Plan, count: int) -> Iterator[str]:
    """The kernels that move most and are no matmul, like ones taken together."""
    moved: dict[tuple[str, str], int] = {}
    runs: dict[tuple[str, str], int] = {}
    for kernel in plan.kernels:
        if kernel.kind != "matmul":
            key = (
                group(kernel),
                kernel.name.split(".")[0] + "  " + kernel.source[-60:],
            )
            moved[key] = moved.get(key, 0) + kernel.moved * kernel.runs
            runs[key] = runs.get(key, 0) + kernel.runs
    for key, total in sorted(moved.items(), key=lambda item: -item[1])[:count]:
        kib = total / plan.tokens / 1024
        yield f"{kib:8.1f} x{runs[key]:<4d} {key[0]:12s} {key[1]}"
