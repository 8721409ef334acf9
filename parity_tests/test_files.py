"""Files that travel: what others read in ours, and what ours reads in others'."""

import dataclasses
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from jaxllm.config import ModelConfig
from jaxllm.convert import to_state_dict
from jaxllm.convert.compare import compare_logits
from jaxllm.convert.configs import (
    config_from,
    generation_config,
    k_model_config,
    llama_config,
)
from jaxllm.convert.export import round_params, write_export
from jaxllm.convert.gguf_file import read_gguf
from jaxllm.convert.load import cast_tree, params_from, read_config, read_params
from jaxllm.data.tokenizer import BEGIN_ID, END_ID, train_tokenizer
from parity_tests import cases, rungs_data, sides
from parity_tests.compare import assert_within, difference
from parity_tests.precision import FP32
from torch_ref import k_model

# Nothing here has its default, so that nothing may be forgotten.
CONFIG = ModelConfig(
    dim=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=50,
    vocab_size=300, max_seq_len=90, norm_eps=3e-4, rope_theta=5e4,
    tie_word_embeddings=False, multiple_of=2,
)  # fmt: skip
PARAMS = cases.spread(CONFIG, 0, FP32)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("format", ["llama", "k_model"])
def test_an_exported_folder_computes_the_same_elsewhere_and_comes_back(
    tmp_path, format
):
    write_export(tmp_path, PARAMS, CONFIG, format=format, tokenizer=None)
    kind = {
        "llama": transformers.LlamaForCausalLM, "k_model": k_model.Transformer
    }[format]  # fmt: skip
    tokens = cases.text(0, (2, 60), CONFIG.vocab_size)
    with torch.no_grad():
        theirs = kind.from_pretrained(tmp_path).eval()(torch.from_numpy(tokens)).logits
    mine = sides.our_logits(PARAMS, CONFIG, FP32, tokens)
    assert_within({format: (mine, theirs.numpy())}, 5e-6, "relative L2")
    found, config = read_config(tmp_path)
    assert (found, dataclasses.replace(config, multiple_of=2)) == (format, CONFIG)
    _equal(read_params(tmp_path, CONFIG, format=format), PARAMS)


@pytest.mark.parametrize("half", HALVES)
def test_rounded_parameters_are_torchs_and_keep_their_dtype(tmp_path, half):
    rounded = round_params(PARAMS, CONFIG, half)
    _equal(rounded, cast_tree(PARAMS, half))
    for name, x in rungs_data._leaves(rounded).items():
        expected = torch.tensor(rungs_data._leaves(PARAMS)[name]).to(HALVES[half])
        assert str(x.dtype) == half
        assert np.array_equal(x.view(np.uint16), expected.view(torch.uint16).numpy())
    write_export(tmp_path, rounded, CONFIG, format="llama", tokenizer=None)
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert there.dtype == HALVES[half]
    back = read_params(tmp_path, CONFIG, format="llama")
    _equal(back, rounded)
    _equal(cast_tree(back, "float32"), cast_tree(rounded, "float32"))


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_gguf_file_says_what_the_network_is(tmp_path, dtype):
    tokenizer = train_tokenizer(["one two three"], 261)
    params = cast_tree(PARAMS, dtype)
    write_export(tmp_path, params, CONFIG, format="gguf", tokenizer=tokenizer)
    (path,) = tmp_path.iterdir()
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32}[dtype],
        "llama.context_length": 90, "llama.embedding_length": 40,
        "llama.block_count": 2, "llama.feed_forward_length": 50,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12, "llama.attention.value_length": 12,
        "llama.rope.dimension_count": 12, "llama.rope.freq_base": 5e4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-4, rel=1e-6),
        "llama.vocab_size": 300, "tokenizer.ggml.bos_token_id": BEGIN_ID,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    tokens = said["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    for token, i in tokenizer.inner.get_vocab(with_added_tokens=True).items():
        assert tokens[i] == token
    state = cases.to_torch(params, CONFIG)
    expected = rungs_data._renamed(state, CONFIG, "gguf")
    raw = {tensor.name: tensor.data for tensor in reader.tensors}
    back = read_gguf(path)
    assert set(raw) == set(back) == set(expected)
    for name, x in expected.items():
        found = raw[name]
        if x.ndim == 1:
            assert found.dtype == np.float32
        elif dtype == "bfloat16":
            found = found.view(ml_dtypes.bfloat16)
        assert np.array_equal(found.reshape(x.shape), x), name
        assert back[name].dtype == x.dtype and np.array_equal(back[name], x), name


def test_what_a_llama_does_not_say_is_what_transformers_takes():
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 99,
    }  # fmt: skip
    stock: Any = transformers.LlamaConfig(**sizes)
    format, config = config_from({"model_type": "llama", **sizes})
    assert format == "llama"
    assert config == config_from(stock.to_dict())[1]
    assert (config.n_kv_heads, config.head_dim, config.norm_eps) == (
        stock.num_key_value_heads, stock.head_dim, stock.rms_norm_eps,
    )  # fmt: skip
    assert config.rope_theta == stock.rope_parameters["rope_theta"]
    assert config.max_seq_len == stock.max_position_embeddings
    assert config.tie_word_embeddings == stock.tie_word_embeddings
    # transformers 4 keeps the base outside, 5 inside of rope_parameters.
    older = {"model_type": "llama", **sizes, "rope_theta": 77.0}
    assert config_from(older)[1].rope_theta == 77.0
    newer = {"rope_type": "default", "rope_theta": 78.0}
    newer = {"model_type": "llama", **sizes, "rope_parameters": newer}
    assert config_from(newer)[1].rope_theta == 78.0


