"""One model moved through weight space: θ = Σ c_j θ_j written into it tensor by tensor, from mapped files.

    mover = Mover(model, {"base": base, "group-0": first, "group-1": second})
    mover.move_to(Point.of({"group-0": 0.5, "group-1": 0.5}))

Memory: the model, one piece of a tensor from each checkpoint, and for noise one whole tensor. However many checkpoints
there are, none is loaded: their files are mapped, and their pages belong to the system's cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from merit_hf.align import FLOATS
from merit_hf.checkpoint import TensorInfo
from merit_hf.config import MeritError
from merit_hf.diagnosis.basin import Point
from merit_hf.vision import saved_names

_PIECE = 1 << 17  # elements: 1 MB in float64 for each checkpoint


class TensorSource(Protocol):
    """What a checkpoint must offer: its tensors by name, each flat. Of a group's, no more than slices are taken: base
    and adapter compute W + s·B·A slice by slice (`adapted.AdaptedCheckpoint`), and never hold it.
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def flat(self, name: str) -> torch.Tensor: ...


class Mover:
    """A model, and the checkpoints whose weighted sums its weights are set to.

    Args:
        model (`torch.nn.Module`): changed in place; its floating tensors are saved under the checkpoints' names.
        sources (`Mapping[str, TensorSource]`): by label, with the same names and shapes; `base` is one of them.

    Attributes:
        names (`list[str]`): the tensors that are moved, sorted; a tied one counts once.

    Raises:
        MeritError: model and checkpoints do not hold the same tensors.
    """

    def __init__(self, model: torch.nn.Module, sources: Mapping[str, TensorSource]) -> None:
        self._sources = dict(sources)
        self._targets = _targets(model, self._sources["base"])
        names = _stored_names(model, self._sources["base"])
        self._parameters = {names[name]: p for name, p in model.named_parameters(remove_duplicate=False)}
        self.names = sorted(self._targets)
        self.sizes = np.array([self._targets[name].numel() for name in self.names])

    @torch.no_grad()
    def move_to(self, point: Point, names: Collection[str] | None = None) -> None:
        """Set the model's weights, or those of `names` alone, to `point`, summed in float64 and rounded once to the
        model's dtype.
        """
        for name in self.names if names is None else names:
            target = self._targets[name].view(-1)
            noise = self._noise(name, *point.noise) if point.noise else None
            for rows, mixed in self._pieces(name, point.coefficients):
                target[rows].copy_(mixed if noise is None else mixed + noise[rows])

    def gradient_dots(self, direction: Mapping[str, float]) -> np.ndarray:
        """⟨∂L/∂θ, Σ c_j θ_j⟩ of the accumulated gradients, a number for each of `names`; float64."""
        dots = np.zeros(len(self.names))
        coefficients = tuple(sorted((label, value) for label, value in direction.items() if value))
        for index, name in enumerate(self.names):
            parameter = self._parameters.get(name)
            if parameter is None or parameter.grad is None:
                continue
            gradient = parameter.grad.reshape(-1)
            for rows, mixed in self._pieces(name, coefficients):
                dots[index] += float(torch.dot(gradient[rows].to("cpu", torch.float64), mixed))
        return dots

    def grams(
        self, labels: Sequence[str], on_tensor: Callable[[int], None] = lambda elements: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of the displacements θ_j − θ0 in every tensor, and ‖θ0‖² of every tensor; float64.

        Args:
            labels: S checkpoints. on_tensor: told the elements of each finished tensor.

        Returns:
            [num_tensors, S, S] and [num_tensors], in the order of `names`.

        Raises:
            MeritError: a checkpoint holds a value that is not finite.
        """
        grams = np.zeros((len(self.names), len(labels), len(labels)))
        squares = np.zeros(len(self.names))
        for index, name in enumerate(self.names):
            origin, *tensors = (self._sources[label].flat(name) for label in ("base", *labels))
            for rows in _slices(origin.numel()):
                start = origin[rows].to(torch.float64)
                moved = torch.stack([tensor[rows].to(torch.float64) - start for tensor in tensors]) if labels else None
                squares[index] += float(start @ start)
                if moved is not None:
                    grams[index] += (moved @ moved.T).numpy()
            bad = [
                label for label, value in zip(labels, np.diagonal(grams[index]), strict=True) if not np.isfinite(value)
            ]
            if bad or not np.isfinite(squares[index]):
                raise MeritError(
                    f"{(bad or ['base'])[0]}: tensor `{name}` holds a value that is not finite (NaN or infinity), so "
                    "no loss can be measured on a path to it. Its training diverged: train it again with a lower "
                    "learning rate, or leave it out."
                )
            on_tensor(origin.numel())
        return grams, squares

    def _pieces(self, name: str, coefficients: Sequence[tuple[str, float]]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Consecutive parts of Σ c_j θ_j for one tensor, float64."""
        tensors = [(self._sources[label].flat(name), value) for label, value in coefficients]
        for rows in _slices(self._targets[name].numel()):
            mixed = tensors[0][0][rows].to(torch.float64) * tensors[0][1]
            for tensor, value in tensors[1:]:
                mixed.add_(tensor[rows].to(torch.float64), alpha=value)
            yield rows, mixed

    def _noise(self, name: str, sigma: float, seed: int) -> torch.Tensor:
        """Gaussian, `sigma` × the root mean square of the base's tensor; the same on every machine's CPU."""
        origin = self._sources["base"].flat(name)
        scale = float(torch.linalg.vector_norm(origin, dtype=torch.float64)) / max(1, origin.numel()) ** 0.5
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(origin.numel(), generator=generator).mul_(sigma * scale)


def holds_the_same_tensors(model: torch.nn.Module, base: TensorSource) -> bool:
    """Whether the model calls its tensors what the checkpoint calls them, so that a [`Mover`] can set them."""
    try:
        _targets(model, base)
    except MeritError:
        return False
    return True


def _stored_names(model: torch.nn.Module, base: TensorSource) -> dict[str, str]:
    """{name in the model: name in the checkpoint}: the model's own names, or those that it saves them under."""
    held = list(model.state_dict())
    stored = {name for name, info in base.tensors.items() if info.dtype in FLOATS}
    return {name: name for name in held} if stored <= set(held) else saved_names(model)


def _targets(model: torch.nn.Module, base: TensorSource) -> dict[str, torch.Tensor]:
    """The model's own floating tensors by name, a tied one under its first name."""
    names = _stored_names(model, base)
    held = {names[name]: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    stored = {name for name, info in base.tensors.items() if info.dtype in FLOATS}
    places: dict[int, list[str]] = {}
    for name, tensor in held.items():
        places.setdefault(tensor.data_ptr(), []).append(name)
    unknown = sorted(stored - held.keys())
    uncovered = sorted(names[0] for names in places.values() if not stored & set(names))
    other_shape = sorted(n for n in stored & held.keys() if base.tensors[n].shape != tuple(held[n].shape))
    wrong = unknown or uncovered or other_shape
    if wrong:
        raise MeritError(
            f"tensor `{wrong[0]}` is not the same in the checkpoints' files and in the loaded model ({len(wrong)} "
            "such), so points between checkpoints cannot be set in place."
        )
    chosen = {min(stored & set(names)): held[names[0]] for names in places.values()}
    return dict(sorted(chosen.items()))


def _slices(num_elements: int) -> Iterator[slice]:
    for start in range(0, num_elements, _PIECE):
        yield slice(start, min(start + _PIECE, num_elements))
