"""The reference lineage's behaviours: what ours does about each, and theirs."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
import torch

from jaxllm.config import ComputeConfig, OptimConfig
from jaxllm.convert import from_state_dict
from jaxllm.data.batches import Batches
from jaxllm.presets import PRESETS, preset
from jaxllm.train import optim as ours_optim
from parity_tests import cases, rungs_rows, sides
from parity_tests.cases import TINY
from parity_tests.precision import FP32, FP64
from torch_ref import ddp_pretrain, run_folder

LINEAGE = ("reference", "reference-small")


def test_half_precision_is_bfloat16_on_both_sides(monkeypatch):
    """autocast without a dtype is float16 whatever a flag says; so theirs names it."""
    resolved = ComputeConfig().resolve(
        n_layers=2, platform="gpu", compute_capability=9.0
    )
    assert resolved.compute_dtype == "bfloat16"
    seen = []
    autocast = torch.autocast

    def recorded(device, dtype=None, enabled=True, **rest):
        seen.append((dtype, enabled))
        return autocast(device, dtype, enabled, **rest)

    monkeypatch.setattr(torch, "autocast", recorded)
    _step("bfloat16")
    assert seen and set(seen) == {(torch.bfloat16, True)}


def test_the_lineage_has_plain_adam_and_the_others_decay_matrices():
    for name in PRESETS:
        optim = preset(name).optim
        plain = name in LINEAGE
        assert optim.algorithm == ("adam" if plain else "adamw"), name
        assert (optim.weight_decay == 0.0) == plain, name
        model = sides.theirs(cases.spread(TINY, 0, FP32), TINY, FP32)
        groups = ddp_pretrain.make_optimizer(model, optim, fused=False).param_groups
        for group in groups:
            matrices = {p.dim() >= 2 for p in group["params"]}
            assert matrices == {group["weight_decay"] > 0} or plain


def test_learning_rates_count_micro_steps_in_the_lineage_only():
    """Update k of A micro-steps has the learning rate of micro-step (k + 1) A - 1."""
    optim, total = preset("reference").optim, 50
    by_update = dataclasses.replace(optim, schedule_unit="update")
    for accumulate in (1, 4):
        for k in (0, 7, 49):
            micro = (k + 1) * accumulate - 1
            one = dataclasses.replace(optim, schedule_unit="update")
            expected = ddp_pretrain.learning_rate(one, micro, total * accumulate)
            theirs = ddp_pretrain.learning_rate(optim, k, total, accumulate)
            assert theirs == pytest.approx(expected, rel=1e-12)
            with FP64.active():
                ours = ours_optim.learning_rate(
                    optim, jax.numpy.int32(k), total_steps=total, accumulate=accumulate
                )
                plain = ours_optim.learning_rate(
                    by_update, jax.numpy.int32(k), total_steps=total, accumulate=1
                )
            assert float(ours) == pytest.approx(expected, rel=1e-12)
            assert (accumulate == 1) == (abs(float(plain) - expected) < 1e-15)


def test_leftover_micro_gradients_leak_in_the_lineage_and_in_neither_of_ours():
    """Five micro-batches in groups of four: the fifth's gradient waits for the next."""
    model = sides.theirs(cases.spread(TINY, 0, FP64), TINY, FP64)
    adam = torch.optim.SGD(model.parameters(), lr=0.0)
    for i in range(5):  # the lineage's loop over one epoch
        batch = cases.batch(i, (1, 2, 16), TINY.vocab_size)
        inputs, targets = (sides.as_torch(batch[k][0]) for k in ("inputs", "targets"))
        model(inputs, targets).loss.mean().backward()
        if (i + 1) % 4 == 0:
            adam.step()
            adam.zero_grad()
    leaked = model.norm.weight.grad
    assert leaked is not None and leaked.abs().max() > 0
    # The reference trainer clears at every update; ours has no place to keep one, and
    # a batch that does not divide is refused beforehand.
    assert all(p.grad is None for p in _step("float32").parameters())
    with pytest.raises(ValueError, match="not divisible by"):
        sides.run_config(TINY, FP32.compute(), rows=1).train.__class__(
            batch_size=5, accumulate=4
        )


