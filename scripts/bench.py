#!/usr/bin/env python3
"""Times jaxllm against the PyTorch reference, on random tokens, on this machine.

    python scripts/bench.py --compare --cpu          2 CPU cores, some minutes
    python scripts/bench.py --compare --shape A      a GPU
    python scripts/bench.py --probe --shape A --budget_s 560
    python scripts/bench.py --data --megabytes 400   preparing data and reading it
    python scripts/bench.py --table                  docs/benchmarks.md from the records

Needs no data and no installation: a checkout with jax, flax, numpy and torch will do
(--data needs the installation). Every side runs in processes of its own, which take
turns.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_data  # isort: skip
import command_line  # isort: skip
from bench_common import BATCHES, SHAPES, median, run_config  # isort: skip
from bench_probe import JOBS  # isort: skip
from bench_process import Failed, Worker, environment, gpu_to_use  # isort: skip
from bench_record import (  # isort: skip
    RECORDS,
    new_record,
    probe_table,
    rates,
    regenerate,
    results_table,
    write,
)


class Bench:
    """What all modes share: options, the record, and the clock."""

    def __init__(self, args: argparse.Namespace, kind: str, caches: Path):
        self.args, self.began = args, time.perf_counter()
        self.gpu = not args.cpu and gpu_to_use()
        self.path = Path(args.json) if args.json else None
        self.record = new_record(kind, sys.argv[1:], args.shape)
        self.record |= {
            "errors": [], "versions": {}, "device_kind": "cpu",
            "dtype": "bfloat16" if self.gpu else "float32",
        }  # fmt: skip
        self.env = environment(self.gpu, caches)
        self.caches = caches

    def left_s(self) -> float:
        """Seconds until the budget is used up."""
        return self.args.budget_s - (time.perf_counter() - self.began)

    def start(self, side: str, **more: Any) -> Worker:
        """Starts a worker, and waits until it is ready."""
        spec = {
            "shape": self.args.shape, "tokens": self.args.tokens,
            "threads": self.args.threads, "device": "cuda" if self.gpu else "cpu",
            "compute": command_line.compute_changes("--set", self.args.set),
            "cache": str(self.caches / "jax"),
            "dtype": self.record["dtype"], **more,
        }  # fmt: skip
        worker = Worker(f"bench_{side}.py", spec, self.env)
        try:
            worker.hear(180)
        except Failed:
            worker.__exit__()
            raise
        return worker

    def note(self, worker: Worker, *, matmul: bool) -> None:
        """Takes down versions, device and the measured matmul peak."""
        about = worker.ask("describe", 120)
        self.record["versions"] |= about["versions"]
        if self.gpu:
            self.record["device_kind"] = about["device_kind"]
        if matmul:
            rate = worker.ask("matmul", 120)["flops_per_s"]
            known = self.record.get("matmul_flops_per_s") or 0.0
            self.record["matmul_flops_per_s"] = max(rate, known)

    def fail(self, what: str, error: Exception) -> None:
        """Keeps an error in the record, and goes on."""
        text = f"{what}: {error}"
        self.record["errors"].append(text)
        print(f"  {text}", flush=True)

    def save(self) -> None:
        """Writes the record as far as it is."""
        self.record["wall_s"] = round(time.perf_counter() - self.began, 1)
        write(self.record, self.path)


def sides(bench: Bench) -> dict[str, tuple[str, dict[str, Any]]]:
    """Who competes: name to (worker, its variant). The first is ours."""
    ours: dict[str, tuple[str, dict[str, Any]]] = {"jaxllm": ("ours", {})}
    if other := bench.args.beside:
        pairs = [*bench.args.set, *other]
        compute = command_line.compute_changes("--beside", pairs)
        ours[f"jaxllm, {' '.join(other)}"] = ("ours", {"compute": compute})
    compiled = {"compiled": True, "sdpa": "default"}
    if bench.gpu:
        return ours | {
            "torch.compile": ("torch", compiled),
            "torch.compile, flash": ("torch", compiled | {"sdpa": "flash"}),
        }
    eager = compiled | {"compiled": False}
    return ours | {
        "torch eager": ("torch", eager),
        "torch eager, memory kept": ("torch", eager | {"keep_memory": True}),
        "torch.compile": ("torch", compiled),
    }


def compare(bench: Bench) -> None:
    """Finds each side's best batch, then lets the sides take turns at it."""
    best: dict[str, dict[str, Any]] = {}
    bench.record["sweep"] = []
    for name, (side, variant) in sides(bench).items():
        sweep(bench, name, side, variant, best)
        bench.save()
    if "jaxllm" not in best or len(best) < 2:
        print("nothing to compare: see the errors above")
        return
    take_turns = turns_restarting if bench.gpu else turns_alive
    take_turns(bench, best)
    bench.save()
    print("\n" + results_table(bench.record["results"]))


