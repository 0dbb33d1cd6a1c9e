"""The weighted mean of checkpoints, θ̄ = Σ w_k θ_k: summed in float64, rounded once.

    base, *groups = align(base_folder, group_folders)
    average = Average(base, groups, fractions)
    for name, pieces in average.stream({"model.norm.weight": torch.bfloat16, ...}):
        writer.write(name, pieces)

Files are mapped and read ahead; threads compute blocks while earlier ones are written. Memory is a few blocks.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from merit_hf.align import Checkpoint, bits
from merit_hf.config import MeritError

_CPU_BLOCK = 1 << 18  # elements: in float64 they stay in the cache, and Python's own time for them does not matter
_DEVICE_BLOCK = 1 << 22
_AHEAD = 32  # blocks that are being read and computed while earlier ones are written
_MAX_THREADS = 8  # beyond, Python's lock is the limit
# The last bits (mask, value) of every float32 that lies on the middle of two neighbours in a 16-bit dtype.
_TAILS = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}


@dataclass(frozen=True)
class _Block:
    """Consecutive elements of one tensor in every checkpoint."""

    name: str
    start: int
    dtype: torch.dtype
    origin: torch.Tensor
    parts: list[torch.Tensor]
    result: torch.Tensor | None


@dataclass(frozen=True)
class _Written:
    """The merged elements of a block, and [‖θ̄ − θ0‖², ‖written − θ̄‖², ‖θ_k − θ0‖² …] over it."""

    name: str
    data: torch.Tensor
    squares: list[float]


class Average:
    """Σ w_k θ_k over aligned checkpoints, and how far everything moved.

    Args:
        base ([`Checkpoint`]): θ0, what displacements are measured from.
        groups (`Sequence[Checkpoint]`): θ_k.
        fractions (`Sequence[float]`): w_k, summing to 1. Where θ0 is among the groups, its own may be negative.
        result ([`Checkpoint`], *optional*): a merged model that takes the place of the mean.
        device (`str`, *optional*, defaults to `"cpu"`): where the sums are made; needs float64.
        threads (`int`, *optional*): blocks in work at once. Default: torch's number of threads, 8 at most.

    Attributes:
        squares (`dict[str, float]`), group_squares (`list[float]`): ‖θ̄ − θ0‖² and ‖written − θ̄‖²; ‖θ_k − θ0‖².
            The same for any number of threads.
    """

    def __init__(
        self,
        base: Checkpoint,
        groups: Sequence[Checkpoint],
        fractions: Sequence[float],
        result: Checkpoint | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self._base, self._groups, self._fractions, self._result = base, groups, fractions, result
        self._device = torch.device(device)
        self._local = threading.local()
        self._threads = threads or min(torch.get_num_threads(), _MAX_THREADS)
        self.squares = {"displacement": 0.0, "cast": 0.0}
        self.group_squares = [0.0] * len(groups)

    def stream(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Name and bytes, in pieces, of every merged tensor, in the order of `dtypes`.

        Args:
            dtypes (`Mapping[str, torch.dtype]`): what a floating tensor is cast to, once; others keep their own.

        Raises:
            MeritError: a checkpoint holds a non-finite value, the mean exceeds the range of its dtype, or an integer
                or boolean tensor is not the base's.
        """
        with closing(self._in_order(self._blocks(dtypes))) as done:
            for name, written in itertools.groupby(done, key=lambda block: block.name):
                yield name, (self._count(block) for block in written)

    def _blocks(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[_Block]:
        checkpoints = [self._base, *self._groups, *([self._result] if self._result else [])]
        size = _CPU_BLOCK if self._device.type == "cpu" else _DEVICE_BLOCK
        for name, dtype in dtypes.items():
            origin, *others = [checkpoint.flat(name) for checkpoint in checkpoints]
            # Integers are compared as a whole: there is nothing to add up.
            step = size if origin.is_floating_point() else max(1, origin.numel())
            for start in range(0, max(1, origin.numel()), step):
                for checkpoint in checkpoints:
                    checkpoint.read_ahead(name, start, start + step)
                parts = [other[start : start + step] for other in others]
                result = parts.pop() if self._result else None
                yield _Block(name, start, dtype, origin[start : start + step], parts, result)

    def _in_order(self, blocks: Iterator[_Block]) -> Generator[_Written, None, None]:
        """The blocks' results in order, with a few of the next in work."""
        pending: deque[Future[_Written]] = deque()
        threads_of_torch = torch.get_num_threads()
        # The blocks are spread over threads already; torch must not spread each operation on them once more.
        with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for block in blocks:
                    pending.append(pool.submit(self._work, block))
                    if len(pending) > _AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
                torch.set_num_threads(threads_of_torch)

    def _count(self, block: _Written) -> memoryview:
        displacement, cast, *groups = block.squares
        self.squares["displacement"] += displacement
        self.squares["cast"] += cast
        self.group_squares = [total + square for total, square in zip(self.group_squares, groups, strict=True)]
        return block.data.view(torch.uint8).numpy().data

    def _work(self, block: _Block) -> _Written:
        if not block.origin.is_floating_point():
            self._refuse_other_integers(block)
            return _Written(block.name, block.origin, [0.0] * (2 + len(self._groups)))
        origin, mean, part = self._buffers(block.origin.numel())
        origin.copy_(block.origin)
        moved = []
        for index, fraction in enumerate(self._fractions):
            part.copy_(block.parts[index])
            if index == 0:
                # Not 0 + w·x, which would turn −0 into 0: identical groups merge to their very bits.
                torch.mul(part, fraction, out=mean)
            else:
                mean.add_(part, alpha=fraction)
            moved.append(_square(part.sub_(origin)))
        if block.result is not None:
            mean.copy_(block.result)
        displacement = _square(torch.sub(mean, origin, out=part))
        cast = round_once(mean, block.dtype)
        squares = [displacement, _square(torch.sub(cast, mean, out=part)), *moved]
        written = cast.cpu()
        if not math.isfinite(sum(squares)):
            self._refuse_non_finite(block, written)
        return _Written(block.name, written, squares)

    def _buffers(self, size: int) -> torch.Tensor:
        """Three rows of float64 that a thread keeps: memory that is new for each block costs as much as the sums."""
        kept = getattr(self._local, "buffers", None)
        if kept is None or kept.shape[1] < size:
            kept = self._local.buffers = torch.empty(3, size, dtype=torch.float64, device=self._device)
        return kept[:, :size]

    def _refuse_other_integers(self, block: _Block) -> None:
        for group, part in zip(self._groups, block.parts, strict=True):
            if not torch.equal(bits(block.origin), bits(part)):
                raise MeritError(
                    f"{group.folder}: tensor `{block.name}` ({self._base.tensors[block.name].dtype}) differs from the "
                    "base's, and integers cannot be averaged. Every checkpoint must hold the base's values."
                )

    def _refuse_non_finite(self, block: _Block, written: torch.Tensor) -> None:
        """Name what is not finite in a block; squares that overflow by themselves pass."""
        for checkpoint, part in zip((self._base, *self._groups), (block.origin, *block.parts), strict=True):
            bad = (~torch.isfinite(part)).nonzero()
            if len(bad):
                raise MeritError(
                    f"{checkpoint.folder}: tensor `{block.name}` is not finite (NaN or infinity) at flat index "
                    f"{block.start + int(bad[0])}. Make it again (a lower learning rate helps), or merge without it."
                )
        if block.result is not None and not bool(torch.isfinite(block.result).all()):
            raise MeritError(
                f"engine mergekit made tensor `{block.name}` not finite (NaN or infinity), of checkpoints that are. "
                "Change merge.parameters, or merge with engine safetensors."
            )
        if not bool(torch.isfinite(written).all()):
            raise MeritError(
                f"tensor `{block.name}`: the merged values exceed the range of {dtype_name(block.dtype)}. "
                "Set out_dtype to bfloat16 or float32."
            )


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 [n] to a narrower dtype, each value to the nearest one (ties to even).

    torch goes to 16 bits through float32, which rounds twice and is wrong where the first rounding lands on the middle
    of two neighbours. An inexact float32 is made odd in its last bit there, so that only the second rounding counts.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.to(torch.float32)
    doubtful = _find(single.view(torch.int32) & _TAILS[dtype][0], _TAILS[dtype][1])
    if len(doubtful):
        near, exact = single[doubtful], values[doubtful]
        excess = near.to(torch.float64).abs_().sub_(exact.abs()).sign_().to(torch.int32)
        bits_of = near.view(torch.int32)
        bits_of -= excess * (1 - (bits_of & 1))
        single[doubtful] = near
    return single.to(dtype)


def _find(values: torch.Tensor, wanted: int) -> torch.Tensor:
    """Where `values` [n] are `wanted`. On a CPU numpy is several times as fast for the few there are."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() == wanted))
    return (values == wanted).nonzero().flatten()


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _square(values: torch.Tensor) -> float:
    return float(torch.dot(values, values))
