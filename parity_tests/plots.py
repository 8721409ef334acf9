"""The report's plots: error by depth and tensor, losses over each other, margins."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(folder: Path, results: dict[str, Any]) -> None:
    """Draws what the results hold; a part that was never run has no plot."""
    for name, function in (
        ("noise", _noise),
        ("trajectory", _trajectories),
        ("real_text", _real_text),
        ("mutants", _mutants),
    ):
        if name in results:
            function(folder, results[name]["results"])


def _noise(folder: Path, found: dict[str, Any]) -> None:
    rows = found["by_depth"]
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in rows[0]:
        if name != "layers":
            axes.semilogy([r["layers"] for r in rows], [r[name] for r in rows], "o-",
                          label=name)  # fmt: skip
    axes.set(xlabel="layers", ylabel="relative L2 of logits, float32")
    axes.legend()
    _save(figure, folder / "error_by_depth.png")

    rows = found["by_tensor"]
    figure, axes = plt.subplots(figsize=(8, 5))
    at = np.arange(len(rows))
    for name in rows[0]:
        if name != "tensor":
            axes.semilogy(at, [r[name] for r in rows], "o", label=name, markersize=4)
    axes.set_xticks(at, [r["tensor"] for r in rows], rotation=90, fontsize=6)
    axes.set_ylabel("relative L2 of the gradient, float32")
    axes.legend()
    _save(figure, folder / "gradient_error_by_tensor.png")


def _trajectories(folder: Path, found: dict[str, Any]) -> None:
    figure, grid = plt.subplots(2, len(found), figsize=(4 * len(found), 6), sharex=True)
    for column, (recipe, losses) in enumerate(found.items()):
        _overlay(grid[0][column], grid[1][column], losses)
        grid[0][column].set_title(recipe, fontsize=8)
    _save(figure, folder / "trajectories.png")


def _real_text(folder: Path, found: dict[str, Any]) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    _overlay(above, below, found["losses"])
    above.set_title(
        f"{found['steps']} steps of the reference recipe on {found['text']}"
    )
    _save(figure, folder / "real_text.png")


def _overlay(above, below, losses: dict[str, list[float]]) -> None:
    """Loss curves on top of each other, and their distances below."""
    ours, theirs, truth = (np.array(values) for values in losses.values())
    styles = ("-", "--", ":")
    for (name, values), style in zip(losses.items(), styles, strict=True):
        above.plot(values, style, label=name, linewidth=1)
    above.set_ylabel("loss, nats")
    above.legend(fontsize=6)
    # On a logarithmic axis equal losses have no place: they are drawn at the floor.
    for name, gap in (
        ("ours - reference", ours - theirs),
        ("reference - its float64", theirs - truth),
    ):
        below.semilogy(np.maximum(np.abs(gap), 1e-8), ".", markersize=2, label=name)
    below.set(xlabel="step", ylabel="distance, nats")
    below.legend(fontsize=6)


def _mutants(folder: Path, rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.16 * len(rows) + 1))
    top = 1e16
    margins = [
        top if r["margin"] == "infinite" else min(r["margin"], top) for r in rows
    ]
    axes.barh(np.arange(len(rows)), margins)
    axes.set_xscale("log")
    axes.axvline(10, color="red")
    axes.set_yticks(np.arange(len(rows)), [r["name"] for r in rows], fontsize=5)
    axes.invert_yaxis()
    axes.set_xlabel("error over gate (10 is asked for)")
    _save(figure, folder / "mutants.png")


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
