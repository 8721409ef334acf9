"""How the network is computed, and what is best on which device."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxllm.fields import require_choices, require_int

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
OURS = ("amx", "native")
"""The values of gemm that are products of our own."""


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed. May differ between two starts of one run."""

    param_dtype: Dtype = "float32"
    """Dtype of the trained weights and of Adam's moments."""
    compute_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix products; auto is bfloat16 on a GPU that has it, else float32."""
    residual_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = (
        "auto"
    )
    """Dtype of the residual stream; auto is at least float32, unless goal is lean. In
    the fused layer its gradient has the compute dtype."""
    attention: Literal["auto", "plain", "blocked", "native", "cudnn"] = "auto"
    """Attention kernel; auto is cuDNN for 16-bit on Ampere or newer, on a CPU native
    where gemm is, else blocked, elsewhere plain."""
    layer: Literal["auto", "plain", "fused"] = "auto"
    """Form of a decoder layer; fused has its norms folded into its products and its
    backward pass written out. Rows with segments, dropout or a cache run plain."""
    embedding: Literal["auto", "plain", "one_hot", "sorted", "rows"] = "auto"
    """How the embedding's gradient is summed; auto picks by backend and vocabulary."""
    cross_entropy: Literal["auto", "plain", "chunked"] = "auto"
    """Loss kernel; auto picks by backend and vocabulary."""
    loss_chunk: int = 4096
    """Tokens a chunk of the chunked loss."""
    unroll: int = 0
    """Decoder layers unrolled per loop turn; 0 is all of them, on a CPU up to 8."""
    goal: Literal["accurate", "lean"] = "accurate"
    """What the autos above and below aim at on a GPU with bfloat16: accurate is no
    further from the truth than PyTorch's autocast; lean moves less memory and keeps
    less, with stream and logits in bfloat16 and remat=products."""
    remat: Literal["auto", "none", "products", "layer"] = "auto"
    """What the backward pass recomputes: nothing; all but the matrix products; whole
    layers. Later ones need less memory and more time; auto is none where goal is
    accurate."""
    gate_up: Literal["auto", "joined", "apart"] = "auto"
    """Whether the fused layer multiplies by gate and up at once; auto is joined on a
    GPU where act is kept (remat=none). Elsewhere it costs more than it spares: act is
    recomputed in the kernel of its gradients only while those are two arrays, and a CPU
    copies what is joined."""
    gemm: Literal["auto", "cublas", "triton", "amx", "native", "onednn", "ynnpack"] = (
        "auto"
    )
    """Matrix products of training. On a GPU cuBLAS alone, which adds them to the
    residual stream in one go, or XLA's Triton kernels too, the faster of the two; auto
    is cublas for the fused layer. On a CPU our own, which GCC compiles there, from six
    products of bfloat16 each (amx) or in float32 (native), oneDNN, or what XLA takes by
    itself (ynnpack); auto is the first of these that there is, for float32: amx and
    native for the fused layer on one device from a dim of 192 on, onednn where XLA is
    known to have it, from 256 on."""
    logits_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the logits in training; auto is at least float32. What is done with
    them is computed in at least float32 either way."""
    matmul_precision: Literal["default", "highest"] = "default"
    """Precision of float32 matrix products on GPU; default may use TF32 there."""

    def __post_init__(self):
        require_choices("compute", self)
        require_int("compute.loss_chunk", self.loss_chunk, at_least=1)
        require_int("compute.unroll", self.unroll, at_least=0)

    @property
    def ours(self) -> str:
        """The method of our own products, where those are taken."""
        return self.gemm if self.gemm in OURS else ""

    def resolve(
        self,
        *,
        n_layers: int,
        vocab_size: int = 0,
        head_dim: int = 64,
        dim: int = 0,
        platform: str = "cpu",
        compute_capability: float = 0.0,
        has: Callable[[str], bool] = lambda gemm: False,
    ) -> "ComputeConfig":
        """Replaces every auto by the choice for a device.

        `platform` is "cpu" or "gpu"; `compute_capability` is NVIDIA's (8.0 is Ampere);
        `has` says whether amx, native or onednn is there, and is asked if it matters.

        Raises: ValueError for a kernel that the device does not have.
        """
        cpu = platform == "cpu"
        ampere = platform == "gpu" and compute_capability >= 8.0
        if self.attention == "cudnn" and not ampere:
            raise ValueError(
                f"compute.attention=cudnn needs an NVIDIA GPU from Ampere on, and this "
                f"is a {platform}: use auto"
            )
        compute = self.compute_dtype
        if compute == "auto":
            compute = "bfloat16" if ampere else "float32"
        wide = "float64" if compute == "float64" else "float32"
        lean = self.goal == "lean" and platform == "gpu" and compute == "bfloat16"
        residual = logits = "bfloat16" if lean else wide
        half = compute in ("bfloat16", "float16")
        fused = (ampere and compute == "bfloat16") or (cpu and not half)
        layer = self.layer
        if layer == "auto":
            layer = "fused" if fused else "plain"
        loss = "chunked" if platform == "gpu" else "plain"
        gemm = self.gemm
        if gemm == "auto":
            gemm = "cublas" if layer == "fused" else "triton"
            if cpu:
                dtypes = {compute, self.residual_dtype, self.logits_dtype}
                single = dtypes <= {"auto", "float32"}
                names = OURS if layer == "fused" and dim >= 192 else ()
                names = (*names, "onednn") if dim >= 256 else names
                fitting = (name for name in names if single and has(name))
                gemm = next(fitting, "ynnpack")
        attention = "blocked" if cpu else "plain"
        if gemm in OURS:
            attention = "native"
        widest = 256 if compute_capability >= 9.0 else 128  # for cuDNN
        if ampere and half and head_dim % 8 == 0 and head_dim <= widest:
            attention = "cudnn"
        remat = self.remat
        if remat == "auto":
            remat = "products" if lean else "none"
        gate_up = "joined" if platform == "gpu" and remat == "none" else "apart"
        embedding = "plain"
        if platform == "gpu":
            embedding = "one_hot" if vocab_size <= 8192 else "sorted"
        return dataclasses.replace(
            self,
            compute_dtype=compute,
            residual_dtype=(
                residual if self.residual_dtype == "auto" else self.residual_dtype
            ),
            attention=attention if self.attention == "auto" else self.attention,
            layer=layer,
            embedding=embedding if self.embedding == "auto" else self.embedding,
            remat=remat,
            gate_up=gate_up if self.gate_up == "auto" else self.gate_up,
            gemm=gemm,
            logits_dtype=logits if self.logits_dtype == "auto" else self.logits_dtype,
            cross_entropy=loss if self.cross_entropy == "auto" else self.cross_entropy,
            unroll=self.unroll or (1 if cpu and n_layers > 8 else n_layers),
        )
