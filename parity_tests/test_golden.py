"""What the seed's log prints: its learning rates digit for digit, its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.model import Transformer
from jaxllm.presets import preset
from jaxllm.train import optim
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import resolve_compute
from parity_tests import oracle
from parity_tests.cases import reference_config
from torch_ref import k_model

# Step of 3,125 and learning rate, as the log of the seed's run prints them.
SEED_LOG = {
    0: "0.0002000", 100: "0.0001995", 200: "0.0001982", 300: "0.0001959",
    400: "0.0001928", 500: "0.0001889", 600: "0.0001841", 700: "0.0001786",
    800: "0.0001724", 900: "0.0001656", 1000: "0.0001582", 1100: "0.0001504",
    1200: "0.0001421", 1300: "0.0001335", 1400: "0.0001246", 1500: "0.0001157",
    1600: "0.0001066", 1700: "0.0000976", 1800: "0.0000887", 1900: "0.0000800",
    2000: "0.0000717", 2100: "0.0000637", 2200: "0.0000562", 2300: "0.0000492",
    2400: "0.0000429", 2500: "0.0000372", 2600: "0.0000322", 2700: "0.0000281",
    2800: "0.0000248", 2900: "0.0000223", 3000: "0.0000207", 3100: "0.0000200",
}  # fmt: skip
STEPS = 3125


@pytest.mark.parametrize("accumulate", [1, 4])
def test_learning_rates_are_those_of_the_seeds_log(accumulate):
    """All 32 of them in float32, and the same column whatever the accumulation."""
    config = preset("reference").optim
    assert len(SEED_LOG) == 32
    if accumulate > 1:
        config = dataclasses.replace(config, schedule_unit="update")
    rates = {
        step: optim.learning_rate(
            config, jnp.int32(step), total_steps=STEPS, accumulate=accumulate
        )
        for step in SEED_LOG
    }
    printed = {step: f"{float(rate):.7f}" for step, rate in rates.items()}
    assert {rate.dtype for rate in rates.values()} == {jnp.dtype("float32")}
    assert printed == SEED_LOG


def test_the_oracle_has_the_seeds_learning_rates_too():
    config = preset("reference").optim
    printed = {
        step: f"{oracle.learning_rate(config, step, total_steps=STEPS):.7f}"
        for step in SEED_LOG
    }
    assert printed == SEED_LOG


def test_torchs_own_cosine_gives_the_same_learning_rates():
    config = preset("reference").optim
    weight = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([weight], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        adam, STEPS, eta_min=config.min_learning_rate
    )
    worst = 0.0
    for step in range(STEPS):
        theirs = schedule.get_last_lr()[0]
        ours = oracle.learning_rate(config, step, total_steps=STEPS)
        worst = max(worst, abs(ours - theirs) / theirs)
        adam.step()
        schedule.step()
    # Torch's recurrence drifts: measured 4e-13 after 3,125 steps.
    assert worst < 1e-11


@pytest.mark.parametrize(
    ("name", "count"), [("k-215m", 215_127_040), ("k-259m", 259_167_232)]
)
def test_parameters_are_counted_on_the_real_shapes_of_both_sides(name, count):
    config = preset(name)
    compute = resolve_compute(config, make_mesh(config.parallel).devices.flat[0])
    abstract = nnx.eval_shape(
        lambda: nnx.state(Transformer(config.model, compute, rngs=nnx.Rngs(0)))
    )
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    with torch.device("meta"):
        theirs = k_model.Transformer(reference_config(config.model)).num_parameters()
    assert ours == theirs == config.model.n_params == count


def test_both_derive_the_same_widths_of_hidden_layer_and_head():
    for dim in (2, 30, 64, 100, 446, 768, 1000, 1024, 1536):
        for multiple_of in (1, 2, 7, 64, 256):
            config = ModelConfig(dim=dim, n_heads=1, n_kv_heads=1,
                                 multiple_of=multiple_of)  # fmt: skip
            other = k_model.ModelConfig(dim=dim, n_heads=1, multiple_of=multiple_of)
            assert config.hidden_dim == other.hidden_dim, (dim, multiple_of)
            assert config.head_dim == other.head_dim == dim
    # 2 (4 dim) / 3 = 2666.7 is cut off before it is rounded up.
    config = ModelConfig(dim=1000, n_heads=1, n_kv_heads=1, multiple_of=1)
    assert config.hidden_dim == 2666


def test_the_reference_preset_is_the_seeds_recipe():
    """The values that decide the run, written out: another default, another run."""
    config = preset("reference")
    assert dataclasses.asdict(config.model) == {
        "dim": 1024, "n_layers": 18, "n_heads": 16, "n_kv_heads": 8,
        "vocab_size": 6144, "hidden_dim": 2752, "multiple_of": 64, "head_dim": 64,
        "norm_eps": 1e-5, "max_seq_len": 512, "dropout": 0.0, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "init": "reference",
    }  # fmt: skip
    assert dataclasses.asdict(config.optim) == {
        "algorithm": "adam", "learning_rate": 2e-4, "min_learning_rate": 2e-5,
        "warmup_steps": 0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "weight_decay": 0.0, "clip_norm": 1.0, "loss_norm": "micro_batch",
        "schedule_unit": "micro_step",
    }  # fmt: skip
    assert (config.train.batch_size, config.train.accumulate) == (32, 1)
    assert (config.data.layout, config.seq_len) == ("rows", 511)
