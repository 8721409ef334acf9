"""Decoding: our cache, our full pass and the reference choose the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm import generate as ours_generate
from parity_tests import cases, sides
from parity_tests.decoding import OTHERS, compared, decode
from parity_tests.precision import FP32, FP64


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("precision", [FP64, FP32], ids=lambda p: p.name)
def test_cached_decoding_chooses_what_a_full_pass_of_others_would(name, precision):
    found = compared(name, precision)
    print(found)
    assert found["tokens"] == 25_600
    if precision is FP64 and name != "transformers":
        assert not found["differ"]
    # Two logits, each off by the noise, may change places where they are closer.
    assert all(d["gap"] <= 2 * found["noise"] for d in found["differ"]), found
    assert found["noise"] < 1e-4, "the noise itself is too large to excuse anything"


def test_the_decoder_beyond_max_seq_len_is_the_references():
    config = cases.TINY
    params = cases.spread(config, 3, FP64)
    other = sides.theirs(params, config, FP64)
    texts = cases.text(3, (3, 60), config.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, (30, 44, 60), strict=True)]
    rows = decode(config, FP64, params, prompts, 24)
    for prompt, row in zip(prompts, rows, strict=True):
        theirs = other.generate(torch.tensor([prompt]), 24, temperature=0.0)
        assert theirs[0].tolist() == [*prompt, *row]


def test_both_stop_at_the_stop_id():
    config = cases.TINY
    params = cases.spread(config, 4, FP64)
    other = sides.theirs(params, config, FP64)
    texts = cases.text(4, (2, 5), config.vocab_size).tolist()
    row, beside = decode(config, FP64, params, texts, 16)
    stop = next(token for token in row[6:] if token not in beside)
    cut, whole = decode(config, FP64, params, texts, 16, stop_ids=[stop])
    prompt = texts[0]
    theirs = other.generate(torch.tensor([prompt]), 16, temperature=0.0, stop_id=stop)
    assert cut == row[: row.index(stop) + 1] and len(cut) < len(whole)
    assert theirs[0].tolist() == [*prompt, *cut]
    assert whole == beside


def test_the_cache_has_a_slot_for_every_token_that_is_read(monkeypatch):
    """A key that is dropped at the end may well leave the greedy choice as it was."""
    slots: list[int] = []

    def prefill(*inputs):
        slots.append(inputs[-1])
        raise StopIteration

    monkeypatch.setattr(ours_generate, "_prefill", prefill)
    params = cases.spread(cases.TINY, 0, FP32)
    for length, new in ((1, 1), (3, 14), (12, 22), (17, 16), (20, 90)):
        with pytest.raises(RuntimeError, match="StopIteration"):
            decode(cases.TINY, FP32, params, [[5] * length], new)
        # The last new token is never read; rows beyond max_seq_len use no cache.
        assert slots.pop() >= min(length + new - 1, cases.TINY.max_seq_len)


def test_keys_and_values_are_cached_in_the_compute_dtype():
    """A narrower cache changes the logits, and seldom the greedy choice."""
    config = sides.run_config(cases.TINY, FP64.compute())
    params, tokens = cases.spread(cases.TINY, 0, FP64), np.ones((1, 16), np.int32)
    graphdef = sides.ours(config).graphdef
    prefill = functools.partial(ours_generate._prefill, graphdef)
    with FP64.active():
        params = jax.tree.map(jnp.asarray, params)
        inputs = (params, ours_generate.unstack(graphdef, params), tokens)
        found = jax.eval_shape(
            lambda *inputs: prefill(*inputs, 16), *inputs, np.ones(1, np.int32)
        )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float64")}


@pytest.mark.parametrize(("precision", "half"), [(FP64, "float64"), (FP32, "bfloat16")])
def test_decoding_reads_each_layers_matrices_as_training_casts_them(precision, half):
    """And norm weights unrounded, whose rounding hides in bfloat16's own noise."""
    config = dataclasses.replace(cases.TINY, n_layers=3)
    params = cases.spread(config, 6, precision)
    compute = precision.compute(compute_dtype=half, residual_dtype=precision.dtype)
    graphdef = sides.ours(sides.run_config(config, compute)).graphdef
    with precision.active():
        on_device = jax.tree.map(jnp.asarray, params)
        layers = ours_generate.unstack(graphdef, on_device)
    for i, layer in enumerate(layers):
        found = jax.tree_util.tree_leaves_with_path(layer)
        stacks = jax.tree.leaves(params["layers"])
        for (path, x), stack in zip(found, stacks, strict=True):
            matrix = path[-1].key == "kernel"
            expected = stack[i].astype(jnp.dtype(half) if matrix else precision.dtype)
            assert x.dtype == expected.dtype, path
            assert np.array_equal(x, expected), (i, path)


def test_a_row_does_not_depend_on_its_neighbours():
    config = cases.TINY
    params = cases.spread(config, 5, FP32)
    texts = cases.text(5, (4, 12), config.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, (1, 5, 9, 12), strict=True)]
    together = decode(config, FP32, params, prompts, 12)
    other = sides.theirs(params, config, FP32)
    for prompt, row in zip(prompts, together, strict=True):
        theirs = other.generate(torch.tensor([prompt]), 12, temperature=0.0)
        assert theirs[0].tolist() == [*prompt, *row]
