"""What a run is: frozen dataclasses that check themselves.

A `RunConfig` holds everything that decides a run; `presets.py` names some of them.
`ModelConfig` says what the network is (and travels with exported weights);
`ComputeConfig` says how it is computed, which may change between two starts of one
run; the rest says what it learns from and how.
This module imports neither JAX nor PyTorch, so that both trainers can read it.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from jaxllm.compute import ComputeConfig
from jaxllm.compute import Dtype as Dtype
from jaxllm.fields import from_dict as from_dict
from jaxllm.fields import require_choices, require_int
from jaxllm.fields import to_json as to_json
from jaxllm.guard import GuardConfig
from jaxllm.parallel import DistributedConfig, ParallelConfig


@dataclass(frozen=True)
class ModelConfig:
    """The network: the seed's fields, by the seed's names."""

    dim: int = 1024
    """Width of the residual stream (D)."""
    n_layers: int = 18
    """Number of decoder layers (L)."""
    n_heads: int = 16
    """Number of query heads (N)."""
    n_kv_heads: int = 8
    """Number of key/value heads (K); must divide n_heads."""
    vocab_size: int = 6144
    """Number of token ids (V); the tokenizer must not have more."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer (F); None derives it from dim and multiple_of."""
    multiple_of: int = 64
    """The derived hidden_dim is rounded up to a multiple of this."""
    head_dim: int | None = None
    """Width of one head (H), even; None derives dim / n_heads."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm's root."""
    max_seq_len: int = 512
    """Longest context in tokens (T)."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    tie_word_embeddings: bool = True
    """Use the embedding table as the output head."""
    init: Literal["residual", "reference"] = "residual"
    """Which projections start at 0.02 / sqrt(2 L) instead of 0.02: w2 and wo
    (residual, as in the papers) or w3 and wo (reference, as in the seed's lineage)."""

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size",
                     "multiple_of", "max_seq_len"):  # fmt: skip
            require_int(f"model.{name}", getattr(self, name), at_least=1)
        if self.hidden_dim is None:
            width = int(2 * (4 * self.dim) / 3)
            hidden = self.multiple_of * math.ceil(width / self.multiple_of)
            object.__setattr__(self, "hidden_dim", hidden)
        require_int("model.hidden_dim", self.hidden_dim, at_least=1)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide "
                f"model.n_heads={self.n_heads}: every key/value head serves the same "
                f"number of query heads; choose a divisor"
            )
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(
                    f"model.dim={self.dim} is not divisible by "
                    f"model.n_heads={self.n_heads}: change one, or give model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        require_int("model.head_dim", self.head_dim, at_least=2)
        if self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(
                f"model.head_dim={self.head_dim} is odd: rotary embeddings turn pairs "
                f"of features; use an even dim / n_heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout={self.dropout} must lie in [0, 1)")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"model.{name}={value} must be a positive number")
        require_choices("model", self)

    @property
    def n_params(self) -> int:
        """Number of trained parameters; a tied head counts once."""
        d, h, f = self.dim, self.head_dim, self.hidden_dim
        assert h is not None and f is not None
        attention = 2 * d * self.n_heads * h + 2 * d * self.n_kv_heads * h
        layer = attention + 3 * d * f + 2 * d
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * d + self.n_layers * layer + d


