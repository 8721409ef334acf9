"""Weights there and back, and the networks that others build from them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from convert_cases import (
    FORMATS,
    FP32,
    GATE,
    MODELS,
    assert_same,
    build_k_model,
    build_llama,
    logits_of,
    one_thread,  # noqa: F401
    our_logits,
    relative,
    some_tokens,
    trained_like,
)
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ModelConfig
from jaxllm.convert import cast, from_state_dict, to_state_dict
from jaxllm.convert.configs import k_model_config
from jaxllm.convert.names import TABLE, parameter_shapes
from jaxllm.model import Transformer
from torch_ref import k_model

models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


# There and back


@models
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_there_and_back_is_bit_exact(config, format, dtype):
    params = trained_like(config, dtype=dtype)
    tensors = to_state_dict(params, config, format=format)
    assert {str(t.dtype) for t in tensors.values()} == {dtype}
    assert_same(from_state_dict(tensors, config, format=format), params)


@models
def test_llama_to_ours_to_llama_is_bit_exact(config):
    rng = np.random.default_rng(3)
    like = to_state_dict(trained_like(config), config, format="llama")
    theirs = {
        n: rng.standard_normal(t.shape).astype(np.float32) for n, t in like.items()
    }
    params = from_state_dict(theirs, config, format="llama")
    back = to_state_dict(params, config, format="llama")
    assert back.keys() == theirs.keys()
    assert all(back[n].tobytes() == theirs[n].tobytes() for n in theirs)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 5),
    n_layers=st.integers(1, 3),
    tied=st.booleans(),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_any_bits_survive(
    kv_heads, group, half, n_layers, tied, format, seed
):
    config = ModelConfig(
        dim=6,
        n_layers=n_layers,
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        head_dim=2 * half,
        vocab_size=7,
        hidden_dim=5,
        tie_word_embeddings=tied,
    )
    rng = np.random.default_rng(seed)
    # Any 16 bits: NaN payloads, infinities, denormals and both zeros included.
    params = jax.tree.map(
        lambda leaf: rng.integers(0, 2**16, leaf.shape, np.uint16).view(
            ml_dtypes.bfloat16
        ),
        trained_like(config),
    )
    back = from_state_dict(
        to_state_dict(params, config, format=format), config, format=format
    )
    assert_same(back, params)


def test_jax_arrays_convert_like_numpy_arrays():
    config = MODELS["tied, 2 of 4 heads"]
    params = trained_like(config)
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    tensors = to_state_dict(ours, config, format="llama")
    assert_same(from_state_dict(tensors, config, format="llama"), ours)


# The networks that others build


@models
def test_transformers_computes_our_logits(config):
    params, tokens = trained_like(config), some_tokens(config)
    theirs = build_llama(to_state_dict(params, config, format="llama"), config)
    found = relative(our_logits(params, config, tokens), logits_of(theirs, tokens))
    print(f"relative L2 {found:.1e}, gate {GATE:.0e}")
    assert found < GATE


def test_a_large_rope_theta_stays_transformers_over_2048_positions():
    # Measured 9.7e-7 relative and 5.2e-6 absolute; with frequencies rounded once, at
    # the end, 5.7e-6 and 5.3e-5.
    config = dataclasses.replace(
        MODELS["5 heads of 48, theta, eps"], head_dim=64, max_seq_len=2048
    )
    params, tokens = trained_like(config, seed=1), some_tokens(config).reshape(1, -1)
    tokens = np.tile(tokens, 4)
    theirs = build_llama(to_state_dict(params, config, format="llama"), config)
    ours, logits = our_logits(params, config, tokens), logits_of(theirs, tokens)
    print(f"relative L2 {relative(ours, logits):.1e}, gate 3e-6")
    assert relative(ours, logits) < 3e-6
    assert np.abs(ours - logits).max() < 1e-5


@models
def test_k_model_computes_our_logits(config):
    params, tokens = trained_like(config), some_tokens(config)
    theirs = build_k_model(to_state_dict(params, config, format="k_model"), config)
    found = relative(our_logits(params, config, tokens), logits_of(theirs, tokens))
    print(f"relative L2 {found:.1e}, gate {GATE:.0e}")
    assert found < GATE


def test_k_model_state_dict_has_our_names_in_full():
    for config in MODELS.values():
        model = k_model.Transformer(k_model.ModelConfig(**k_model_config(config)))
        ours = to_state_dict(trained_like(config), config, format="k_model")
        assert ours.keys() == model.state_dict().keys()


def _permute(tensors, config, name, heads):
    """Rows of every `name`, permuted as if they had `heads` heads."""
    for key in tensors:
        if name in key:
            t = tensors[key]
            pairs = t.reshape(heads, -1, 2, t.shape[1])
            tensors[key] = pairs.swapaxes(1, 2).reshape(t.shape)


def _swap(tensors, first, second):
    for key in list(tensors):
        if first in key:
            other = key.replace(first, second)
            tensors[key], tensors[other] = tensors[other], tensors[key]


def _unpermuted(tensors, params, config, *names):
    plain = to_state_dict(params, config, format="k_model")
    for i in range(config.n_layers):
        for name in names:
            key = f"model.layers.{i}.self_attn.{name}_proj.weight"
            tensors[key] = plain[f"layers.{i}.attention.w{name}.weight"]


MISTAKES = {
    "q and k not permuted": lambda t, p, c: _unpermuted(t, p, c, "q", "k"),
    "q not permuted": lambda t, p, c: _unpermuted(t, p, c, "q"),
    "k not permuted": lambda t, p, c: _unpermuted(t, p, c, "k"),
    "q and k permuted twice": lambda t, p, c: (
        _permute(t, c, "q_proj", c.n_heads),
        _permute(t, c, "k_proj", c.n_kv_heads),
    ),
    "v permuted as well": lambda t, p, c: _permute(t, c, "v_proj", c.n_kv_heads),
    "k permuted by the query heads": lambda t, p, c: (
        _unpermuted(t, p, c, "k"),
        _permute(t, c, "k_proj", c.n_heads),
    ),
    "gate and up swapped": lambda t, p, c: _swap(t, "gate_proj", "up_proj"),
    "norms swapped": lambda t, p, c: _swap(
        t, "input_layernorm", "post_attention_layernorm"
    ),
    "layers reversed": lambda t, p, c: _swap(
        t, "layers.0.", f"layers.{c.n_layers - 1}."
    ),
    "k and v swapped": lambda t, p, c: _swap(t, "k_proj", "v_proj"),
}


@pytest.mark.parametrize("field", [{"norm_eps": 1e-6}, {"rope_theta": 10100.0}])
def test_a_number_lost_on_the_way_is_caught(field):
    config = MODELS["tied, 2 of 4 heads"]
    params, tokens = trained_like(config), some_tokens(config)
    other = dataclasses.replace(config, **field)
    theirs = build_llama(to_state_dict(params, other, format="llama"), other)
    found = relative(our_logits(params, config, tokens), logits_of(theirs, tokens))
    print(f"{field}: relative L2 {found:.1e}, {found / GATE:,.0f} times the gate")
    assert found > 10 * GATE


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_conversion_is_caught(mistake):
    config = MODELS["tied, 2 of 4 heads"]
    params, tokens = trained_like(config), some_tokens(config)
    tensors = to_state_dict(params, config, format="llama")
    MISTAKES[mistake](tensors, params, config)
    theirs = build_llama(tensors, config)
    found = relative(our_logits(params, config, tokens), logits_of(theirs, tokens))
    print(f"{mistake}: relative L2 {found:.1e}, {found / GATE:,.0f} times the gate")
    assert found > 1000 * GATE


# Refusals


def _tensors(config, format: Any = "llama"):
    return to_state_dict(trained_like(config), config, format=format)


SMALL = MODELS["tied, 2 of 4 heads"]
UNTIED = MODELS["all heads, untied"]


def test_a_missing_tensor_is_refused_by_name():
    tensors = _tensors(SMALL)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'"):
        from_state_dict(tensors, SMALL, format="llama")


def test_an_extra_tensor_is_refused_by_name():
    tensors = _tensors(SMALL)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias"):
        from_state_dict(tensors, SMALL, format="llama")


def test_an_untied_head_is_missed_and_a_tied_one_must_equal_the_embedding():
    tensors = _tensors(UNTIED)
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is missing"):
        from_state_dict(tensors, UNTIED, format="llama")
    tensors = _tensors(SMALL)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    from_state_dict(tensors, SMALL, format="llama")
    tensors["lm_head.weight"][5, 5] += 1
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs"):
        from_state_dict(tensors, SMALL, format="llama")


def test_a_wrong_shape_is_refused_by_name():
    tensors = _tensors(SMALL)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj.*shape \(192, 64"):
        from_state_dict(tensors, SMALL, format="llama")


@pytest.mark.parametrize("dtype", ["int32", "float64", "int8", "bool", "complex64"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_wrong_dtype_is_refused_by_name(dtype, name):
    tensors = _tensors(SMALL)
    tensors[name] = tensors[name].astype(dtype)
    with pytest.raises(ValueError, match="has dtype"):
        from_state_dict(tensors, SMALL, format="llama")


def test_a_huge_layer_count_fails_at_the_first_missing_tensor():
    config = dataclasses.replace(SMALL, n_layers=2**31 - 1)
    with pytest.raises(ValueError, match=r"layers\.3\.input_layernorm.* is missing"):
        from_state_dict(_tensors(SMALL), config, format="llama")


def test_our_own_tree_is_checked_too():
    params = trained_like(SMALL)
    del params["layers"]["ffn_norm"]
    with pytest.raises(ValueError, match="lack 'layers/ffn_norm/weight'"):
        to_state_dict(params, SMALL, format="llama")
    with pytest.raises(ValueError, match="'output/kernel'"):
        extra = {"output": {"kernel": np.zeros((64, 307), np.float32)}}
        to_state_dict(trained_like(SMALL) | extra, SMALL, format="llama")
    with pytest.raises(ValueError, match="format 'onnx'"):
        to_state_dict(params, SMALL, format="onnx")  # type: ignore[arg-type]


# Rounding


def test_rounding_is_to_nearest_and_refuses_what_does_not_fit():
    tensors = _tensors(SMALL, "k_model")
    half = cast(tensors, "bfloat16")
    assert half["output.weight"] is half["tok_embeddings.weight"]
    for name, t in tensors.items():
        expected = torch.tensor(np.array(t)).bfloat16()
        assert (half[name].view(np.int16) == expected.view(torch.int16).numpy()).all()
    assert cast(tensors, "float32")["norm.weight"] is tensors["norm.weight"]
    tensors["norm.weight"] = np.full(64, 1e5, np.float32)
    with pytest.raises(ValueError, match=r"'norm\.weight' reaches 1e\+05.*bfloat16"):
        cast(tensors, "float16")
    tensors["norm.weight"] = np.full(64, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"'norm\.weight' holds 64 values"):
        cast(tensors, "float32")
    with pytest.raises(ValueError, match="dtype 'int8'"):
        cast(tensors, "int8")


def test_the_table_names_every_leaf_of_the_model_once():
    for config in MODELS.values():
        _, state = nnx.split(
            nnx.eval_shape(
                lambda config=config: Transformer(config, FP32, rngs=nnx.Rngs(0))
            )
        )
        flat = nnx.to_pure_dict(state)
        ours = {
            "/".join(key.key for key in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(flat)
        }
        assert ours == parameter_shapes(config)
    for format in ("ours", *FORMATS):
        assert len({getattr(row, format) for row in TABLE}) == len(TABLE)
