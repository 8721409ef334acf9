"""Memory kept from step to step, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

# Allocates, fills and frees 256 MB some times, in a thread as JAX does, and says how
# many pages each time faulted in, and how much was held after it.
PROGRAM = """
import json, resource, threading
from jaxllm.train import allocator
{before}
import numpy as np
faults, held = [], []
def work():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(64 << 20, np.float32).sum()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        held.append(allocator.resident_bytes())
        {between}
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps({{"kept": kept, "faults": faults, "held": held}}))
"""
ARRAY_BYTES = 256 << 20


@pytest.fixture
def perform():
    def run(before="kept = allocator.keep_memory()", between="pass", **environment):
        clean = {
            name: value
            for name, value in os.environ.items()
            if name != "GLIBC_TUNABLES" and not name.startswith("MALLOC_")
        }
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(before=before, between=between)],
            env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip
        return json.loads(out)

    return run


def test_what_is_freed_is_there_for_the_next_time(perform):
    plain = perform(before="kept = False")
    kept = perform()
    assert not plain["kept"] and kept["kept"]
    # In huge pages, or small ones where the system has none.
    assert min(plain["faults"][1:]) >= ARRAY_BYTES >> 21
    assert max(kept["faults"][1:]) < 16
    assert plain["held"][-1] < ARRAY_BYTES < kept["held"][-1]


LARGE = """kept = allocator.keep_memory()
allocator.memory_bytes = lambda: 3 * ({mb} << 20)"""


def test_a_large_process_gives_back_what_is_free(perform):
    large = perform(before=LARGE.format(mb=200), between="allocator.tend()")
    assert min(large["faults"][1:]) >= ARRAY_BYTES >> 21
    assert large["kept"] and large["held"][0] > ARRAY_BYTES


def test_what_is_held_shrinks_then(perform):
    after = "allocator.tend(); held[-1] = allocator.resident_bytes()"
    large = perform(before=LARGE.format(mb=200), between=after)
    assert max(large["held"]) < ARRAY_BYTES


def test_a_process_that_needs_more_no_longer_keeps_it(perform):
    """200 MB stay in use, more than a third: all is as if never kept."""
    before = LARGE.format(mb=90) + "\nimport numpy\nneeded = numpy.ones(200 << 17)"
    large = perform(before=before, between="allocator.tend()")
    assert min(large["faults"][1:]) >= ARRAY_BYTES >> 21
    assert large["held"][-1] < ARRAY_BYTES + (150 << 20)


def test_a_small_one_keeps_it_while_it_steps(perform):
    small = perform(between="allocator.tend()")
    assert max(small["faults"][1:]) < 16


def test_no_memory_is_promised_where_promises_count(perform, tmp_path):
    from jaxllm.train import allocator

    spaces = {}
    for mode in ("0", "2"):
        (tmp_path / mode).write_text(mode)
        out = perform(
            before="from pathlib import Path\n"
            f"allocator.OVERCOMMIT = Path({str(tmp_path / mode)!r})\n"
            "kept = allocator.keep_memory()",
            between='held[-1] = int(open("/proc/self/statm").read().split()[0]) << 12',
        )
        assert out["kept"] and max(out["faults"][1:]) < 16
        spaces[mode] = max(out["held"])
    assert spaces["0"] - spaces["2"] > 0.4 * allocator.memory_bytes()


@pytest.mark.parametrize(
    "environment",
    [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"MALLOC_ARENA_MAX": "4"}],
)
def test_who_tunes_malloc_is_left_alone(perform, environment):
    assert not perform(**environment)["kept"]


def test_a_process_for_a_gpu_is_left_alone(monkeypatch, tmp_path):
    from jaxllm.train import allocator, gpus

    monkeypatch.setattr(gpus, "DEV", tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not allocator.keep_memory({})


def test_memory_is_no_more_than_the_machine_has():
    from jaxllm.train import allocator

    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < allocator.resident_bytes() < allocator.memory_bytes() <= machine
