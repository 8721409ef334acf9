"""Runs the ladder on this machine and writes what it found.

    python -m parity_tests.report [--quick | --part NAME] [--out docs]

Writes OUT/parity.md, OUT/parity/parity.json and plots. Every figure in them comes from
this run or, with --part, from the run named beside it. The thousand steps on real text
take thirteen minutes of their own: --part real_text. --quick takes one seed, leaves
out what is slow (long runs, the true size, decoding, the mutants, real text, float32 of
the parts) and writes to runs/parity.
"""

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import torch

import parity_tests.conftest  # noqa: F401  (the same strict JAX as the tests)
from parity_tests import (
    cases,
    decoding,
    gates,
    mutation,
    noise,
    on_gpu,
    plots,
    real_text,
    rungs_bf16,
)
from parity_tests.markdown import page
from parity_tests.precision import FP32, PRECISIONS
from parity_tests.rungs import RUNGS, SEEDS, measure

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ladder", "noise", "bf16", "trajectory", "decode", "real_text", "mutants",
         "gpu")  # fmt: skip
APART = ("real_text",)
"""Parts that a run without --part leaves as it found them."""
COMPILING = (
    "step ", "fast forms", "mesh", "exported", "init", "accumulation", "one recipe",
    "skipped", "dropout", "evaluation", "other shapes",
)  # fmt: skip
"""Rungs that spend their time in the compiler; --quick leaves them out too."""
WHOLE = ("logits", "loss", "gradients")
"""Rungs that --quick runs in float32 too; of the others float64 notices more."""
LONG = "200 "
SHARED = ("step ", LONG, "215M ")
"""Beginnings of the names of rungs that read one computation."""


def environment() -> dict[str, Any]:
    """Versions, device, commit, and a hash of the trained weights that were used."""
    weights = jax.tree.leaves(cases.trained(0, FP32))
    digest = hashlib.sha256(b"".join(x.tobytes() for x in weights)).hexdigest()
    device = jax.devices()[0]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno")),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": f"{device.platform} ({device.device_kind})",
        "trained_weights_sha256": digest,
    }


@dataclass(frozen=True)
class Task:
    """A piece of one part of the report, small enough to share pieces out."""

    part: str
    run: Callable[..., Any]
    inputs: tuple = ()


Chain = list[Task]
"""What one process does one after the other, since later ones use earlier results."""


def ladder(quick: bool) -> list[Chain]:
    """Every rung in each of its precisions: the worst error over the seeds."""
    families: dict[tuple[str, str], list[Task]] = {}
    for name, rung in RUNGS.items():
        if quick and (rung.slow or name.startswith(COMPILING)):
            continue
        both = not quick or name in WHOLE
        for precision in rung.limits if both else [*rung.limits][:1]:
            # Rungs that read one computation stay in one process, which keeps it.
            shared = next((f for f in SHARED if name.startswith(f)), name)
            key = (shared, "any" if shared == LONG else precision)
            task = Task("ladder", rung_row, (name, precision, quick))
            families.setdefault(key, []).append(task)
    return list(families.values())


def rung_row(name: str, precision: str, quick: bool) -> dict[str, Any]:
    """One rung in one precision over its seeds, as a row of the table."""
    rung, began = RUNGS[name], time.perf_counter()
    seeds = rung.seeds[:1] if quick else rung.seeds
    found = [measure(name, PRECISIONS[precision], seed) for seed in seeds]
    worst = max(found, key=lambda d: d.error)
    entry = gates.table()[name][precision]
    print(f"{name} {precision}: {worst.error:.3g} of {entry['gate']:.3g}", flush=True)
    return {
        "rung": name,
        "precision": precision,
        "metric": rung.metric,
        "error": worst.error,
        "where": worst.name,
        "gate": entry["gate"],
        "limit": entry["limit"],
        "seeds": len(seeds),
        "passed": bool(worst.error <= entry["gate"]),
        "seconds": round(time.perf_counter() - began, 1),
    }


def mutant_row(index: int) -> dict[str, Any]:
    """One mutant: its rung, and how far beyond the gate it went."""
    mutant = mutation.ALL[index]
    kill = mutation.attempt(mutant)
    print(f"{mutant.name}: {kill.margin:.3g} times the gate of {mutant.rung}")
    return {
        "name": mutant.name,
        "target": mutant.target,
        "rung": mutant.rung,
        "precision": mutant.precision,
        "margin": kill.margin if np.isfinite(kill.margin) else "infinite",
        "killed": kill.killed,
    }