def test_documents_begin_and_end_with_the_same_ids_everywhere():
    """And the end, which pads elsewhere, stays a row that is trained."""
    for config in (llama_config(CONFIG), k_model_config(CONFIG), generation_config()):
        assert (config["bos_token_id"], config["eos_token_id"]) == (BEGIN_ID, END_ID)
    assert (BEGIN_ID, END_ID) == (3, 4)
    assert generation_config()["pad_token_id"] == END_ID
    stock = transformers.LlamaConfig.from_dict(llama_config(CONFIG))
    embedding = transformers.LlamaForCausalLM(stock).get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding) and embedding.padding_idx is None
    told = dataclasses.replace(CONFIG, dropout=0.1, init="reference")
    assert config_from(k_model_config(told)) == ("k_model", told)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True},
        {"sliding_window": 64}, {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}},
        {"rope_theta": 1.0}, {"logits_scaling": 2.0}, {"quantization_config": {}},
        {"model_type": "mistral"}, {"architectures": ["MixtralForCausalLM"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_llama_that_computes_something_else_is_refused(change):
    with pytest.raises(ValueError):
        config_from(llama_config(CONFIG) | change)


def test_weights_that_say_something_else_are_refused():
    state = to_state_dict(PARAMS, CONFIG, format="llama")
    settings: dict = {"format": "llama", "where": "here"}
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = 5e4 ** -(np.arange(0, 12, 2) / 12)
    kept = params_from(state | {name: frequencies}, CONFIG, **settings)
    _equal(kept, PARAMS)
    with pytest.raises(ValueError, match="scaled"):
        params_from(state | {name: frequencies / 2}, CONFIG, **settings)
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="differs"):
        params_from(state, tied, **settings)
    spoilt = {
        k: np.full_like(x, np.nan) if "norm" in k else x for k, x in state.items()
    }
    with pytest.raises(ValueError, match="not finite"):
        params_from(spoilt, CONFIG, **settings)


def test_the_comparison_of_logits_measures_what_the_ladder_measures():
    rng = np.random.default_rng(3)
    ours = 3 * rng.standard_normal((2, 7, 31))
    for size in (0.0, 1e-7, 1e-4, 1.0):
        theirs = ours + size * rng.standard_normal(ours.shape)
        found = compare_logits(ours, theirs)
        for name, a, b, metric in (
            ("relative_l2", theirs, ours, "relative L2"),
            ("max_abs_difference", theirs, ours, "absolute"),
            ("max_kl_nats", theirs, ours, "KL"),
        ):
            expected = difference(name, a, b, metric).error
            assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-15)
        same = np.mean(ours.argmax(-1) == theirs.argmax(-1))
        assert found["top1_agreement"] == same and (size < 1 or same < 1)
        assert found["passed"] == (size < 1e-6)
    assert not compare_logits(ours, np.full_like(ours, np.nan))["passed"]


def _equal(mine: dict, expected: dict) -> None:
    mine, expected = rungs_data._leaves(mine), rungs_data._leaves(expected)
    assert mine.keys() == expected.keys()
    for name, x in expected.items():
        assert mine[name].dtype == x.dtype and np.array_equal(mine[name], x), name
