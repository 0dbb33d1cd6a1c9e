"""The sums of a block on an accelerator: all of it in float64, in torch.

sums = DeviceSums("cuda", [0.75, 0.25])
written, squares = sums(origin, [first, second], None, "BF16")
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BLOCK = 1 << 22  # elements
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The last bits (mask, value) of every float32 that lies on the middle of two neighbours in a 16-bit dtype.
_TAILS = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}


class DeviceSums:
    """As [`Sums`], of tensors instead of arrays.

    Args:
        device (`str`): where it is computed; needs float64.
        fractions (`Sequence[float]`): w_k, in the order of the parts.
    """

    def __init__(self, device: str, fractions: Sequence[float]) -> None:
        self._device, self._fractions = torch.device(device), list(fractions)
        self._buffers = torch.empty(3, 0, dtype=torch.float64, device=self._device)

    def __call__(
        self,
        origin: torch.Tensor,
        parts: Sequence[torch.Tensor],
        result: torch.Tensor | None,
        dtype: str,
        out: np.ndarray,
    ) -> list[float]:
        if self._buffers.shape[1] < len(origin):
            self._buffers = torch.empty(3, len(origin), dtype=torch.float64, device=self._device)
        start, mean, part = self._buffers[:, : len(origin)]
        start.copy_(origin)
        moved = []
        for index, fraction in enumerate(self._fractions):
            part.copy_(parts[index])
            if index == 0:
                # Not 0 + w·x, which would turn −0 into 0: identical groups merge to their very bits.
                torch.mul(part, fraction, out=mean)
            else:
                mean.add_(part, alpha=fraction)
            moved.append(_square(part.sub_(start)))
        if result is not None:
            mean.copy_(result)
        displacement = _square(torch.sub(mean, start, out=part))
        cast = round_once(mean, _DTYPES[dtype])
        squares = [displacement, _square(torch.sub(cast, mean, out=part)), *moved]
        np.copyto(out, cast.cpu().view(torch.uint8).numpy())
        return squares

    @staticmethod
    def to_float64(stored: torch.Tensor) -> np.ndarray:
        """The numbers that are stored."""
        return stored.to(torch.float64).cpu().numpy()


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


def _square(values: torch.Tensor) -> float:
    return float(torch.dot(values, values))
