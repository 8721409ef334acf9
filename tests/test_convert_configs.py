"""The config.json of others: read, written, and refused by name."""

import dataclasses
import json
from typing import Any

import pytest
import transformers
from convert_cases import MODELS

from jaxllm.config import ModelConfig
from jaxllm.convert.configs import (
    config_from,
    config_from_llama,
    k_model_config,
    llama_config,
)
from torch_ref import k_model

LLAMA = llama_config(ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_configurations_come_back(config):
    for describe, format in ((llama_config, "llama"), (k_model_config, "k_model")):
        values = json.loads(json.dumps(describe(config, dtype="bfloat16")))
        found_format, found = config_from(values)
        assert (found_format, found) == (format, config)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_what_transformers_saves_is_read(config, tmp_path):
    transformers.LlamaConfig.from_dict(llama_config(config)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert config_from(values) == ("llama", config)
    k_model.ModelConfig(**k_model_config(config)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert config_from(values) == ("k_model", config)


def test_transformers_4_folders_are_read():
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 300, "rope_scaling": None,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "pretraining_tp": 1,
    }  # fmt: skip
    config = config_from_llama(values)
    assert config.rope_theta == 500000.0
    assert config.n_kv_heads == 4 and config.head_dim == 16
    # The defaults of transformers' LlamaConfig, which are not ours.
    assert config.norm_eps == 1e-6 and config.max_seq_len == 2048
    assert config.tie_word_embeddings is False


REFUSED: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["LlamaForSequenceClassification"],
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "sliding_window": 4096,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "quantization_config": {"quant_method": "gptq"},
    "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
    "num_local_experts": 8,
    "final_logit_softcapping": 30.0,
    "rope_theta": 7.0,
    "tie_word_embeddings": "yes",
    "rms_norm_eps": "1e-5",
    "hidden_size": "64",
    "intermediate_size": None,
    "num_hidden_layers": -1,
    "num_key_value_heads": 3,
    "vocab_size": 1e4,
    "head_dim": 15,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(name):
    ours: dict[str, str] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
    }
    with pytest.raises(ValueError) as refusal:
        config_from(LLAMA | {name: REFUSED[name]})
    text = str(refusal.value)
    assert name in text or ours.get(name, "?") in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": True},
        {"rope_type": "default", "rope_theta": 20000.0},
        "default",
        [],
    ],
)
def test_scaled_rotary_embeddings_are_refused_by_name(rope):
    values = LLAMA | {"rope_parameters": rope}
    if rope == []:  # nothing said is the default
        config_from(values)
        return
    with pytest.raises(ValueError, match="rope_"):
        config_from(values)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_missing_sizes_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        config_from({key: LLAMA[key] for key in LLAMA if key != name})


@pytest.mark.parametrize("values", [[], "llama", None, 3])
def test_a_configuration_must_be_an_object(values):
    with pytest.raises(ValueError, match="instead of an object"):
        config_from(values)


def test_unknown_fields_of_a_k_model_are_refused_by_name():
    values = k_model_config(MODELS["1 key/value head"])
    with pytest.raises(ValueError, match="'use_moe'"):
        config_from(values | {"use_moe": True})


def test_sizes_that_transformers_refuses_are_not_exported():
    config = ModelConfig(dim=96, n_layers=1, n_heads=5, n_kv_heads=1, head_dim=48)
    with pytest.raises(ValueError, match="model.dim=96 is not divisible"):
        llama_config(config)
    assert config_from(k_model_config(config)) == ("k_model", config)


def test_dropout_stays_behind():
    config = dataclasses.replace(MODELS["1 key/value head"], dropout=0.1)
    assert config_from(llama_config(config))[1].dropout == 0.0
    assert config_from(k_model_config(config))[1] == config
