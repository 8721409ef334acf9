#!/usr/bin/env python3
"""Exports a run's weights, and proves the export.

    python scripts/export_weights.py runs/demo --format llama

The folder is written under a temporary name, opened by what its users will open it
with, compared with the run on held-out text, and only then moved to its place. An
export that computes something else ends in FOLDER.failed and exit code 2.
"""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

# Nothing here needs a GPU, whose float32 products may be rounded to TF32 besides.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import command_line
import tyro

from jaxllm.config import RunConfig
from jaxllm.convert.card import model_card
from jaxllm.convert.export import round_params, write_export
from jaxllm.convert.folder import MARK, check_target, new_folder, publish, write_json
from jaxllm.convert.gguf_file import import_gguf
from jaxllm.convert.tensors import SHARD_BYTES
from jaxllm.data.shards import file_sha256, load_manifest
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.metrics import read_jsonl
from jaxllm.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports the weights of a run, and proves that they compute what the run does."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, as scripts/pretrain.py wrote it."""
    format: Literal["llama", "k_model", "gguf"] = "llama"
    """llama: a folder for transformers, vLLM and others. k_model: for torch_ref. gguf:
    a file for llama.cpp."""
    out: Path | None = None
    """Folder to write; an earlier export there is replaced. None: RUN/export/FORMAT."""
    step: int | None = None
    """Checkpoint to export, in updates. None: the newest that is intact."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights. None: that in which they were trained."""
    verify: bool = True
    """Open the folder with transformers, torch_ref or llama.cpp and compare it with the
    run. Where those are not installed it is skipped, unless --verify was given."""
    pth: bool = False
    """Write a pickled state dict, model.pth, as well (k_model; needs torch)."""
    optimizer: bool = False
    """Write Adam's moments as well, for torch_ref/ddp_pretrain.py --resume (k_model;
    needs torch)."""
    max_shard_gb: float = SHARD_BYTES / 1e9
    """Largest file of weights in GB (10^9 bytes); above it they are cut into shards."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and exports; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = command_line.parse(Export, args=words, description=__doc__)
    return command_line.call(lambda: export(args, must_verify="--verify" in words))


def export(args: Export, *, must_verify: bool = False) -> None:
    """Writes, verifies and publishes one folder.

    Raises: ValueError for what the user can mend, and for an export that differs.
    """
    target = args.out or args.run / "export" / args.format
    check_target(target)
    _check(args)
    config, step, trained = read_run(args.run, args.step)
    tokenizer = read_tokenizer(args.run)
    dtype = args.dtype or config.compute.param_dtype
    params = round_params(trained, config.model, dtype)
    data = data_folders(args.run, config)
    with new_folder(target) as draft:
        write_export(
            draft, params, config.model, format=args.format, tokenizer=tokenizer,
            name=args.run.resolve().name, max_shard_bytes=int(args.max_shard_gb * 1e9),
        )  # fmt: skip
        if args.pth:
            write_pth(draft, params, config)
        if args.optimizer:
            from torch_moments import write_trainer

            _, _, opt = read_run(args.run, step, prefix="opt/")
            write_trainer(draft, {"step": step, "opt": opt}, config)
        report: dict[str, Any] = {
            "name": args.run.resolve().name,
            "format": args.format,
            "dtype": dtype,
            "step": step,
            "model": dataclasses.asdict(config.model),
            "versions": _versions(),
            "sha256": {p.name: file_sha256(p) for p in sorted(draft.iterdir())},
        }
        report |= prove(
            draft, args, config, params, tokenizer, data, must_verify=must_verify
        )
        _describe(draft, args, config, target, data, report)
        failed = target.with_name(target.name + ".failed")
        if report["status"] == "failed":
            publish(draft, failed)
            wrong = [check["name"] for check in report["checks"] if not check["passed"]]
            raise ValueError(
                f"the export does not compute what the run does ({'; '.join(wrong)}): "
                f"it was left in {failed} for a look, figures in {MARK}; do not use it"
            )
        publish(draft, target)
        shutil.rmtree(failed, ignore_errors=True)  # of an earlier attempt
    print(f"{target}: step {step}, {args.format}, {dtype}; {_proof_line(report)}")


def read_run(
    run: Path, step: int | None, *, prefix: str = "params/"
) -> tuple[RunConfig, int, dict[str, Any]]:
    """Reads a run's configuration, step and arrays, as NumPy: those below `prefix`.

    Raises: ValueError if there is no such run, or no such step that is undamaged.
    """
    from jaxllm.train.checkpoint import Checkpoints

    folder = RunFolder(run)
    config = folder.load_config()
    return config, *Checkpoints(folder.checkpoints).read_arrays(prefix, step=step)


def read_tokenizer(run: Path) -> Tokenizer | None:
    """Reads the run's tokenizer; None if it has none, as after some imports.

    Raises: ValueError if it is damaged.
    """
    path = RunFolder(run).tokenizer
    return Tokenizer.load(path) if path.exists() else None


def data_folders(run: Path, config: RunConfig) -> list[Path]:
    """Lists where the run's data may lie: where it says, and in the run's folder."""
    from jaxllm.data.batches import parse_mixture

    folders = [RunFolder(run).data]
    if config.data.path:
        with_weights = parse_mixture(config.data.path)
        folders = [folder for folder, _ in with_weights] + folders
    return [folder for folder in folders if (folder / "manifest.json").is_file()]


def prove(
    draft, args: Export, config: RunConfig, params, tokenizer, data, *, must_verify
) -> dict[str, Any]:
    """Verifies the draft, or says why not: `status`, and what belongs to it."""
    if not args.verify:
        return {"status": "not verified", "reason": "--no-verify was given"}
    import verify_weights

    missing = verify_weights.missing_package(args.format)
    if missing:
        if must_verify:
            raise ValueError(
                f"--verify needs {missing}: pip install 'jaxllm[torch,gguf]', or leave "
                f"--verify out"
            )
        return {"status": "not verified", "reason": f"{missing} is not installed"}
    text = verify_weights.read_text(data, config.model, tokenizer)
    checks = verify_weights.verify(
        draft, params, config.model, format=args.format, text=text, tokenizer=tokenizer
    )
    passed = all(check["passed"] for check in checks)
    status = "verified" if passed else "failed"
    return {"status": status, "text": text.source, "checks": checks}


def write_pth(draft: Path, params: dict[str, Any], config: RunConfig) -> None:
    """Writes model.pth, a state dict that torch.load(weights_only=True) reads."""
    import torch
    from torch_moments import to_torch

    torch.save(to_torch(params, config.model), draft / "model.pth")


def _check(args: Export) -> None:
    """Raises: ValueError for flags that do not go together, or values out of range."""
    for name in ("pth", "optimizer"):
        if not getattr(args, name):
            continue
        if args.format != "k_model":
            raise ValueError(f"--{name} belongs to --format k_model, not {args.format}")
        if importlib.util.find_spec("torch") is None:
            raise ValueError(f"--{name} needs torch: pip install 'jaxllm[torch]'")
    if args.optimizer and args.dtype is not None:
        raise ValueError(
            "--optimizer goes on with the training, which needs the weights as they "
            "are: leave --dtype out"
        )
    if not 0 < args.max_shard_gb < 1e9:
        raise ValueError(f"--max-shard-gb {args.max_shard_gb} must lie in (0, 10^9)")
    if args.format == "gguf":
        import_gguf()


def _describe(draft: Path, args: Export, config, target, data, report) -> None:
    """Writes parity.json, the model card, and the loss plot, if the run has one."""
    folder = RunFolder(args.run)
    plot = None
    if folder.plot.is_file():
        plot = folder.plot.name
        shutil.copy(folder.plot, draft / plot)
    records = read_jsonl(folder.metrics) if folder.metrics.is_file() else []
    evaluations = [
        record
        for record in records
        if "val_loss" in record and record["step"] <= report["step"]
    ]
    card = model_card(
        config, folder=target, files=list(report["sha256"]), report=report,
        data=_manifest(data), evaluations=evaluations, plot=plot,
    )  # fmt: skip
    (draft / "README.md").write_text(card, encoding="utf-8")
    write_json(draft / MARK, report)


def _manifest(data: Sequence[Path]) -> dict[str, Any] | None:
    """What the data folder says about itself."""
    for folder in data:
        try:
            manifest = load_manifest(folder)
        except ValueError:
            continue
        return {
            "path": str(folder),
            "sha256": file_sha256(folder / "manifest.json"),
            "tokenizer_sha256": manifest.tokenizer_sha256,
            **{
                f"{split}_{what}": getattr(manifest, what)(split)
                for split in ("train", "val")
                for what in ("documents", "tokens")
            },
        }
    return None


def _versions() -> dict[str, str]:
    names = ("jaxllm", "jax", "numpy", "safetensors", "torch", "transformers", "gguf",
             "xllamacpp")  # fmt: skip
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _proof_line(report: dict[str, Any]) -> str:
    if report["status"] != "verified":
        return f"not verified: {report['reason']}"
    figures = {k: v for check in report["checks"] for k, v in check.items()}
    line = f"verified, {len(report['checks'])} checks"
    if "relative_l2" in figures:
        line += f", logits within {figures['relative_l2']:.1e}"
    return f"{line}, largest KL {figures.get('max_kl_nats', 0):.1e} nats"


if __name__ == "__main__":
    sys.exit(main())
