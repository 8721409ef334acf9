"""Weights from wherever they lie: a run, a Hugging Face Llama, a k_model.

And what it takes to begin a run with them: the same network, the same tokenizer.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.convert.load import cast_tree, read_config, read_params
from jaxllm.convert.names import Format
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.run_folder import RunFolder

# Without influence on what the weights mean, so that a new run may choose them.
_FREE = ("multiple_of", "max_seq_len", "dropout", "rope_theta", "norm_eps", "init")


@dataclass(frozen=True)
class Origin:
    """Weights on disk, described but not read yet."""

    path: Path
    format: Format | None
    """None is a run of ours."""
    model: ModelConfig
    tokenizer: Tokenizer | None
    """The tokenizer that belongs to them; None if there is none of ours."""

    @property
    def beside(self) -> Path:
        """The folder that they lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(self, step: int | None = None) -> tuple[int | None, dict[str, Any]]:
        """Reads the weights as NumPy arrays, and the step that they are from.

        Raises: ValueError naming what is missing or damaged, or a `step` asked of
        weights that are no run.
        """
        if self.format is None:
            from jaxllm.train.checkpoint import Checkpoints

            checkpoints = Checkpoints(RunFolder(self.path).checkpoints)
            return checkpoints.read_arrays("params/", step=step)
        if step is not None:
            raise ValueError(
                f"--step {step} belongs to a run, and {self.path} is none: leave it out"
            )
        return None, read_params(self.path, self.model, format=self.format)


def find_weights(path: str | Path, *, config: Path | None = None) -> Origin:
    """Describes a run's folder, a Hugging Face Llama folder, or a k_model's folder or
    .safetensors file (with the config.json beside it, or `config`).

    Raises: ValueError if `path` is none of these, or needs what we do not represent.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a run or a folder of weights")
    folder = RunFolder(path)
    if path.is_dir() and folder.checkpoints.is_dir():
        tokenizer = _tokenizer(folder.tokenizer)
        return Origin(path, None, folder.load_config().model, tokenizer)
    if path.is_dir() and config is None and not folder.config.is_file():
        raise ValueError(
            f"{path} holds no run (no checkpoints) and no weights (no config.json): "
            f"give a run, a Hugging Face Llama folder, or a k_model's"
        )
    format, model = read_config(path, config)
    origin = Origin(path, format, model, None)
    tokenizer = _tokenizer(origin.beside / "tokenizer.json")
    if tokenizer is not None and tokenizer.vocab_size <= model.vocab_size:
        origin = replace(origin, tokenizer=tokenizer)
    return origin


def require_data(config: RunConfig, folder: RunFolder) -> None:
    """Refuses the demo corpus for weights that know the ids of another tokenizer.

    Raises: ValueError if no data was named where it has to be.
    """
    if config.data.path:
        return
    if folder.has_checkpoint():
        from jaxllm.train.checkpoint import Checkpoints

        if Checkpoints(folder.checkpoints).read_meta()["data"] is None:
            raise ValueError(
                f"the run in {folder.path} was imported without data: give --data.path "
                f"with a data folder{_prepared_with(folder.tokenizer)}"
            )
    elif config.init_from:
        theirs = RunFolder(find_weights(config.init_from).path)
        if not (theirs.data / "manifest.json").is_file():
            raise ValueError(
                f"--init-from {theirs.path} needs --data.path as well, with a data "
                f"folder{_prepared_with(theirs.tokenizer)}: the demo corpus has a "
                f"tokenizer of its own"
            )


def require_fit(config: RunConfig, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Checks that the weights a run goes on with, or begins with, know the ids of its
    data, and have the shape of its network.

    Raises: ValueError naming the field, or the tokenizers, that differ.
    """
    if folder.has_checkpoint():
        # Before anything is written: the run's own tokenizer is the proof.
        theirs = _tokenizer(folder.tokenizer)
        if theirs is not None and theirs.sha256 != tokenizer.sha256:
            raise ValueError(
                f"the run in {folder.path} was trained on other data than "
                f"{config.data.path}, whose tokenizer is another (sha256 "
                f"{tokenizer.sha256[:12]}..., not {theirs.sha256[:12]}...): give its "
                f"--data.path, or data{_prepared_with(folder.tokenizer)}"
            )
    elif config.init_from:
        _require_origin(find_weights(config.init_from), config, tokenizer)


def load(config: RunConfig, abstract_state: dict) -> tuple[dict[str, Any], str]:
    """Reads the weights of `config.init_from`, in the run's dtype and layout; also says
    where they came from."""
    import jax

    origin = find_weights(config.init_from)
    step, params = origin.read()

    def put(array: np.ndarray, like: Any) -> Any:
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: array[index]
        )

    host = cast_tree(params, config.compute.param_dtype)
    where = str(origin.path) if step is None else f"{origin.path}, step {step}"
    return jax.tree.map(put, host, abstract_state["params"]), f"weights of {where}"


def _require_origin(origin: Origin, config: RunConfig, tokenizer: Tokenizer) -> None:
    theirs = asdict(origin.model)
    for name, ours in asdict(config.model).items():
        if name not in _FREE and ours != theirs[name]:
            raise ValueError(
                f"--init-from {origin.path} has model.{name}={theirs[name]}, and "
                f"model.{name}={ours} was asked for: leave that flag out"
            )
    if origin.tokenizer is not None and origin.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"--init-from {origin.path} has another tokenizer (sha256 "
            f"{origin.tokenizer.sha256[:12]}...) than {config.data.path} "
            f"({tokenizer.sha256[:12]}...): its weights know other ids; give "
            f"data{_prepared_with(origin.beside / 'tokenizer.json')}"
        )


def _prepared_with(tokenizer: Path) -> str:
    words = " that scripts/prepare_data.py wrote"
    return f"{words} with --tokenizer {tokenizer}" if tokenizer.is_file() else words


def _tokenizer(path: Path) -> Tokenizer | None:
    try:
        return Tokenizer.load(path)
    except ValueError:
        return None  # missing, or not of our kind
