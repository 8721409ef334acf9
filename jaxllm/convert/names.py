"""One table of names and layouts: our parameter tree, and the state dicts of others.

Formats, all of them a flat dict from tensor name to array, matrices as (out, in):

k_model  torch_ref.k_model.Transformer.state_dict(): rotary pairs interleaved, as ours.
         A tied head stands under its own name too, as in any PyTorch state dict.
llama    transformers' LlamaForCausalLM: rotary pairs half a head apart, so the rows of
         q and k are permuted. No lm_head when tied.
gguf     llama.cpp's architecture `llama`: interleaved, no output when tied.

Letters: L layers, D dim, Q = n_heads * head_dim, K = n_kv_heads * head_dim,
F hidden_dim, V vocab_size. Whatever has the shape of the parameters converts the same
way: gradients and both of Adam's moments.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.convert.dtypes import FLOATS

Format = Literal["k_model", "llama", "gguf"]


@dataclass(frozen=True)
class Row:
    """One leaf of our tree and what the others call it ({i} is the layer)."""

    ours: str
    shape: str  # ours, in the letters above
    k_model: str
    llama: str
    gguf: str
    matrix: bool = False  # ours is (in, out), theirs (out, in)
    rotary: Literal["", "n_heads", "n_kv_heads"] = ""  # heads whose rows llama permutes


# fmt: off
TABLE = (
    Row("tok_embeddings/embedding", "VD", "tok_embeddings.weight",
        "model.embed_tokens.weight", "token_embd.weight"),
    Row("layers/attention_norm/weight", "LD", "layers.{i}.attention_norm.weight",
        "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    Row("layers/attention/wq/kernel", "LDQ", "layers.{i}.attention.wq.weight",
        "model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight",
        matrix=True, rotary="n_heads"),
    Row("layers/attention/wk/kernel", "LDK", "layers.{i}.attention.wk.weight",
        "model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight",
        matrix=True, rotary="n_kv_heads"),
    Row("layers/attention/wv/kernel", "LDK", "layers.{i}.attention.wv.weight",
        "model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight",
        matrix=True),
    Row("layers/attention/wo/kernel", "LQD", "layers.{i}.attention.wo.weight",
        "model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight",
        matrix=True),
    Row("layers/ffn_norm/weight", "LD", "layers.{i}.ffn_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    Row("layers/feed_forward/w1/kernel", "LDF", "layers.{i}.feed_forward.w1.weight",
        "model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight",
        matrix=True),
    Row("layers/feed_forward/w3/kernel", "LDF", "layers.{i}.feed_forward.w3.weight",
        "model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight",
        matrix=True),
    Row("layers/feed_forward/w2/kernel", "LFD", "layers.{i}.feed_forward.w2.weight",
        "model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight",
        matrix=True),
    Row("norm/weight", "D", "norm.weight", "model.norm.weight", "output_norm.weight"),
)
HEAD = Row("output/kernel", "DV", "output.weight", "lm_head.weight", "output.weight",
           matrix=True)
# fmt: on


def to_state_dict(
    params: Mapping[str, Any], config: ModelConfig, *, format: Format
) -> dict[str, np.ndarray]:
    """Renames and lays out our nested dict of arrays as `format` wants it, bit for bit.

    Tensors are views of `params` wherever the layout allows; dtypes stay as they are.

    Raises: ValueError naming a leaf that is missing, unknown, or of the wrong shape.
    """
    _require_format(format)
    leaves = dict(_flatten(params))
    rows = _rows(config)
    for row in rows:
        if row.ours not in leaves:
            raise ValueError(f"the parameters lack {row.ours!r}: pass the whole tree")
        _require_shape(row.ours, leaves[row.ours].shape, _shape(row, config))
    extra = sorted(set(leaves) - {row.ours for row in rows})
    if extra:
        raise ValueError(
            f"the parameters hold {extra[0]!r}, which a model with "
            f"tie_word_embeddings={config.tie_word_embeddings} does not have: remove it"
        )
    tensors = {}
    for row in rows:
        for i, leaf in enumerate(
            leaves[row.ours] if _stacked(row) else [leaves[row.ours]]
        ):
            tensors[_name(row, format, i)] = _outward(row, leaf, config, format)
    if config.tie_word_embeddings and format == "k_model":
        tensors[HEAD.k_model] = tensors["tok_embeddings.weight"]
    return tensors


def from_state_dict(
    tensors: Mapping[str, Any], config: ModelConfig, *, format: Format
) -> dict[str, Any]:
    """Builds our nested dict of NumPy arrays from a state dict, bit for bit.

    Every name, shape and dtype is checked before anything is copied. A tied model may
    carry its head as well, if it equals the embedding.

    Raises: ValueError naming the tensor that is missing, unknown, of another shape, not
    floating point, of another dtype than the rest, or a tied head that differs.
    """
    _require_format(format)
    dtype, known = None, set()
    for row in _rows(config):
        for name in _names(row, format, config):
            if name not in tensors:
                raise ValueError(
                    f"tensor {name!r} is missing: the configuration "
                    f"({config.n_layers} layers, tie_word_embeddings="
                    f"{config.tie_word_embeddings}) needs it; check that weights and "
                    f"configuration belong together"
                )
            _require_shape(name, tensors[name].shape, _shape(row, config, theirs=True))
            dtype = _require_dtype(name, tensors[name].dtype, dtype)
            known.add(name)
    if config.tie_word_embeddings and _name(HEAD, format) in tensors:
        _require_tied(tensors, format)
        known.add(_name(HEAD, format))
    extra = sorted(set(tensors) - known)
    if extra:
        raise ValueError(
            f"tensor {extra[0][:100]!r} has no place in this model ({config.n_layers} "
            f"layers, tie_word_embeddings={config.tie_word_embeddings}; {len(extra)} "
            f"such): check that weights and configuration belong together"
        )
    params = parameter_tree(config, lambda shape: np.empty(shape, dtype))
    leaves = dict(_flatten(params))
    for row in _rows(config):
        for i, name in enumerate(_names(row, format, config)):
            tensor = _inward(row, np.asarray(tensors[name]), config, format)
            leaves[row.ours][i if _stacked(row) else ...] = tensor
    return params


def parameter_tree(
    config: ModelConfig, make: Callable[[tuple[int, ...]], Any]
) -> dict[str, Any]:
    """Builds our nested dict, every leaf made from its shape."""
    tree: dict[str, Any] = {}
    for path, shape in parameter_shapes(config).items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = make(shape)
    return tree


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Maps every path of our tree, as `layers/attention/wq/kernel`, to its shape."""
    return {row.ours: _shape(row, config) for row in _rows(config)}


