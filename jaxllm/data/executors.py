"""Where the workers run: here, on a Slurm cluster or on Ray, by datatrove's executors.

The pipeline is the same everywhere: one step, `TokenizeParts`. Workers share nothing
but the work folder, which has to be on a file system that all of them see.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.slurm import launch_slurm_job
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from jaxllm.data.parts import stop_run, tokenize_parts


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm is asked for."""

    partition: str
    tasks: int
    """Tasks of the array job, one core each."""
    time: str = "12:00:00"
    """Limit of each, in Slurm's form."""
    memory_gb: int = 4
    """Memory of each."""
    finish: tuple[str, ...] = ()
    """The command that merges the parts when the tasks have ended."""


class TokenizeParts(PipelineStep):
    """The datatrove step of one worker: tokenises what it can claim."""

    name = "Tokenize parts"
    type = "tokenizer"

    def __init__(self, work: Path, run: str):
        super().__init__()
        self.work = work
        self.run_name = run
        self.place = os.getcwd()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Runs until no part is left to claim."""
        os.chdir(self.place)  # the inputs' paths are relative to it
        # One thread a worker: the parallelism is in the workers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            for counts in tokenize_parts(self.work, self.run_name, world_size):
                for key in ("documents", "tokens", "text_bytes", "empty"):
                    self.stat_update(key, value=counts[key])
        except Exception:
            # Without this part nothing comes of the run: the others need not go on.
            stop_run(self.work, self.run_name)
            raise
        return None


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on the standard pool, which reports a killed worker;
    the pool it uses by default waits for it for ever."""

    def run(self) -> PipelineStats:
        """Runs all tasks.

        Raises: ValueError if a worker was killed.
        """
        context = get_context("spawn")
        with ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_end_with_parent
        ) as pool:
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


def _end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, killed or not.

    Left alone, the pool's workers would wait for a next task for ever.
    """
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


def run_ray(work: Path, run: str, workers: int) -> None:
    """Runs the workers on the Ray cluster of RAY_ADDRESS, or on a local one."""
    try:
        import ray  # type: ignore[reportMissingImports]
        from datatrove.executor import RayPipelineExecutor
    except ImportError:
        raise ValueError(
            "--executor ray needs Ray: pip install ray, or use --executor local"
        ) from None
    logger.disable("datatrove")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    RayPipelineExecutor(
        pipeline=[TokenizeParts(work.absolute(), run)],
        tasks=workers,
        workers=workers,
        logging_dir=str((work / "logs" / run).absolute()),
        skip_completed=False,
    ).run()


def submit_slurm(
    work: Path, run: str, job: SlurmJob, *, logs: Path, dry_run: bool
) -> list[str]:
    """Submits the workers as an array job, and after them a job that merges.

    With dry_run nothing is submitted or written. Gives the two scripts.
    Raises: ValueError if there is no sbatch, or it fails.
    """
    if not dry_run and shutil.which("sbatch") is None:
        raise ValueError(
            "--executor slurm needs the command sbatch, which is not here: run it on a "
            "login node, or look at the job with --dry-run"
        )
    logger.disable("datatrove")
    programs = shlex.quote(str(Path(sys.executable).parent))
    workers = _ArrayJob(
        pipeline=[TokenizeParts(work.absolute(), run)],
        tasks=job.tasks,
        time=job.time,
        partition=job.partition,
        mem_per_cpu_gb=job.memory_gb,
        job_name="prepare-data",
        qos="",
        env_command=f"export PATH={programs}:$PATH",
        logging_dir=str(logs.absolute()),
        slurm_logs_folder=str(logs.absolute()),
        max_array_size=-1,
        skip_completed=False,
    )
    command = shlex.join([sys.executable, *job.finish])
    if dry_run:
        task = f"srun -l -n 1 launch_pickled_pipeline {logs.absolute()}/executor.pik"
        array = workers.get_launch_file_contents(workers.arguments(job.tasks), task)
        return [array, workers.get_launch_file_contents(workers.arguments(), command)]
    finish = workers.get_launch_file_contents(workers.arguments(), command)
    logs.mkdir(parents=True, exist_ok=True)
    try:
        workers.launch_job()
        # After any end: the merging run does what the tasks left over.
        after = f"--dependency=afterany:{workers.job_id}"
        launch_slurm_job(finish, workers.job_id_retriever, after)
    except (subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(f"sbatch failed: {error}") from None
    return [(logs / "launch_script.slurm").read_text(), finish]


class _ArrayJob(SlurmPipelineExecutor):
    """datatrove's Slurm executor without its own job that adds up statistics."""

    def launch_merge_stats(self) -> None:
        pass

    def arguments(self, tasks: int = 0) -> dict:
        """The options of sbatch; a job without an array if tasks is 0."""
        options = self.get_sbatch_args(max(tasks, 1))
        if not tasks:
            del options["array"]
        return options

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """The options of sbatch; unlike datatrove's own, without making a folder."""
        output = f"{self.slurm_logs_folder}/%A_%a.out"
        options = {
            "job-name": self.job_name,
            "partition": self.partition,
            "time": self.time,
            "cpus-per-task": self.cpus_per_task,
            "mem-per-cpu": f"{self.mem_per_cpu_gb}G",
            "array": f"0-{max_array - 1}",
            "output": output,
            "error": output,
            "requeue": "",
        }
        return options
