"""The dtypes in which weights are kept, and rounding from one to another."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

FLOATS = ("float64", "float32", "bfloat16", "float16")


def cast(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Rounds every tensor to `dtype` (float64, float32, bfloat16 or float16).

    Raises: ValueError naming a tensor that is not finite, or too large for `dtype`.
    """
    target = as_dtype(dtype)
    rounded: dict[int, np.ndarray] = {}  # a tied head stays one array under two names
    for name, tensor in tensors.items():
        if id(tensor) in rounded:
            continue
        require_finite(name, tensor)
        with np.errstate(over="ignore"):
            rounded[id(tensor)] = tensor.astype(target, copy=False)
        if not np.isfinite(rounded[id(tensor)]).all():
            largest = float(ml_dtypes.finfo(target).max)
            raise ValueError(
                f"tensor {name!r} reaches {np.abs(tensor).max():.3g}, beyond the "
                f"largest {dtype} number {largest:.3g}: use bfloat16"
            )
    return {name: rounded[id(tensor)] for name, tensor in tensors.items()}


def require_finite(name: str, tensor: np.ndarray) -> None:
    """Raises: ValueError naming a tensor that holds a NaN or an infinity."""
    bad = tensor.size - int(np.isfinite(tensor).sum())
    if bad:
        raise ValueError(
            f"tensor {name!r} holds {bad} values that are not finite: these weights "
            f"are damaged or their training diverged; take an earlier step"
        )


def as_dtype(name: str) -> np.dtype:
    """The NumPy dtype of that name; bfloat16 comes from ml_dtypes."""
    if name not in FLOATS:
        raise ValueError(f"dtype {name!r} must be one of {', '.join(FLOATS)}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
