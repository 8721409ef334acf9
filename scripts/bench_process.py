"""The processes that the benchmark drives, and the environment they run in."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from bench_common import MARK  # isort: skip
from bench_record import nvidia_smi  # isort: skip
from jaxllm.train.gpus import count_gpus, has_gpu  # isort: skip

HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """A worker that gave an error, died, or was too slow; the text says which."""


class Worker:
    """A process of bench_ours.py, bench_torch.py or one of the probes."""

    def __init__(self, script: str, spec: dict[str, Any], env: dict[str, str]):
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
            text=True, env=env, cwd=HERE,
        )  # fmt: skip
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.answers.put(json.loads(line.removeprefix(MARK)))
        self.answers.put(None)

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next answer; None at the end.

        Raises: Failed if none comes in time, or the process broke down.
        """
        try:
            answer = self.answers.get(timeout=max(timeout_s, 0.1))
        except queue.Empty:
            raise Failed(f"nothing within {timeout_s:.0f} s") from None
        if answer is None and self.process.wait(30) != 0:
            self.stderr.seek(0)
            last = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise Failed(f"exit code {self.process.returncode}: {last[:300]}")
        return answer

    def ask(self, do: str, timeout_s: float = 600, **arguments: Any) -> dict[str, Any]:
        """Gives a command and waits for its answer.

        Raises: Failed with the error that is the answer.
        """
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died, and hear says of what
        answer = self.hear(timeout_s)
        if answer is None or "error" in answer:
            raise Failed(answer["error"] if answer else "the process ended")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            if stream:
                stream.close()


def gpu_to_use() -> bool:
    """Whether there is an NVIDIA GPU to be used; the driver is asked where there are no
    device files (WSL)."""
    if has_gpu():
        return True
    may = count_gpus({"CUDA_VISIBLE_DEVICES": "0", **os.environ}) > 0
    return may and nvidia_smi("name") is not None


def environment(gpu: bool, caches: Path) -> dict[str, str]:
    """The workers' environment: one GPU or none, and caches that begin empty."""
    env = dict(os.environ)
    env["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
    env["TRITON_CACHE_DIR"] = str(caches / "triton")
    if gpu:
        visible = env.get("CUDA_VISIBLE_DEVICES", "0")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["JAX_PLATFORMS"] = "cpu"
    return env
