"""What is compared on: networks, weights that look trained, text, batches.

All of it comes from seeds, so nothing binary is kept and any case can be made again.
"""

import contextlib
import functools
import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from jaxllm.config import ModelConfig
from jaxllm.data.files import write_atomically
from parity_tests.precision import Precision
from torch_ref import k_model

# Every size differs from every other that a mistake might put in its place: 2 key/value
# heads of 4, head width 16, hidden 192, vocabulary 331.
SMALL = ModelConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=331, max_seq_len=160
)
TINY = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97, max_seq_len=48,
    multiple_of=8,
)  # fmt: skip


def text(seed: int, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Tokens with something to learn: four successors a token, and repetitions."""
    rng = np.random.default_rng((7, seed))
    successors = np.random.default_rng(7).integers(0, vocab_size, (vocab_size, 4))
    rows, length = int(np.prod(shape[:-1])), shape[-1]
    tokens = np.empty((rows, length), np.int64)
    tokens[:, 0] = rng.integers(0, vocab_size, rows)
    choice = rng.choice(4, (rows, length), p=[0.55, 0.25, 0.15, 0.05])
    copied = rng.random((rows, length)) < 0.3
    for t in range(1, length):
        follow = successors[tokens[:, t - 1], choice[:, t]]
        earlier = tokens[:, max(t - 13, 0)]
        tokens[:, t] = np.where(copied[:, t], earlier, follow)
    return tokens.reshape(shape)


def batch(seed: int, shape: tuple[int, int, int], vocab_size: int) -> dict:
    """Micro-batches (A, B, T) whose rows end at different places, padded and masked.

    Padding holds id 4, an id that real tokens have too: a mask by id would be seen.
    """
    tokens = text(seed, (*shape[:2], shape[2] + 1), vocab_size)
    tokens[:, -1, shape[2] // 2 + 1] = 4
    rng = np.random.default_rng((11, seed))
    # At least one row is short and one is full, so means of means differ from means.
    real = rng.integers(1, shape[2] + 1, shape[:2])
    real[0, 0], real[-1, -1] = max(1, shape[2] // 5), shape[2]
    mask = np.arange(shape[2]) < real[..., None]
    inputs, targets = tokens[..., :-1].copy(), tokens[..., 1:].copy()
    inputs[..., 1:][~mask[..., :-1]] = 4
    targets[~mask] = 4
    return {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_mask": mask,
    }


def spread(config: ModelConfig, seed: int, precision: Precision) -> dict:
    """Weights of any shape with the spread of trained ones.

    Heads attend sharply, norm weights differ, the stream grows: every part of the
    network shows in the logits.
    """
    rng = np.random.default_rng((13, seed))
    d, f, v = config.dim, config.hidden_dim, config.vocab_size
    n, k, layers = config.n_heads, config.n_kv_heads, config.n_layers
    assert config.head_dim is not None and f is not None
    q_dim, kv_dim = n * config.head_dim, k * config.head_dim

    def draw(shape, scale, mean=0.0):
        return (mean + scale * rng.standard_normal(shape)).astype(precision.dtype)

    def kernel(d_in, d_out, gain=0.8):
        return {"kernel": draw((layers, d_in, d_out), gain / d_in**0.5)}

    def norm(*shape):
        return {"weight": draw(shape, 0.3, mean=1.0)}

    params = {
        "tok_embeddings": {"embedding": draw((v, d), 0.1)},
        "layers": {
            "attention": {
                "wq": kernel(d, q_dim, 1.1),
                "wk": kernel(d, kv_dim, 1.1),
                "wv": kernel(d, kv_dim),
                "wo": kernel(q_dim, d),
            },
            "feed_forward": {"w1": kernel(d, f), "w2": kernel(f, d),
                             "w3": kernel(d, f)},
            "attention_norm": norm(layers, d),
            "ffn_norm": norm(layers, d),
        },
        "norm": norm(d),
    }  # fmt: skip
    if not config.tie_word_embeddings:
        params["output"] = {"kernel": draw((d, v), 0.5 / d**0.5)}
    return params


@functools.cache
def _trained(seed: int, steps: int, config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights of the reference (not ours: the fixture must not depend on what it
    tests), trained once for all processes of this checkout."""
    sources = (Path(__file__), Path(k_model.__file__))
    parts = [file.read_bytes() for file in sources]
    parts.append(repr((seed, steps, config, torch.__version__)).encode())
    name = hashlib.sha256(b"".join(parts)).hexdigest()[:32]
    folder = Path(__file__).resolve().parents[1] / "runs" / "parity" / "trained"
    return _kept(folder / f"{name}.npz", lambda: _train(seed, steps, config))


def _kept(
    file: Path, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays from `file`, or made and written to it, where it can be written."""
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        arrays = make()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
        write_atomically(file, content.getvalue())
    return arrays


def _train(seed: int, steps: int, config: ModelConfig) -> dict[str, np.ndarray]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = k_model.Transformer(reference_config(config))
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(steps):
            rows = text(1000 * seed + step, (8, 65), config.vocab_size)
            tokens = torch.from_numpy(rows)
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss.mean()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def trained(
    seed: int, precision: Precision, *, steps: int = 200, config: ModelConfig = SMALL
) -> dict:
    """Weights after `steps` of training on `text`: our tree, in `precision`."""
    state = _trained(seed, steps, config)
    # A float32 fixture leaves half the digits of a float64 rung at zero: fill them.
    rng = np.random.default_rng((17, seed))
    return from_torch(
        {
            name: (tensor * (1 + 1e-4 * rng.standard_normal(tensor.shape)))
            for name, tensor in state.items()
        },
        config,
        precision,
    )


def reference_config(config: ModelConfig, **changes) -> k_model.ModelConfig:
    """The reference's configuration, field by field."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim",
             "multiple_of", "head_dim", "norm_eps", "max_seq_len", "dropout",
             "rope_theta", "tie_word_embeddings", "init")  # fmt: skip
    return k_model.ModelConfig(
        **({name: getattr(config, name) for name in names} | changes)
    )


# A second way between the two parameter trees, written out and independent of
# jaxllm.convert, whose own rungs are judged by it.
_PROJECTIONS = tuple(
    f"{room}.{name}"
    for room, names in (
        ("attention", ("wq", "wk", "wv", "wo")),
        ("feed_forward", ("w1", "w2", "w3")),
    )
    for name in names
)


def to_torch(params: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our tree as the reference's state dict."""
    embedding = np.asarray(params["tok_embeddings"]["embedding"])
    tied = config.tie_word_embeddings
    state = {
        "tok_embeddings.weight": embedding,
        "norm.weight": np.asarray(params["norm"]["weight"]),
        "output.weight": embedding
        if tied
        else np.asarray(params["output"]["kernel"]).T,
    }
    for i in range(config.n_layers):
        for path in _PROJECTIONS:
            room, name = path.split(".")
            kernel = np.asarray(params["layers"][room][name]["kernel"][i])
            state[f"layers.{i}.{path}.weight"] = kernel.T
        for norm in ("attention_norm", "ffn_norm"):
            weight = np.asarray(params["layers"][norm]["weight"][i])
            state[f"layers.{i}.{norm}.weight"] = weight
    return state


def from_torch(state: dict, config: ModelConfig, precision: Precision) -> dict:
    """The reference's state dict as our tree."""

    def take(name):
        return np.asarray(state[name]).astype(precision.dtype)

    def stack(path, matrix):
        layers = [take(f"layers.{i}.{path}.weight") for i in range(config.n_layers)]
        return np.stack([layer.T if matrix else layer for layer in layers])

    params: dict = {
        "tok_embeddings": {"embedding": take("tok_embeddings.weight")},
        "layers": {
            norm: {"weight": stack(norm, False)}
            for norm in ("attention_norm", "ffn_norm")
        },
        "norm": {"weight": take("norm.weight")},
    }
    for path in _PROJECTIONS:
        room, name = path.split(".")
        params["layers"].setdefault(room, {})[name] = {"kernel": stack(path, True)}
    if not config.tie_word_embeddings:
        params["output"] = {"kernel": take("output.weight").T}
    return params
