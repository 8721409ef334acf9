"""Signals: the first asks, another one ends, and who repeats itself is not two."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxllm.train.stop import SIGNALS, Stop


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "nothing happened for 10 s"
        time.sleep(0.005)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_nothing_else_happens(number, capfd):
    with Stop() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        wait_until(stop.reached)
    name = signal.Signals(number).name
    assert capfd.readouterr().err.startswith(f"{name}: finishing the step")


def test_handlers_are_put_back():
    # A shell starts what is in its background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = set(threading.enumerate())
    for _ in range(3):
        with Stop():
            assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert set(threading.enumerate()) <= threads
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_signals_are_left_alone():
    seen = []
    earlier = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: seen)
            assert not stop.reached()
    finally:
        signal.signal(signal.SIGUSR1, earlier)


def test_a_thread_may_use_it_without_signals():
    results = []

    def work():
        with Stop() as stop:
            results.append(stop.reached())
            stop.request()
            results.append(stop.reached())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False, True]


CHILD = """
import os, signal, sys, time
from jaxllm.train.stop import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.reached():
        time.sleep(0.01)
    print("asked", flush=True)
    {after}
print("end", flush=True)
"""


def child(after: str, stderr: int = subprocess.PIPE) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(after=after)],
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_though_it_computes(number):
    # In one long call outside Python, where no handler written in Python can run.
    process = child("__import__('ctypes').CDLL(None).sleep(60)")
    assert process.stdout is not None
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 5
    assert "end" not in out and "SIGTERM again: stopping at once" in err


def test_signals_count_though_nobody_reads_what_they_say():
    heard, said = os.pipe()
    os.close(heard)
    process = child("time.sleep(60)", stderr=said)
    os.close(said)
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_same_request_twice_at_once_is_one_request():
    """As timeout(1) sends it: to the process, then to its whole group."""
    process = child("time.sleep(0.5)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "asked\nend\n")
