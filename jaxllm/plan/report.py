"""What a plan says, as text and as JSON: memory, kernels, collectives, a roofline."""

from collections.abc import Iterator
from typing import Any

from jaxllm.plan import hlo
from jaxllm.plan.compile import Plan, attention_calls
from jaxllm.plan.targets import (
    ATTENTION_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    RESERVED_BYTES,
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
        "temporary_bytes": plan.temp_bytes,
        "temporary_kib": plan.temp_bytes / plan.tokens / 1024,
        "peak_bytes": plan.peak_bytes,
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
    """The collectives of a step, with the bytes each hands over."""
    return [
        {
            "name": kernel.name,
            "bytes": kernel.written,
            "runs": kernel.runs,
            "overlaps": kernel.overlaps,
        }
        for kernel in plan.kernels
        if kernel.kind == "collective"
    ]


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
    moved = sum(item["bytes"] * item["runs"] for item in collectives(plan))
    # A ring moves every byte of an all-reduce out and in about twice.
    link_s = 2 * moved * (plan.devices - 1) / plan.devices / target.link
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
    arguments = plan.argument_bytes / 1e9
    yield f"memory     arguments (weights, moments)   {arguments:8.2f} GB"
    yield (
        f"           temporary                      {plan.temp_bytes / 1e9:8.2f} GB = "
        f"{facts['temporary_kib']:.0f} KiB a token"
    )
    yield f"           together                       {plan.peak_bytes / 1e9:8.2f} GB"
    if plan.target:
        room = plan.target.memory_bytes - RESERVED_BYTES
        fits = "fits" if plan.peak_bytes < room else "DOES NOT FIT"
        yield f"           of                             {room / 1e9:8.2f} GB: {fits}"
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
        overlapping = sum(item["overlaps"] for item in facts["collectives"])
        size = sum(item["bytes"] * item["runs"] for item in facts["collectives"])
        yield (
            f"collectives {len(facts['collectives'])}, {size / 1e6:,.0f} MB a device "
            f"and step; {overlapping} started and awaited apart, behind kernels"
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
