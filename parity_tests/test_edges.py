"""Edges that no trajectory reaches: bad steps, long rows, seeds, micro-batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxpr_as_fun

from jaxllm.guard import GuardConfig
from jaxllm.kernels.attention import attention
from jaxllm.kernels.cross_entropy import _statistics, cross_entropy
from jaxllm.score import Scorer
from jaxllm.train import optim, step
from parity_tests import cases, sides
from parity_tests.cases import TINY
from parity_tests.compare import assert_within
from parity_tests.precision import FP32, FP64


@pytest.mark.parametrize(
    ("loss", "grad", "good"),
    [(1.0, 1.0, True), (np.nan, 1.0, False), (np.inf, 1.0, False),
     (1.0, np.inf, False), (1.0, np.nan, False)],
)  # fmt: skip
def test_a_loss_or_a_gradient_alone_can_spoil_a_step(monkeypatch, loss, grad, good):
    params = {"norm": {"weight": jnp.ones(3)}}
    grads = {"norm": {"weight": jnp.array([1.0, grad, 2.0])}}
    monkeypatch.setattr(step, "loss_and_grads", lambda *_: (jnp.float32(loss), grads))
    config = sides.run_config(TINY, FP32.compute())
    state = {"step": jnp.int32(3), "params": params, "opt": optim.init(params)}
    batch = {"loss_mask": np.ones((1, 1, 4), bool)}
    after, metrics = step.update_state(config, None, state, batch, total_steps=9)
    moved = not np.array_equal(after["params"]["norm"]["weight"], np.ones(3))
    assert (moved, int(metrics["skipped"]) == 0) == (good, good)
    assert int(after["opt"]["count"]) == int(good)
    assert int(after["step"]) == 4


@pytest.mark.parametrize(
    ("loss", "grad", "good"), [(2.1, 1.05, True), (20.0, 1.0, False), (2.0, 9.0, False)]
)
def test_a_spike_is_skipped_where_the_run_has_a_guard(monkeypatch, loss, grad, good):
    params = {"norm": {"weight": jnp.ones(1)}}
    grads = {"norm": {"weight": jnp.array([grad])}}
    monkeypatch.setattr(step, "loss_and_grads", lambda *_: (jnp.float32(loss), grads))
    config = dataclasses.replace(
        sides.run_config(TINY, FP32.compute()), guard=GuardConfig(spike_factor=10.0)
    )
    # 64 steps of loss 2 and norm 1: the least deviations, 2 and 10 percent, decide.
    logs = jnp.log(jnp.array([[2.0], [1.0]])) * jnp.ones((2, 64))
    state = {
        "step": jnp.int32(70), "params": params, "opt": optim.init(params),
        "guard": {"seen": jnp.int32(64), "logs": logs},
    }  # fmt: skip
    batch = {"loss_mask": np.ones((1, 1, 4), bool)}
    after, metrics = step.update_state(config, None, state, batch, total_steps=99)
    moved = float(after["params"]["norm"]["weight"][0]) != 1.0
    assert (moved, int(metrics["skipped"]) == 0) == (good, good)
    assert float(metrics["loss_bound"]) == pytest.approx(2 * np.exp(0.2), rel=1e-5)
    assert float(metrics["grad_norm_bound"]) == pytest.approx(np.exp(1.0), rel=1e-5)
    assert int(after["guard"]["seen"]) == 65
    assert float(after["guard"]["logs"][0, -1]) == pytest.approx(np.log(loss))


def test_more_tokens_than_max_seq_len_are_refused_by_both():
    params = cases.spread(TINY, 0, FP32)
    tokens = cases.text(0, (1, TINY.max_seq_len + 1), TINY.vocab_size)
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        sides.our_logits(params, TINY, FP32, tokens)
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        sides.theirs(params, TINY, FP32)(torch.from_numpy(tokens))


def test_the_runs_seed_decides_the_fresh_weights():
    first, again, other = (
        jax.tree.leaves(
            step.build(
                sides.run_config(TINY, FP32.compute(), seed=seed),
                sides.mesh(), total_steps=1,
            ).init()["params"]["layers"]["attention"]
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_rows_are_cut_into_micro_batches_in_their_order():
    config = sides.run_config(TINY, FP32.compute(), rows=2, accumulate=3)
    program = step.build(config, sides.mesh(), total_steps=1)
    rows = np.arange(6 * 5).reshape(6, 5)
    cut = step.to_device(program, {"inputs": rows}, parts=3)["inputs"]
    assert np.array_equal(cut, rows.reshape(3, 2, 5))


def test_a_gpus_single_pass_over_the_logits_has_the_same_loss_and_gradients(
    monkeypatch,
):
    rng = np.random.default_rng(2)
    h, head = rng.standard_normal((13, 8)), 3 * rng.standard_normal((31, 8))
    targets, mask = rng.integers(0, 31, 13), rng.random(13) < 0.7
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x)
    )
    with FP64.active():
        mine = jax.value_and_grad(
            functools.partial(cross_entropy, implementation="chunked", chunk=5), (0, 1)
        )(*map(jnp.asarray, (h, head, targets, mask)))
    a, b = (torch.tensor(x, requires_grad=True) for x in (h, head))
    losses = torch.nn.functional.cross_entropy(
        a @ b.T, torch.tensor(targets), reduction="none"
    )
    loss = (losses * torch.tensor(mask)).sum()
    loss.backward()
    assert a.grad is not None and b.grad is not None
    pairs = {
        "loss": (mine[0], loss.detach().numpy()),
        "dh": (mine[1][0], a.grad.numpy()),
        "dhead": (mine[1][1], b.grad.numpy()),
    }
    assert_within(pairs, 1e-14, "relative L2")


def test_the_single_pass_begins_with_what_changes_nothing(monkeypatch):
    """A GPU fills its reductions up with it, a CPU does not: read off the program."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x)
    )
    inputs = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    equations = jax.make_jaxpr(_statistics)(*inputs).jaxpr.eqns
    (reduction,) = [e for e in equations if e.primitive.name == "reduce"]
    combine = jaxpr_as_fun(reduction.params["jaxpr"])
    start, value = (-jnp.inf, 0.0, 0.0), (1.5, 2.0, 0.5)
    for a, b, expected in (
        (start, start, start), (start, value, value), (value, start, value)
    ):  # fmt: skip
        assert tuple(map(float, combine(*map(jnp.float32, (*a, *b))))) == expected


