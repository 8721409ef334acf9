"""What XLA is told when it compiles the train step, and what it can do where.

Options are passed for versions of jax that were tried: one that XLA does not know is an
error. A jax that never was goes without them.
"""

import os
import platform
import sys
import warnings
from typing import Any

import jax

from jaxllm.compute import ComputeConfig
from jaxllm.kernels.native import has_native, native
from jaxllm.kernels.processor import features

# The first and the last jax whose CUDA plugin is known to have the compiler options.
FIRST_JAX, LAST_JAX = (0, 10), (0, 12)

# The jax whose oneDNN was tried, and what it takes of the processor. With less than
# AVX-512 it writes beyond its memory (AVX), or stands still (AVX2).
ONEDNN_JAX = (0, 10)
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

# Each product by itself: what XLA joins for oneDNN beyond that ends the process.
ONEDNN = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def has_onednn(device: Any) -> bool:
    """Whether XLA multiplies by oneDNN on `device` if it is told to, and was seen to do
    so without fault: jax 0.10 on Linux, an x86 CPU with AVX-512, none of it forbidden
    by oneDNN's variables."""
    return (
        device.platform == "cpu"
        and not any(name in os.environ for name in ONEDNN_LIMITS)
        and jax.__version_info__[:2] == ONEDNN_JAX
        and (sys.platform, platform.machine()) == ("linux", "x86_64")
        and features() >= AVX512
    )


def has_products(gemm: str, device: Any, *, alone: bool = True) -> bool:
    """Whether a CPU's products by amx, native or onednn are to be had on `device`,
    which computes `alone` or shares the work with others."""
    if gemm == "onednn":
        return has_onednn(device)
    return alone and has_native(device, gemm)


def compiler_options(
    compute: ComputeConfig, device: Any, *, alone: bool = True
) -> dict[str, bool | str]:
    """Options of the train step of a resolved `compute`, for `device`, which computes
    `alone` or shares the work with others.

    Without Triton's products XLA makes every addition of a product to the residual
    stream part of the product, in cuBLASLt: 36 of them in 18 layers, either way.

    Raises: ValueError for a CPU's products where they are not known to work.
    """
    names = ("compute_dtype", "residual_dtype", "logits_dtype")
    dtypes = {name: getattr(compute, name) for name in names}
    single = set(dtypes.values()) == {"float32"}
    these = ", ".join(f"{name}={dtype}" for name, dtype in dtypes.items())
    if compute.ours or compute.attention == "native":
        name, method = "gemm" if compute.ours else "attention", compute.ours or "native"
        fits = single and alone and compute.layer == "fused"
        if not (fits and has_native(device, method)):
            raise ValueError(
                f"compute.{name}={method} takes float32, the fused layer, one CPU"
                f"{' with AMX' * (method == 'amx')}, and GCC to compile with; this is "
                f"{these}, layer={compute.layer}, "
                f"{device.platform}{'' if alone else ', several devices'}"
                f"{': ' + problem if (problem := native().problem) else ''}; use auto"
            )
    if compute.ours:
        return {}
    if compute.gemm == "onednn":
        if not has_onednn(device) or not single:
            raise ValueError(
                "compute.gemm=onednn takes float32, jax 0.10 on Linux, and an x86 CPU "
                f"with AVX-512; this is {these}, {device.platform}, "
                f"jax {jax.__version__}, {sys.platform} {platform.machine()}: use auto"
            )
        # Nobody can act on it: such a step is compiled anew by every start.
        warnings.filterwarnings(
            "ignore", message="Error writing persistent compilation cache.*onednn"
        )
        return dict(ONEDNN)
    if device.platform == "cpu" or compute.gemm != "cublas":
        return {}
    if not FIRST_JAX <= jax.__version_info__[:2] <= LAST_JAX:
        return {}
    return {"xla_gpu_enable_triton_gemm": False}