def test_means_of_micro_batches_are_the_lineages_and_differ_from_the_token_mean():
    for name in PRESETS:
        expected = "micro_batch" if name in LINEAGE else "token"
        assert preset(name).optim.loss_norm == expected, name
    batch = cases.batch(0, (4, 2, 30), TINY.vocab_size)
    params = cases.spread(TINY, 0, FP64)
    losses = {}
    for loss_norm in ("token", "micro_batch"):
        run = sides.run_config(
            TINY, FP64.compute(), rows=2, accumulate=4,
            optim=OptimConfig(loss_norm=loss_norm),
        )  # fmt: skip
        losses[loss_norm], _ = sides.our_loss_and_grads(run, FP64, params, batch)
    assert abs(losses["token"] - losses["micro_batch"]) > 1e-3


def test_the_end_token_is_learned_although_it_pads():
    """A mask by id, as in the lineage, would ignore every end; ours is by position."""
    params = cases.spread(TINY, 0, FP64)
    batch = cases.batch(1, (1, 2, 24), TINY.vocab_size)
    batch["targets"][0, 1, 5] = 4  # a real end, in the full row
    assert batch["loss_mask"][0, 1, 5]
    run = sides.run_config(TINY, FP64.compute(), rows=2)
    mine, _ = sides.our_loss_and_grads(run, FP64, params, batch)
    model = sides.theirs(params, TINY, FP64)
    inputs, targets = (sides.as_torch(batch[k][0]) for k in ("inputs", "targets"))
    mask = sides.as_torch(batch["loss_mask"][0])
    with torch.no_grad():
        theirs = model(inputs, targets, mask).loss
        lineage = torch.nn.functional.cross_entropy(
            model(inputs).logits.flatten(0, 1), targets.flatten(), ignore_index=4
        )
    assert float(mine) == pytest.approx(float(theirs), rel=1e-13)
    assert abs(float(mine) - float(lineage)) > 1e-3


def test_the_lineages_rows_are_511_inputs_of_one_document():
    """How a row is cut and padded is the rung 'rows'; here, who uses it."""
    for name in PRESETS:
        config = preset(name)
        rows = config.data.layout == "rows"
        assert rows == (name in LINEAGE), name
        assert config.seq_len == config.model.max_seq_len - rows, name
    assert preset("reference").seq_len == 511


def test_the_lineage_starts_w3_small_and_the_others_w2():
    for name in PRESETS:
        expected = "reference" if name in LINEAGE else "residual"
        assert preset(name).model.init == expected, name
    for init, small in (("reference", "w3"), ("residual", "w2")):
        other = sides.theirs(
            cases.spread(TINY, 0, FP32), dataclasses.replace(TINY, init=init), FP32
        )
        mlp = other.layers[0].feed_forward
        stds = {n: getattr(getattr(mlp, n), "init_std", 0.02) for n in ("w2", "w3")}
        assert stds[small] < 0.02 and max(stds.values()) == 0.02


def test_weights_load_strictly_and_without_pickle(tmp_path):
    state = cases.to_torch(cases.spread(TINY, 0, FP32), TINY)
    lacking = {k: v for k, v in state.items() if k != "layers.1.attention.wo.weight"}
    for wrong, name in (
        (lacking, "wo"),
        (state | {"more": state["norm.weight"]}, "more"),
    ):
        with pytest.raises(ValueError, match=name):
            from_state_dict(wrong, TINY, format="k_model")
    with pytest.raises(ValueError, match="does not exist"):
        model = sides.theirs(cases.spread(TINY, 0, FP32), TINY, FP32)
        run_folder.load_weights(model, tmp_path / "nothing")
    assert "weights_only=True" in inspect.getsource(run_folder.restore)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_by_both_numbers():
    _, folder = rungs_rows.folder_of(0)
    with pytest.raises(ValueError, match=r"261.*97|97.*261"):
        Batches(
            folder.name, seq_len=16, batch_size=2, vocab_size=TINY.vocab_size
        )  # both trainers read through it


def _step(dtype: str):
    """One update of the reference trainer on a small network; returns the model."""
    config = sides.run_config(
        TINY, FP32.compute(), rows=2, optim=preset("reference").optim
    )
    model = sides.theirs(cases.spread(TINY, 0, FP32), TINY, FP32)
    module = ddp_pretrain.SummedLoss(model)
    adam = ddp_pretrain.make_optimizer(model, config.optim)
    batch = {k: x[0] for k, x in cases.batch(0, (1, 2, 16), TINY.vocab_size).items()}
    metrics = ddp_pretrain.train_step(
        module, adam, batch, config=config, step=0, total_steps=5, dtype=dtype
    )
    assert np.isfinite(float(metrics["loss"]))
    return model
