"""The precisions of the ladder: one name for the dtypes of both sides."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
import torch

from jaxllm.config import ComputeConfig, Dtype


@dataclass(frozen=True)
class Precision:
    """A dtype on our side, in NumPy and in PyTorch, with its machine epsilon."""

    name: str
    dtype: Dtype
    torch_dtype: torch.dtype

    @property
    def eps(self) -> float:
        """Spacing of the numbers just above 1: no gate is tighter than this."""
        # bfloat16 runs keep their weights in float32, and round everything else.
        return 2.0**-8 if self.name == "bf16" else float(np.finfo(self.dtype).eps)

    def compute(self, **changes) -> ComputeConfig:
        """The plain kernels with every dtype of the model set to this one."""
        settings: dict = {
            "param_dtype": self.dtype,
            "compute_dtype": self.dtype,
            "residual_dtype": self.dtype,
            "attention": "plain",
            "layer": "plain",
            "embedding": "plain",
            "cross_entropy": "plain",
        }
        return ComputeConfig(**(settings | changes))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Lets JAX have 64-bit types inside the block, if this precision needs them."""
        with jax.enable_x64(self.dtype == "float64"):
            yield


FP64 = Precision("fp64", "float64", torch.float64)
FP32 = Precision("fp32", "float32", torch.float32)
BF16 = Precision("bf16", "float32", torch.float32)
PRECISIONS = {"fp64": FP64, "fp32": FP32, "bf16": BF16}