@pytest.mark.parametrize("form", ["plain", "chunked", "a GPU's chunked"])
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_logits_beyond_the_range_of_exp_do_no_harm(monkeypatch, form, offset):
    """In float32 exp(89) is infinite. Measured 5e-6: the last place of 300."""
    if "GPU" in form:
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x)
        )
    rng = np.random.default_rng(7)
    h, head = rng.standard_normal((9, 8)), rng.standard_normal((31, 8))
    h[:, 0], head[:, 0] = offset, 1.0
    targets, mask = rng.integers(0, 31, 9), np.ones(9, bool)
    floats = (jnp.asarray(x, jnp.float32) for x in (h, head))
    inputs = *floats, jnp.asarray(targets), jnp.asarray(mask)
    run = functools.partial(cross_entropy, implementation=form.split()[-1], chunk=4)
    loss, grads = jax.value_and_grad(run, (0, 1))(*inputs)
    a, b = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in inputs[:2])
    a, b = a.requires_grad_(), b.requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        a @ b.T, torch.tensor(targets), reduction="sum"
    )
    expected.backward()
    assert a.grad is not None and b.grad is not None
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    for mine, theirs in zip(grads, (a.grad, b.grad), strict=True):
        assert_within({"grad": (mine, theirs.numpy())}, 1e-4, "relative L2")


@pytest.mark.parametrize("form", ["plain", "blocked"])
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_scores_beyond_the_range_of_exp_do_no_harm(form, offset):
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((2, 70, heads, 4)) for heads in (4, 2, 2))
    q[..., 0], k[..., 0] = 2 * offset, 1.0  # over the root of 4 that is the offset
    q, k, v = (x.astype(np.float32) for x in (q, k, v))

    @jax.jit
    def run(*inputs):
        f = functools.partial(attention, implementation=form)
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(jnp.ones_like(out))

    a, b, c = (torch.tensor(x).double().requires_grad_() for x in (q, k, v))
    x, y, z = (tensor.transpose(1, 2) for tensor in (a, b, c))
    expected = torch.nn.functional.scaled_dot_product_attention(
        x, y, z, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    expected.sum().backward()
    out, *_, dv = run(q, k, v)
    assert c.grad is not None
    pairs = {"out": (out, expected.detach().numpy()), "dv": (dv, c.grad.numpy())}
    assert_within(pairs, 1e-4, "relative L2")


def test_scores_of_given_text_are_its_log_probabilities():
    params = cases.spread(TINY, 1, FP64)
    graphdef = sides.ours(sides.run_config(TINY, FP64.compute())).graphdef
    text = cases.text(2, (3, TINY.max_seq_len + 1), TINY.vocab_size)
    rows = [row[:n] for row, n in zip(text, (2, 18, 49), strict=True)]
    with FP64.active():
        scored = Scorer(graphdef, jax.tree.map(jnp.asarray, params)).score(rows)
    model = sides.theirs(params, TINY, FP64)
    for row, (log_p, best) in zip(rows, scored, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(row[None, :-1])).logits[0]
        expected = logits.log_softmax(-1).numpy()[np.arange(len(row) - 1), row[1:]]
        assert_within({"log p": (log_p, expected)}, 1e-12, "absolute")
        assert np.array_equal(best, logits.argmax(-1).numpy() == row[1:])


def test_what_cudnn_is_asked_for_is_causal_attention_with_grouped_heads(monkeypatch):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, 9, heads, 8)) for heads in (4, 2, 2))
    asked = []

    def stand_in(*inputs, implementation, **options):
        asked.append(implementation)
        return dot_product_attention(*inputs, implementation="xla", **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    with FP64.active():
        inputs = [jnp.asarray(x) for x in (q, k, v)]
        mine = np.asarray(attention(*inputs, implementation="cudnn"))
        a, b, c = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            a, b, c, is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        for name in ("positions_BT", "segment_ids_BT"):
            with pytest.raises(ValueError, match="plain causal rows only"):
                attention(
                    *inputs, implementation="cudnn", **{name: jnp.zeros((2, 9), int)}
                )
    assert asked == ["cudnn"]
    # XLA's stand-in takes its softmax in float32.
    assert_within({"out": (mine, theirs.numpy())}, 1e-6, "relative L2")


def test_dropout_needs_a_key_and_evaluation_has_none():
    config = dataclasses.replace(TINY, dropout=0.5)
    params = cases.spread(TINY, 0, FP32)
    tokens = cases.text(0, (1, 20), TINY.vocab_size)
    with torch.no_grad():
        theirs = sides.theirs(params, TINY, FP32)(torch.from_numpy(tokens)).logits
    mine = sides.our_logits(params, config, FP32, tokens)
    np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=2e-5)
