"""Ray Train: one worker a GPU, started again by Ray after a failure.

    ray job submit --working-dir . -- python docs/launch/ray_train.py SHARDS 16

Needs a Ray whose JaxTrainer serves GPUs (`JaxConfig(use_gpu=True)`; older ones only
TPUs). Ray joins the processes by jax.distributed before it calls `train`, and the run
takes them as they are. The folders lie on a file system that all nodes share.
"""

import sys

FLAGS = [
    "k-215m",
    "--out", "/shared/runs/k-215m",
    "--parallel.data", "-1",
    "--train.batch-size", "2048",
    "--train.save-every", "500",
]  # fmt: skip


def train(config: dict) -> None:
    """What every worker does: the command of one process, with the same flags."""
    import jax
    from ray.train import get_context  # type: ignore[import-not-found]

    workers = get_context().get_world_size()
    if workers > 1 and not jax.distributed.is_initialized():
        raise RuntimeError("this Ray does not join JAX's processes on GPUs: update it")
    sys.path.append("scripts")
    import pretrain  # type: ignore[import-not-found]

    pretrain.main(config["flags"])


def main(data: str, workers: int) -> None:
    from ray.train import (  # type: ignore[import-not-found]
        FailureConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.v2.jax import JaxTrainer  # type: ignore[import-not-found]
    from ray.train.v2.jax.config import JaxConfig  # type: ignore[import-not-found]

    JaxTrainer(
        train,
        train_loop_config={"flags": [*FLAGS, "--data.path", data]},
        jax_config=JaxConfig(use_gpu=True),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=True),
        run_config=RunConfig(
            storage_path="/shared/ray", failure_config=FailureConfig(max_failures=100)
        ),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
