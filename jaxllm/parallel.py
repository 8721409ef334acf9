"""How a run is spread: over the devices of a mesh, and over processes."""

import re
from dataclasses import dataclass

from jaxllm.fields import require_int


@dataclass(frozen=True)
class ParallelConfig:
    """The device mesh. -1 means all devices the other axes leave over."""

    data: int = -1
    """Devices along the batch, each with a full copy of the weights."""
    fsdp: int = 1
    """Devices along the batch that also share out the weights."""
    tensor: int = 1
    """Devices that share the heads and the feed-forward width of each layer."""

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            if value != -1:
                require_int(f"parallel.{name}", value, at_least=1)
        rest = [n for n in ("data", "fsdp", "tensor") if getattr(self, n) == -1]
        if len(rest) > 1:
            raise ValueError(
                f"parallel.{rest[0]}=-1 and parallel.{rest[1]}=-1 cannot both be what "
                f"the other axes leave over: give --parallel.{rest[0]} 1"
            )


@dataclass(frozen=True)
class DistributedConfig:
    """Which of several processes this one is. Under Slurm, Open MPI and Kubernetes, or
    with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the
    environment, nothing needs to be given."""

    coordinator: str = ""
    """HOST:PORT that process 0 listens on and all others reach; the same on each."""
    num_processes: int = 0
    """Processes of the run; 0 asks the launcher, and is one where there is none."""
    process_id: int = -1
    """Number of this process, from 0; -1 asks the launcher."""
    start_timeout_s: int = 300
    """Seconds that the processes wait for one another to start."""
    heartbeat_s: int = 100
    """Seconds without a sign of life after which a process counts as dead, and the
    others end."""

    def __post_init__(self):
        require_int("distributed.num_processes", self.num_processes, at_least=0)
        require_int("distributed.process_id", self.process_id, at_least=-1)
        require_int("distributed.start_timeout_s", self.start_timeout_s, at_least=1)
        require_int("distributed.heartbeat_s", self.heartbeat_s, at_least=1)
        if self.coordinator and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ValueError(
                f"distributed.coordinator={self.coordinator!r} must be HOST:PORT, such "
                f"as node1:55527"
            )
        if self.num_processes and self.process_id >= self.num_processes:
            raise ValueError(
                f"distributed.process_id={self.process_id} must be below "
                f"distributed.num_processes={self.num_processes}: they count from 0"
            )
