"""The Transformer in Flax NNX, twin of torch_ref/k_model.py: read them side by side.

Shape suffixes: B batch, T time, S key position, D dim, N query heads, K key/value
heads, H head dim, R = H / 2, F feed-forward dim, V vocabulary, L layers.
Dtypes: weights are kept in `param_dtype` and enter matrix products in `compute_dtype`;
the residual stream has `residual_dtype`; statistics (norm, softmax, rotation) are
computed in at least float32 and follow wider inputs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.config import ComputeConfig, ModelConfig
from jaxllm.kernels.attention import attention
from jaxllm.kernels.cross_entropy import logits
from jaxllm.kernels.embedding import embed
from jaxllm.kernels.layer import fused_layer
from jaxllm.kernels.remat import scan_layers

Cache = dict[str, jax.Array]


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): no mean, no bias."""

    def __init__(self, dim: int, eps: float, *, param_dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Scales x to unit mean square, casts back, *then* applies the weight."""
        x = x_BTD.astype(_stat(x_BTD.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(x_BTD.dtype) * self.weight[...][None, None]


@functools.cache
def precompute_freqs_cis(head_dim: int, end: int, theta: float, dtype):
    """Tabulates the cosines and sines of rotary embeddings as (T, R) host arrays.

    Row t, column i is the angle t / theta ** (2 i / H). Exponents, powers, frequencies
    and angles are each rounded to `dtype` (at least float32), as transformers does it:
    a float32 angle near position 2048 is off by 1e-4, and what counts is to be off
    alike. Built with numpy while tracing: a constant to XLA, the same on every backend.
    """
    stat = np.dtype(_stat(dtype))
    exponents_R = np.arange(0, head_dim, 2, dtype=stat) / stat.type(head_dim)
    # Python floats, the one power that both twins share: NumPy's and PyTorch's differ
    # in the last bit, which is 6e-14 in the angle at position 1484.
    powers_R = np.array([theta**e for e in exponents_R.tolist()], stat)
    angles_TR = np.outer(np.arange(end, dtype=stat), 1 / powers_R)
    # In float64, where the libraries' last bits don't matter to a float32.
    wide_TR = angles_TR.astype(np.float64)
    return np.cos(wide_TR).astype(stat), np.sin(wide_TR).astype(stat)


def apply_rotary_emb(xq_BTNH, xk_BTKH, freqs_cos, freqs_sin):
    """Rotates the pairs (0, 1), (2, 3), ... of each head; tables are (B or 1, T, R).

    Interleaved pairs, as in RoFormer (Su et al., 2021), not the half-split of Hugging
    Face Llama. Computes in at least float32 and casts back.
    """
    cos, sin = freqs_cos[:, :, None], freqs_sin[:, :, None]

    def rotate(x):
        pairs = x.astype(_stat(x.dtype)).reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)

    return rotate(xq_BTNH), rotate(xk_BTKH)


# repeat_kv has no twin here: the attention kernels read key/value head n // G for
# query head n, so no repeated copy is ever made.


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.implementation = config, compute.attention
        assert config.head_dim is not None
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        linear = functools.partial(_linear, config, compute, rngs)
        self.wq = linear("wq", config.dim, q_dim)
        self.wk = linear("wk", config.dim, kv_dim)
        self.wv = linear("wv", config.dim, kv_dim)
        self.wo = linear("wo", q_dim, config.dim)

    def __call__(
        self,
        x_BTD: jax.Array,
        freqs_cos: jax.Array,
        freqs_sin: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attends; with a cache, writes keys and values at `positions_BT` first."""
        b, t, _ = x_BTD.shape
        heads = (b, t, -1, self.config.head_dim)
        xq_BTNH = checkpoint_name(self.wq(x_BTD), "q").reshape(heads)
        xk_BTKH = checkpoint_name(self.wk(x_BTD), "k").reshape(heads)
        xv_BTKH = checkpoint_name(self.wv(x_BTD), "v").reshape(heads)
        xq_BTNH, xk_BTKH = apply_rotary_emb(xq_BTNH, xk_BTKH, freqs_cos, freqs_sin)
        if cache is None:
            out_BTNH = attention(
                xq_BTNH, xk_BTKH, xv_BTKH, segment_ids_BT=segment_ids_BT,
                implementation=self.implementation,
            )  # fmt: skip
        else:
            slots = (jnp.arange(b)[:, None], positions_BT)
            cache = {
                "k": cache["k"].at[slots].set(xk_BTKH, mode="drop"),
                "v": cache["v"].at[slots].set(xv_BTKH, mode="drop"),
            }
            out_BTNH = attention(
                xq_BTNH, cache["k"], cache["v"], positions_BT=positions_BT
            )
        return self.wo(out_BTNH.reshape(b, t, -1)), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(_linear, config, compute, rngs)
        self.w1 = linear("w1", config.dim, config.hidden_dim)
        self.w2 = linear("w2", config.hidden_dim, config.dim)
        self.w3 = linear("w3", config.dim, config.hidden_dim)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps x_BTD to the layer's contribution, in the compute dtype."""
        gate_BTF = checkpoint_name(self.w1(x_BTD), "gate")
        up_BTF = checkpoint_name(self.w3(x_BTD), "up")
        return self.w2(jax.nn.silu(gate_BTF) * up_BTF)


class DecoderLayer(nnx.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.dropout, self.compute = config.dropout, compute
        self.attention = Attention(config, compute, rngs=rngs)
        self.feed_forward = MLP(config, compute, rngs=rngs)
        norm = functools.partial(
            RMSNorm, config.dim, config.norm_eps, param_dtype=compute.param_dtype
        )
        self.attention_norm = norm()
        self.ffn_norm = norm()

    def __call__(
        self, h_BTD, freqs_cos, freqs_sin, *, dropout_key=None, fullest=False,
        **attention_inputs,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """Returns the residual stream after the layer, and the layer's cache."""
        plain_rows = all(x is None for x in attention_inputs.values())
        if self.compute.layer == "fused" and plain_rows and dropout_key is None:
            h_BTD = fused_layer(self, h_BTD, freqs_cos, freqs_sin, fullest=fullest)
            return h_BTD, None
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        out_BTD, cache = self.attention(
            self.attention_norm(h_BTD), freqs_cos, freqs_sin, **attention_inputs
        )
        h_BTD = h_BTD + _dropout(out_BTD, self.dropout, keys[0]).astype(h_BTD.dtype)
        out_BTD = self.feed_forward(self.ffn_norm(h_BTD))
        h_BTD = h_BTD + _dropout(out_BTD, self.dropout, keys[1]).astype(h_BTD.dtype)
        return h_BTD, cache


class Transformer(nnx.Module):
    """Embedding, L decoder layers, norm, and a head tied to the embedding or not."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        assert "auto" not in (compute.compute_dtype, compute.residual_dtype)
        self.config, self.compute = config, compute
        self.tok_embeddings = nnx.Embed(
            config.vocab_size, config.dim, dtype=compute.residual_dtype,
            param_dtype=compute.param_dtype, rngs=rngs,
            embedding_init=jax.nn.initializers.normal(0.02),
        )  # fmt: skip

        # One stacked module whose leaves lead with L, not L modules: 11 leaves to
        # dispatch instead of 9 L + 2.
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return DecoderLayer(config, compute, rngs=rngs)

        self.layers = layers(rngs)
        self.norm = RMSNorm(
            config.dim, config.norm_eps, param_dtype=compute.param_dtype
        )
        if not config.tie_word_embeddings:
            self.output = _linear(
                config, compute, rngs, "output", config.dim, config.vocab_size
            )

    def __call__(self, tokens_BT: jax.Array, **kwargs) -> jax.Array:
        """Returns logits_BTV in at least float32; arguments as in `hidden`."""
        return logits(self.hidden(tokens_BT, **kwargs)[0], self.head_VD())

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        layers: Sequence[dict] | None = None,
        cache: Sequence[Cache] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """Runs all but the head; returns h_BTD in the compute dtype, and the cache.

        `positions_BT` defaults to 0 .. T-1. `cache` holds, for each of the L layers, k
        and v of shape (B, S, K, H), and needs positions and `layers`: the parameters of
        each layer as arrays of their own (`generate.unstack`). One token does so little
        with a weight that taking it out of a stack costs as much as using it. Dropout
        acts only when it gets a key, and without a cache.
        """
        freqs_cos, freqs_sin = self._freqs_cis(tokens_BT, positions_BT)
        n_layers = self.config.n_layers
        h_BTD = embed(
            self.tok_embeddings.embedding[...], tokens_BT,
            dtype=self.compute.residual_dtype, implementation=self.compute.embedding,
            grad_dtype=self.compute.compute_dtype,
        )  # fmt: skip
        keys = None
        if dropout_key is not None and self.config.dropout:
            first, rest = jax.random.split(dropout_key)
            h_BTD = _dropout(h_BTD, self.config.dropout, first)
            keys = jax.random.split(rest, n_layers)

        def body(h_BTD, inputs, *, fullest=False):
            layer, key, layer_cache = inputs
            return layer(
                h_BTD, freqs_cos, freqs_sin, dropout_key=key, cache=layer_cache,
                segment_ids_BT=segment_ids_BT, fullest=fullest,
                positions_BT=None if cache is None else positions_BT,
            )  # fmt: skip

        if cache is None:
            h_BTD = scan_layers(body, h_BTD, (self.layers, keys, None), self.compute)
            grown = None
        else:
            assert layers is not None and keys is None
            layerdef, grown = nnx.split(self.layers)[0], []
            for params, layer_cache in zip(layers, cache, strict=True):
                layer = nnx.merge(layerdef, params)
                h_BTD, layer_cache = body(h_BTD, (layer, None, layer_cache))
                grown.append(layer_cache)
        return self.norm(h_BTD).astype(self.compute.compute_dtype), grown

    def head_VD(self) -> jax.Array:
        """The output head's weight in the compute dtype."""
        if self.config.tie_word_embeddings:
            weight = self.tok_embeddings.embedding[...]
        else:
            weight = self.output.kernel[...].T
        return weight.astype(self.compute.compute_dtype)

    def _freqs_cis(self, tokens_BT, positions_BT):
        t, end = tokens_BT.shape[1], self.config.max_seq_len
        if t > end:
            raise ValueError(
                f"{t} tokens do not fit model.max_seq_len={end}: cut them, or raise it"
            )
        tables = precompute_freqs_cis(
            self.config.head_dim, end, self.config.rope_theta,
            jnp.dtype(self.compute.compute_dtype),
        )  # fmt: skip
        if positions_BT is None:
            return tuple(jnp.asarray(table[None, :t]) for table in tables)
        return tuple(jnp.asarray(table)[positions_BT] for table in tables)


def _stat(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _linear(config, compute, rngs, name, d_in, d_out):
    """A bias-free projection; the two that write to the stream start smaller."""
    scaled = {"residual": ("w2", "wo"), "reference": ("w3", "wo")}[config.init]
    std = 0.02 / (2 * config.n_layers) ** 0.5 if name in scaled else 0.02
    return nnx.Linear(
        d_in, d_out, use_bias=False, dtype=compute.compute_dtype,
        param_dtype=compute.param_dtype, rngs=rngs,
        kernel_init=jax.nn.initializers.normal(std),
    )  # fmt: skip


def _dropout(x, rate, key):
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
