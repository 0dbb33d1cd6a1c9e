"""Cells side by side, each in a process with its share of the cores: a small model's steps leave most of them idle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from experiment import Cell
from stages import Row, Stages

from merit_hf.errors import MeritError
from merit_hf.quiet import quiet_libraries

_stages: Stages | None = None


def rows_of_cells(stages: Stages, wanted: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, list[Row]]]:
    """Cells as they are finished, and their rows; with one worker in their order, in this process.

    Raises:
        MeritError: as a cell does, when what is in work has ended, whose rows are lost; or a worker was ended.
    """
    if min(workers, len(wanted)) < 2:
        for cell in wanted:
            yield cell, stages.cell(cell)
        return
    import torch

    stages.share(wanted)
    given = (stages.experiment, stages.condition, stages.material, stages.folder)
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (given, threads)) as pool:
        futures = {pool.submit(_rows, cell): cell for cell in wanted}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise MeritError(
                "a worker was ended from outside, perhaps for want of memory. Run it again, with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(given: tuple, threads: int) -> None:
    quiet_libraries()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    global _stages
    _stages = Stages(*given)


def _end_with_parent() -> None:
    """Nobody would take the rows."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _rows(cell: Cell) -> list[Row]:
    assert _stages is not None
    return _stages.cell(cell)
