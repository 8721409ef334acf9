"""Several processes as one run: who this one is, and how none waits for a dead one.

Launchers (Slurm, Open MPI, Kubernetes, Kubeflow, Ray) start the same command many times
and say in the environment which start is which. JAX reads some of them by itself;
`find` adds what it gets wrong or does not know.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxllm.parallel import DistributedConfig
from jaxllm.train.gpus import count_gpus
from jaxllm.train.processes import one_line

FAILED = "jaxllm/failed"
"""Key under which the first process that fails tells the others."""
DEAD_PEER = 75
"""EX_TEMPFAIL of sysexits.h: start all processes again, and the run goes on."""
_FAILED = re.compile("(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|INTERNAL|DATA_LOSS): ")


@dataclass(frozen=True)
class Place:
    """What jax.distributed.initialize is told; None is left to JAX's own detection."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_devices: list[int] | None

    @property
    def essentials(self) -> tuple[str | None, int | None, int | None]:
        return self.coordinator, self.num_processes, self.process_id


def find(
    given: DistributedConfig, env: Mapping[str, str], *, n_gpus: int | None = None
) -> Place | None:
    """Finds this process's place; None where it is the only one.

    Of each value the flag counts first, then JAX_COORDINATOR_ADDRESS and kin (which
    Kubeflow and Ray set), then what the launcher set. `n_gpus` is how many this process
    could use, counted here unless it is given.

    Raises: ValueError naming what is missing.
    """
    n_gpus = count_gpus(env) if n_gpus is None else n_gpus
    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS"}
    coordinator = given.coordinator or env.get("JAX_COORDINATOR_ADDRESS") or None
    count = given.num_processes or _int(env, "JAX_NUM_PROCESSES")
    index = given.process_id if given.process_id >= 0 else _int(env, "JAX_PROCESS_ID")
    devices, launcher = None, ""
    if "OMPI_COMM_WORLD_SIZE" in env:
        # Before Slurm, as in JAX: on the nodes of an allocation mpirun starts its own
        # daemons by srun, and the step that these processes see is the daemons'.
        launcher = "Open MPI"
        count = count or _int(env, "OMPI_COMM_WORLD_SIZE")
        index = _or(index, _int(env, "OMPI_COMM_WORLD_RANK"))
        alone = _int(env, "OMPI_COMM_WORLD_LOCAL_SIZE") == 1
        devices = _devices(n_gpus, alone, _int(env, "OMPI_COMM_WORLD_LOCAL_RANK"))
    elif slurm <= set(env):
        launcher = "Slurm"
        # The step's own number: in a shell inside an allocation SLURM_NTASKS is the
        # allocation's, though one process runs.
        tasks = _int(env, "SLURM_STEP_NUM_TASKS") or _int(env, "SLURM_NTASKS")
        nodes = _int(env, "SLURM_STEP_NUM_NODES") or 1
        count, index = count or tasks, _or(index, _int(env, "SLURM_PROCID"))
        devices = _devices(n_gpus, tasks == nodes, _int(env, "SLURM_LOCALID"))
    elif "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        launcher = "Kubernetes"
        index = _or(index, _int(env, "JOB_COMPLETION_INDEX"))
    if count == 1 or (not launcher and count is None and coordinator is None):
        return None
    # JAX asks these three for what is not given; Open MPI 5 no longer says it.
    known = (
        launcher == "Slurm"
        or (launcher == "Open MPI" and "OMPI_MCA_orte_hnp_uri" in env)
        or (launcher == "Kubernetes" and _can_ask_kubernetes())
    )
    missing = [
        flag
        for flag, value in (
            ("--distributed.coordinator HOST:PORT", coordinator),
            ("--distributed.num-processes N", count),
            ("--distributed.process-id I", index),
        )
        if value is None
    ]
    if missing and not known:
        also = " (or --distributed.num-processes 1 for a process of its own)"
        raise ValueError(
            f"this is one of several processes{f' of {launcher}' * bool(launcher)}, "
            f"and {' and '.join(missing)} cannot be found out here: give it"
            f"{also if launcher else ''}"
        )
    return Place(coordinator, count, index, devices)


def _devices(n_gpus: int, alone: bool, local: int | None) -> list[int] | None:
    """The GPUs of a process: all that it sees if it is alone on its node, or if the
    launcher shows it one; else the one of its number on the node."""
    if n_gpus and (alone or n_gpus == 1):
        return list(range(n_gpus))
    return None if local is None else [local]


