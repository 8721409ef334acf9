"""Opens an exported folder the way its users will, and compares it with the run.

What export_weights.py does before it publishes a folder.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing here may ask a network, and exact float32 products are the CPU's.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.config import ComputeConfig, ModelConfig
from jaxllm.convert.compare import check_greedy, compare_logits, relative_l2
from jaxllm.convert.names import Format, from_state_dict, to_state_dict
from jaxllm.convert.tensors import read_tensors
from jaxllm.data.shards import load_manifest
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import END_ID, Tokenizer
from jaxllm.model import Transformer

WINDOW = 256
"""Longest stretch of text that is compared, in tokens."""
NASTY = ("a\r\nb\r \x00 \ufeff<|im_start|>user<|im_end|></s> "
         "\U0001f469\u200d\U0001f469 e\u0301\u3000")  # fmt: skip
"""Text that tokenizers tend to change."""

ROWS = 8
"""Stretches that are compared, and prompts that are continued."""

NEW_TOKENS = 64
"""Length in tokens of a greedy continuation."""

Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Text:
    """What both sides read: ids (B, T), and where they come from."""

    tokens_BT: np.ndarray
    source: str

    @property
    def prompt(self) -> int:
        """Length in tokens of the prompts, the beginnings of the rows."""
        return max(1, self.tokens_BT.shape[1] // 8)


def verify(
    folder: Path,
    params: dict[str, Any],
    config: ModelConfig,
    *,
    format: Format,
    text: Text,
    tokenizer: Tokenizer | None,
) -> list[dict[str, Any]]:
    """Compares what `folder` computes with what `params` compute.

    Returns one entry for each check: its name, whether it passed, and its figures. A
    folder that cannot even be opened has failed a check of that name.
    """
    ours = our_logits(params, config)
    stages = {"weights read back": lambda: [_bits(folder, params, config, format)]}
    if format == "llama":
        stages["opened by transformers"] = lambda: with_transformers(
            folder, ours, text, tokenizer
        )
    elif format == "k_model":
        stages["opened by torch_ref"] = lambda: _with_k_model(folder, ours, text)
    elif importlib.util.find_spec("xllamacpp") is not None:
        from verify_gguf import with_llama_cpp

        stages["opened by llama.cpp"] = lambda: with_llama_cpp(
            gguf_file(folder), ours, text, tokenizer
        )
    checks = []
    for name, stage in stages.items():
        try:
            checks += stage()
        except Exception as error:  # programs of others raise all sorts
            checks.append({"name": name, "passed": False, "error": first_line(error)})
    return checks


def first_line(error: Exception) -> str:
    """An exception in one line that can be read."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def missing_package(format: Format) -> str | None:
    """Names the package without which `format` cannot be verified, if it is missing."""
    needed = {"llama": ("torch", "transformers"), "k_model": ("torch", "transformers")}
    for name in needed.get(format, ("gguf",)):
        if importlib.util.find_spec(name) is None:
            return name
    return None


def our_logits(params: dict[str, Any], config: ModelConfig) -> Logits:
    """Our network in float32: a function from ids (B, T) to logits (B, T, V)."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), params)

    def logits(tokens_BT: np.ndarray) -> np.ndarray:
        rows = [_forward(config)(wide, jnp.asarray(row[None])) for row in tokens_BT]
        return np.concatenate([np.asarray(row) for row in rows])

    return logits


@functools.cache
def _forward(config: ModelConfig) -> Callable[..., jax.Array]:
    compute = ComputeConfig(
        compute_dtype="float32", residual_dtype="float32", matmul_precision="highest"
    )
    compute = compute.resolve(n_layers=config.n_layers)  # plain forms, as on a CPU
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, compute, rngs=nnx.Rngs(0)))
    )

    @jax.jit
    def forward(params, tokens_BT):
        with jax.default_matmul_precision("highest"):
            return nnx.merge(graphdef, params)(tokens_BT)

    return forward


def _bits(folder, params, config, format) -> dict[str, Any]:
    """Reads the weights back by the table of names: every bit must be there."""
    if format == "gguf":
        from jaxllm.convert.gguf_file import read_gguf

        back = read_gguf(gguf_file(folder))
    else:
        back = read_tensors(folder)
    found = to_state_dict(
        from_state_dict(back, config, format=format), config, format="k_model"
    )
    expected = to_state_dict(params, config, format="k_model")
    wrong = [n for n, t in expected.items() if t.tobytes() != found[n].tobytes()]
    return {
        "name": "weights read back",
        "passed": not wrong,
        "tensors": len(expected),
        "different": wrong,
    }


def with_transformers(
    folder, ours, text, tokenizer, *, new=NEW_TOKENS
) -> list[dict[str, Any]]:
    """Opens a Llama folder in transformers; entries as in `verify`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Its type says that it may or may not return notes.
    open_folder: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, notes = open_folder(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
        output_loading_info=True,
    )  # fmt: skip
    model.eval()
    notes = {name: sorted(map(str, keys)) for name, keys in notes.items() if keys}
    stock: type = transformers.LlamaForCausalLM
    opened = {
        "name": f"opened by transformers {transformers.__version__}",
        "passed": type(model) is stock and not notes,
        "class": type(model).__name__,
        "notes": notes,
    }
    model.generation_config.eos_token_id = None  # go on beyond the end of a document

    def greedy(prompts_BT: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts_BT)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new, pad_token_id=END_ID, use_cache=True,
        ).numpy()  # fmt: skip

    checks = [opened, *with_torch(model, greedy, ours, text, new=new)]
    if tokenizer is not None:
        theirs = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        checks.append(
            same_tokenizer(
                "tokenizer in transformers", text, tokenizer,
                lambda t: theirs(t, split_special_tokens=True).input_ids, theirs.decode,
            )
        )  # fmt: skip
    return checks


