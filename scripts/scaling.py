#!/usr/bin/env python3
"""Predicts the step on 8, 64 and 512 GPUs, and writes docs/scaling.md.

    python scripts/scaling.py                     # the document, from docs/scaling.json
    python scripts/scaling.py --write             # into docs/scaling.md
    python scripts/scaling.py --step-ms 215M=90   # with a step measured on one GPU
    python scripts/scaling.py --record            # compile anew into docs/scaling.json

Recording takes four minutes, needs the gpu-compile extra (see scripts/plan.py), and no
GPU. All else needs neither.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line

from jaxllm.plan import scaling, targets
from jaxllm.plan.scaling import (
    CHECKS,
    DEPTHS,
    GPU,
    GPUS_A_NODE,
    MESHES,
    NEEDED,
    SCHEMES,
    SIZES,
    Links,
)

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "scaling.json"
GPUS = (8, 64, 512)
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
HEAD = """\
# Scaling, predicted

Written by `python scripts/scaling.py --write` from `docs/scaling.json`: do not edit.
**Nothing here was measured on more than one GPU, and the time on one is a roofline.**

- Compiled: the train step for 1, 8 and 16 H100s (16: two nodes), with {low} and {high}
  layers, by jax {jax} and its CUDA plugin, without a GPU:
  `python scripts/scaling.py --record`.
- Scaled by calculation: from {low} and {high} layers to all, layers being alike; from
  8 and 16 GPUs to 64 and 512, by the links. A sharded optimizer was not compiled.
- Time on one GPU: the roofline of the step compiled for one (`scripts/plan.py`);
  `--step-ms SIZE=MS` puts a measured one in its place.
- The arithmetic: `jaxllm/plan/scaling.py`.

All run bfloat16 products and stream, with the activations of a layer's products kept
(`--compute.remat products`), in one micro-batch. Sizes:
"""
EXCHANGED = """\
## What is exchanged

MB a step, whole: what every GPU has after a gather, or before a reduction; beside it
the number of collectives. On a ring a GPU sends that many bytes of a gather or a
scatter, less one part in as many as there are GPUs, and twice as many of an all-reduce.
Projections go in bfloat16. The tied table's gradients are reduced twice in float32, as
embedding's and as head's; it is gathered once, in float32 (6.6B: in bfloat16). FSDP
gathers weights once a step and keeps them for the backward pass, so a GPU sends about
what it sends under DP; gathering them again would be half as much more. HSDP's
all-reduces, between nodes, have next to no product beside them.
"""
CHECKED = """\
Whether it may be scaled so: figures made from few layers, or from 8 GPUs, beside what
was compiled. XLA puts small collectives together up to a size; scaled from few layers,
the part with no product beside it comes out too large, and efficiency too low.
"""
ASSUMED = """\
## Assumptions

| what | value | source |
|---|---|---|
"""
PREDICTED = """\
## Step time and efficiency

The tokens of a GPU stay the same (weak scaling); efficiency is against one GPU that had
the memory. In brackets: ms of exchange, hidden or not, and memory of a GPU, which is as
uncertain as the check above says; a step needing more than {room:.1f} GB does not fit.
HSDP falls behind FSDP because its all-reduces have next to no product beside them.

