"""Runs the ladder on this machine and writes what it found.

    python -m parity_tests.report [--quick | --part NAME] [--out docs]

Writes OUT/parity.md, OUT/parity/parity.json and plots. Every figure in them comes from
this run or, where a part was left out, from the run named beside it. --quick takes one
seed and leaves out what is slow: long runs, the true size, the mutants, real text.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import torch
import transformers

import parity_tests.conftest  # noqa: F401  (the same strict JAX as the tests)
from parity_tests import (
    cases,
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
PARTS = ("ladder", "noise", "bf16", "trajectory", "mutants", "real_text", "gpu")
COMPILING = ("step ", "fast forms", "mesh", "exported", "init", "accumulation")
"""Rungs that spend their time in the compiler; --quick leaves them out too."""
SHARED = ("step ", "200 ", "215M ")
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
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": f"{device.platform} ({device.device_kind})",
        "trained_weights_sha256": digest,
    }


def ladder(quick: bool, processes: int) -> list[dict[str, Any]]:
    """Every rung in each of its precisions: the worst error over the seeds."""
    families: dict[tuple[str, str], list[str]] = {}
    for name, rung in RUNGS.items():
        if quick and (rung.slow or name.startswith(COMPILING)):
            continue
        for precision in rung.limits:
            # Rungs that read one computation stay in one process, which keeps it.
            shared = next((f for f in SHARED if name.startswith(f)), name)
            families.setdefault((shared, precision), []).append(name)
    tasks = [(names, precision, quick) for (_, precision), names in families.items()]
    tasks.sort(key=lambda task: not RUNGS[task[0][0]].slow)  # the long ones first
    rows = [row for rows in _spread(_measured, tasks, processes) for row in rows]
    order = list(RUNGS)
    return sorted(rows, key=lambda row: order.index(row["rung"]))


def _measured(task: tuple[list[str], str, bool]) -> list[dict[str, Any]]:
    """The rows of some rungs in one precision."""
    names, precision, quick = task
    rows = []
    for name in names:
        rung, began = RUNGS[name], time.perf_counter()
        seeds = rung.seeds[:1] if quick else rung.seeds
        found = [measure(name, PRECISIONS[precision], seed) for seed in seeds]
        worst = max(found, key=lambda d: d.error)
        entry = gates.table()[name][precision]
        row = {
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
        rows.append(row)
        print(
            f"{name} {precision}: {worst.error:.3g} of {entry['gate']:.3g}", flush=True
        )
    return rows


def mutants(processes: int) -> list[dict[str, Any]]:
    """Every mutant: its rung, how far beyond the gate it went."""
    rows = list(_spread(_attempted, list(range(len(mutation.ALL))), processes))
    dead = sum(row["killed"] for row in rows)
    print(f"{dead} of {len(rows)} mutants killed", flush=True)
    return rows


def _attempted(index: int) -> dict[str, Any]:
    """The row of one mutant."""
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


def _spread(function: Callable[[Any], Any], tasks: list, processes: int) -> list:
    """Maps over tasks in processes of their own, or in this one if one is wanted."""
    if processes == 1:
        return [function(task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(function, tasks))


def bf16() -> dict[str, dict[str, float]]:
    """Mean relative errors over the seeds, of autocast and of each of our variants."""
    found = [rungs_bf16.errors(seed) for seed in SEEDS]
    return {
        side: {
            kind: float(np.mean([errors[side][kind] for errors in found]))
            for kind in found[0][side]
        }
        for side in found[0]
    }


def main() -> None:
    """Parses the command line, measures, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, nothing slow")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder to write to (docs)"
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
    folder = args.out / "parity"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parity.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    began, env = time.perf_counter(), environment()

    parts: dict[str, Callable[[], Any]] = {
        "ladder": lambda: ladder(args.quick, args.processes),
        "noise": noise.measured,
    }
    if not args.quick:
        parts |= {
            "bf16": bf16,
            "trajectory": noise.trajectories,
            "mutants": lambda: mutants(args.processes),
            "real_text": real_text.compare,
        }
    if not on_cpu:
        parts["gpu"] = on_gpu.measured
    results: dict[str, Any] = dict(before.get("parts", {}))
    for name, run in parts.items():
        if args.quick and not args.part and name == "ladder" and name in results:
            # A quick run replaces the rungs it measured and keeps the others.
            results[name] = _merged(results[name], run(), env["commit"])
            continue
        if args.part not in (None, name):
            continue
        results[name] = {"commit": env["commit"], "results": run()}
        # After every part: a run that is cut off has written what it knows.
        _write(file, {"environment": env, "parts": results})
    _write(file, {"environment": env, "parts": results})
    plots.draw(folder, results)
    (args.out / "parity.md").write_text(page(env, results))
    rows = results["ladder"]["results"]
    failed = [f"{row['rung']} {row['precision']}" for row in rows if not row["passed"]]
    print(f"{time.perf_counter() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    alive = [
        row["name"]
        for row in results.get("mutants", {}).get("results", [])
        if not row["killed"]
    ]
    if alive:
        print(f"mutants that survive: {', '.join(alive)}")
    if failed or alive:
        raise SystemExit(1)


def _merged(old: dict, rows: list[dict], commit: str) -> dict:
    new = {(row["rung"], row["precision"]): row for row in rows}
    kept = [
        new.pop((row["rung"], row["precision"]), row)
        for row in old["results"]
        if row["rung"] in RUNGS
    ]
    return {"commit": commit, "results": [*kept, *new.values()]}


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