def _with_k_model(folder, ours, text) -> list[dict[str, Any]]:
    import torch

    from torch_ref import k_model

    loaded = k_model.Transformer.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model = k_model.Transformer(loaded.config).eval()
    tensors = {
        name: torch.from_numpy(np.array(tensor, np.float32))
        for name, tensor in read_tensors(folder).items()
    }
    model.load_state_dict(tensors, strict=True)
    same = all(
        torch.equal(a, b)
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )

    opened = {"name": "opened by torch_ref, strictly", "passed": same}
    # Without a cache every new token costs a whole pass: fewer of them.
    greedy = uncached(model)
    return [opened, *with_torch(model, greedy, ours, text, prompts=2, new=16)]


def uncached(model: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """Greedy decoding by torch_ref: ids (B, T) and a count to ids (B, T + count)."""
    import torch

    def greedy(prompts_BT: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts_BT)
        return model.generate(ids, new, temperature=0.0).clone().numpy()

    return greedy


def with_torch(model, greedy, ours, text, *, prompts=ROWS, new=NEW_TOKENS):
    """Compares logits and greedy continuations of a network in PyTorch with ours."""
    import torch

    tokens = text.tokens_BT
    with torch.inference_mode():
        theirs = np.concatenate(
            [model(torch.from_numpy(row[None])).logits.numpy() for row in tokens]
        )
    new = min(new, tokens.shape[1] - text.prompt)
    said = greedy(tokens[:prompts, : text.prompt], new)
    with torch.inference_mode():
        truth = model.double()(torch.from_numpy(tokens[:1])).logits.numpy()
    model.float()
    logits = compare_logits(ours(tokens), theirs, noise=relative_l2(theirs[:1], truth))
    return [
        {"name": "logits", "text": text.source} | logits,
        {"name": "greedy continuations"}
        | check_greedy(
            ours(padded(said, tokens.shape[1]))[:, : said.shape[1]], said,
            prompt=text.prompt, noise=float(logits["max_abs_difference"]),
        ),
    ]  # fmt: skip


def same_tokenizer(
    name: str, text: Text, tokenizer: Tokenizer, encode: Callable, decode: Callable
) -> dict[str, Any]:
    """Compares ids of text, special tokens' spelling as text, and text given back."""
    texts = [tokenizer.decode(row) for row in text.tokens_BT]
    texts = [t.replace("\ufffd", "") for t in texts] + [NASTY]
    different = [
        t
        for t in texts
        if encode(t) != tokenizer.encode(t) or decode(tokenizer.encode(t)) != t
    ]
    return {
        "name": name, "passed": not different, "texts": len(texts),
        "different": [t[:80] for t in different],
    }  # fmt: skip


def read_text(
    data: Sequence[Path], config: ModelConfig, tokenizer: Tokenizer | None
) -> Text:
    """Takes rows of held-out text from the first of the data folders that is there;
    without one, of this program's own source; without a tokenizer, of random ids."""
    length = min(WINDOW, config.max_seq_len)
    for folder in data:
        try:
            manifest = load_manifest(folder)
            ids = TokenStream(manifest, "val").read(0, ROWS * length)
        except (ValueError, OSError):
            continue
        if len(ids) >= length and ids.max() < config.vocab_size:
            return Text(_rows(ids, length), f"held-out documents of {folder}")
    if tokenizer is not None:
        ids = np.array(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")))
        if len(ids) >= length:
            source = "the source of verify_weights.py (no held-out documents there)"
            return Text(_rows(ids, length), source)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, ROWS * length)
    return Text(_rows(ids, length), "random ids (no data and no tokenizer there)")


def _rows(ids: np.ndarray, length: int) -> np.ndarray:
    rows = min(ROWS, len(ids) // length)
    return ids[: rows * length].reshape(rows, length).astype(np.int64)


def gguf_file(folder: Path) -> Path:
    """Finds the one GGUF file of a folder.

    Raises: ValueError if there are none or several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} GGUF files: one was expected")
    return files[0]


def padded(tokens_BT: np.ndarray, width: int) -> np.ndarray:
    """Fills rows up to one width, so that our forward compiles once; what follows the
    last token is never looked at."""
    return np.pad(tokens_BT, [(0, 0), (0, width - tokens_BT.shape[1])])
