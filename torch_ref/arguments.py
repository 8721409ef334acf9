"""The command line of the reference trainer: a preset, and changes to it."""

import argparse
import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxllm import presets
from jaxllm.config import RunConfig

# What the command line may change in a preset: (section, field, flag, help).
FLAGS = (
    ("model", "dim", "dim", "width of the residual stream"),
    ("model", "n_layers", "n_layers", "number of decoder layers"),
    ("model", "n_heads", "n_heads", "number of query heads"),
    ("model", "n_kv_heads", "n_kv_heads", "number of key/value heads"),
    ("model", "hidden_dim", "hidden_dim", "width of the feed-forward layer"),
    ("model", "vocab_size", "vocab_size", "number of token ids"),
    ("model", "max_seq_len", "max_seq_len", "longest context in tokens"),
    ("model", "dropout", "dropout", "probability of dropping an activation"),
    ("model", "init", "init", "which projections start smaller"),
    ("data", "layout", "layout", "packed windows, or one document a row"),
    ("data", "seq_len", "seq_len", "tokens of an input row; 0 derives it"),
    ("data", "seed", "data_seed", "seed of the order of the rows"),
    ("optim", "algorithm", "algorithm", "adamw, or adam without any decay"),
    ("optim", "learning_rate", "learning_rate", "peak learning rate"),
    ("optim", "min_learning_rate", "min_learning_rate", "rate at the cosine's end"),
    ("optim", "warmup_steps", "warmup_steps", "updates of linear warm-up"),
    ("optim", "beta1", "beta1", "decay rate of Adam's first moment"),
    ("optim", "beta2", "beta2", "decay rate of Adam's second moment"),
    ("optim", "eps", "eps", "Adam's epsilon"),
    ("optim", "weight_decay", "weight_decay", "decay per unit of learning rate"),
    ("optim", "clip_norm", "clip_norm", "largest gradient norm; 0 turns it off"),
    ("optim", "loss_norm", "loss_norm", "mean over tokens, or of micro-batch means"),
    ("optim", "schedule_unit", "schedule_unit", "what the schedule counts"),
    ("train", "batch_size", "batch_size", "rows of an update, over all processes"),
    ("train", "accumulate", "accumulate", "micro-batches of an update"),
    ("train", "epochs", "epochs", "passes over the data, if steps is 0"),
    ("train", "steps", "steps", "updates of the run; 0 lets epochs decide"),
    ("train", "seed", "seed", "seed of fresh weights and of dropout"),
    ("train", "log_every", "log_every", "updates between two lines"),
    ("train", "save_every", "save_every", "updates between two checkpoints"),
    ("train", "keep", "keep", "newest checkpoints that are kept"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str):
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def make_parser() -> Parser:
    """Builds the command line; flags that change the preset have no default."""
    parser = Parser(
        prog="ddp_pretrain.py",
        description="Trains torch_ref/k_model.py as a PyTorch user would.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of token shards (prepare_data.py)")
    add("--preset", default="reference", help="run to start from (default: reference)")
    add("--out", default="runs/torch", help="folder of the run (default: runs/torch)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--init_from", help="initial weights: a .safetensors file or exported folder")
    add("--dtype", choices=("float32", "float64", "bfloat16"), default="float32",
        help="float32 (default), float64, or autocast to bfloat16")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, or auto (default): a GPU if any")
    add("--sdpa", choices=("default", "flash", "plain"), default="default",
        help="attention: PyTorch picks (default), FlashAttention, plain")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile model and loss")
    add("--threads", type=int, default=0, help="CPU threads; 0 (default): PyTorch's")
    add("--json", action="store_true", help="print log lines as JSON objects")
    changes = parser.add_argument_group("changes to the preset (default: its values)")
    for section, name, flag, text in FLAGS:
        kind = get_type_hints(_sections()[section])[name]
        extra: dict[str, Any] = {}
        if get_origin(kind) is Literal:
            extra["choices"] = get_args(kind)
        else:
            extra["type"] = int if int in (kind, *get_args(kind)) else float
        changes.add_argument(f"--{flag}", help=f"{text} [{section}.{name}]", **extra)
    return parser


def configure(args: argparse.Namespace) -> RunConfig:
    """Returns the preset with the command line's changes.

    Raises: ValueError as the configuration does.
    """
    config = presets.preset(args.preset)
    sections = {}
    for section in _sections():
        given = {
            name: getattr(args, flag)
            for part, name, flag, _ in FLAGS
            if part == section and getattr(args, flag) is not None
        }
        if "dim" in given or "n_heads" in given:
            # Widths that follow from these are derived anew, unless they are given.
            given = {"hidden_dim": None, "head_dim": None} | given
        sections[section] = dataclasses.replace(getattr(config, section), **given)
    return dataclasses.replace(config, **sections)


def _sections() -> dict[str, type]:
    hints = get_type_hints(RunConfig)
    return {name: hints[name] for name in ("model", "data", "optim", "train")}
