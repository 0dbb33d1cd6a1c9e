"""The weighted mean of checkpoints, θ̄ = Σ w_k θ_k, rounded once: blocks of `sums` over whole files.

    base, *groups = align(base_folder, group_folders)
    average = Average(base, groups, fractions)
    for name, pieces in average.stream({"model.norm.weight": "BF16", ...}):
        writer.write(name, pieces)

Files are mapped and read ahead; later parts are computed while earlier ones are written. Memory is a few blocks.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from merit_hf import sums
from merit_hf.align import FLOATS, Checkpoint
from merit_hf.checkpoint import ITEM_SIZES
from merit_hf.errors import MeritError
from merit_hf.ordered import can_fork, in_processes, in_threads

_CHUNK = 1 << 20  # elements that are computed and written at a time
_MAX_WORKERS = 8
_WORTH_PROCESSES = 1 << 25  # elements of all checkpoints


@dataclass(frozen=True)
class _Chunk:
    """Consecutive elements of a tensor, and the dtype they are written in."""

    name: str
    start: int
    stop: int
    dtype: str


class Average:
    """Σ w_k θ_k over aligned checkpoints, and how far everything moved.

    Args:
        base ([`Checkpoint`]): θ0, what displacements are measured from.
        groups (`Sequence[Checkpoint]`): θ_k.
        fractions (`Sequence[float]`): w_k, summing to 1. Where θ0 is among the groups, its own may be negative.
        result ([`Checkpoint`], *optional*): a merged model that takes the place of the mean.
        device (`str`, *optional*, defaults to `"cpu"`): where the sums are made; needs float64.
        workers (`int`, *optional*): chunks in work at once. Default: one a core, 8 at most.
        processes (`bool`, *optional*): whether workers are processes rather than threads. Default: where they can be,
            and there is enough to do.

    Attributes:
        squares (`dict[str, float]`), group_squares (`list[float]`): ‖θ̄ − θ0‖² and ‖written − θ̄‖²; ‖θ_k − θ0‖².
            The same for any number of workers.
    """

    def __init__(
        self,
        base: Checkpoint,
        groups: Sequence[Checkpoint],
        fractions: Sequence[float],
        result: Checkpoint | None = None,
        device: str = "cpu",
        workers: int | None = None,
        processes: bool | None = None,
    ) -> None:
        self._base, self._groups, self._result = base, groups, result
        self._checkpoints = [base, *groups, *([result] if result else [])]
        self._fractions, self._device = list(fractions), device
        self._local = threading.local()
        self._workers = workers or min(_num_cores(), _MAX_WORKERS)
        # torch, which devices and adapters need, does not survive a fork.
        whole = device == "cpu" and all(type(checkpoint) is Checkpoint for checkpoint in self._checkpoints)
        elements = sum(info.num_elements for info in base.tensors.values()) * len(self._checkpoints)
        worth = self._workers > 1 and elements >= _WORTH_PROCESSES
        self._processes = can_fork() and whole and (worth if processes is None else processes)
        self._chunks: list[_Chunk] = []
        self.squares = {"displacement": 0.0, "cast": 0.0}
        self.group_squares = [0.0] * len(groups)

    def stream(self, dtypes: Mapping[str, str]) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Name and bytes, in pieces, of every merged tensor, in the order of `dtypes`.

        A piece holds until the next one is asked for.

        Args:
            dtypes (`Mapping[str, str]`): what a floating tensor is cast to, once: `F32`, …; others keep their own.

        Raises:
            MeritError: a checkpoint holds a non-finite value, the mean exceeds the range of its dtype, or an integer
                or boolean tensor is not the base's.
        """
        self._chunks = [
            _Chunk(name, start, min(start + _CHUNK, self._base.tensors[name].num_elements), dtype)
            for name, dtype in dtypes.items()
            for start in range(0, max(1, self._base.tensors[name].num_elements), _CHUNK)
        ]
        with closing(self._in_order()) as done:
            for name, pieces in itertools.groupby(done, key=lambda piece: piece[0]):
                yield name, (data for _, data in pieces)

    def _in_order(self) -> Generator[tuple[str, memoryview], None, None]:
        count, room = len(self._chunks), _CHUNK * max(ITEM_SIZES.values())
        if self._processes:
            results = in_processes(self._workers, count, self._work, room)
        else:
            results = in_threads(self._workers, count, self._work, room, _one_thread_each)
        with closing(results):
            for chunk, (data, squares) in zip(self._chunks, results, strict=True):
                displacement, cast, *groups = squares
                self.squares["displacement"] += displacement
                self.squares["cast"] += cast
                self.group_squares = [a + b for a, b in zip(self.group_squares, groups, strict=True)]
                yield chunk.name, data

    def _work(self, number: int, out: memoryview) -> tuple[int, list[float]]:
        """Compute a chunk into `out`: its bytes, and [‖θ̄ − θ0‖², ‖written − θ̄‖², ‖θ_k − θ0‖² …] over it."""
        chunk, info = self._chunks[number], self._base.tensors[self._chunks[number].name]
        for later in self._chunks[number + 2 * self._workers : number + 2 * self._workers + 1]:
            for checkpoint in self._checkpoints:
                checkpoint.read_ahead(later.name, later.start, later.stop)
        adds = info.dtype in FLOATS
        read: list[Any] = [
            checkpoint.stored(chunk.name) if self._device == "cpu" or not adds else checkpoint.flat(chunk.name)
            for checkpoint in self._checkpoints
        ]
        if not adds:
            return self._same(chunk, [values[chunk.start : chunk.stop] for values in read], out)
        size = ITEM_SIZES[chunk.dtype]
        merged = np.frombuffer(out, dtype=np.uint8)[: (chunk.stop - chunk.start) * size]
        origin, *parts = [values[chunk.start : chunk.stop] for values in read]
        result = parts.pop() if self._result else None
        squares = self._sums()(origin, parts, result, chunk.dtype, merged)
        if not math.isfinite(sum(squares)):
            self._refuse_non_finite(chunk, origin, parts, result, merged)
        return len(merged), squares

    def _sums(self) -> Any:
        """This thread's own."""
        kept = getattr(self._local, "sums", None)
        if kept is None and self._device == "cpu":
            kept = sums.Sums(self._fractions)
        elif kept is None:
            from merit_hf.device_sums import DeviceSums

            kept = DeviceSums(self._device, self._fractions)
        self._local.sums = kept
        return kept

    def _same(self, chunk: _Chunk, values: Sequence[np.ndarray], out: memoryview) -> tuple[int, list[float]]:
        """There is nothing to add up in integers."""
        origin, *parts = values
        for group, part in zip(self._groups, parts, strict=False):
            if not np.array_equal(origin, part):
                raise MeritError(
                    f"{group.folder}: tensor `{chunk.name}` ({self._base.tensors[chunk.name].dtype}) differs from the "
                    "base's, and integers cannot be averaged. Every checkpoint must hold the base's values."
                )
        out[: origin.nbytes] = origin.view(np.uint8).data
        return origin.nbytes, [0.0] * (2 + len(self._groups))

    def _refuse_non_finite(
        self, chunk: _Chunk, origin: Any, parts: Sequence[Any], result: Any, written: np.ndarray
    ) -> None:
        """Name what is not finite; squares that overflow by themselves pass."""
        to_float64: Callable[[Any], np.ndarray] = self._sums().to_float64
        for checkpoint, part in zip((self._base, *self._groups), (origin, *parts), strict=True):
            bad = np.flatnonzero(~np.isfinite(to_float64(part)))
            if len(bad):
                raise MeritError(
                    f"{checkpoint.folder}: tensor `{chunk.name}` is not finite (NaN or infinity) at flat index "
                    f"{chunk.start + int(bad[0])}. Make it again (a lower learning rate helps), or merge without it."
                )
        if result is not None and not np.isfinite(to_float64(result)).all():
            raise MeritError(
                f"engine mergekit made tensor `{chunk.name}` not finite (NaN or infinity), of checkpoints that are. "
                "Change merge.parameters, or merge with engine safetensors."
            )
        if not np.isfinite(sums.Sums.to_float64(written.view(sums.ARRAYS[chunk.dtype]))).all():
            raise MeritError(
                f"tensor `{chunk.name}`: the merged values exceed the range of {FLOATS[chunk.dtype]}. "
                "Set out_dtype to bfloat16 or float32."
            )


def _num_cores() -> int:
    """The cores that this process may use; as everywhere in this ecosystem, OMP_NUM_THREADS says how many to take."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread_each() -> None:
    """Chunks are spread over threads: torch, where an adapter or a device brings it, must not spread each again."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
