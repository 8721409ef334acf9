"""A real, tiny training run in a process of its own, with accidents on order.

run_worker.py OUT DATA [name=value ...]: `devices`, `stop_at` (asks for a stop as a
signal would), `full_from` and `full_to` (steps between which no file grows beyond
64 KiB), `pause_s` (seconds a step), `hang_at` (a step at which the data never comes),
`fail_at` (raises in that step), `double` (computes in float64), `fsdp`, any field of
TrainConfig; `processes`, `process` and `port`, where it is one of several, which hear
of a death within 10 s.
"""

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.compute import ComputeConfig
from jaxllm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from jaxllm.parallel import DistributedConfig, ParallelConfig

VOCAB = 320
STEPS = 60


def write_text(folder: Path) -> Path:
    """Writes 200 short documents with some structure to learn."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    lines = [
        json.dumps({"text": " ".join(rng.choice(words[k % 5 :: 5], 40)) + f" {k}."})
        for k in range(200)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder / "text.jsonl"


def write_data(folder: Path) -> Path:
    """Makes shards of them."""
    from jaxllm.data.corpus import prepare

    prepare([write_text(folder)], folder / "shards", vocab_size=VOCAB, workers=1,
            val_fraction=0.1)  # fmt: skip
    return folder / "shards"


def tiny(out: str, data: str, **train: Any) -> RunConfig:
    rhythm: dict[str, Any] = dict(
        batch_size=8, steps=STEPS, log_every=20, eval_every=0, sample_every=0,
        save_every=4, sample_tokens=1, eval_rows=8, keep=2,
    )  # fmt: skip
    return RunConfig(
        out=out,
        model=ModelConfig(
            dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB,
            max_seq_len=32,
        ),
        data=DataConfig(path=data),
        optim=OptimConfig(learning_rate=1e-2, min_learning_rate=1e-3),
        train=TrainConfig(**rhythm | train),
    )  # fmt: skip


def main(out: str, data: str, *orders: str) -> None:
    given = {
        name: float(value) for name, _, value in (o.partition("=") for o in orders)
    }
    jax.config.update("jax_num_cpu_devices", int(given.pop("devices", 1)))
    # Compiled once by the first process of a test, read from its cache by the others.
    jax.config.update("jax_compilation_cache_dir", os.environ["RUN_WORKER_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jaxllm.train import loop, stop
    from jaxllm.train.step_folders import CheckpointError

    stop_at = given.pop("stop_at", -1)
    full = range(int(given.pop("full_from", 0)), int(given.pop("full_to", 0)))
    pause_s, hang_at = given.pop("pause_s", 0.0), given.pop("hang_at", -1)
    fail_at = given.pop("fail_at", -1)
    compute = ComputeConfig()
    if given.pop("double", 0):
        jax.config.update("jax_enable_x64", True)
        compute = ComputeConfig(param_dtype="float64", compute_dtype="float64")
    distributed = DistributedConfig()
    if count := int(given.pop("processes", 0)):
        distributed = DistributedConfig(
            coordinator=f"localhost:{int(given.pop('port'))}", num_processes=count,
            process_id=int(given.pop("process")), heartbeat_s=10,
        )  # fmt: skip
    parallel = ParallelConfig(fsdp=int(given.pop("fsdp", 1)))
    asked = stop.Stop()
    true_prefetched = loop.prefetched
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def prefetched(run, first):
        for item in true_prefetched(run, first):
            limit = 2**16 if item[0] in full else unlimited[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            if item[0] == stop_at:
                asked.request()
            if item[0] == fail_at:
                raise RuntimeError("an accident in one process")
            time.sleep(1000 if item[0] == hang_at else pause_s)
            yield item

    loop.prefetched, loop.Stop = prefetched, lambda: asked
    train = {name: int(value) for name, value in given.items()}
    try:
        config = tiny(out, data, **train)
        loop.run(
            replace(config, distributed=distributed, compute=compute, parallel=parallel)
        )
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
