"""The report as a page: every figure taken from the results, none typed."""

from typing import Any

from parity_tests.mutants_training import EQUIVALENT
from parity_tests.rungs_bf16 import GATED

INTRO = """# Parity

What is equal to the PyTorch reference, how tightly, and how we know that the check can
fail. This page is written by `python -m parity_tests.report`; `parity/parity.json`
holds the same figures for programs. The gates are enforced by `pytest parity_tests`.
"""


def page(env: dict[str, Any], results: dict[str, Any]) -> str:
    """Writes docs/parity.md."""
    parts = [INTRO, _environment(env)]
    for name, write in (
        ("ladder", _ladder),
        ("noise", _noise),
        ("bf16", _bf16),
        ("trajectory", _trajectory),
        ("decode", _decode),
        ("real_text", _real_text),
        ("gpu", _gpu),
        ("mutants", _mutants),
    ):
        if name == "gpu" and name not in results:
            parts.append("## On a GPU\n\nNot measured.\n")
        if name in results:
            part = results[name]
            text = write(part["results"])
            if part["commit"] != env["commit"]:
                text += f"\nMeasured at commit {part['commit'][:12]}.\n"
            parts.append(text)
    return "\n".join(parts)


def _environment(env: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in env.items())
    return f"## Where\n\n| | |\n|---|---|\n{rows}\n"


def _ladder(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## The ladder",
        "",
        "Worst error over the seeds, over all that a rung compares. `gate` is what",
        "the tests enforce, `limit` the specification's bound; gates only tighten.",
        "",
        "| rung | precision | metric | seeds | error | gate | limit | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['rung']} | {row['precision']} | {row['metric']} | {row['seeds']} "
            f"| {row['error']:.2g} | {row['gate']:.2g} | {row['limit']:.2g} "
            f"| {'holds' if row['passed'] else '**FAILS**'} |"
        )
    return "\n".join([*lines, ""])


def _noise(found: dict[str, Any]) -> str:
    deepest = found["by_depth"][-1]
    worst = max(found["by_tensor"], key=lambda row: row["ours to reference"])
    return f"""## The yardstick: the reference's own noise

Float32 logits after {deepest["layers"]} layers, relative L2: ours to the reference
{deepest["ours to reference"]:.2g}, ours to float64 {deepest["ours to float64"]:.2g},
the reference to its own float64 {deepest["reference to float64"]:.2g}, its fused
attention to its plain one {deepest["reference to itself"]:.2g}. The gradient furthest
from the reference is `{worst["tensor"]}`, {worst["ours to reference"]:.2g}; the
reference is {worst["reference to float64"]:.2g} from float64 there.

![error by depth](parity/error_by_depth.png)
![gradient error by tensor](parity/gradient_error_by_tensor.png)
"""


def _bf16(found: dict[str, dict[str, float]]) -> str:
    return _over_autocast("## bfloat16", found)


def _gpu(found: dict[str, dict[str, float]]) -> str:
    return _over_autocast("## On a GPU", found)


def _over_autocast(title: str, found: dict[str, dict[str, float]]) -> str:
    base = found["autocast"]
    lines = [
        title,
        "",
        "Mean relative errors against the float64 truth, and over those of torch's "
        "autocast.",
        "",
        "| | logits | loss | gradients | logits ratio | gradients ratio |",
        "|---|---|---|---|---|---|",
    ]
    for side, errors in found.items():
        ratios = [errors[kind] / base[kind] for kind in ("logits", "gradients")]
        name = f"**ours, {side}**" if side in GATED else side
        lines.append(
            f"| {name} | {errors['logits']:.3g} | {errors['loss']:.3g} "
            f"| {errors['gradients']:.3g} | {ratios[0]:.2g} | {ratios[1]:.2g} |"
        )
    return "\n".join([*lines, ""])


def _trajectory(found: dict[str, Any]) -> str:
    lines = [
        "## 200 steps",
        "",
        "Largest distance between losses, float32.",
        "",
        "| recipe | ours to reference | ours to float64 | reference to float64 |",
        "|---|---|---|---|",
    ]
    for recipe, losses in found.items():
        ours, theirs, truth = losses.values()
        gaps = (_gap(ours, theirs), _gap(ours, truth), _gap(theirs, truth))
        lines.append(f"| {recipe} | " + " | ".join(f"{g:.2g}" for g in gaps) + " |")
    return "\n".join([*lines, "", "![trajectories](parity/trajectories.png)", ""])


def _decode(found: list[dict[str, Any]]) -> str:
    lines = [
        "## Decoding",
        "",
        "Greedy text of 100 prompts of different lengths with our cache, judged token "
        "by token by a full pass after the same tokens. Where another token would have "
        "been chosen, two logits lie closer than twice their noise.",
        "",
        "| against | precision | tokens | differ | their logits apart, at most | noise "
        "of the logits |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        gap = max((place["gap"] for place in row["differ"]), default=0.0)
        lines.append(
            f"| {row['against']} | {row['precision']} | {row['tokens']:,} "
            f"| {len(row['differ'])} | {gap:.2g} | {row['noise']:.2g} |"
        )
    return "\n".join([*lines, ""])


def _real_text(found: dict[str, Any]) -> str:
    return f"""## {found["steps"]} steps on {found["text"]}

The reference's recipe at a small size, {found["tokens"]:,} targets: our trainer's step
and `torch_ref/ddp_pretrain.py`, from the same weights, on the same rows, in float32.
The loss goes from {found["first_loss"]:.3f} to {found["last_100_mean_loss"]:.3f} (mean
of the last 100 steps). Largest distance of two losses: ours to the reference
{found["ours_to_reference"]:.2g}, ours to the reference in float64
{found["ours_to_float64"]:.2g}, the reference to itself in float64
{found["reference_to_float64"]:.2g}.

![real text](parity/real_text.png)
"""


def _mutants(rows: list[dict[str, Any]]) -> str:
    killed = sum(row["killed"] for row in rows)
    lines = [
        "## Mutants",
        "",
        f"{killed} of {len(rows)} planted mistakes are noticed by ten times the gate.",
        "",
        "| mistake | in | noticed by | error over gate |",
        "|---|---|---|---|",
    ]
    for row in rows:
        margin = row["margin"]
        margin = margin if isinstance(margin, str) else f"{margin:.2g}"
        name = row["name"] if row["killed"] else f"**{row['name']} (survives)**"
        lines.append(
            f"| {name} | `{row['target']}` | {row['rung']}, {row['precision']} "
            f"| {margin} |"
        )
    lines += ["", "Changes that are no mistakes:", ""]
    lines += [f"- {name}: {argument}" for name, argument in EQUIVALENT.items()]
    return "\n".join([*lines, "", "![mutants](parity/mutants.png)", ""])


def _gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