def _can_ask_kubernetes() -> bool:
    try:
        import kubernetes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return True


def _int(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "")
    return int(value) if value.isdigit() else None


def _or(value: int | None, other: int | None) -> int | None:
    return other if value is None else value


class Peers:
    """The other processes of a run: told of an error here, listened to for one there.

    Within the context of `joined`. Nobody waits in a collective for a process that has
    failed: it says why through the coordinator, and all end, with its exit code.
    """

    def __init__(self, client: Any = None):
        self.before_leaving: Callable[[], None] = lambda: None
        """What is worth finishing before the process ends: a save under way."""
        self._client = client
        self._ended = False
        self._leaving = threading.Lock()

    def listen(self) -> None:
        """Starts to listen, on a thread of its own."""
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def end(self) -> None:
        """Listens no longer: from now on processes may go."""
        self._ended = True

    def fail(self, error: BaseException) -> None:
        """Says what went wrong, here and to the others, and ends the process at once.

        Not by an exception: JAX's own clean-up would wait for all others, who may wait
        for this one.
        """
        with self._leaving:
            self._ended = True
            code, text = _verdict(error)
            self.before_leaving()
            me = jax.process_index()
            told = {"process": me, "text": text, "code": code}
            with contextlib.suppress(Exception):  # the coordinator may be what is dead
                self._client.key_value_set(FAILED, json.dumps(told))
            with contextlib.suppress(Exception):
                told = json.loads(self._client.blocking_key_value_get(FAILED, 1000))
            if told["process"] == me and not isinstance(error, (ValueError, OSError)):
                traceback.print_exception(error)
            self._exit(told)

    def _listen(self) -> None:
        while not self._ended:
            try:
                told = json.loads(self._client.blocking_key_value_get(FAILED, 10_000))
            except Exception as error:
                if "DEADLINE" in str(error) or self._ended:
                    continue
                return  # no coordinator: JAX ends the process, and says so
            with self._leaving:
                self.before_leaving()
                self._exit(told)

    def _exit(self, told: dict[str, Any]) -> None:
        me = jax.process_index()
        who = "" if told["process"] == me else f"process {told['process']} failed: "
        with contextlib.suppress(OSError):  # nobody has to listen
            print(f"error: {who}{told['text']}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if me == 0:
            time.sleep(2.0)  # the coordinator lives here: the others are still asking
        os._exit(told["code"])


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and its text."""
    # Where the figures of a step are read, JAX makes a ValueError of a failed one.
    if isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and _FAILED.match(str(error))
    ):
        return DEAD_PEER, (
            "a collective failed, most likely because another process has died: start "
            f"all of them again to continue ({one_line(error)})"
        )
    if isinstance(error, (ValueError, OSError)):
        return getattr(error, "exit_code", 2), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, f"{type(error).__name__}: {one_line(error)}"


@contextlib.contextmanager
def joined(given: DistributedConfig) -> Iterator[Peers]:
    """Makes this process one of its run's; must be entered before any device is used.

    An error within ends the process, and the others. Where this process is the only
    one, does nothing.

    Raises: ValueError when the processes do not find one another.
    """
    if jax.distributed.is_initialized():  # by the launcher, who ends it too
        place = None
    elif (place := find(given, os.environ)) is None:
        yield Peers()
        return
    else:
        _initialize(place, given)
    from jax._src.distributed import global_state  # as Orbax does: there is no other

    peers = Peers(global_state.client)
    peers.listen()
    try:
        yield peers
    except BaseException as error:
        peers.fail(error)
    peers.end()
    if place is not None:
        jax.distributed.shutdown()


def _initialize(place: Place, given: DistributedConfig) -> None:
    # Its handler would swallow SIGTERM until the run listens for it (see stop.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            place.local_devices,
            # What is known here, JAX need not ask a launcher for.
            None if None in place.essentials else "deactivate",
            initialization_timeout=given.start_timeout_s,
            heartbeat_timeout_seconds=given.heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"process {place.process_id} of {place.num_processes} did not meet the "
            f"others at {place.coordinator or 'the address of process 0'} within "
            f"{given.start_timeout_s} s: {one_line(error)}; check that all were "
            f"started and that the address can be reached"
        ) from None
