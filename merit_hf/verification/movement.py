"""How far every tensor of several checkpoints moved from their base, and what no training moves like.

A fine-tuned group has left the base in every tensor that training changes, by no more than its optimizer can step,
about as far as the other groups, tensor by tensor, and not at right angles to all of them. An untrained copy, a tensor
that was scaled, permuted or replaced, and noise each break one of these. One pass over the weights, a slice at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from merit_hf.checkpoint import TensorInfo, read_tensor_index
from merit_hf.verification.checks import Check

_SLICE = 1 << 22
# Spacing of the stored dtype relative to a value: what rounding alone may add to a move.
_EPSILON = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
# Groups of one plan differ in data, not in kind: their moves agree in order of magnitude.
_FACTOR = 10.0
# Shares of single tensors agree more closely: within 0.6 and 1.3 over the quickstart's groups of SmolLM2-135M. The
# last norm of a 5M-parameter model was seen at 0.0064 of an honest move where the other groups had 0.020.
_TENSOR_FACTOR = 4.0
# A tensor with less of the move than this is too small to judge: under SGD it follows its gradient alone.
_SMALL = 0.005
# A random direction has |cosine| below 5/√n with probability 1 − 6e-7.
_DIRECTION = 5.0
# Small models are judged by chance: honest groups of 30,000 parameters were seen at a cosine of 0.01, where noise
# reaches 0.03. Those of SmolLM2-135M are at 0.04 to 0.13, where it reaches 0.0004.
_ENOUGH = 1_000_000
# Honest groups of SmolLM2-135M have cosines up to 0.13; a copy with noise a seventh as long as its move has 0.99.
_SAME = 0.99


@dataclass(frozen=True)
class Movement:
    """Δ = θ_k − θ0 of K checkpoints over T floating tensors.

    Attributes:
        names: of the tensors. sizes: int64 [T], elements. frozen: bool [T], not to be trained. images: bool [T], read
            images, so that text alone does not move them.
        squares: float64 [K, T], ‖Δ‖². largest: float64 [K, T], max |Δ|.
        scale: float64 [T], max |θ0|. gram: float64 [K, K], inner products of the Δ.
        finite: bool [K]. dtypes: [K][T].
    """

    names: list[str]
    sizes: np.ndarray
    squares: np.ndarray
    largest: np.ndarray
    scale: np.ndarray
    gram: np.ndarray
    finite: np.ndarray
    dtypes: list[list[str]]
    frozen: np.ndarray
    images: np.ndarray


def measure_movement(
    base: Path,
    folders: Sequence[Path],
    file: str | None = None,
    frozen: Collection[str] = (),
    images: Collection[str] = (),
) -> Movement:
    """Read base and checkpoints once.

    Args:
        file: read just this file of every checkpoint, an adapter's. Its B factors start at zero and are what moves; of
            the A factors, whose random start is not stored, only finiteness is looked at.
        frozen: tensors that the plan does not train. images: those that read images.
    """
    origin = read_tensor_index(base) if file is None else {}
    indices = [read_tensor_index(folder, file) for folder in folders]
    floats = [name for name, info in indices[0].items() if info.dtype in _EPSILON]
    names = [name for name in floats if file is None or ".lora_B." in name]
    num_groups, num_tensors = len(folders), len(names)
    squares, largest = np.zeros((num_groups, num_tensors)), np.zeros((num_groups, num_tensors))
    scale, gram, finite = np.zeros(num_tensors), np.zeros((num_groups, num_groups)), np.ones(num_groups, dtype=bool)
    with contextlib.ExitStack() as stack:
        readers = [_Reader(stack, folder, index) for folder, index in zip(folders, indices, strict=True)]
        start = _Reader(stack, base, origin)
        for name in sorted(set(floats) - set(names)):
            finite &= np.array([bool(torch.isfinite(reader.read(name, None)).all()) for reader in readers])
        for column, name in enumerate(names):
            for rows in _slices(indices[0][name].shape):
                at = start.read(name, rows) if name in origin else None
                moves = torch.stack([reader.read(name, rows) - (0 if at is None else at) for reader in readers])
                finite &= torch.isfinite(moves).all(dim=1).numpy()
                moves = torch.nan_to_num(moves, nan=0.0, posinf=0.0, neginf=0.0)
                product = (moves @ moves.T).numpy()
                gram += product
                squares[:, column] += np.diag(product)
                largest[:, column] = np.maximum(largest[:, column], moves.abs().amax(dim=1).numpy())
                if at is not None:
                    scale[column] = max(scale[column], float(at.abs().max()))
    sizes = np.array([indices[0][name].num_elements for name in names], dtype=np.int64)
    dtypes = [[index[name].dtype for name in names] for index in indices]
    marks = [np.array([name in marked for name in names], dtype=bool) for marked in (frozen, images)]
    return Movement(names, sizes, squares, largest, scale, gram, finite, dtypes, *marks)


def movement_checks(
    movement: Movement, k: int, sft: Mapping[str, Any], steps: Sequence[int], blind: Collection[int] = ()
) -> list[Check]:
    """The checks of checkpoint `k` against its optimizer and the other checkpoints.

    Args:
        sft: identity fields of its training. steps: optimizer steps of each of the K trainings.
        blind: checkpoints of a mixture with images that saw none, so that their image tensors are the base's.
    """
    if not movement.finite[k]:
        return [Check("finite weights", "all finite", "NaN or infinite values", False)]
    checks = [Check("finite weights", "all finite", "all finite", True), _moved(movement, k, k in blind)]
    if movement.frozen.any():
        checks.insert(1, _frozen(movement, k))
    others = [j for j in range(len(steps)) if j != k and movement.finite[j] and movement.squares[j].sum() > 0]
    if not checks[-1].ok:
        return checks
    bound = step_bound(sft, steps[k])
    if bound is not None:
        checks.append(_largest_step(movement, k, bound, steps[k]))
    if others:
        checks += [
            _displacement(movement, k, others, steps),
            _shape(movement, k, others, _FACTOR if bound is None else _TENSOR_FACTOR, blind),
            _own(movement, k, others),
        ]
        # Under other optimizers a few tensors make the move, and honest groups may be as far apart as chance.
        if bound is not None and movement.sizes.sum() >= _ENOUGH:
            checks.append(_turned(movement, k, others))
    return checks


def step_bound(sft: Mapping[str, Any], num_steps: int) -> tuple[float, float] | None:
    """(a, b): no weight w moves further than a + b·max|w| in `num_steps` of AdamW; None for other optimizers.

    Step t is η·m̂/√v̂, and with m̂ = Σ wᵢgᵢ, v̂ = Σ uᵢgᵢ² Cauchy-Schwarz gives (m̂/√v̂)² ≤ Σ wᵢ²/uᵢ, which gradients
    that grow by β2/β1 a step attain; (1−β1)/√(1−β2), the limit of a single gradient (Kingma and Ba 2015, §2.1), is
    smaller. Decoupled decay adds η·λ·|w|, and |w| itself grows by no more than a.
    """
    if sft["optim"] not in _ADAMW or num_steps <= 0:
        return None
    beta1, beta2 = float(sft["adam_beta1"]), float(sft["adam_beta2"])
    if not (0 <= beta1 < 1 and 0 < beta2 < 1):
        return None
    rate, step = float(sft["learning_rate"]), np.arange(1, num_steps + 1)
    with np.errstate(over="ignore"):
        ages = np.cumsum((beta1**2 / beta2) ** (step - 1.0))
    widest = (1 - beta1) / (1 - beta1**step) * np.sqrt((1 - beta2**step) / (1 - beta2) * ages)
    far = rate * float(widest.sum())
    decay = num_steps * rate * float(sft["weight_decay"])
    return far * (1 + decay), decay


def _frozen(movement: Movement, k: int) -> Check:
    moved = [name for name, far in zip(movement.names, movement.squares[k], strict=True) if far > 0]
    moved = [name for name in moved if movement.frozen[movement.names.index(name)]]
    return Check("frozen modules", "as in the base", f"{moved[0]} moved" if moved else "as in the base", not moved)


def _moved(movement: Movement, k: int, blind: bool) -> Check:
    still = movement.squares[k] == 0
    sizes = np.where(movement.frozen | (movement.images & still & blind), 0, movement.sizes)
    share = float(sizes[~still].sum() / max(1, sizes.sum()))
    wanted = "most parameters lie in tensors that left the base"
    found = f"{100 * share:.0f} % do, displacement {math.sqrt(movement.squares[k].sum()):.4g}"
    return Check("trained", wanted, found, share > 0.5)


def _largest_step(movement: Movement, k: int, bound: tuple[float, float], num_steps: int) -> Check:
    rounding = np.array([_EPSILON[dtype] for dtype in movement.dtypes[k]]) * movement.scale
    # A training may have kept its weights in 16 bits, and then rounds every step up to twice its length.
    short = np.array([dtype in ("BF16", "F16") for dtype in movement.dtypes[k]])
    each = np.where(short, np.minimum(bound[0], num_steps * rounding), 0.0)
    limit = 1.01 * (bound[0] + bound[1] * movement.scale + rounding + each)
    excess = movement.largest[k] / limit
    worst = int(excess.argmax())
    return Check(
        "largest move",
        "no weight further than its optimizer can step",
        f"{movement.names[worst]}: {movement.largest[k, worst]:.3g} of at most {limit[worst]:.3g}",
        bool(excess[worst] <= 1),
    )


def _displacement(movement: Movement, k: int, others: Sequence[int], steps: Sequence[int]) -> Check:
    norms = np.sqrt(movement.squares.sum(axis=1))
    typical = float(np.median(norms[others]))
    # A training of more steps may have gone further, at most in proportion.
    apart = max([steps[k] / steps[j] for j in others] + [steps[j] / steps[k] for j in others] + [1.0])
    ratio, factor = float(norms[k]) / typical, _FACTOR * apart
    wanted = f"between {1 / factor:.3g} and {factor:.3g} times the other groups' {typical:.4g}"
    return Check("displacement", wanted, f"{norms[k]:.4g}", 1 / factor <= ratio <= factor)


def _shape(movement: Movement, k: int, others: Sequence[int], factor: float, blind: Collection[int]) -> Check:
    """Tensor by tensor, as a share of the whole move: one that was exchanged stands out, one that was left, too.

    Of a group without images, and against one, the tensors that read images are left out.
    """
    left_out = movement.images & bool({k, *others} & set(blind))
    squares = np.where(left_out, 0.0, movement.squares)
    norms = np.maximum(np.sqrt(squares.sum(axis=1)), np.finfo(float).tiny)
    share = np.sqrt(squares[k]) / norms[k]
    typical = np.median([np.sqrt(squares[j]) / norms[j] for j in others], axis=0)
    ratio = np.maximum(share, _SMALL) / np.maximum(typical, _SMALL)
    worst = int(np.abs(np.log(ratio)).argmax())
    return Check(
        "displacement by tensor",
        f"within a factor {factor:g} of the other groups' shares",
        f"{movement.names[worst]}: {share[worst]:.3g} of the move, others {typical[worst]:.3g}",
        bool(1 / factor <= ratio[worst] <= factor),
    )


def _turned(movement: Movement, k: int, others: Sequence[int]) -> Check:
    norms = np.sqrt(movement.squares.sum(axis=1))
    cosines = [movement.gram[k, j] / (norms[k] * norms[j]) for j in others]
    highest = max(cosines, key=abs)
    least = _DIRECTION / math.sqrt(movement.sizes.sum())
    wanted = f"|cosine| with some other group above {least:.2g}, which noise does not reach"
    return Check("direction", wanted, f"{highest:.3g}", bool(abs(highest) > least))


def _own(movement: Movement, k: int, others: Sequence[int]) -> Check:
    """Another group's weights under this group's manifest move as that group's do, and better than the base, too."""
    norms = np.sqrt(movement.squares.sum(axis=1))
    highest = max(float(movement.gram[k, j] / (norms[k] * norms[j])) for j in others)
    return Check("own weights", f"cosine with no other group above {_SAME:g}", f"{highest:.3g}", highest <= _SAME)


class _Reader:
    """Slices of the floating tensors of one checkpoint, in float64, flat."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, index: Mapping[str, TensorInfo]) -> None:
        self._index = index
        self._files = {
            file: stack.enter_context(safe_open(str(folder / file), framework="pt"))
            for file in {info.file for info in index.values()}
        }

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        file = self._files[self._index[name].file]
        tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        return tensor.double().flatten()


def _slices(shape: Sequence[int]) -> Iterator[slice | None]:
    """Along the first dimension, so that no more than `_SLICE` elements are read at once where that is possible."""
    if math.prod(shape) <= _SLICE or len(shape) < 2:
        yield None
        return
    step = max(1, _SLICE // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))
