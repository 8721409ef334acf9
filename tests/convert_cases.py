"""Models, weights and openers that the tests of conversion share."""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jaxllm.config import ComputeConfig, ModelConfig
from jaxllm.convert.configs import k_model_config, llama_config
from jaxllm.convert.names import parameter_shapes
from jaxllm.model import Transformer
from torch_ref import k_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

FORMATS = ("k_model", "llama", "gguf")
FP32 = ComputeConfig(compute_dtype="float32", residual_dtype="float32").resolve(
    n_layers=1
)
# Relative L2 of float32 logits against transformers and torch_ref. Measured on these
# models: 1.4e-6 at worst; the smallest mistake below gives 1.1e-3.
GATE = 5e-6

MODELS = {
    "tied, 2 of 4 heads": ModelConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=307
    ),
    "1 key/value head": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=307
    ),
    "all heads, untied": ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        vocab_size=307,
        tie_word_embeddings=False,
    ),
    "5 heads of 48, theta, eps": ModelConfig(
        dim=160,
        n_layers=2,
        n_heads=5,
        n_kv_heads=1,
        head_dim=48,
        vocab_size=311,
        rope_theta=500000.0,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    ),
}


def trained_like(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict:
    """Weights with the spread of trained ones: heads attend sharply, norms differ, so
    that every part of the network shows in the logits."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for path, shape in parameter_shapes(config).items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        scale = {"kernel": 0.8 / np.sqrt(shape[0 if len(shape) < 2 else -2]),
                 "embedding": 0.1, "weight": 0.3}  # fmt: skip
        values = rng.standard_normal(shape) * scale[leaf] + (leaf == "weight")
        if path.endswith(("wq/kernel", "wk/kernel")):
            values *= 1.25
        node[leaf] = values.astype(np.float32).astype(dtype)
    return params


def our_logits(params: dict, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, FP32, rngs=nnx.Rngs(0)))
    )
    return np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens)))


def build_llama(tensors: dict, config: ModelConfig) -> torch.nn.Module:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(llama_config(config))
    )
    state = {name: torch.tensor(np.array(t)) for name, t in tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def build_k_model(tensors: dict, config: ModelConfig) -> torch.nn.Module:
    model = k_model.Transformer(k_model.ModelConfig(**k_model_config(config)))
    state = {name: torch.tensor(np.array(t)) for name, t in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy()


def some_tokens(config: ModelConfig, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, 256))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(autouse=True)
def one_thread():
    """Keeps PyTorch from waiting for threads that a busy machine does not run: these
    models are too small to be worth more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(name: str) -> Any:
    """Imports a script of ours as a module."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def leaves(params: dict) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert leaves(a) == leaves(b)