def sweep(bench: Bench, name: str, side: str, variant: dict, best: dict) -> None:
    """Times one side at each batch, briefly; keeps the fastest in `best`."""
    blocks, steps = (3, 5) if bench.gpu else (2, 1)
    try:
        with bench.start(side, **variant) as worker:
            bench.note(worker, matmul=True)
            for batch in bench.args.batches:
                if best.get(name) and bench.left_s() < 0.5 * bench.args.budget_s:
                    break  # enough is left for the turns
                built = worker.ask("build", bench.args.build_s, batch=batch)
                bench.record["dtype"] = built["dtype"]  # ours decides, being first
                took = worker.ask("time", blocks=blocks, steps=steps)
                entry = {
                    "name": name, "batch": batch, "ms": median(took["ms"]),
                    "cold_s": built["first_step_s"], "settings": built["settings"],
                    "peak_bytes": took["peak_bytes"],
                }  # fmt: skip
                bench.record["sweep"].append(entry)
                each = entry["ms"] / batch
                print(f"  {name}: {batch} rows, {entry['ms']:.1f} ms", flush=True)
                if name not in best or each < best[name]["ms"] / best[name]["batch"]:
                    best[name] = entry
    except Failed as error:  # out of memory among others: what was timed counts
        bench.fail(name, error)


def turns_alive(bench: Bench, best: dict[str, dict[str, Any]]) -> None:
    """On a CPU: all sides stay alive, and take some steps each in every round."""
    workers: dict[str, Worker] = {}
    try:
        for name, entry in list(best.items()):
            side, variant = sides(bench)[name]
            try:
                workers[name] = bench.start(side, **variant)
                built = workers[name].ask("build", 900, batch=entry["batch"])
                entry["warm_s"] = built["first_step_s"]
                workers[name].ask("time", blocks=1, steps=1)
            except Failed as error:
                bench.fail(name, error)
                del best[name]
        rounds: dict[str, list[float]] = {name: [] for name in best}
        for number in range(bench.args.rounds or 12):
            # Every other round the other way around, so that nobody is always first.
            for name in list(best) if number % 2 == 0 else list(best)[::-1]:
                # One step to come back: memory and caches belonged to the others.
                workers[name].ask("time", blocks=1, steps=1)
                took = workers[name].ask("time", blocks=1, steps=2)
                rounds[name].append(took["ms"][0])
                best[name] |= {"loss": took["loss"], "peak_bytes": took["peak_bytes"]}
            summarise(bench, best, rounds)
            bench.save()
    finally:
        for worker in workers.values():
            worker.__exit__()