def chains(quick: bool, on_cpu: bool) -> list[Chain]:
    """All there is to do, what takes longest first."""
    rungs = ladder(quick)
    found: list[Chain] = [[Task("noise", noise.measured, (quick,))]]
    if not on_cpu:
        found.append([Task("gpu", on_gpu.measured)])
    if quick:
        return rungs + found
    long = next(chain for chain in rungs if chain[0].inputs[0].startswith(LONG))
    # Both look at the same trajectories, which their process keeps.
    long.append(Task("trajectory", noise.trajectories))
    found.append([Task("bf16", rungs_bf16.errors, (seed,)) for seed in SEEDS])
    found += [[Task("mutants", mutant_row, (i,))] for i in range(len(mutation.ALL))]
    slow = [c for c in rungs if c is not long and RUNGS[c[0].inputs[0]].slow]
    rest = [c for c in rungs if c is not long and c not in slow]
    return [
        long,
        [Task("real_text", real_text.compare)],
        *slow,
        [Task("decode", decoding.measured)],
        *rest,
        *found,
    ]


def joined(part: str, found: list[Any]) -> Any:
    """The results of one part from those of its tasks."""
    if part == "ladder":
        order = list(RUNGS)
        return sorted(found, key=lambda row: order.index(row["rung"]))
    if part == "mutants":
        dead = sum(row["killed"] for row in found)
        print(f"{dead} of {len(found)} mutants killed", flush=True)
        return found
    if part == "bf16":
        return _means(found)
    (only,) = found
    return only


def _means(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean relative errors over the seeds, of autocast and of each of our variants."""
    return {
        side: {
            kind: float(np.mean([errors[side][kind] for errors in found]))
            for kind in found[0][side]
        }
        for side in found[0]
    }


def measured(todo: list[Chain], processes: int) -> Iterator[tuple[str, Any]]:
    """Runs the chains; yields a part and its results as soon as all of it is there."""
    left = Counter(task.part for chain in todo for task in chain)
    found: dict[str, dict[tuple[int, int], Any]] = {part: {} for part in left}
    for number, results in _spread(todo, processes):
        for at, (task, result) in enumerate(zip(todo[number], results, strict=True)):
            found[task.part][number, at] = result
            if len(found[task.part]) == left[task.part]:
                in_order = [found[task.part][key] for key in sorted(found[task.part])]
                yield task.part, joined(task.part, in_order)


def _spread(todo: list[Chain], processes: int) -> Iterator[tuple[int, list[Any]]]:
    """Runs chains in processes of their own, or in this one if one is wanted."""
    if processes == 1:
        yield from ((number, _run(chain)) for number, chain in enumerate(todo))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(_run, chain): i for i, chain in enumerate(todo)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _run(chain: Chain) -> list[Any]:
    results = []
    for task in chain:
        began = time.perf_counter()
        results.append(task.run(*task.inputs))
        if task.part not in ("ladder", "mutants"):
            print(f"{task.part}: {time.perf_counter() - began:.0f} s", flush=True)
    return results


def main() -> None:
    """Parses the command line, measures, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, nothing slow")
    parser.add_argument(
        "--out", type=Path, help="folder to write to (docs; runs/parity if quick)"
    )
    parser.add_argument(
        "--part", choices=PARTS, help="measure this part only and keep the others"
    )
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--processes", type=int, help="(as many as CPUs, 4 at most; 1 on a GPU)",
        default=min(4, len(os.sched_getaffinity(0))) if on_cpu else 1,
    )  # fmt: skip
    args = parser.parse_args()
    # One seed is no reason to overwrite what five have shown.
    out = args.out or ROOT / ("runs/parity" if args.quick else "docs")
    folder = out / "parity"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parity.json"
    results: dict[str, Any] = {}
    if file.is_file():
        kept = json.loads(file.read_text())["parts"]
        results = {k: v for k, v in kept.items() if args.part or k in APART}
    began, env = time.perf_counter(), environment()
    parts = {args.part} if args.part else {*PARTS} - {*APART}
    todo = [
        [task for task in chain if task.part in parts]
        for chain in chains(args.quick, on_cpu)
    ]
    todo = [chain for chain in todo if chain]
    if not todo:
        parser.error(
            f"--part {args.part} needs "
            + ("a GPU" if args.part == "gpu" else "a run without --quick")
        )
    for name, found in measured(todo, args.processes):
        results[name] = {"commit": env["commit"], "results": found}
        # After every part: a run that is cut off has written what it knows.
        file.write_text(
            json.dumps({"environment": env, "parts": results}, indent=1) + "\n"
        )
    plots.draw(folder, results)
    (out / "parity.md").write_text(page(env, results))
    print(f"{time.perf_counter() - began:.0f} s; wrote {out / 'parity.md'}")
    _judge(results)


def _judge(results: dict[str, Any]) -> None:
    """Ends the process with 1 if a rung fails or a mutant survives."""
    rows = results.get("ladder", {}).get("results", [])
    failed = [f"{row['rung']} {row['precision']}" for row in rows if not row["passed"]]
    rows = results.get("mutants", {}).get("results", [])
    alive = [row["name"] for row in rows if not row["killed"]]
    print(f"rungs that fail: {', '.join(failed) or 'none'}")
    print(f"mutants that survive: {', '.join(alive) or 'none'}")
    if failed or alive:
        raise SystemExit(1)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
