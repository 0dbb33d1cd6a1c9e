"""Tasks in threads and in forked processes: results in order, the first error, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from merit_hf.errors import MeritError
from merit_hf.ordered import can_fork, in_processes, in_threads

needs_fork = pytest.mark.skipif(not can_fork(), reason="only Linux forks")


def square(number: int, out: memoryview) -> tuple[int, int]:
    time.sleep(0.002 * (number % 3))  # so that they do not end in the order they began
    out[: number % 5] = bytes([number]) * (number % 5)
    return number % 5, number**2


def fail(number: int, out: memoryview) -> tuple[int, int]:
    if number in (7, 8):
        raise MeritError(f"number {number}")
    return square(number, out)


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@needs_fork
@pytest.mark.parametrize("run", [in_threads, in_processes])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_the_first_error_is_raised(run, workers: int) -> None:
    before = children()
    for count in (0, 1, 3, 23):
        found = [(bytes(data), value) for data, value in run(workers, count, square, 8)]
        assert found == [(bytes([n]) * (n % 5), n**2) for n in range(count)]
    done = []
    with pytest.raises(MeritError, match="number 7"):
        done.extend(value for _, value in run(workers, 23, fail, 8))
    assert children() <= before


@needs_fork
def test_a_process_that_is_ended_is_told_and_the_others_end() -> None:
    before = children()
    results = in_processes(2, 100, square, 8)
    next(results)
    os.kill(min(children() - before), signal.SIGKILL)
    with pytest.raises(MeritError, match="a process of the merge was ended from outside"):
        list(results)
    assert children() <= before


KILLED = """
import os, signal, sys
from merit_hf.ordered import in_processes
results = in_processes(2, 1000, lambda number, out: (1, os.getpid()), 8)
pids = {next(results)[1] for _ in range(2)}
sys.stdout.write(" ".join(map(str, pids)))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_fork
def test_processes_end_with_a_killed_parent() -> None:
    # They hold the other end of the pipe: it is at its end when they are gone.
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(killed.stdout.split()) == 2
