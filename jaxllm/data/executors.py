"""Where the workers run: here, on a Slurm cluster or on Ray, by datatrove's executors.

The pipeline is the same everywhere: one step, `TokenizeParts`. Workers share nothing
but the work folder, which has to be on a file system that all of them see.
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from jaxllm.data.parts import tokenize_parts


class TokenizeParts(PipelineStep):
    """The datatrove step of one worker: tokenises what it can claim."""

    name = "Tokenize parts"
    type = "tokenizer"

    def __init__(self, work: Path, run: str):
        super().__init__()
        self.work = work
        self.run_name = run

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Runs until no part is left to claim."""
        # One thread a worker: the parallelism is in the workers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parent = os.getppid()
        for counts in tokenize_parts(self.work, self.run_name):
            for key in ("documents", "tokens", "text_bytes", "empty"):
                self.stat_update(key, value=counts[key])
            if os.getppid() != parent:
                raise SystemExit("the process that started this worker has ended")
        return None


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on the standard pool, which reports a killed worker;
    the pool it uses by default waits for it for ever."""

    def run(self) -> PipelineStats:
        """Runs all tasks.

        Raises: ValueError if a worker was killed.
        """
        context = get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            tasks = [pool.submit(_run_rank, self, rank) for rank in range(self.tasks)]
            try:
                stats = [task.result() for task in as_completed(tasks)]
            except BrokenProcessPool:
                raise ValueError(
                    f"a worker process was killed, perhaps for want of memory: run the "
                    f"same command again with fewer --workers than {self.workers} (it "
                    f"goes on where it stopped)"
                ) from None
        return sum(stats, start=PipelineStats())


def _run_rank(executor: LocalExecutor, rank: int) -> PipelineStats:
    logger.disable("datatrove")
    return executor._run_for_rank(rank)


def run_local(work: Path, run: str, workers: int) -> None:
    """Runs the workers as processes of this machine and waits for them."""
    logger.disable("datatrove")
    LocalExecutor(
        pipeline=[TokenizeParts(work, run)],
        tasks=workers,
        workers=workers,
        logging_dir=str(work / "logs" / run),
        skip_completed=False,
    ).run()
