"""Rungs of weights and moments that travel: k_model, Llama, GGUF, safetensors."""

import dataclasses
import importlib
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from safetensors.torch import load_file

from jaxllm.config import ModelConfig
from jaxllm.convert import cast, from_state_dict, to_state_dict
from jaxllm.convert.configs import (
    config_from_k_model,
    config_from_llama,
    k_model_config,
    llama_config,
)
from jaxllm.convert.tensors import read_tensors, write_tensors
from parity_tests import cases, sides
from parity_tests.cases import TINY
from parity_tests.compare import Pairs
from parity_tests.precision import Precision
from parity_tests.rungs_training import MODERN, REFERENCE
from torch_ref import k_model
from torch_ref.ddp_pretrain import make_optimizer
from torch_ref.run_folder import TRAINER

# A part of two commands, which find it beside them.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
torch_moments = importlib.import_module("torch_moments")

MODELS: dict[str, ModelConfig] = {
    "tied": TINY,
    "untied, K=1": dataclasses.replace(TINY, n_kv_heads=1, tie_word_embeddings=False),
    "own head width": dataclasses.replace(TINY, n_kv_heads=4, head_dim=12),
}


def weights(precision: Precision, seed: int) -> Pairs:
    """Weights to k_model, Llama and GGUF and back: names, layouts, every bit."""
    pairs: Pairs = {}
    for name, config in MODELS.items():
        params = cases.spread(config, seed, precision)
        state = cases.to_torch(params, config)
        mine = to_state_dict(params, config, format="k_model")
        _same(pairs, f"{name}: to k_model", mine, state)
        back = from_state_dict(state, config, format="k_model")
        _same(pairs, f"{name}: from k_model", _leaves(back), _leaves(params))
        for form in ("llama", "gguf"):
            there = to_state_dict(params, config, format=form)
            expected = _renamed(state, config, form)
            _same(pairs, f"{name}: to {form}", there, expected)
            back = from_state_dict(expected, config, format=form)
            _same(pairs, f"{name}: from {form}", _leaves(back), _leaves(params))
        _same(pairs, f"{name}: file", *_through_a_file(mine))
        for half, torch_half in _HALVES.items():
            _same(pairs, f"{name}: {half}", *_rounded(state, half, torch_half))
        told = dataclasses.replace(
            config, norm_eps=3e-4, rope_theta=5e4, max_seq_len=77
        )
        for part, read, write in (
            ("k_model", config_from_k_model, k_model_config),
            ("llama", config_from_llama, llama_config),
        ):
            if config.dim % config.n_heads:
                continue  # which Llama does not know
            back = read(write(told))
            # Llama's file has no place for these two, which decide nothing any more.
            back = dataclasses.replace(
                back, multiple_of=config.multiple_of, init=config.init
            )
            pairs[f"{name}: {part} config"] = (repr(back), repr(told))
    return pairs


_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _rounded(state: dict, half: str, torch_half: torch.dtype) -> tuple[dict, dict]:
    """Tensors cast to 16 bits by ours and sent through files, and by torch, as bits."""
    if half == "float16":  # torch rounds a float64 twice, by way of float32
        state = {name: x.astype(np.float32) for name, x in state.items()}
    found, _ = _through_a_file(cast(state, half))
    return found, {
        name: torch.tensor(x).to(torch_half).view(torch.uint16).numpy()
        for name, x in state.items()
    }


def _through_a_file(tensors: dict) -> tuple[dict, dict]:
    """What safetensors' own reader for torch finds in the files that ours wrote."""
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write_tensors(Path(folder), tensors)
        found = _by_torch(path)
        *shards, index = write_tensors(Path(folder), tensors, max_shard_bytes=40_000)
        assert len(shards) > 1 and index.suffix == ".json"
        cut = {name: x for shard in shards for name, x in _by_torch(shard).items()}
        whole = {name: np.array(x) for name, x in read_tensors(path).items()}
        path.unlink()
        joined = {name: np.array(x) for name, x in read_tensors(Path(folder)).items()}
    for name, x in found.items():
        assert np.array_equal(cut[name], x)
        for mine in (whole[name], joined[name]):
            assert mine.dtype == tensors[name].dtype
            assert np.array_equal(mine.view(x.dtype), x)
    assert len(whole) == len(joined) == len(cut) == len(found)
    return found, tensors


def _by_torch(path: Path) -> dict[str, np.ndarray]:
    return {
        name: (x.view(torch.uint16) if x.itemsize == 2 else x).numpy()
        for name, x in load_file(path).items()
    }


