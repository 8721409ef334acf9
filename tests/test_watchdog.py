"""A hang is noticed, described once, and only a hang."""

import subprocess
import sys
import threading

import pytest

from jaxllm.train.watchdog import EXIT_CODE, Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watched(tmp_path):
    """A watchdog on a clock of ours, without its thread, and what it says."""
    clock, said = Clock(), []
    dog = Watchdog(
        factor=10,
        least_s=5,
        report=tmp_path / "stacks.txt",
        say=said.append,
        clock=clock,
    )
    return dog, clock, said


def step(dog: Watchdog, clock: Clock, number: int, seconds: float) -> None:
    dog.beat(number)
    clock.now += seconds


def test_a_step_beyond_the_usual_is_reported_once_with_all_stacks(watched):
    dog, clock, said = watched
    for number in range(5):
        step(dog, clock, number, 1.0)
    step(dog, clock, 5, 10.0)
    assert not dog.check()  # ten times the usual, not more
    clock.now += 0.5
    parked = threading.Event()
    thread = threading.Thread(target=parked.wait, name="parked")
    thread.start()
    assert dog.check() and not dog.check()
    parked.set()
    thread.join()
    assert len(said) == 1
    assert "heard for 10.5 s (usually 1.00 s) since step 5 ended" in said[0]
    stacks = dog.report.read_text()
    assert stacks.count("most recent call first") >= 2 and "test_watchdog.py" in stacks


def test_compiling_is_not_a_hang_and_a_first_step_that_never_ends_is(watched):
    dog, clock, said = watched
    clock.now += 1000.0
    assert not dog.check()  # nothing has begun
    with dog.paused("the start"):
        pass
    clock.now += 29.0
    assert not dog.check()
    step(dog, clock, 0, 1.0)
    step(dog, clock, 1, 29.0)
    assert not dog.check()
    clock.now += 2.0
    assert said == [] and dog.check()
    assert "for 31.0 s (usually 15.00 s) since step 1 ended" in said[0]


def test_fast_steps_may_still_take_the_least_time(watched):
    dog, clock, said = watched
    for number in range(9):
        step(dog, clock, number, 0.01)
    step(dog, clock, 9, 4.9)
    assert not dog.check()
    clock.now += 0.2
    assert dog.check()


def test_evaluations_do_not_count(watched):
    dog, clock, said = watched
    for number in range(5):
        step(dog, clock, number, 1.0)
    with dog.paused():
        clock.now += 29
        assert not dog.check()
    assert not dog.check()
    assert dog.limit_s() == 10.0
    clock.now += 11
    assert dog.check()


def test_a_save_that_never_ends_is_a_hang(watched):
    dog, clock, said = watched
    dog.on_hang = lambda *seen: said.append(seen)
    dog.beat(7)
    with dog.paused("a save"):
        clock.now += 30.5
        assert dog.check() and not dog.check()
    assert "for 30.5 s from a save, since step 7 ended" in said[0]
    assert said[1] == (7, 30.5)


def test_one_slow_step_does_not_raise_the_bound(watched):
    dog, clock, said = watched
    for number in range(5):
        step(dog, clock, number, 1.0)
    step(dog, clock, 5, 500.0)
    step(dog, clock, 6, 1.0)
    assert dog.limit_s() == 10.0


def test_zero_watches_nothing():
    with Watchdog(least_s=0) as dog:
        assert dog._thread is None


def test_it_can_end_a_hung_process():
    program = """
import time
from jaxllm.train.watchdog import Watchdog
with Watchdog(factor=2, least_s=0.2, exit_when_hung=True) as dog:
    for step in range(6):
        dog.beat(step)
        time.sleep(0.01)
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_CODE
    assert "since step 5 ended" in done.stderr
    assert "most recent call first" in done.stderr  # the stacks themselves
