#!/usr/bin/env python3
"""Imports weights into a run folder that generate.py and pretrain.py open.

    python scripts/import_weights.py some/llama-folder --out runs/llama

PATH is a Hugging Face Llama folder, a folder or .safetensors file of a k_model, a
pickled state dict (.pth, with --allow-pickle), or a run of torch_ref/ddp_pretrain.py,
whose Adam moments come along (with --allow-pickle: they lie in a pickle).
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

# Nothing here needs a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import command_line
import numpy as np
import tyro

from jaxllm.config import ComputeConfig, DataConfig, ModelConfig, RunConfig, to_json
from jaxllm.convert.folder import new_folder, publish
from jaxllm.convert.load import (
    PICKLES,
    cast_tree,
    params_from,
    read_config,
    read_params,
)
from jaxllm.convert.names import parameter_tree
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.run_folder import RunFolder

TRAINER = "trainer.pt"  # torch_ref/run_folder.py, not imported: it needs torch


@dataclasses.dataclass(frozen=True)
class Import:
    """Imports weights into a run folder."""

    path: Annotated[Path, tyro.conf.Positional]
    """Folder or file to import."""
    out: Path
    """Run folder to make; it must not exist yet."""
    config: Path | None = None
    """The config.json of the weights. None: the one beside them."""
    tokenizer: Path | None = None
    """A tokenizer.json of scripts/prepare_data.py. None: the one beside the weights, if
    it is of that kind."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Dtype of the weights in the run. None: float32 (float64 stays float64)."""
    data: str = ""
    """Data folder on which pretrain.py --resume shall go on; empty: none yet."""
    seq_len: int = 0
    """Length in tokens of the rows of --data; 0 means the model's whole context."""
    verify: bool = True
    """Open the folder with transformers or torch_ref and compare its logits with what
    was read. Where those are not installed it is skipped, unless --verify was given."""
    allow_pickle: bool = False
    """Open pickles, too: tensors and plain values are read, code never runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and imports; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = command_line.parse(Import, args=words, description=__doc__)
    verify = "--verify" in words
    return command_line.call(lambda: import_weights(args, must_verify=verify))


def import_weights(args: Import, *, must_verify: bool = False) -> None:
    """Reads, checks, and writes the run folder, whole or not at all.

    Raises: ValueError for what the user can mend.
    """
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists: give another --out, or remove it")
    if not args.path.exists():
        raise ValueError(f"{args.path} does not exist: give a folder or a file")
    if args.allow_pickle and importlib.util.find_spec("torch") is None:
        raise ValueError("--allow-pickle needs torch: pip install 'jaxllm[torch]'")
    path = _newest_checkpoint(args.path)
    if (path / TRAINER).is_file():
        config, state = _from_trainer(path, args)
    else:
        config, state = _from_weights(path, args)
    tokenizer = _tokenizer(path, args, config.model)
    proof = _prove(path, args, config.model, tokenizer, must_verify=must_verify)
    meta = _meta(config)
    with new_folder(args.out) as draft:
        write_run(draft, config, state, meta, tokenizer)
        publish(draft, args.out)
    print(
        f"{args.out}: {config.model.n_params:,} parameters in "
        f"{config.compute.param_dtype}, step {int(state['step'])}, from {path}; {proof}"
    )
    if tokenizer is not None:
        print(f"next: python scripts/generate.py {args.out} --prompt 'Once'")
    print(f"next: python scripts/pretrain.py {_training(args.out, config)}")


def _prove(
    path: Path, args: Import, model: ModelConfig, tokenizer: Any, *, must_verify: bool
) -> str:
    """Opens the folder with the program of its authors and compares; says what came
    of it.

    Raises: ValueError if it computes something else there, or cannot be compared
    although that was asked for.
    """
    if not args.verify:
        return "not verified: --no-verify was given"
    reason = ""
    if not path.is_dir() or args.config is not None:
        reason = "only a folder with its config.json can be opened by others"
    else:
        from verify_weights import missing_package

        format, _ = read_config(path)
        if missing := missing_package(format):
            reason = f"{missing} is not installed"
    if reason:
        if must_verify:
            raise ValueError(f"--verify cannot compare {path}: {reason}")
        return f"not verified: {reason}"
    from verify_import import verify_import
    from verify_weights import first_line

    # As they lie there, before --dtype: rounding is no mistake.
    params = read_params(path, model, format=format)
    program = "transformers" if format == "llama" else "torch_ref"
    try:
        checks = verify_import(path, params, model, format=format, tokenizer=tokenizer)
    except Exception as error:  # programs of others raise all sorts
        raise ValueError(
            f"{path} cannot be opened by {program} ({first_line(error)}): it was not "
            f"imported; --no-verify imports it all the same"
        ) from None
    wrong = [check["name"] for check in checks if not check["passed"]]
    figures = {k: v for check in checks for k, v in check.items()}
    if wrong:
        raise ValueError(
            f"{path} computes something else in {program} than here "
            f"({'; '.join(wrong)}; logits {figures['relative_l2']} apart): it was not "
            f"imported; --no-verify imports it all the same"
        )
    return f"verified, logits within {figures['relative_l2']:.1e}"


def _training(out: Path, config: RunConfig) -> str:
    """The arguments with which training goes on, as far as they are known."""
    if config.data.path:
        return f"--resume --out {out}"
    return f"--init-from {out} --data.path DIR --out runs/new"


def write_run(
    folder: Path,
    config: RunConfig,
    state: dict[str, Any],
    meta: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes what makes a folder a run: configuration, tokenizer, one checkpoint."""
    from jaxllm.train.checkpoint import Checkpoints

    run = RunFolder(folder)
    run.config.write_text(to_json(config), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(int(state["step"]), state, meta)
    checkpoints.close()


def _newest_checkpoint(path: Path) -> Path:
    """Goes from a run of ddp_pretrain.py to its newest checkpoint."""
    steps = sorted(path.glob("step_*")) if path.is_dir() else []
    return steps[-1] if steps and not (path / "config.json").exists() else path


def _from_weights(path: Path, args: Import) -> tuple[RunConfig, dict[str, Any]]:
    """Weights alone: a run at step 0, with Adam at rest."""
    pickled = path.is_file() and path.suffix in PICKLES
    if pickled and not args.allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can hold code: convert it to safetensors, or "
            f"give --allow-pickle to read its tensors and nothing else"
        )
    format, model = read_config(path, args.config)
    if pickled:
        from torch_moments import load, to_arrays

        arrays = to_arrays(load(path), where=str(path))
        params = params_from(arrays, model, format=format, where=str(path))
    else:
        params = read_params(path, model, format=format)
    wide = params["norm"]["weight"].dtype == np.float64
    dtype = args.dtype or ("float64" if wide else "float32")
    config = RunConfig(
        out=str(args.out),
        model=model,
        compute=ComputeConfig(param_dtype=dtype),
        data=DataConfig(path=args.data, seq_len=args.seq_len),
    )
    params = cast_tree(params, dtype)
    moments = [
        parameter_tree(model, lambda s: np.zeros(s, params["norm"]["weight"].dtype))
        for _ in range(2)
    ]
    opt = {"count": np.zeros((), np.int32), "m": moments[0], "v": moments[1]}
    return config, {"step": np.zeros((), np.int32), "params": params, "opt": opt}


