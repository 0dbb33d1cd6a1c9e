"""Weighted sums of numbers, rounded once, and how far everything moved: numpy on one thread.

    sums = Sums([0.75, 0.25])
    squares = sums(origin, [first, second], None, "BF16", out)

Arrays are as safetensors stores them, flat; bfloat16, which numpy has not, is `uint16`.

**Exactness.** Sums are made in float64 and rounded once, to the nearest value (ties to even). One exception saves half
of the work: where all inputs and the output are bfloat16, m = Σ w_k x_k is summed in float32, whose roundings are of
relative size u = 2⁻²⁴ at most. The largest weight takes up what rounding the others leaves, so that all sum to 1; it
is off by K u at most, as it is a K-th of their sum or more. Each term carries that, the rounding of its product and at
most K − 1 of the additions', so that |m − Σ w_k x_k| ≤ 2 K u Σ |w_k x_k| to first order in u. Rounding m to bfloat16
differs from rounding the exact sum only where the middle of two neighbours lies between them. A unit in the last place
of m is u |m| or more, so with c = Σ |w_k x_k| / |m| that is within 2 K c such units of m. Elements within 4 (K + 1)
units of a middle are summed again in float64. So the result is the value nearest to the float64 sum wherever c ≤ 2
(c is 1 where the x_k have one sign, as nearly all have in fine-tunes of one base); beyond, it is within half a unit of
bfloat16 and 2 K u Σ |w_k x_k| of it.

**Distances** are sums of squares of differences that are rounded to float32 once (relative error u), added up in
float32 over rows of 512 and from there in float64: 6 digits and more, and 5 of the distance of what is written to the
mean. Where float32 has not the range, or moves cancel so far that weights cut short to float32 would tell in the sixth
digit, all is done again in float64; so it is where elements are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Bits = NDArray[np.uint32]
Floats = NDArray[np.floating]

# numpy's names of how safetensors stores; it has no bfloat16, so its bits.
ARRAYS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BLOCK = 1 << 15  # elements: what is worked on stays in a core's own cache
_ROW = 512  # elements whose squares are added up in float32
_SMALL = 1 << 12
_MAX_FLOAT32_TERMS = 64
_HIGH = 0xFFFF0000
_LEAST = 2.0**-100  # sums of squares that underflow has not touched


class Sums:
    """The sums of one thread, with memory that it keeps: new pages cost more than the sums.

    Args:
        fractions (`Sequence[float]`): w_k, in the order of the parts.
    """

    def __init__(self, fractions: Sequence[float]) -> None:
        self._fractions = [float(fraction) for fraction in fractions]
        self._single = np.array(fractions, dtype=np.float32)
        largest = int(np.argmax(np.abs(self._single)))
        others = float(np.delete(self._single, largest).sum(dtype=np.float64))
        self._single[largest] = sum(self._fractions) - others
        self._cut = np.abs(self._single - np.array(self._fractions))
        # A weight that float32 would cut short is for float64.
        least = min(map(abs, self._fractions))
        self._float32 = len(self._fractions) <= _MAX_FLOAT32_TERMS and (least == 0 or least > 2.0**-100)
        count = len(self._fractions)
        rows = np.empty((count + 5, _BLOCK), dtype=np.float32)
        # What squares are taken of: θ_k − θ0, θ̄ − θ0, written − θ̄.
        self._squared, (self._start, self._mean, self._spare) = rows[: count + 2], rows[count + 2 :]
        self._mask = np.empty(_BLOCK, dtype=np.bool_)
        self._wide = np.empty((2, _BLOCK), dtype=np.float64)

    def __call__(
        self, origin: Array, parts: Sequence[Array], result: Array | None, dtype: str, out: NDArray[np.uint8]
    ) -> list[float]:
        """Writes the merged elements to `out`; gives [‖θ̄ − θ0‖², ‖written − θ̄‖², ‖θ_k − θ0‖² …] over them.

        Args:
            origin, parts (arrays [n]): θ0 and θ_k.
            result (array [n], *optional*): takes the place of the mean.
            dtype (`str`): of the output: `F64`, `F32`, `F16` or `BF16`.
            out (bytes): n elements of that.

        A square is not finite where an input is not, or where the output exceeds its dtype.
        """
        merged = out.view(ARRAYS[dtype])
        with np.errstate(all="ignore"):
            if len(origin) >= _SMALL:
                paired = result is None and self._float32 and len(origin) % 2 == 0 and dtype == "BF16"
                squares = None
                if paired and all(array.dtype == np.uint16 for array in (origin, *parts)):
                    squares = self._in_float32(origin, parts, merged)
                squares = squares or self._in_float64(origin, parts, result, dtype, merged)
                if self._sound(squares, origin, parts, result):
                    return squares
            return self._plainly(origin, parts, result, dtype, merged)

    def _in_float32(self, origin: Array, parts: Sequence[Array], out: Array) -> list[float] | None:
        """Two neighbours are one 32-bit word, and its halves are widened by themselves: first all even elements of a
        block, then all odd ones. None where too many are near a middle, as with equal weights, or distances suffer."""
        total = np.zeros(len(self._squared))
        doubtful = []
        for at in _blocks(len(origin)):
            size, half = at.stop - at.start, (at.stop - at.start) // 2
            start, mean, spare = self._start[:size], self._mean[:size], self._spare[:size]
            moved, (shift, error) = self._squared[:-2, :size], self._squared[-2:, :size]
            _widen_halves(origin[at], start)
            for k, stored in enumerate(parts):
                _widen_halves(stored[at], moved[k])
                # Not 0 + w·x, which would turn −0 into 0: identical groups merge to their very bits.
                np.multiply(moved[k], self._single[k], out=spare if k else mean)
                if k:
                    np.add(mean, spare, out=mean)
            np.subtract(moved, start, out=moved)
            rounded, words = spare.view(np.uint32), out[at].view(np.uint32)
            near = self._near_a_middle(mean.view(np.uint32), rounded)
            if len(near) > size // 32:
                return None
            if len(near):
                doubtful.append(at.start + np.where(near < half, 2 * near, 2 * (near - half) + 1))
            _round_bits(mean.view(np.uint32), rounded)
            np.bitwise_and(rounded, _HIGH, out=rounded)
            np.right_shift(rounded[:half], 16, out=words)
            np.bitwise_or(words, rounded[half:], out=words)
            # Not written − m, which float32's own roundings of m would blur.
            np.subtract(spare, start, out=error)
            np.einsum("k,kn->n", self._single, moved, out=shift)
            np.subtract(error, shift, out=error)
            total += self._squares(size)
        if doubtful:
            places = np.concatenate(doubtful)
            out[places] = self._exactly([stored[places] for stored in parts])
        squares = [float(square) for square in (*total[-2:], *total[:-2])]
        return squares if self._sharp(squares) else None

    def _sharp(self, squares: Sequence[float]) -> bool:
        """Whether float32 leaves the distance of what is written to the mean its 5 digits."""
        _, error, *moved = squares
        return self._blur(moved) <= 4e-6 * error**0.5

    def _blur(self, moved: Sequence[float]) -> float:
        """How far θ̄ − θ0 may be off in float32: it cuts weights short and rounds what they move, and either may be
        the same everywhere, where all moves are of one size."""
        return float(np.sqrt(moved) @ (self._cut + 2.0**-24 * np.abs(self._fractions)))

    def _near_a_middle(self, bits: Bits, spare: Bits) -> NDArray[np.intp]:
        """Where the sum in float32 is so near to the middle of two bfloat16 that its error may decide."""
        margin = 4 * (len(self._fractions) + 1)
        np.add(bits, 0x8000 + margin, out=spare)
        np.bitwise_and(spare, 0xFFFF, out=spare)
        return np.flatnonzero(np.less_equal(spare, 2 * margin, out=self._mask[: len(bits)]))

    def _exactly(self, values: Sequence[Array]) -> NDArray[np.uint16]:
        mean = self._fractions[0] * self.to_float64(values[0])
        for fraction, value in zip(self._fractions[1:], values[1:], strict=True):
            mean += fraction * self.to_float64(value)
        return (round_to_bfloat16(mean) >> 16).astype(np.uint16)

    def _in_float64(
        self, origin: Array, parts: Sequence[Array], result: Array | None, dtype: str, out: Array
    ) -> list[float]:
        """The mean in float64, distances in float32."""
        total = np.zeros(len(self._squared))
        for at in _blocks(len(origin)):
            size = at.stop - at.start
            mean, spare = self._wide[:, :size]
            moved, (shift, error) = self._squared[:-2, :size], self._squared[-2:, :size]
            start = _widen(origin[at], self._start)
            for k, stored in enumerate(parts):
                part = _widen(stored[at], self._spare)
                np.subtract(part, start, out=moved[k], casting="same_kind")
                term = spare if k else mean
                np.copyto(term, part)
                np.multiply(term, self._fractions[k], out=term)
                if k:
                    np.add(mean, spare, out=mean)
            if result is not None:
                np.copyto(mean, _widen(result[at], self._spare))
                np.subtract(mean, start, out=shift, casting="same_kind")
            else:
                np.einsum("k,kn->n", self._single, moved, out=shift)
            value = _narrow(mean, dtype, out[at], self._spare)
            np.subtract(value, mean, out=error, casting="same_kind")
            total += self._squares(size)
        return [float(square) for square in (*total[-2:], *total[:-2])]

    def _squares(self, size: int) -> NDArray[np.float64]:
        """Of the rows of a block."""
        count = -(-size // _ROW) * _ROW
        self._squared[:, size:count] = 0
        rows = self._squared[:, :count].reshape(len(self._squared), -1, _ROW)
        return np.vecdot(rows, rows).sum(axis=1, dtype=np.float64)

    def _sound(self, squares: Sequence[float], origin: Array, parts: Sequence[Array], result: Array | None) -> bool:
        """Whether float32 gave them to 6 digits."""
        shift, error, *moved = squares
        for square, part in zip(moved, parts, strict=True):
            if not _LEAST < square < np.inf and (square or not np.array_equal(origin, part)):
                return False
        blur = self._blur(moved)
        if result is None and blur > 1e-6 * shift**0.5:
            return False
        exact = shift == error == blur == 0  # nothing moved at all
        return exact or (_LEAST < error < np.inf and _LEAST < shift < np.inf)

    def _plainly(
        self, origin: Array, parts: Sequence[Array], result: Array | None, dtype: str, out: Array
    ) -> list[float]:
        """All of it in float64."""
        total = np.zeros(2 + len(parts))
        for at in _blocks(len(origin)):
            start, *values = (self.to_float64(stored[at]) for stored in (origin, *parts))
            mean = self._fractions[0] * values[0]
            for fraction, value in zip(self._fractions[1:], values[1:], strict=True):
                mean += fraction * value
            if result is not None:
                mean = self.to_float64(result[at])
            written = _narrow(mean, dtype, out[at], self._spare)
            rows = (mean - start, written - mean, *(value - start for value in values))
            total += [np.einsum("i,i->", row, row) for row in rows]
        return [float(square) for square in total]

    @staticmethod
    def to_float64(stored: Array) -> NDArray[np.float64]:
        """The numbers that are stored."""
        return _widen(stored, np.empty(len(stored), dtype=np.float32)).astype(np.float64)


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, _BLOCK):
        yield slice(start, min(start + _BLOCK, size))


def round_to_bfloat16(values: NDArray[np.float64]) -> Bits:
    """Each value to the nearest bfloat16 (ties to even), as the float32 of the same value, in bits.

    By way of float32 it would be rounded twice, wrongly where the first rounding lands on the middle of two of them.
    An inexact float32 is made odd in its last bit there, so that only the second rounding counts.
    """
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    doubtful = np.flatnonzero((bits & 0xFFFF) == 0x8000)
    if len(doubtful):
        near = bits[doubtful]
        excess = np.sign(np.abs(near.view(np.float32).astype(np.float64)) - np.abs(values[doubtful]))
        # The middle's last bit is 0: one step towards the exact value makes it odd.
        bits[doubtful] = near - excess.astype(np.int32).astype(np.uint32)
    rounded = np.empty_like(bits)
    _round_bits(bits, rounded)
    # A NaN stays one.
    return np.where(np.isnan(values), np.uint32(0x7FC00000), rounded & _HIGH)


def _round_bits(bits: Bits, out: Bits) -> None:
    """The bits of float32 to those of the nearest bfloat16 (ties to even), in the upper half of `out`."""
    np.right_shift(bits, 16, out=out)
    np.bitwise_and(out, 1, out=out)
    np.add(out, 0x7FFF, out=out)
    np.add(out, bits, out=out)


def _widen_halves(stored: Array, out: NDArray[np.float32]) -> None:
    """bfloat16 [n] to float32: even elements to the first half of `out`, odd ones to the second."""
    words, bits = stored.view(np.uint32), out.view(np.uint32)
    np.left_shift(words, 16, out=bits[: len(words)])
    np.bitwise_and(words, _HIGH, out=bits[len(words) :])


def _widen(stored: Array, room: NDArray[np.float32]) -> Floats:
    """To float32, in `room`; float32 and float64 as they are."""
    if stored.dtype == np.uint16:
        bits = room[: len(stored)].view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32)
    if stored.dtype == np.float16:
        np.copyto(room[: len(stored)], stored)
        return room[: len(stored)]
    return stored  # type: ignore[return-value]


def _narrow(mean: NDArray[np.float64], dtype: str, out: Array, room: NDArray[np.float32]) -> Floats:
    """Rounded once to `out`; the same values as numbers."""
    if dtype == "BF16":
        bits = round_to_bfloat16(mean)
        np.right_shift(bits, 16, out=out, casting="unsafe")
        return bits.view(np.float32)
    np.copyto(out, mean, casting="unsafe")
    return _widen(out, room)