def moments(precision: Precision, seed: int) -> Pairs:
    """Adam's moments in the reference trainer's file, and back: by name, every bit."""
    pairs: Pairs = {}
    for tied, optim in ((True, REFERENCE), (False, MODERN)):
        config = dataclasses.replace(TINY, tie_word_embeddings=tied)
        run = sides.run_config(config, precision.compute(), optim=optim)
        m, v, params = (cases.spread(config, 3 * seed + i, precision) for i in range(3))
        v = jax.tree.map(abs, v)  # a mean of squares
        opt = {"count": np.int32(7), "m": m, "v": v}
        model = sides.theirs(params, config, precision)
        adam = make_optimizer(model, optim, fused=False)
        with tempfile.TemporaryDirectory() as folder:
            state = {"step": np.int32(9), "opt": opt}
            torch_moments.write_trainer(Path(folder), state, run)
            adam.load_state_dict(
                torch_moments.load(Path(folder) / TRAINER)["optimizer"]
            )
            told, back = torch_moments.read_trainer(Path(folder), config)
        where = f"tied={tied}"
        for ours, theirs in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            state = cases.to_torch(opt[ours], config)
            for name, weight in sides.named_parameters(model).items():
                found = adam.state[weight][theirs].numpy()
                pairs[f"{where}: {ours} of {name}"] = (state[name], found)
            again = _leaves(back["opt"][ours]), _leaves(opt[ours])
            _same(pairs, f"{where}: {ours} back", *again)
        counts = [int(adam.state[w]["step"]) for w in model.parameters()]
        pairs[f"{where}: count"] = (counts, [7] * len(counts))
        pairs[f"{where}: count back"] = (back["opt"]["count"], 7)
        pairs[f"{where}: step back"] = (back["step"], 9)
        pairs[f"{where}: run"] = (repr(told), repr(run))
    return pairs


def exported(precision: Precision, seed: int) -> Pairs:
    """Logits of k_model and of stock transformers, built from what convert.py gives."""
    import transformers  # slow to import: where it is used

    pairs: Pairs = {}
    for name, config in MODELS.items():
        config = dataclasses.replace(
            config, max_seq_len=128, norm_eps=1e-4, rope_theta=5e4
        )
        params = cases.spread(config, seed, precision)
        tokens = cases.text(seed, (2, 128), config.vocab_size)
        mine = sides.our_logits(params, config, precision, tokens)
        ours_there = to_state_dict(params, config, format="k_model")
        model = k_model.Transformer(k_model.ModelConfig(**k_model_config(config)))
        pairs[f"{name}: k_model"] = (mine, _logits(model, ours_there, tokens))
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig.from_dict(llama_config(config))
        )
        there = to_state_dict(params, config, format="llama")
        if config.tie_word_embeddings:
            there["lm_head.weight"] = there["model.embed_tokens.weight"]
        pairs[f"{name}: llama"] = (mine, _logits(llama, there, tokens))
    return pairs


def _same(pairs: Pairs, name: str, mine: dict, expected: dict) -> None:
    names = (sorted(mine), sorted(expected))
    assert names[0] == names[1], f"{name}: {set(names[0]) ^ set(names[1])}"
    for tensor in expected:
        a, b = np.asarray(mine[tensor]), np.asarray(expected[tensor])
        assert a.dtype == b.dtype, f"{name} {tensor}: {a.dtype} for {b.dtype}"
        pairs[f"{name} {tensor}"] = (a, b)


def _leaves(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _logits(model: torch.nn.Module, state: dict, tokens: np.ndarray) -> np.ndarray:
    tensors = {name: torch.tensor(np.array(x)) for name, x in state.items()}
    dtype = next(iter(tensors.values())).dtype
    torch.nn.Module.to(model, dtype=dtype)
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


# The names of others, written out a second time.
_LLAMA = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
_GGUF = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
    "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}  # fmt: skip


def _renamed(state: dict, config: ModelConfig, form: str) -> dict[str, np.ndarray]:
    """A k_model state dict under the names, and with the row order, of another."""
    table = {"llama": _LLAMA, "gguf": _GGUF}[form]
    renamed = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem == "output" and config.tie_word_embeddings:
            continue
        if stem.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            prefix = f"model.layers.{i}." if form == "llama" else f"blk.{i}."
        else:
            prefix = ""
        heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}
        if form == "llama" and stem in heads:
            tensor = np.concatenate(
                [
                    head[pair::2]
                    for head in np.split(tensor, heads[stem])
                    for pair in (0, 1)
                ]
            )
        renamed[f"{prefix}{table[stem]}.weight"] = tensor
    return renamed
