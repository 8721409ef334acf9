#!/usr/bin/env python3
"""Says what a training step will be on a GPU that is not there: compiles it for one.

    python scripts/plan.py --target h100 --preset k-215m
    python scripts/plan.py --target rtx4090 --preset k-215m --batch 64 --largest
    python scripts/plan.py --target h100 --devices 8 --preset k-259m

Needs the gpu-compile extra, in an environment of its own (without a driver the CUDA
plugin would otherwise disturb JAX's default choice of device).
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import command_line

from jaxllm.config import ComputeConfig, RunConfig
from jaxllm.fields import from_dict
from jaxllm.plan import report
from jaxllm.plan.compile import Plan, plan, with_batch
from jaxllm.plan.targets import TARGETS
from jaxllm.presets import PRESETS, preset


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.Parser(prog="plan.py", description=__doc__)
    add = parser.add_argument
    add("--target", choices=[*TARGETS, "cpu"], default="h100")
    add("--preset", choices=list(PRESETS), default="k-215m")
    add("--devices", type=int, default=1, help="1 to 8, or nodes of 8")
    add("--batch", type=int, help="rows a device and step")
    add("--accumulate", type=int, help="micro-batches of a step")
    add("--compute", action="append", default=[], metavar="FIELD=VALUE",
        help="a field of the compute configuration, such as goal=lean")  # fmt: skip
    add("--largest", action="store_true",
        help="compile until the largest micro-batch that fits is found")  # fmt: skip
    add("--heaviest", type=int, default=0, help="list so many kernels")
    add("--json", help="write the figures here too")
    return parser


def planned(args: argparse.Namespace) -> RunConfig:
    """The run that the command line asks for.

    Raises: ValueError naming what cannot be.
    """
    for name in ("devices", "batch", "accumulate"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.devices > 8 and args.devices % 8:
        raise ValueError(f"--devices {args.devices}: 1 to 8, or a multiple of 8")
    if args.largest and args.target == "cpu":
        raise ValueError("--largest asks what fits a GPU, and --target is cpu")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    for pair in args.compute:
        if "=" not in pair:
            raise ValueError(f"--compute {pair}: write FIELD=VALUE, such as goal=lean")
    texts = dict(pair.split("=", 1) for pair in args.compute)
    values = {name: int(x) if x.isdigit() else x for name, x in texts.items()}
    config = preset(args.preset)
    compute = dataclasses.asdict(config.compute) | values
    rows = (args.batch or config.train.batch_size) * args.devices
    return dataclasses.replace(
        config,
        compute=from_dict(ComputeConfig, compute, where="compute"),
        train=dataclasses.replace(
            config.train,
            batch_size=rows,
            accumulate=args.accumulate or config.train.accumulate,
        ),
    )


def main(argv: list[str] | None = None) -> int:
    """Compiles and reports; returns the exit code."""
    args = make_parser().parse_args(argv)
    logging.getLogger("jax").setLevel(logging.ERROR)
    target = TARGETS.get(args.target)
    try:
        made = plan(planned(args), target, count=args.devices)
        facts = report.figures(made) | {"roofline": report.roofline(made)}
        print("\n".join(report.lines(made)))
        if args.heaviest:
            print("\nheaviest kernels but matmuls, KiB a token")
            print("\n".join(report.heaviest(made, args.heaviest)))
        if args.largest:
            facts["largest_micro_batch"] = largest(made, args.devices)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(facts, file, indent=2)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    return 0


def largest(made: Plan, devices: int) -> int:
    """Finds the most rows a device that fit in one micro-batch, and says so.

    Temporary memory grows in proportion to the rows: a guess from one compilation,
    confirmed, or lowered, by the next.
    """
    assert made.target is not None
    config, room = made.program.config, report.room(made.target)
    rows = report.largest_guess(made)
    while rows > 1:
        tried = plan(with_batch(config, rows * devices), made.target, count=devices)
        if tried.peak_bytes < room:
            break
        rows = rows - 8 if rows > 16 else rows - 1
    if rows < 1:
        print("\nnot even one row fits: --compute remat=layer, or more devices")
        return 0
    print(
        f"\nlargest micro-batch that fits: {rows} x {config.seq_len} = "
        f"{rows * config.seq_len:,} tokens a device"
    )
    return rows


if __name__ == "__main__":
    sys.exit(main())
