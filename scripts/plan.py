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

from jaxllm.plan import report
from jaxllm.plan.compile import Plan, plan, with_batch
from jaxllm.plan.targets import TARGETS
from jaxllm.presets import PRESETS, preset


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=[*TARGETS, "cpu"], default="h100")
    parser.add_argument("--preset", choices=list(PRESETS), default="k-215m")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, help="rows a device and step")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a step")
    parser.add_argument(
        "--compute", action="append", default=[], metavar="FIELD=VALUE",
        help="a field of the compute configuration, such as remat=products",
    )  # fmt: skip
    parser.add_argument(
        "--largest",
        action="store_true",
        help="search the largest micro-batch that fits",
    )
    parser.add_argument("--heaviest", type=int, default=0, help="list so many kernels")
    parser.add_argument("--json", help="write the figures here too")
    args = parser.parse_args()
    logging.getLogger("jax").setLevel(logging.ERROR)

    config = preset(args.preset)
    fields = dict(item.split("=", 1) for item in args.compute)
    values = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
    accumulate = args.accumulate or config.train.accumulate
    rows = (args.batch or config.train.batch_size) * args.devices
    config = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, **values),
        train=dataclasses.replace(config.train, batch_size=rows, accumulate=accumulate),
    )
    target = TARGETS.get(args.target)
    try:
        made = plan(config, target, count=args.devices)
    except RuntimeError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines(made)))
    if args.heaviest:
        print("\nheaviest kernels but matmuls, KiB a token")
        print("\n".join(report.heaviest(made, args.heaviest)))
    facts = report.figures(made) | {"roofline": report.roofline(made)}
    if args.largest and target is not None:
        facts["largest_micro_batch"] = largest(made, args.devices)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
    return 0


def largest(made: Plan, devices: int) -> int:
    """Finds the most rows a device that fit in one micro-batch, and says so.

    Temporary memory grows in proportion to the rows: a guess from one compilation,
    confirmed, or lowered, by the next.
    """
    assert made.target is not None
    config, room = made.program.config, made.target.memory_bytes
    room -= report.RESERVED_BYTES
    rows = config.train.batch_size // config.train.accumulate // devices
    by_row = made.temp_bytes / rows
    guess = max(1, int((room - made.argument_bytes) / by_row))
    guess = guess // 8 * 8 if guess >= 16 else guess
    while guess > 1:
        tried = plan(with_batch(config, guess * devices), made.target, count=devices)
        if tried.peak_bytes < room:
            break
        guess = guess - 8 if guess > 16 else guess - 1
    print(
        f"\nlargest micro-batch that fits: {guess} x {config.seq_len} = "
        f"{guess * config.seq_len:,} tokens a device"
    )
    return guess


if __name__ == "__main__":
    sys.exit(main())