DP is `--parallel.data -1`; FSDP `--parallel.fsdp -1 --parallel.data 1`; HSDP
`--parallel.fsdp 8`, which on 8 GPUs is FSDP. A sharded optimizer alone (ZeRO stage 1)
stands here for comparison: jaxllm shards moments together with their weights.
"""


def main() -> None:
    """Parses the command line; records, and prints or writes the document."""
    parser = command_line.Parser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="compile anew")
    parser.add_argument("--size", choices=SIZES, help="record this size only")
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md")
    parser.add_argument(
        "--step-ms", action="append", default=[], metavar="SIZE=MS", type=measured,
        help="a step of SIZE as measured on one GPU, in milliseconds",
    )  # fmt: skip
    args = parser.parse_args()
    if args.write and args.step_ms:
        parser.error("--write takes no --step-ms: the document is of the record alone")
    if args.size and not args.record:
        parser.error("--size needs --record")
    if args.record:
        try:
            record(args.size)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    text = document(json.loads(RECORD.read_text("utf-8")), dict(args.step_ms))
    if args.write:
        (DOCS / "scaling.md").write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def measured(text: str) -> tuple[str, float]:
    """SIZE=MS as the size and seconds."""
    size, _, value = text.partition("=")
    try:
        seconds = float(value) / 1e3
    except ValueError:
        seconds = 0.0
    if size not in SIZES or not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SIZE=MS, SIZE one of {', '.join(SIZES)}, MS above 0"
        )
    return size, seconds


def record(only: str | None) -> None:
    """Compiles every size on its meshes; with `only`, keeps the others' figures."""
    from jaxllm.plan.record import compiled, versions

    logging.getLogger("jax").setLevel(logging.ERROR)
    found: dict[str, Any] = {"sizes": {}}
    if only and RECORD.exists():
        found = json.loads(RECORD.read_text("utf-8"))
    for size in [only] if only else SIZES:
        made: dict[str, Any] = {}
        for mesh, depth, figures in compiled(size):
            made.setdefault(mesh, {})[str(depth)] = figures
            print(f"{size} {mesh}, {depth} layers", file=sys.stderr)
        found["sizes"][size] = made
    found["versions"] = versions()
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def document(record: dict[str, Any], step_s: dict[str, float] | None = None) -> str:
    """The text of docs/scaling.md; `step_s` are measured steps of one GPU, by size."""
    step_s = step_s or {}
    head = HEAD.format(jax=record["versions"]["jax"], low=DEPTHS[0], high=DEPTHS[1])
    room = (GPU.memory_bytes - targets.RESERVED_BYTES) / 1e9
    lines = [
        *head.splitlines(), "", *networks(record, step_s), "",
        *EXCHANGED.splitlines(), "", *exchanged(record), "",
        *CHECKED.splitlines(), "", *checked(record), "",
        *ASSUMED.splitlines(), *assumed(Links()), "",
        *PREDICTED.format(room=room).splitlines(), "",
    ]  # fmt: skip
    for title, links in (
        ("400 Gb/s for each GPU", Links()),
        ("400 Gb/s for each node of 8", Links(network=Links.network / GPUS_A_NODE)),
    ):
        lines += [f"### {title}", "", *predicted(record, links, step_s), ""]
    return "\n".join(lines[:-1]) + "\n"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def networks(record: dict[str, Any], step_s: dict[str, float]) -> Iterator[str]:
    """Each size, and its step on one GPU."""
    yield row("size", "parameters", "layers", "width", "tokens a GPU", "one GPU", "MFU")
    yield "|---" * 7 + "|"
    for size, (model, rows) in SIZES.items():
        seconds = step_s.get(size) or scaling.one_gpu_s(record, size)
        mfu = scaling.quantity(record, size, "one", "flops") / seconds / GPU.peak_flops
        yield row(
            size, f"{model.n_params:,}", model.n_layers, model.dim,
            f"{rows} x {model.max_seq_len:,}",
            f"{seconds * 1e3:,.0f} ms{', measured' if size in step_s else ''}",
            f"{mfu:.0%}",
        )  # fmt: skip


def exchanged(record: dict[str, Any]) -> Iterator[str]:
    """What each size exchanges on each mesh, by kind."""
    yield row("size", "data x fsdp", *KINDS)
    yield "|---" * 5 + "|"
    for size in SIZES:
        for mesh in NEEDED[1:]:
            cells = []
            for kind in KINDS:
                ones = [
                    one
                    for one in scaling.exchanges(record, size, mesh)
                    if one.kind == kind
                ]
                total = sum(one.bytes for one in ones) / 1e6
                runs = sum(one.runs for one in ones)
                cells.append(f"{total:,.0f} ({runs:.0f})" if ones else "-")
            data, fsdp, _ = MESHES[mesh]
            yield row(size, f"{data} x {fsdp}", *cells)