def turns_restarting(bench: Bench, best: dict[str, dict[str, Any]]) -> None:
    """On a GPU, which holds one side at a time: fresh processes take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in best}
    for number in range(bench.args.rounds or 2):
        if number and bench.left_s() < 120:
            break
        for name in list(best):
            side, variant = sides(bench)[name]
            try:
                with bench.start(side, **variant) as worker:
                    batch = best[name]["batch"]
                    built = worker.ask("build", bench.args.build_s, batch=batch)
                    best[name].setdefault("warm_s", built["first_step_s"])
                    worker.ask("time", blocks=1, steps=5)
                    took = worker.ask("time", blocks=6, steps=10)
            except Failed as error:
                bench.fail(name, error)
                del best[name], rounds[name]
                continue
            rounds[name].append(median(took["ms"]))
            best[name] |= {"loss": took["loss"], "peak_bytes": took["peak_bytes"]}
            print(f"  {name}: {rounds[name][-1]:.1f} ms", flush=True)
        summarise(bench, best, rounds)
        bench.save()


def summarise(bench: Bench, best: dict, rounds: dict[str, list[float]]) -> None:
    """Turns rounds into results: medians, rates, and ours over theirs pair by pair."""
    results = []
    seq_len = SHAPES[bench.args.shape].max_seq_len
    ours = [ms / best["jaxllm"]["batch"] for ms in rounds.get("jaxllm", [])]
    for name, entry in best.items():
        if not rounds[name]:
            continue
        ms = median(rounds[name])
        tokens = entry["batch"] * seq_len
        result = entry | rates(bench.record, tokens, ms, bench.record["dtype"])
        result |= {"ms": ms, "rounds_ms": rounds[name], "tokens_per_step": tokens}
        if name != "jaxllm":
            pairs = [
                theirs / entry["batch"] / mine
                for mine, theirs in zip(ours, rounds[name], strict=False)
            ]
            result |= {"pair_ratios": pairs}
            if pairs:
                result["ours_over_this"] = median(pairs)
        results.append(result)
    bench.record["results"] = results


def probe(bench: Bench) -> None:
    """Runs the eight probes, each job a process; keeps every item as it comes."""
    bench.record["items"] = []
    wanted = bench.args.jobs or list(JOBS)
    # Programs that several jobs compile are compiled once.
    env = bench.env | {"JAX_COMPILATION_CACHE_DIR": str(bench.caches / "jax")}
    for number, job in enumerate(wanted):
        name, _ = JOBS[job]
        if bench.left_s() < 5:
            bench.fail(job, Failed("no time left in --budget_s"))
            continue
        until = time.perf_counter() + share_s(wanted[number:], bench.left_s())
        print(f"{name}: {job}", flush=True)
        spec = {
            "job": job, "shape": bench.args.shape, "threads": bench.args.threads,
            "device": "cuda" if bench.gpu else "cpu",
        }  # fmt: skip
        side = job.split("_")[1]
        with Worker(f"bench_probe_{side}.py", spec, env) as worker:
            try:
                while item := worker.hear(until - time.perf_counter()):
                    bench.record["items"].append({"probe": name, "job": job, **item})
                    bench.record["versions"] |= item.get("versions", {})
                    if bench.gpu and "device" in item:
                        bench.record["device_kind"] = item["device"]
                    bench.save()
            except Failed as error:
                bench.fail(job, error)
        items = [item for item in bench.record["items"] if item["job"] == job]
        print(probe_table(items), flush=True)
    bench.save()


def share_s(jobs: list[str], left_s: float) -> float:
    """Seconds for the first of `jobs`, so that all of them get some of what is left.

    Its limit if there is room for all limits; what it does not use is the others'.
    """
    limits = [JOBS[job][1] for job in jobs]
    return limits[0] * min(1.0, left_s / sum(limits))


def data(args: argparse.Namespace) -> int:
    """Times the way of the data, in a temporary folder; returns the exit code."""
    path = Path(args.json) if args.json else None
    record = new_record("data", sys.argv[1:])
    record |= {"device_kind": "cpu", "versions": bench_data.versions()}

    def keep(name: str, result: Any) -> None:
        record[name] = result
        write(record, path)

    if args.megabytes < 1:
        raise ValueError(f"--megabytes {args.megabytes} must be at least 1")
    workers = args.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        bench_data.measure(
            Path(folder), megabytes=args.megabytes, workers=workers, keep=keep
        )
    print(bench_data.data_tables(record))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.Parser(prog="bench.py", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--compare", action="store_true", help="ours against PyTorch")
    mode.add_argument("--probe", action="store_true", help="the parts of a step")
    mode.add_argument("--data", action="store_true", help="preparing and reading data")
    mode.add_argument("--table", action="store_true", help="write docs/benchmarks.md")
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="A: 215M, T 512. B: 259M, T 2048. small: 27M, "
        "T 256. tiny: for tests. Default: A on a GPU, small on a CPU")  # fmt: skip
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    add("--json", metavar="PATH", help=f"write the record there (kept ones: {RECORDS})")
    add("--batches", type=int, nargs="+", metavar="ROWS",
        help="rows of a step to choose the best from")  # fmt: skip
    add("--rounds", type=int, default=0, help="turns of each side (CPU 12, GPU 2)")
    add("--tokens", choices=("zipf", "uniform"), default="zipf", help="random ids")
    add("--threads", type=int, default=0, help="CPUs to use; 0 (default): all")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="change jaxllm's compute configuration, such as layer=plain")  # fmt: skip
    add("--beside", nargs="+", default=[], metavar="NAME=VALUE",
        help="let jaxllm with this change take turns too, in its own row")  # fmt: skip
    add("--jobs", nargs="+", choices=JOBS, help="only these jobs of --probe")
    add("--megabytes", type=int, default=400, help="corpus that --data makes (400)")
    add("--budget_s", type=float, default=1800.0,
        help="seconds after which nothing new is begun (default 1800)")  # fmt: skip
    add("--build_s", type=float, default=300.0,
        help="seconds that compiling one step may take (default 300)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one mode; returns the exit code."""
    args = make_parser().parse_args(argv)
    return command_line.call(lambda: execute(args))


def execute(args: argparse.Namespace) -> int:
    """Runs the mode that was asked for; returns the exit code.

    Raises: ValueError for what the user can mend.
    """
    for name in ("rounds", "threads", "budget_s", "build_s"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder is not there; make it first")
    if args.table:
        print(f"docs/benchmarks.md: {regenerate()} records")
        return 0
    if args.data:
        return data(args)
    gpu = not args.cpu and gpu_to_use()
    args.shape = args.shape or ("A" if gpu else "small")
    args.batches = args.batches or list(BATCHES[args.shape][0 if gpu else 1])
    for flag, pairs in (("--set", args.set), ("--beside", args.set + args.beside)):
        compute = command_line.compute_changes(flag, pairs)
        for batch in args.batches:
            run_config(args.shape, batch, compute=compute)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): figures will be worse, and less")
        print("fair to the side whose threads wait for one another")
    with tempfile.TemporaryDirectory(prefix="bench-") as caches:
        bench = Bench(args, "compare" if args.compare else "probe", Path(caches))
        (compare if args.compare else probe)(bench)
        if bench.path:
            print(f"record: {bench.path}")
    if args.compare:
        return 0 if bench.record.get("results") else 1
    return 0 if bench.record["items"] else 1


if __name__ == "__main__":
    sys.exit(main())
