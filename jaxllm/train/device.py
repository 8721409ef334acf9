"""What a run needs of its device: a compile cache, and plain words when it is full."""

import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import RunConfig


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs and autotuning results in `folder` for the next start.

    XLA's own caches (kernels, autotuning) go there too, so that a resumed run executes
    the very program of the first start. Call before the first compilation. A cache that
    is set already, such as by JAX_COMPILATION_CACHE_DIR, stays.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "all")


def pin_kernels(cache: Path) -> None:
    """Asks XLA for kernels that always add in the same order, and for those that an
    earlier start measured to be the fastest, which it keeps in `cache`.

    Concerns GPUs alone: on a CPU all kernels are so. To be called before the first use
    of a device, since XLA reads its flags once. Those that XLA_FLAGS has already stay.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    for name, value in {
        "xla_gpu_exclude_nondeterministic_ops": "true",
        "xla_gpu_per_fusion_autotune_cache_dir": (cache / "autotune").absolute(),
    }.items():
        if name not in flags:
            flags += f" --{name}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()


def peak_bytes(devices: Iterable[Any]) -> int:
    """The most memory that one of `devices`, or where they don't count it (a CPU) this
    process, has held so far."""
    stats = [device.memory_stats() or {} for device in devices]
    peak = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(error: BaseException, config: RunConfig) -> str | None:
    """Says what to change when a step does not fit, or None for any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
        return None
    train, compute = config.train, config.compute
    micro = train.batch_size // train.accumulate
    advice = []
    if micro > 1:
        parts = next(
            n
            for n in range(train.accumulate + 1, train.batch_size + 1)
            if train.batch_size % n == 0
        )
        advice.append(
            f"--train.accumulate {parts} (micro-batches of {train.batch_size // parts} "
            f"rows instead of {micro}; the result is the same)"
        )
    if compute.remat != "layer":
        known = {"accurate": "none", "lean": "products"}[compute.goal]
        known = known if compute.remat == "auto" else compute.remat
        stronger = {"none": "products", "products": "layer"}[known]
        advice.append(f"--compute.remat {stronger} (less memory, more time)")
    if compute.cross_entropy != "chunked":
        advice.append("--compute.cross-entropy chunked")
    elif compute.loss_chunk > 1024:
        advice.append(f"--compute.loss-chunk {compute.loss_chunk // 2}")
    first = str(error).splitlines()[0][:200]
    return "\n".join(
        [
            f"the device is out of memory with micro-batches of {micro} x "
            f"{config.seq_len} tokens. Try, in this order:",
            *(f"  {line}" for line in advice),
            "scripts/plan.py --largest says beforehand what fits on a GPU.",
            f"({first})",
        ]
    )
