"""The benchmark's records: JSON files, what they say of the machine, and the table."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_common import ROOT, SHAPES  # isort: skip
from bench_data import data_tables  # isort: skip
from jaxllm.train.metrics import flops_per_token, peak_flops  # isort: skip

RECORDS = ROOT / "docs" / "benchmarks"
TABLE = ROOT / "docs" / "benchmarks.md"


def new_record(kind: str, argv: list[str], shape: str = "") -> dict[str, Any]:
    """A record of this machine, this commit and this command, without results.

    Without a shape it is not about a model.
    """
    record = {
        "kind": kind,
        "command": " ".join(["python", "scripts/bench.py", *argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
    }
    if not shape:
        return record
    model = SHAPES[shape]
    half, full = flops_per_token(model, model.max_seq_len)
    return record | {
        "shape": shape,
        "model": {
            "parameters": model.n_params,
            "vocab_size": model.vocab_size,
            "seq_len": model.max_seq_len,
            "flops_per_token_half": half,
            "flops_per_token_full": full,
        },
    }


def write(record: dict[str, Any], path: Path | None) -> None:
    """Writes the record as far as it is, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def rates(
    record: dict[str, Any], tokens_per_step: int, ms: float, dtype: str
) -> dict[str, Any]:
    """Tokens per second, and utilisation of the data sheet's and the measured peak.

    A device without a sourced peak has None instead of a guess.
    """
    tokens_per_s = 1e3 * tokens_per_step / ms
    half = record["model"]["flops_per_token_half"] * tokens_per_s
    full = record["model"]["flops_per_token_full"] * tokens_per_s
    peak = peak_flops(record.get("device_kind", ""), dtype)
    measured = record.get("matmul_flops_per_s")
    return {
        "tokens_per_s": tokens_per_s,
        "mfu_half": half / peak if peak else None,
        "mfu_full": full / peak if peak else None,
        "of_measured_matmul": half / measured if measured else None,
    }


def results_table(results: list[dict[str, Any]]) -> str:
    """The results of a comparison as a Markdown table; a dash is what is not known."""
    head = (
        "| | rows | ms a step | tokens/s | MFU half / full | of measured matmul peak "
        "| peak memory GiB | first step s, cold / warm | ours / this |"
    )
    lines = [head, "|---" * 9 + "|"]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['name']} | {r['error']} |" + " |" * 7)
            continue
        mfu = f"{_percent(r['mfu_half'])} / {_percent(r['mfu_full'])}"
        memory = r["peak_bytes"] / 2**30
        first = f"{_seconds(r.get('cold_s'))} / {_seconds(r.get('warm_s'))}"
        ratio = r.get("ours_over_this")
        pairs = r.get("pair_ratios")
        spread = f" ({min(pairs):.2f}-{max(pairs):.2f})" if pairs else ""
        lines.append(
            f"| {r['name']} | {r['batch']} | {r['ms']:.1f} | {r['tokens_per_s']:,.0f} "
            f"| {mfu} | {_percent(r['of_measured_matmul'])} | {memory:.2f} | {first} "
            f"| {f'**{ratio:.2f}**{spread}' if ratio else '-'} |"
        )
    return "\n".join(lines)


def probe_table(items: list[dict[str, Any]]) -> str:
    """The items of one probe as a Markdown table."""
    lines = ["| | by | ms | TFLOP/s | tokens/s | note |", "|---" * 6 + "|"]
    for item in items:
        rest = {
            name: value
            for name, value in item.items()
            if name not in ("probe", "job", "item", "ms", "tflops", "tokens_per_s",
                            "wall_s", "first_loss")
        }  # fmt: skip
        note = "; ".join(f"{name} {_plain(value)}" for name, value in rest.items())
        by = "PyTorch" if item["job"].endswith("torch") else "jaxllm"
        lines.append(
            f"| {item['item']} | {by} | {_number(item.get('ms'), 3)} "
            f"| {_number(item.get('tflops'), 1)} "
            f"| {_number(item.get('tokens_per_s'), 0)} | {note} |"
        )
    return "\n".join(lines)


def regenerate(records: Path = RECORDS, table: Path = TABLE) -> int:
    """Writes docs/benchmarks.md from the records; returns how many there are."""
    parts = [
        "# Benchmarks",
        "Generated from the records in `docs/benchmarks/` by "
        "`python scripts/bench.py --table`: do not edit. Each record says its command, "
        "commit and machine. *rows*: of a step, the best of those tried. *MFU*: model "
        "FLOPs (causal attention half, and in full) over the data sheet's peak. "
        "*ours / this*: jaxllm's tokens/s over this row's, the median over pairs of "
        "runs that took turns on the machine, and their range. A dash is unknown or "
        "not measured.",
    ]
    paths = sorted(records.glob("*.json"))
    loaded = [(path.name, json.loads(path.read_text())) for path in paths]
    for name, record in sorted(loaded, key=lambda pair: pair[1]["when"], reverse=True):
        parts += _section(name, record)
    if not loaded:
        parts.append(
            "No records yet. `python scripts/bench.py --compare --json "
            "docs/benchmarks/NAME.json` makes one: on a machine that does nothing else."
        )
    table.write_text("\n\n".join(parts) + "\n")
    return len(loaded)


def _section(name: str, record: dict[str, Any]) -> list[str]:
    machine = record["machine"]
    device = record.get("device_kind") or "unknown device"
    if device == "cpu":
        device = f"{machine['cpu']}, {machine['cpus']} CPUs"
    versions = ", ".join(
        f"{library} {version}"
        for library, version in sorted(record.get("versions", {}).items())
        if version
    )
    about, model = record["kind"], ""
    if "model" in record:
        about += f", shape {record['shape']}"
        model = (
            f"{record['model']['parameters']:,} parameters, vocabulary "
            f"{record['model']['vocab_size']:,}, T {record['model']['seq_len']}; "
        )
    parts = [
        f"## {about}, {device}",
        f"{record['when']}, commit {record['commit']}, record `{name}`  \n"
        f"`{record['command']}`  \n"
        + model
        + versions
        + (f"; driver {machine['driver']}" if machine.get("driver") else ""),
    ]
    if record["kind"] == "data":
        parts.append(data_tables(record))
    if record.get("results"):
        parts.append(results_table(record["results"]))
    probes: dict[str, list[dict[str, Any]]] = {}
    for item in record.get("items", []):
        probes.setdefault(item["probe"], []).append(item)
    for probe in sorted(probes):
        parts += [f"### {probe}", probe_table(probes[probe])]
    if record.get("errors"):
        errors = "\n".join(f"- {error}" for error in record["errors"])
        parts.append(f"Not measured:\n\n{errors}")
    return parts


def _commit() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "jaxllm", "torch_ref", "scripts")
    except (OSError, subprocess.TimeoutExpired):
        return f"unknown, {_source()}"
    if not commit:
        return f"unknown, {_source()}"
    return commit + (f" with changes, {_source()}" if changed else "")


def _source() -> str:
    """A digest of the code that was timed, for trees that no commit describes."""
    digest = hashlib.sha256()
    for room in ("jaxllm", "torch_ref", "scripts"):
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return f"source sha256 {digest.hexdigest()[:12]}"


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "gpu": nvidia_smi("name"),
        "driver": nvidia_smi("driver_version"),
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def nvidia_smi(field: str) -> str | None:
    """What the driver says of the first GPU; None without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value).replace("|", "/")
