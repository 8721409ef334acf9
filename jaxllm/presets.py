"""Named runs. A docstring holds the command, the hardware and what to expect."""

import dataclasses
from collections.abc import Callable

from jaxllm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from jaxllm.guard import GuardConfig

# Above what training shows by itself, below the spikes that undo days. None where a run
# is compared with PyTorch's, step by step.
SPIKES = GuardConfig(spike_factor=10.0)


def demo() -> RunConfig:
    """python scripts/pretrain.py

    A small model on the offline demo corpus (Python source text), for any machine.
    Hardware: 2 CPU cores, under 3 minutes. Expected: see the README's first screen.
    """
    return RunConfig(
        out="runs/demo",
        model=ModelConfig(
            dim=192, n_layers=4, n_heads=6, n_kv_heads=3, vocab_size=6144,
            max_seq_len=256,
        ),  # fmt: skip
        optim=OptimConfig(
            learning_rate=1.5e-3, min_learning_rate=1.5e-4, warmup_steps=40
        ),
        train=TrainConfig(
            batch_size=8, steps=160, log_every=10, eval_every=80, eval_rows=64,
            sample_every=80, save_every=80, when_finished="again",
        ),  # fmt: skip
        guard=SPIKES,
    )  # fmt: skip


def k_215m() -> RunConfig:
    """python scripts/pretrain.py k-215m --data.path DIR

    The lineage's network (215,127,040 parameters) with our training defaults: AdamW
    with decay on matrices, packed windows, mean over tokens. Hardware: one 80 GB GPU.
    Wall time and loss: not measured yet.
    """
    return RunConfig(
        out="runs/k-215m",
        model=ModelConfig(),
        optim=OptimConfig(learning_rate=6e-4, min_learning_rate=6e-5, warmup_steps=100),
        train=TrainConfig(batch_size=128, log_every=10, save_every=500),
        guard=SPIKES,
    )


def k_259m() -> RunConfig:
    """python scripts/pretrain.py k-259m --data.path DIR

    The network of the lineage's table: vocabulary 49,152, context 2,048 (259,167,232
    parameters). Hardware: one 80 GB GPU. Wall time and loss: not measured yet.
    """
    return dataclasses.replace(
        k_215m(),
        out="runs/k-259m",
        model=ModelConfig(vocab_size=49152, max_seq_len=2048),
        train=TrainConfig(batch_size=32, log_every=10, save_every=500),
    )


def _as_the_seed(config: RunConfig, *, out: str) -> RunConfig:
    return dataclasses.replace(
        config,
        out=out,
        model=dataclasses.replace(config.model, init="reference"),
        data=DataConfig(layout="rows"),
        optim=OptimConfig(
            algorithm="adam", learning_rate=2e-4, min_learning_rate=2e-5,
            warmup_steps=0, beta2=0.999, weight_decay=0.0, clip_norm=1.0,
            loss_norm="micro_batch", schedule_unit="micro_step",
        ),  # fmt: skip
        train=dataclasses.replace(
            config.train, batch_size=32, log_every=100, when_finished="stop"
        ),
        guard=GuardConfig(),
    )  # fmt: skip


def reference() -> RunConfig:
    """python scripts/pretrain.py reference --data.path DIR

    The lineage's run, exactly: 215,127,040 parameters, Adam without decay, learning
    rate 2e-4 to 2e-5 by a cosine over the run, no warm-up, clip 1.0, batch 32, one
    document a row, padded to 511 inputs. 100,000 documents are 3,125 steps. Its log
    ends near loss 3.8 on its own corpus after 40 minutes on its card.
    """
    return _as_the_seed(k_215m(), out="runs/reference")


def reference_small() -> RunConfig:
    """python scripts/pretrain.py reference-small --data.path DIR

    The lineage's recipe on the demo's small network, for comparisons on a CPU.
    """
    small = dataclasses.replace(demo(), train=TrainConfig(eval_rows=64))
    return _as_the_seed(small, out="runs/reference-small")


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "k-215m": k_215m,
    "k-259m": k_259m,
    "reference": reference,
    "reference-small": reference_small,
}


def preset(name: str) -> RunConfig:
    """Returns the preset called `name`.

    Raises: ValueError naming the presets there are, when there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