def _from_trainer(path: Path, args: Import) -> tuple[RunConfig, dict[str, Any]]:
    """A checkpoint of ddp_pretrain.py: weights, moments, step and configuration."""
    if not args.allow_pickle:
        raise ValueError(
            f"{path / TRAINER} is a pickle, which can hold code: give --allow-pickle "
            f"to read its tensors and nothing else, or the model.safetensors beside "
            f"it to take the weights alone"
        )
    for name in ("dtype", "config", "seq_len"):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with {path}, whose training "
                f"goes on as it was: leave it out"
            )
    from torch_moments import read_trainer

    format, model = read_config(path)
    # First the weights: a network that they do not fill is not built.
    params = read_params(path, model, format=format)
    config, state = read_trainer(path, model)
    where = args.data or config.data.path
    if not args.data and where and not Path(where.partition("=")[0]).exists():
        print(
            f"note: its data folder {where} is not here: give --data to name it now, "
            f"or pretrain.py --resume --out {args.out} --data.path DIR later",
            file=sys.stderr,
        )
        where = ""
    data = dataclasses.replace(config.data, path=where)
    config = dataclasses.replace(
        config,
        out=str(args.out),
        data=data,
        compute=ComputeConfig(param_dtype=str(params["norm"]["weight"].dtype)),  # type: ignore[arg-type]
    )
    return config, state | {"params": params}


def _tokenizer(path: Path, args: Import, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer that was given, or the one that came with the weights, or that of
    the data.

    Raises: ValueError if a given one is not ours, or has more ids than the model, or is
    another than that of the data.
    """
    beside = (path if path.is_dir() else path.parent) / "tokenizer.json"
    file, tokenizer = args.tokenizer or beside, None
    if args.tokenizer is not None or beside.exists():
        try:
            tokenizer = Tokenizer.load(file)
        except ValueError as error:
            if args.tokenizer is not None:
                raise
            print(f"note: without its tokenizer, since {error}", file=sys.stderr)
    if args.data:
        theirs = Tokenizer.load(Path(args.data) / "tokenizer.json")
        if tokenizer is not None and tokenizer.sha256 != theirs.sha256:
            raise ValueError(
                f"--data {args.data} was prepared with another tokenizer than {file}: "
                f"prepare it with --tokenizer {file}, or leave --data out"
            )
        file, tokenizer = Path(args.data) / "tokenizer.json", theirs
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > model.vocab_size:
        larger = (
            f"{file} has {tokenizer.vocab_size} ids, and the model only "
            f"{model.vocab_size}"
        )
        if args.tokenizer is not None or args.data:
            raise ValueError(f"{larger}: give the tokenizer that belongs to it")
        print(f"note: without its tokenizer, since {larger}", file=sys.stderr)
        return None
    return tokenizer


def _meta(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says besides its arrays, as jaxllm/train/run.py writes it."""
    meta = {"config": dataclasses.asdict(config), "total_steps": config.train.steps}
    if not config.data.path:
        return meta | {"data": None}
    from jaxllm.train.run import open_batches

    train, _ = open_batches(config)
    rows, options = train.n_rows, config.train
    total = options.steps or -(-rows * options.epochs // options.batch_size)
    data = {"rows": rows, "tokenizer": train.tokenizer.sha256}
    return meta | {"data": data, "total_steps": total}


if __name__ == "__main__":
    sys.exit(main())