@dataclass(frozen=True)
class DataConfig:
    """What the run reads."""

    path: str = ""
    """Folder of token shards made by scripts/prepare_data.py; empty builds (or reuses)
    shards of the offline demo corpus in the run's own data folder. Several folders with
    their shares of the rows: DIR=0.7,DIR2=0.3."""
    layout: Literal["packed", "rows"] = "packed"
    """packed: windows of seq_len + 1 cut from the token stream. rows: one document a
    row, cut at seq_len, padded, the padding masked."""
    seq_len: int = 0
    """Length in tokens of a row that enters the model; 0 means model.max_seq_len in
    the packed layout and model.max_seq_len - 1 in rows, as in the seed."""
    isolate_documents: bool = False
    """In the packed layout, keep a document from attending to the one before it and
    restart its positions at 0."""
    seed: int = 0
    """Seed of the order in which rows are read."""
    verify: bool = False
    """Compare every shard with the hash in its manifest before the first step; sizes
    are always compared. --verify-data is the same."""

    def __post_init__(self):
        require_choices("data", self)
        require_int("data.seq_len", self.seq_len, at_least=0)
        require_int("data.seed", self.seed, at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move."""

    algorithm: Literal["adamw", "adam"] = "adamw"
    """adamw: decoupled weight decay, on matrices only. adam: no decay at all."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0 to its peak."""
    beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    beta2: float = 0.95
    """Adam's decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's bias-corrected second moment."""
    weight_decay: float = 0.1
    """Decay per unit of learning rate; ignored by adam."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    loss_norm: Literal["token", "micro_batch"] = "token"
    """token: mean over the tokens of the whole batch. micro_batch: mean of the means
    of the micro-batches, as in the seed's lineage."""
    schedule_unit: Literal["update", "micro_step"] = "update"
    """What the schedule counts. micro_step is the lineage's: update k of A micro-steps
    uses the learning rate of micro-step (k + 1) A - 1."""

    def __post_init__(self):
        require_choices("optim", self)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optim.{name}={value} must be a number >= 0")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"optim.{name}={getattr(self, name)} must lie in [0, 1)"
                )
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"optim.eps={self.eps} must be a positive number")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate} is above "
                f"optim.learning_rate={self.learning_rate}: lower it"
            )
        require_int("optim.warmup_steps", self.warmup_steps, at_least=0)


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run and its rhythm. One step is one optimizer update."""

    batch_size: int = 32
    """Rows of one step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches into which a step's rows are cut; divides batch_size."""
    epochs: int = 1
    """Passes over the data, when steps is 0."""
    steps: int = 0
    """Updates of the whole run; 0 means as many as `epochs` passes need."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    log_every: int = 100
    """Steps between two log lines."""
    eval_every: int = 500
    """Steps between two evaluations on held-out documents; 0 only at the end."""
    eval_rows: int = 256
    """Rows of the held-out documents that an evaluation reads at most."""
    sample_every: int = 500
    """Steps between two text samples; 0 only at the end."""
    sample_prompt: str = ""
    """Text the samples go on from; empty begins a new document."""
    sample_tokens: int = 96
    """Length in tokens of a text sample."""
    save_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    save_every_minutes: float = 0.0
    """Minutes after which a checkpoint is due all the same; 0 counts steps alone."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this as well; 0 keeps none."""
    hang_s: float = 300.0
    """Silence in seconds after which a run counts as hung, if that is 20 usual steps at
    least (in a save or an evaluation 6 times as long); 0 watches nothing."""
    exit_when_hung: bool = False
    """Exit with code 75 when hung, for the scheduler to start the run again; else the
    stacks of all threads are written to stacks.txt, and nothing more."""
    track: Literal["none", "tensorboard", "wandb", "swanlab", "trackio"] = "none"
    """Experiment tracker that gets every step's figures as well; metrics.jsonl and
    loss.png are there without one."""
    when_finished: Literal["stop", "again"] = "stop"
    """What a start does when the run folder holds a finished run. stop: says so and
    ends. again: sets the old run aside and trains anew; with --resume it goes on with
    the old one for as many steps again."""

    def __post_init__(self):
        require_choices("train", self)
        for name in ("batch_size", "accumulate", "epochs", "log_every", "save_every",
                     "keep", "eval_rows"):  # fmt: skip
            require_int(f"train.{name}", getattr(self, name), at_least=1)
        for name in ("steps", "seed", "eval_every", "sample_every", "sample_tokens",
                     "keep_every"):  # fmt: skip
            require_int(f"train.{name}", getattr(self, name), at_least=0)
        for name in ("save_every_minutes", "hang_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"train.{name}={value} must be a number >= 0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.accumulate={self.accumulate}: change one"
            )


@dataclass(frozen=True)
class RunConfig:
    """A run of scripts/pretrain.py."""

    out: str = "runs/demo"
    """Folder of the run: configuration, data cache, checkpoints, log, plot."""
    resume: bool = False
    """Go on with the run in `out`; an error if there is none. Without it an unfinished
    run with the same configuration is continued all the same."""
    fresh: bool = False
    """Set aside whatever run is in `out` and start at step 0; again each time it is
    given, so not for a command that a scheduler repeats."""
    deterministic: bool = False
    """On a GPU, use only kernels that always add in the same order, and in each start
    those of the first: a resumed run is then the same bit for bit, as on a CPU."""
    init_from: str = ""
    """Start with the weights of this run, Hugging Face Llama or k_model, and with its
    network; the optimizer starts at rest, the data at its beginning."""
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self):
        if self.resume and self.fresh:
            raise ValueError("--resume and --fresh contradict each other: give one")
        if self.init_from and os.path.realpath(self.init_from) == os.path.realpath(
            self.out
        ):
            raise ValueError(
                f"--init-from {self.init_from} is the folder of the new run itself: "
                f"give another --out, or --resume to go on with it"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than "
                f"model.max_seq_len={self.model.max_seq_len}: lower the first"
            )
        if self.seq_len < 1:
            raise ValueError(
                f"model.max_seq_len={self.model.max_seq_len} leaves no input token in "
                f"the rows layout: raise it"
            )

    @property
    def seq_len(self) -> int:
        """Tokens of one input row (T)."""
        if self.data.seq_len:
            return self.data.seq_len
        return self.model.max_seq_len - (self.data.layout == "rows")
