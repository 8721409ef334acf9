"""ModelConfig <-> the config.json of torch_ref.k_model and of Hugging Face Llama."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.data.tokenizer import BEGIN_ID, END_ID

# What a Llama configuration may say besides sizes, and the only values under which it
# still describes our network: with any other the weights would load all the same and
# compute something different.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None, {"type": "default"}, {"rope_type": "default"}),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_ONLY_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1, None),
}
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# What transformers writes into any config.json beside the fields of the model.
_BESIDES = {"architectures", "model_type", "dtype", "torch_dtype", "flash_attn",
            "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version",
            "_name_or_path", "use_cache"}  # fmt: skip


def llama_config(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json with which stock LlamaForCausalLM computes our network.

    Dropout and initialisation stay behind: Llama has no place for them.

    Raises: ValueError if transformers would refuse the sizes.
    """
    if config.dim % config.n_heads:
        raise ValueError(
            f"model.dim={config.dim} is not divisible by model.n_heads="
            f"{config.n_heads}, which transformers' Llama demands even where head_dim "
            f"is given: export as k_model or gguf"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        # Readers older than transformers 5 know only this one.
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        # None, although the tokenizer pads with the end: an embedding built with a
        # padding index never trains that row, and the end must stay trainable.
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def k_model_config(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The config.json from which torch_ref.k_model.Transformer.from_pretrained builds
    our network."""
    return {
        "architectures": ["Transformer"],
        "model_type": "k_model",
        **dataclasses.asdict(config),
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "dtype": dtype,
    }


def generation_config() -> dict[str, Any]:
    """The generation_config.json of an exported folder: where documents begin and end,
    and what fills up shorter rows of a batch."""
    return {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}


def config_from_llama(values: Mapping[str, Any]) -> ModelConfig:
    """Reads the config.json of a Hugging Face Llama, transformers 4 or 5.

    Raises: ValueError naming whatever it asks for that our network does not have:
    another architecture or activation, biases, scaled or partial rotary embeddings,
    sliding windows, quantisation, code to run, and values that contradict each other.
    """
    _require_object(values)
    _require_architecture(values, "llama", "LlamaForCausalLM")
    for name, allowed in _ONLY.items():
        if name in values and values[name] not in allowed:
            raise ValueError(
                f"config.json: {name}={_shown(values[name])} cannot be represented "
                f"here, only {name}={allowed[0]!r}: import another model"
            )
    for name in _NEEDED:
        if name not in values:
            raise ValueError(
                f"config.json: {name!r} is missing: take the file that belongs to the "
                f"weights"
            )
    # Defaults below are those of transformers' LlamaConfig.
    n_heads, n_kv_heads = (
        values["num_attention_heads"],
        values.get("num_key_value_heads"),
    )
    return _model_config(
        dim=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        vocab_size=values["vocab_size"],
        hidden_dim=_given("intermediate_size", values["intermediate_size"]),
        head_dim=values.get("head_dim"),
        norm_eps=_number("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
        max_seq_len=values.get("max_position_embeddings", 2048),
        rope_theta=_rope_theta(values),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
    )


def config_from_k_model(values: Mapping[str, Any]) -> ModelConfig:
    """Reads the config.json of torch_ref.k_model.

    Raises: ValueError naming a field that our network does not have.
    """
    _require_object(values)
    _require_architecture(values, "k_model", "Transformer")
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    unknown = sorted(set(values) - set(names) - _BESIDES)
    if unknown:
        raise ValueError(
            f"config.json: {_shown(unknown[0])}={_shown(values[unknown[0]])} is not "
            f"known: a k_model has {', '.join(names)}"
        )
    return _model_config(**{name: values[name] for name in names if name in values})


def config_from(values: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Reads either config.json; returns the format ("llama" or "k_model") as well."""
    _require_object(values)
    if values.get("model_type") == "k_model":
        return "k_model", config_from_k_model(values)
    return "llama", config_from_llama(values)


def _require_object(values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(
            f"config.json holds a {type(values).__name__} instead of an object: take "
            f"the file that belongs to the weights"
        )


def _require_architecture(
    values: Mapping[str, Any], model_type: str, architecture: str
) -> None:
    if values.get("model_type") != model_type:
        raise ValueError(
            f"config.json: model_type={_shown(values.get('model_type'))} is not known "
            f"here: only 'llama' and 'k_model' can be imported"
        )
    if values.get("architectures") not in ([architecture], None):
        raise ValueError(
            f"config.json: architectures={_shown(values['architectures'])} is not "
            f"known here: a {model_type} must be a {[architecture]!r}"
        )


def _rope_theta(values: Mapping[str, Any]) -> float:
    """The base of the rotary embedding; transformers 5 keeps it in rope_parameters."""
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"config.json: rope_parameters={_shown(rope)} must be an object"
        )
    for name, value in rope.items():
        if name != "rope_theta" and value not in _ONLY_ROPE.get(name, ()):
            raise ValueError(
                f"config.json: rope_parameters.{name}={_shown(value)} cannot be "
                f"represented here, only unscaled rotary embeddings (rope_type "
                f"'default'): import another model"
            )
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if values.get("rope_theta", theta) != theta:
        raise ValueError(
            f"config.json: rope_theta={_shown(values['rope_theta'])} contradicts "
            f"rope_parameters.rope_theta={theta!r}: make them equal"
        )
    return float(_number("rope_theta", theta))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {name}={_shown(value)} must be a number")
    # An integer may be too large to be any float.
    if abs(value) > sys.float_info.max or value != value:
        raise ValueError(f"config.json: {name}={_shown(value)} must be finite")
    return value


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name}={_shown(value)} must be true or false")


def _shown(value: Any) -> str:
    # Whatever it is, the message stays a line that can be read.
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _given(name: str, value: Any) -> Any:
    # ModelConfig derives a hidden_dim of None; a file that says null says nothing.
    if value is None:
        raise ValueError(f"config.json: {name} is null: it must be an integer")
    return value


def _model_config(**fields: Any) -> ModelConfig:
    for name in ("norm_eps", "rope_theta", "dropout"):
        if name in fields:
            fields[name] = _number(name, fields[name])
    _require_bool("tie_word_embeddings", fields.get("tie_word_embeddings", True))
    try:
        return ModelConfig(**fields)
    except TypeError as error:
        raise ValueError(
            f"config.json holds a value of the wrong kind: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
