"""The Transformer in PyTorch: the reference that jaxllm/model.py is checked against.

Shape suffixes: B batch, T time, D dim, N query heads, K key/value heads, G = N / K,
H head dim, R = H / 2, F feed-forward dim, V vocabulary.
Statistics (norm, softmax, rotation, loss) are computed in at least float32 and follow
wider inputs, so that `.double()` turns the whole model into a float64 oracle.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ModelConfig(PretrainedConfig):
    """The network: field for field the ModelConfig of jaxllm/config.py."""

    model_type = "k_model"

    def __init__(
        self,
        dim: int = 1024,
        n_layers: int = 18,
        n_heads: int = 16,
        n_kv_heads: int | None = 8,
        vocab_size: int = 6144,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        max_seq_len: int = 512,
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_word_embeddings: bool = True,
        init: str = "residual",
        flash_attn: bool = True,
        **kwargs,
    ):
        if hidden_dim is None:
            hidden_dim = multiple_of * math.ceil(int(2 * (4 * dim) / 3) / multiple_of)
        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.multiple_of = multiple_of
        self.head_dim = dim // n_heads if head_dim is None else head_dim
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.dropout = dropout
        self.rope_theta = rope_theta
        self.init = init
        self.flash_attn = flash_attn
        # Begin and end of a document: <|im_start|> and <|im_end|>.
        kwargs.setdefault("bos_token_id", 3)
        kwargs.setdefault("eos_token_id", 4)
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): no mean, no bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Scales x to unit mean square, casts back, *then* applies the weight."""
        x = x_BTD.to(_stat(x_BTD.dtype))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x.to(x_BTD.dtype) * self.weight