def checked(record: dict[str, Any]) -> Iterator[str]:
    """Scaled figures beside compiled ones."""
    yield row("size", "what", "scaled", "compiled", "off by")
    yield "|---" * 5 + "|"

    def line(size: str, what: str, scaled: float, compiled: float) -> str:
        off = f"{scaled / compiled - 1:+.1%}"
        return row(
            size, what, f"{scaled / 1e6:,.0f} MB", f"{compiled / 1e6:,.0f} MB", off
        )

    for size, meshes in CHECKS.items():
        layers = SIZES[size][0].n_layers
        for mesh in meshes:
            whole = record["sizes"][size][mesh][str(layers)]
            title = f"all {layers} layers on {mesh}, from {DEPTHS[0]} and {DEPTHS[1]}"
            yield line(
                size, f"exchange of {title}", volume(record, size, mesh),
                sum(one["bytes"] for one in whole["collectives"]),
            )  # fmt: skip
            yield line(
                size, f"of it with nothing beside it, {title}",
                sum(one.bare_bytes for one in scaling.exchanges(record, size, mesh)),
                sum(one["bare_bytes"] for one in whole["collectives"]),
            )  # fmt: skip
            memory = sum(
                scaling.quantity(record, size, mesh, name)
                for name in ("argument_bytes", "temporary_bytes")
            )
            found = whole["argument_bytes"] + whole["temporary_bytes"]
            yield line(size, f"memory of {title}", memory, found)
        for low, high in (("dp8", "dp16"), ("fsdp8", "fsdp16")):
            yield line(
                size, f"exchange of {high}, from {low}", volume(record, size, low),
                volume(record, size, high),
            )  # fmt: skip


def volume(record: dict[str, Any], size: str, mesh: str) -> float:
    """Bytes that a step exchanges, of all kinds together."""
    return sum(one.bytes for one in scaling.exchanges(record, size, mesh))


def assumed(links: Links) -> Iterator[str]:
    sheet = GPU.source
    yield row(
        "GPU",
        f"{GPU.peak_flops / 1e12:,.1f} TFLOP/s of dense bfloat16, "
        f"{GPU.bandwidth / 1e12:.2f} TB/s of memory",
        sheet,
    )
    yield row(
        "a kernel reaches",
        f"{targets.MATMUL_SHARE:.0%} in products, {targets.ATTENTION_SHARE:.0%} in "
        f"attention, {targets.MEMORY_SHARE:.0%} of the memory's rate in the rest",
        "assumed in `jaxllm/plan/targets.py`",
    )
    yield row(
        f"within a node of {GPUS_A_NODE}",
        f"NVLink, {links.nvlink / 1e9:.0f} GB/s a GPU in one direction",
        f"{sheet} (900 GB/s in both together)",
    )
    yield row(
        "between nodes",
        f"400 Gb/s a GPU, {links.network / 1e9:.0f} GB/s in one direction",
        "NVIDIA DGX H100 data sheet: eight 400 Gb/s ports for eight GPUs",
    )
    yield row("reached of a link", f"{links.share:.0%}", "assumed")
    yield row(
        "latency of a collective",
        f"{links.latency_s * 1e6:.0f} us for each doubling of its group",
        "assumed",
    )
    yield row(
        "stages",
        "within the node, then between nodes, one after the other",
        "assumed; NCCL overlaps them in part",
    )
    yield row(
        "hidden",
        "gathers beside the forward pass, a third of the step; reductions beside the "
        "backward pass; what has no product beside it in the compiled schedule, not",
        "the schedule of the compiled step; thirds by FLOPs",
    )
    yield row(
        "sharded optimizer",
        "DP's reductions scattered; weights gathered in 16 bits, a layer at a time",
        "calculated, not compiled",
    )
    yield row(
        "contention",
        "none: collectives slow no product",
        "assumed; a real run loses some to it",
    )
    yield row(
        "optimizer",
        "as long as on one GPU, though shards of it take less",
        "assumed",
    )
    yield row(
        "memory",
        "arguments and temporaries, scaled to all layers; shards of weights and "
        f"moments by the GPUs; {targets.RESERVED_BYTES / 1e9:.1f} GB left free",
        "the compiled step's memory analysis",
    )


def predicted(
    record: dict[str, Any], links: Links, step_s: dict[str, float]
) -> Iterator[str]:
    yield row("size", "scheme", *(f"{gpus} GPUs" for gpus in GPUS))
    yield "|---" * (2 + len(GPUS)) + "|"
    for size in SIZES:
        for scheme in SCHEMES:
            cells = []
            for gpus in GPUS:
                one = scaling.predict(
                    record, size, scheme, gpus, links=links, step_s=step_s.get(size)
                )
                memory = f"{one.memory_bytes / 1e9:,.0f} GB"
                if one.fits:
                    cells.append(
                        f"{one.step_s * 1e3:,.0f} ms, {one.efficiency:.1%} "
                        f"({one.exchange_s * 1e3:,.0f} ms, {memory})"
                    )
                else:
                    cells.append(f"does not fit: {memory}")
            yield row(size, scheme, *cells)


if __name__ == "__main__":
    command_line.run(main)
