"""Whether there are NVIDIA GPUs to be used, asked without taking hold of one."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

DEV = Path("/dev")


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The GPUs that a process with this environment is shown: those of the machine, or
    of CUDA_VISIBLE_DEVICES, which ends for CUDA at the first name that is none."""
    if environment.get("JAX_PLATFORMS", "").lower() == "cpu":
        return 0
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return _device_files()
    names = (name.strip() for name in shown.split(","))
    return len(list(itertools.takewhile(lambda name: name not in ("", "-1"), names)))


def has_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether one of those is there. Not seen: GPUs without a device file (WSL)."""
    return _device_files() > 0 and count_gpus(environment) > 0


def _device_files() -> int:
    return len(list(DEV.glob("nvidia[0-9]*")))