def precompute_freqs_cis(
    head_dim: int,
    end: int,
    theta: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tabulates the cosines and sines of rotary embeddings as two (T, R) tensors.

    Row t, column i is the angle t / theta ** (2 i / H). Exponents, powers, frequencies
    and angles are each rounded to `dtype` (at least float32), as transformers does it.
    """
    stat = _stat(dtype)
    freqs = _frequencies(head_dim, theta, stat)
    freqs_R = torch.tensor(freqs, dtype=stat, device=device)
    angles_TR = torch.outer(torch.arange(end, dtype=stat, device=device), freqs_R)
    # In float64, where the libraries' last bits don't matter to a float32.
    wide_TR = angles_TR.double()
    return wide_TR.cos().to(stat), wide_TR.sin().to(stat)


def apply_rotary_emb(
    xq_BTNH: torch.Tensor,
    xk_BTKH: torch.Tensor,
    freqs_cos: torch.Tensor,
    freqs_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (0, 1), (2, 3), ... of each head; tables are (T, R).

    Interleaved pairs, as in RoFormer (Su et al., 2021), not the half-split of Hugging
    Face Llama. Computes in at least float32 and casts back.
    """
    cos, sin = freqs_cos[None, :, None], freqs_sin[None, :, None]

    def rotate(x):
        a, b = x.to(_stat(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return turned.flatten(-2).to(x.dtype)

    return rotate(xq_BTNH), rotate(xk_BTKH)


def repeat_kv(x_BTKH: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeats each key/value head n_rep times in place: query head n gets n // G."""
    return x_BTKH if n_rep == 1 else x_BTKH.repeat_interleave(n_rep, dim=2)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = _linear(config, "wq", config.dim, q_dim)
        self.wk = _linear(config, "wk", config.dim, kv_dim)
        self.wv = _linear(config, "wv", config.dim, kv_dim)
        self.wo = _linear(config, "wo", q_dim, config.dim)

    def forward(
        self, x_BTD: torch.Tensor, freqs_cos: torch.Tensor, freqs_sin: torch.Tensor
    ) -> torch.Tensor:
        """Attends from each position to itself and those before it."""
        b, t, _ = x_BTD.shape
        heads = (b, t, -1, self.config.head_dim)
        xq_BTNH = self.wq(x_BTD).view(heads)
        xk_BTKH = self.wk(x_BTD).view(heads)
        xv_BTKH = self.wv(x_BTD).view(heads)
        xq_BTNH, xk_BTKH = apply_rotary_emb(xq_BTNH, xk_BTKH, freqs_cos, freqs_sin)
        n_rep = self.config.n_heads // self.config.n_kv_heads
        q_BNTH = xq_BTNH.transpose(1, 2)
        k_BNTH = repeat_kv(xk_BTKH, n_rep).transpose(1, 2)
        v_BNTH = repeat_kv(xv_BTKH, n_rep).transpose(1, 2)
        if self.config.flash_attn:
            out_BNTH = F.scaled_dot_product_attention(
                q_BNTH, k_BNTH, v_BNTH, is_causal=True
            )
        else:
            out_BNTH = _plain_attention(q_BNTH, k_BNTH, v_BNTH)
        return self.wo(out_BNTH.transpose(1, 2).reshape(b, t, -1))


def _plain_attention(q_BNTH, k_BNTH, v_BNTH):
    """Softmax attention under an explicit causal mask."""
    t = q_BNTH.shape[-2]
    scores_BNTS = q_BNTH @ k_BNTH.transpose(-2, -1) / math.sqrt(q_BNTH.shape[-1])
    future = torch.ones(t, t, dtype=torch.bool, device=q_BNTH.device).triu(1)
    scores_BNTS = scores_BNTS.masked_fill(future, -math.inf)
    probs_BNTS = scores_BNTS.to(_stat(scores_BNTS.dtype)).softmax(-1)
    return probs_BNTS.to(v_BNTH.dtype) @ v_BNTH


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = _linear(config, "w1", config.dim, config.hidden_dim)
        self.w2 = _linear(config, "w2", config.hidden_dim, config.dim)
        self.w3 = _linear(config, "w3", config.dim, config.hidden_dim)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Maps x_BTD to the layer's contribution to the residual stream."""
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.attention = Attention(config)
        self.feed_forward = MLP(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h_BTD, freqs_cos, freqs_sin) -> torch.Tensor:
        """Returns the residual stream after the layer."""
        out_BTD = self.attention(self.attention_norm(h_BTD), freqs_cos, freqs_sin)
        h_BTD = h_BTD + self.dropout(out_BTD)
        return h_BTD + self.dropout(self.feed_forward(self.ffn_norm(h_BTD)))


class Transformer(PreTrainedModel, GenerationMixin):
    """Embedding, L decoder layers, norm, and a head tied to the embedding or not."""

    config_class = ModelConfig
    config: ModelConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    # transformers reads it only when config.tie_word_embeddings is set.
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _supports_sdpa = True

    def __init__(self, config: ModelConfig | None = None):
        super().__init__(ModelConfig() if config is None else config)
        config = self.config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = _linear(config, "output", config.dim, config.vocab_size)
        self._freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None
        self.post_init()  # initialises the weights, then ties the head

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output head."""
        self.output = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", 0.02))

    def forward(
        self,
        tokens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits (B, T, V) and, given targets (B, T), the loss in nats.

        The loss is per token (B, T); with `attention_mask` (B, T), 1 on targets that
        count, it is their mean, a scalar. The mask works on the loss alone: rows are
        padded on the right, where causal attention never looks back from real tokens.
        `input_ids` is accepted as another name for tokens.

        Raises: ValueError if there are more tokens than max_seq_len.
        """
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        assert tokens is not None, "give tokens or input_ids"
        t = tokens.shape[1]
        if t > self.config.max_seq_len:
            raise ValueError(
                f"{t} tokens do not fit max_seq_len={self.config.max_seq_len}: cut "
                f"them, or raise it"
            )
        h_BTD = self.dropout(self.tok_embeddings(tokens))
        freqs_cos, freqs_sin = self._tables(h_BTD)
        for layer in self.layers:
            h_BTD = layer(h_BTD, freqs_cos[:t], freqs_sin[:t])
        logits_BTV = self.output(self.norm(h_BTD))
        loss = None
        if targets is not None:
            wide = logits_BTV.to(_stat(logits_BTV.dtype))
            loss = F.cross_entropy(
                wide.flatten(0, 1), targets.flatten(), reduction="none"
            ).view_as(targets)
            if attention_mask is not None:
                mask = attention_mask.to(loss.dtype)
                loss = (loss * mask).sum() / mask.sum()
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV)  # type: ignore[arg-type]

    def _tables(self, h_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Kept as a plain attribute, not a buffer: it is derived, follows the dtype,
        # and from_pretrained would build a non-persistent buffer on the meta device.
        tables = self._freqs_cis
        stat = _stat(h_BTD.dtype)
        if tables is None or (tables[0].dtype, tables[0].device) != (
            stat,
            h_BTD.device,
        ):
            tables = self._freqs_cis = precompute_freqs_cis(
                self.config.head_dim, self.config.max_seq_len, self.config.rope_theta,
                dtype=stat, device=h_BTD.device,
            )  # fmt: skip
        return tables

    @torch.inference_mode()
    def generate(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Goes on from tokens (B, T) without a cache; returns the whole (B, T + new).

        Temperature 0 is greedy. Beyond max_seq_len the context is cut on the left, and
        its first token is position 0 again. Stops when every row has `stop_id`; a row
        that has stopped is filled up with it.
        """
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            context = tokens[:, -self.config.max_seq_len :]
            logits_BV = self(context).logits[:, -1]
            if temperature == 0.0:
                chosen = logits_BV.argmax(-1, keepdim=True)
            else:
                logits_BV = logits_BV / temperature
                if top_k:
                    k = min(top_k, logits_BV.shape[-1])
                    floor = logits_BV.topk(k).values[:, -1:]
                    logits_BV = logits_BV.masked_fill(logits_BV < floor, -math.inf)
                probs_BV = logits_BV.to(_stat(logits_BV.dtype)).softmax(-1)
                chosen = torch.multinomial(probs_BV, 1, generator=generator)
            if stop_id is not None:
                chosen = chosen.masked_fill(done, stop_id)
                done |= chosen == stop_id
            tokens = torch.cat([tokens, chosen], dim=1)
            if stop_id is not None and done.all():
                break
        return tokens


def _linear(config: ModelConfig, name: str, d_in: int, d_out: int) -> nn.Linear:
    """A bias-free projection; the two that write to the stream start smaller."""
    linear = nn.Linear(d_in, d_out, bias=False)
    scaled = {"residual": ("w2", "wo"), "reference": ("w3", "wo")}[config.init]
    if name in scaled:
        linear.init_std = 0.02 / math.sqrt(2 * config.n_layers)  # type: ignore[assignment]
    return linear


def _stat(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result
def _frequencies(head_dim: int, theta: float, stat: torch.dtype) -> list[float]:
    """theta ** (-2 i / H), on the host: a GPU divides and takes powers otherwise."""
    exponents_R = torch.arange(0, head_dim, 2, dtype=stat, device="cpu") / head_dim
    powers = [theta**e for e in exponents_R.tolist()]
    return (1 / torch.tensor(powers, dtype=stat, device="cpu")).tolist()
