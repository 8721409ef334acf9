"""Decoding: the cache changes nothing, and sampling does what its names say."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import generate as decoding
from jaxllm.config import ComputeConfig, ModelConfig
from jaxllm.generate import Sampling, generate, stream
from jaxllm.model import Transformer

CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=97, max_seq_len=48
)


@functools.cache
def network():
    compute = ComputeConfig().resolve(n_layers=CONFIG.n_layers)
    graphdef, state = nnx.split(Transformer(CONFIG, compute, rngs=nnx.Rngs(1)))
    # Larger weights than at the start of training, so that the likeliest token depends
    # on the whole context.
    return graphdef, jax.tree.map(lambda x: 4 * x, nnx.to_pure_dict(state))


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


@jax.jit
def full_pass(params, tokens_BT):
    return nnx.merge(network()[0], params)(tokens_BT)


def greedy_without_cache(prompt, count):
    row = list(prompt)
    for _ in range(count):
        context = row[-CONFIG.max_seq_len :]
        # Padded on the right to one length, so that it is compiled once; causal
        # attention keeps the padding out of the logits that are read.
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
        padded[0, : len(context)] = context
        logits = full_pass(network()[1], padded)[0, len(context) - 1]
        row.append(int(np.argmax(logits)))
    return row[len(prompt) :]


def test_greedy_with_cache_equals_a_full_pass_for_each_token():
    rows = prompts(1, 9, 20)
    got = generate(*network(), rows, max_new_tokens=24)
    assert got == [greedy_without_cache(row, 24) for row in rows]
    assert len({tuple(row) for row in got}) == 3


def test_a_context_longer_than_max_seq_len_slides():
    rows = prompts(40, 60)
    got = generate(*network(), rows, max_new_tokens=20)
    assert got == [greedy_without_cache(row, 20) for row in rows]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    rows = prompts(5, 30, 12)
    sampling = Sampling(temperature=1.0, seed=3)
    together = generate(*network(), rows, max_new_tokens=12)
    for row, tokens in zip(rows, together, strict=True):
        assert generate(*network(), [row], max_new_tokens=12) == [tokens]
    first = generate(*network(), rows, max_new_tokens=12, sampling=sampling)[0]
    alone = generate(*network(), rows[:1], max_new_tokens=12, sampling=sampling)[0]
    assert first == alone


def test_lengths_share_compiled_programs():
    prefill: Any = decoding._prefill
    decode: Any = decoding._decode
    prefill.clear_cache()
    decode.clear_cache()
    for length in (3, 7, 11, 16):
        generate(*network(), prompts(length), max_new_tokens=12)
    assert prefill._cache_size() <= 2
    assert decode._cache_size() <= 2


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_token_copies_neither_weights_nor_cache():
    layers = decoding.unstack(*network())
    shape = 1, 64, CONFIG.n_kv_heads, CONFIG.head_dim
    cache = [{name: jnp.zeros(shape) for name in "kv"} for _ in layers]
    decode: Any = decoding._decode
    program = decode.lower(
        *network(), layers, np.ones((1, 1), np.int32), np.ones(1, np.int32), cache
    )
    memory = program.compile().memory_analysis()
    assert memory.temp_size_in_bytes < nbytes(layers[0]) / 4
    assert memory.alias_size_in_bytes == nbytes(cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unstacked_layers_hold_what_the_stack_holds(dtype):
    compute = ComputeConfig(compute_dtype=dtype).resolve(n_layers=CONFIG.n_layers)
    graphdef, _ = nnx.split(Transformer(CONFIG, compute, rngs=nnx.Rngs(1)))
    params = network()[1]
    layers = decoding.unstack(graphdef, params)
    assert len(layers) == CONFIG.n_layers
    for i, layer in enumerate(layers):
        at = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        norm, kernel = "attention_norm", layer["attention"]["wq"]["kernel"]
        assert layer[norm]["weight"].dtype == jnp.float32
        assert kernel.dtype == dtype
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), layer, at
        )
        stack = params["layers"]["attention"]["wq"]["kernel"]
        offset = kernel.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer()
        assert (offset == i * kernel.nbytes) == (dtype == "float32")


def test_after_decoding_the_parameters_can_be_given_away():
    graphdef, params = network()
    given = jax.tree.map(lambda x: x + 0, params)
    generate(graphdef, given, prompts(4), max_new_tokens=3)
    stack = given["layers"]["attention"]["wq"]["kernel"]
    where = stack.unsafe_buffer_pointer()
    kept = jax.jit(lambda x: x + 1, donate_argnums=0)(stack)
    assert stack.is_deleted() and kept.unsafe_buffer_pointer() == where


def test_a_row_ends_with_its_stop_id_and_the_others_go_on():
    rows = prompts(4, 8)
    free = generate(*network(), rows, max_new_tokens=15)
    stop = next(token for token in free[0][3:] if token not in free[1])
    got = generate(*network(), rows, max_new_tokens=15, stop_ids=(stop,))
    assert got[0] == free[0][: free[0].index(stop) + 1]
    assert got[1] == free[1]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    def draw(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(*network(), prompts(6), max_new_tokens=20, sampling=sampling)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def sampled(logits, count=2000, **options):
    sampling = Sampling(**options)
    logits_BV = jnp.broadcast_to(jnp.array(logits), (count, len(logits)))
    rows = [[0]] * count
    return decoding._choose(sampling, logits_BV, rows, 0, len(logits))


def test_temperature_top_k_and_top_p_shape_the_distribution():
    logits = np.log([0.5, 0.25, 0.15, 0.1]).astype(np.float32)
    shares = np.bincount(sampled(logits, temperature=1.0), minlength=4) / 2000
    # Four standard deviations of a share of 2,000 draws are at most 0.045.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.045)
    sharp = np.bincount(sampled(logits, temperature=0.5), minlength=4) / 2000
    squares = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(sharp, squares / squares.sum(), atol=0.045)
    assert set(sampled(logits, temperature=1.0, top_k=2)) == {0, 1}
    assert set(sampled(logits, temperature=1.0, top_p=0.74)) == {0, 1}
    assert set(sampled(logits, temperature=1.0, top_p=0.76)) == {0, 1, 2}
    assert set(sampled(logits, temperature=1.0, top_p=0.01)) == {0}


def test_the_ends_of_the_ranges_are_drawn_from():
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    assert set(sampled(logits, temperature=1e-6)) == {0}
    for options in ({"top_k": 10**12}, {"seed": 2**32 - 1}, {"temperature": 1e6}):
        given: dict[str, Any] = {"temperature": 1.0} | options
        assert set(sampled(logits, **given)) == {0, 1, 2}


def test_the_repetition_penalty_makes_seen_tokens_less_likely():
    logits = np.array([1.0, 0.9, -1.0], np.float32)
    assert set(sampled(logits)) == {0}
    assert set(sampled(logits, repetition_penalty=1.2)) == {1}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, ["no prompt"]),
        ([[]], {}, ["prompt 0 is empty"]),
        ([[1], [97]], {}, ["prompt 1", "97", "vocabulary"]),
        ([[-1]], {}, ["-1", "vocabulary"]),
        ([[1]], {"max_new_tokens": 0}, ["max_new_tokens=0"]),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(rows, options, words):
    with pytest.raises(ValueError) as caught:
        next(stream(*network(), rows, **{"max_new_tokens": 1} | options))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
     {"repetition_penalty": 0.0}, {"seed": -1}, {"temperature": 1e-40},
     {"temperature": math.inf}, {"repetition_penalty": math.inf},
     {"temperature": math.nan}, {"top_p": math.nan}, {"seed": 2**32}],
)  # fmt: skip
def test_a_sampling_option_out_of_range_is_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
