"""Many tasks at once, their results in order: in threads, or in processes that share nothing but the results' memory.

    for piece, found in in_processes(2, len(tasks), work, room=1 << 20):     # work(number, out) → (size, found)
        file.write(piece)

Steps of a few microseconds, such as numpy's on blocks that fit a cache, make threads wait for Python's lock most of
the time; processes do not. They are forked, which takes a few milliseconds and no import.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from merit_hf.errors import MeritError

_T = TypeVar("_T")
# What a task does: number and memory for its result → bytes used of that, and whatever else it found.
Work = Callable[[int, memoryview], tuple[int, _T]]
_SLOTS = 2  # results of a process that wait to be taken


def can_fork() -> bool:
    """Whether processes can be forked without harm: macOS's own libraries do not survive it."""
    return sys.platform == "linux"


def in_threads(
    workers: int, count: int, work: Work[_T], room: int, start: Callable[[], None] | None = None
) -> Generator[tuple[memoryview, _T], None, None]:
    """Results 0 … count − 1; each result's memory holds until the next is asked for.

    Args:
        room (`int`): the most bytes of a result.
        start (`Callable`, *optional*): called in each thread first.
    """
    pending: deque[tuple[memoryview, Future[tuple[int, _T]]]] = deque()
    free: list[memoryview] = []
    with ThreadPoolExecutor(workers, initializer=start) as pool:
        try:
            for number in range(count + _SLOTS * workers):
                if number < count:
                    out = free.pop() if free else memoryview(bytearray(room))
                    pending.append((out, pool.submit(work, number, out)))
                if number >= min(count, _SLOTS * workers) and pending:
                    out, future = pending.popleft()
                    size, found = future.result()
                    yield out[:size], found
                    free.append(out)
        finally:
            for _, future in pending:
                future.cancel()


def in_processes(workers: int, count: int, work: Work[_T], room: int) -> Generator[tuple[memoryview, _T], None, None]:
    """[`in_threads`] in forked processes: `work` sees what this process held, and what it changes is lost.

    Raises:
        MeritError: a process was ended. What `work` raises is raised here, in the order of the tasks.
    """
    memory = [memoryview(mmap.mmap(-1, _SLOTS * room)) for _ in range(workers)]
    pipes: list[Connection] = []
    children: list[int] = []
    try:
        for index in range(workers):
            ours, theirs = Pipe()
            with warnings.catch_warnings():
                # Other threads hold no lock that `work` takes.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                _serve(theirs, [ours, *pipes], range(index, count, workers), work, memory[index])
            theirs.close()
            pipes.append(ours)
            children.append(child)
        for number in range(count):
            pipe, turn = pipes[number % workers], number // workers
            try:
                size, found = pipe.recv()
            except (EOFError, OSError):
                raise MeritError(
                    "a process of the merge was ended from outside: memory is short, or a file was cut meanwhile. "
                    "Run it again."
                ) from None
            if isinstance(found, BaseException):
                raise found
            begin = turn % _SLOTS * room
            yield memory[number % workers][begin : begin + size], found
            with contextlib.suppress(OSError):  # it has nothing left to do and is gone
                pipe.send(None)
    finally:
        for pipe in pipes:
            pipe.close()  # whoever waits for it ends
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _serve(pipe: Connection, others: list[Connection], numbers: range, work: Work[Any], memory: memoryview) -> None:
    """A forked process's whole life."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this one
        for other in others:
            other.close()  # or none would see that the parent is gone
        room = len(memory) // _SLOTS
        for turn, number in enumerate(numbers):
            if turn >= _SLOTS:
                pipe.recv()
            begin = turn % _SLOTS * room
            try:
                answer: tuple[int, Any] = work(number, memory[begin : begin + room])
            except Exception as error:
                answer = (0, error)
            pipe.send(answer)
    finally:
        os._exit(0)
