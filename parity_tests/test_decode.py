"""Decoding: our cache, our full pass and the reference choose the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxllm import generate as ours_generate
from jaxllm.convert import to_state_dict
from jaxllm.convert.configs import llama_config
from jaxllm.generate import generate
from parity_tests import cases, sides
from parity_tests.precision import FP32, FP64, Precision

CONFIG = dataclasses.replace(cases.SMALL, max_seq_len=288)
PROMPTS, NEW = 100, 256


@functools.cache
def decoded(precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Greedy text of 100 prompts of different lengths; and the prompts' lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, PROMPTS)
    texts = cases.text(0, (PROMPTS, 32), CONFIG.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, lengths, strict=True)]
    rows = _generate(CONFIG, precision, _params(precision), prompts, NEW)
    tokens = np.zeros((PROMPTS, CONFIG.max_seq_len), np.int64)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert len(row) == NEW
        tokens[i, : len(prompt) + NEW] = [*prompt, *row]
    return tokens, lengths


def _params(precision: Precision) -> dict:
    return cases.trained(0, precision)


def _generate(config, precision, params, prompts, new, **options):
    graphdef = sides.ours(sides.run_config(config, precision.compute())).graphdef
    with precision.active():
        on_device = jax.tree.map(jnp.asarray, params)
        return generate(graphdef, on_device, prompts, max_new_tokens=new, **options)


def _reference(precision: Precision) -> torch.nn.Module:
    return sides.theirs(_params(precision), CONFIG, precision)


def _transformers(precision: Precision) -> torch.nn.Module:
    tensors = to_state_dict(_params(precision), CONFIG, format="llama")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(llama_config(CONFIG))
    )
    torch.nn.Module.to(model, dtype=precision.torch_dtype)
    model.load_state_dict({n: torch.tensor(np.array(x)) for n, x in tensors.items()})
    return model.eval()


def _disagreements(logits, tokens, lengths) -> list[tuple[int, int, float]]:
    """Rows and positions where a model would not have chosen our token, and the gap."""
    found = []
    for row, length in enumerate(lengths):
        at = np.arange(length - 1, length - 1 + NEW)
        scores, chosen = logits[row, at], tokens[row, at + 1]
        wrong = np.flatnonzero(scores.argmax(-1) != chosen)
        gaps = scores.max(-1) - scores[np.arange(NEW), chosen]
        found += [(row, int(at[i]), float(gaps[i])) for i in wrong]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("build", [_reference, _transformers])
@pytest.mark.parametrize("precision", [FP64, FP32], ids=lambda p: p.name)
def test_cached_decoding_chooses_what_a_full_pass_of_others_would(build, precision):
    """Position by position on our own text: by induction both write the same."""
    tokens, lengths = decoded(precision)
    with torch.no_grad():
        logits = build(precision)(torch.from_numpy(tokens)).logits.numpy()
    mine = sides.our_logits(_params(precision), CONFIG, precision, tokens[:10])
    noise = float(np.max(np.abs(mine - logits[:10])))
    found = _disagreements(logits, tokens, lengths)
    print(f"{len(found)} of {PROMPTS * NEW} differ; logits' noise {noise:.3g}; {found}")
    if precision is FP64 and build is _reference:
        assert not found
    # Two logits, each off by the noise, may change places where they are closer.
    assert all(gap <= 2 * noise for _, _, gap in found), found
    assert noise < 1e-4, "the noise itself is too large to excuse anything"


def test_the_decoder_beyond_max_seq_len_is_the_references():
    config = cases.TINY
    params = cases.spread(config, 3, FP64)
    other = sides.theirs(params, config, FP64)
    texts = cases.text(3, (3, 60), config.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, (30, 44, 60), strict=True)]
    rows = _generate(config, FP64, params, prompts, 24)
    for prompt, row in zip(prompts, rows, strict=True):
        theirs = other.generate(torch.tensor([prompt]), 24, temperature=0.0)
        assert theirs[0].tolist() == [*prompt, *row]


def test_both_stop_at_the_stop_id():
    config = cases.TINY
    params = cases.spread(config, 4, FP64)
    other = sides.theirs(params, config, FP64)
    texts = cases.text(4, (2, 5), config.vocab_size).tolist()
    row, beside = _generate(config, FP64, params, texts, 16)
    stop = next(token for token in row[6:] if token not in beside)
    cut, whole = _generate(config, FP64, params, texts, 16, stop_ids=[stop])
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
            _generate(cases.TINY, FP32, params, [[5] * length], new)
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


def test_a_row_does_not_depend_on_its_neighbours():
    config = cases.TINY
    params = cases.spread(config, 5, FP32)
    texts = cases.text(5, (4, 12), config.vocab_size)
    prompts = [row[:n].tolist() for row, n in zip(texts, (1, 5, 9, 12), strict=True)]
    together = _generate(config, FP32, params, prompts, 12)
    other = sides.theirs(params, config, FP32)
    for prompt, row in zip(prompts, together, strict=True):
        theirs = other.generate(torch.tensor([prompt]), 12, temperature=0.0)
        assert theirs[0].tolist() == [*prompt, *row]