def _rows(config: ModelConfig) -> tuple[Row, ...]:
    return TABLE if config.tie_word_embeddings else (*TABLE, HEAD)


def _stacked(row: Row) -> bool:
    return row.shape.startswith("L")


def _name(row: Row, format: Format, i: int = 0) -> str:
    return getattr(row, format).format(i=i)


def _names(row: Row, format: Format, config: ModelConfig) -> Iterator[str]:
    # Lazy: a configuration that claims 10^12 layers fails at the first that is missing.
    return (
        _name(row, format, i) for i in range(config.n_layers if _stacked(row) else 1)
    )


def _shape(row: Row, config: ModelConfig, theirs: bool = False) -> tuple[int, ...]:
    assert config.head_dim is not None and config.hidden_dim is not None
    sizes = {
        "L": config.n_layers,
        "D": config.dim,
        "Q": config.n_heads * config.head_dim,
        "K": config.n_kv_heads * config.head_dim,
        "F": config.hidden_dim,
        "V": config.vocab_size,
    }
    if not theirs:
        return tuple(sizes[letter] for letter in row.shape)
    letters = row.shape.removeprefix("L")
    return tuple(sizes[letter] for letter in (letters[::-1] if row.matrix else letters))


def _outward(row: Row, leaf: Any, config: ModelConfig, format: Format) -> np.ndarray:
    tensor = np.asarray(leaf)
    tensor = tensor.T if row.matrix else tensor
    if row.rotary and format == "llama":
        # Rows (n, r, pair) -> (n, pair, r): the first of every pair, then the second.
        pairs = (getattr(config, row.rotary), -1, 2, tensor.shape[1])
        tensor = tensor.reshape(pairs).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _inward(
    row: Row, tensor: np.ndarray, config: ModelConfig, format: Format
) -> np.ndarray:
    if row.rotary and format == "llama":
        halves = (getattr(config, row.rotary), 2, -1, tensor.shape[1])
        tensor = tensor.reshape(halves).swapaxes(1, 2).reshape(tensor.shape)
    return tensor.T if row.matrix else tensor


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def _require_format(format: str) -> None:
    if format not in get_args(Format):
        raise ValueError(
            f"format {format!r} must be one of {', '.join(get_args(Format))}"
        )


def _require_shape(name: str, shape: Any, expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ValueError(
            f"tensor {name!r} has shape {tuple(shape)}, but the configuration wants "
            f"{expected}: check that weights and configuration belong together"
        )


def _require_dtype(name: str, dtype: Any, first: np.dtype | None) -> np.dtype:
    if str(dtype) not in FLOATS:
        raise ValueError(
            f"tensor {name!r} has dtype {dtype}: weights must be one of "
            f"{', '.join(FLOATS)}; quantised weights must be expanded first"
        )
    if first is not None and dtype != first:
        raise ValueError(
            f"tensor {name!r} has dtype {dtype}, but the tensors before it have "
            f"{first}: store all of them in one dtype"
        )
    return np.dtype(dtype)


def _require_tied(tensors: Mapping[str, Any], format: Format) -> None:
    head, table = _name(HEAD, format), _name(TABLE[0], format)
    a, b = np.asarray(tensors[head]), np.asarray(tensors[table])
    # Compared as bytes: equal even where both are NaN, unequal at -0.0 against 0.0.
    if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
        raise ValueError(
            f"tensor {head!r} differs from {table!r}, but the configuration says "
            f"tie_word_embeddings=true: set it to false to keep both"
        )
