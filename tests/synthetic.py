"""Gradients with a known truth, sampled in two halves: what the statistics of a plan are tried on."""

from __future__ import annotations

import numpy as np

from merit_hf.partition import split_by_conflict
from merit_hf.readouts import GradientReadout
from merit_hf.reliability import split_half
from merit_hf.stability import HalfProducts

KINDS = ("noise", "shared", "blocks")


def true_gradients(kind: str, count: int, rng: np.random.Generator, dim: int = 400) -> np.ndarray:
    """float64 [count, dim], of length 1 or 0: no signal, one direction for all, or four blocks with one in common."""
    directions = np.linalg.qr(rng.standard_normal((dim, 5)))[0].T
    if kind == "noise":
        return np.zeros((count, dim))
    if kind == "shared":
        return np.tile(directions[0], (count, 1))
    blocks = rng.permutation(np.arange(count) % 4)
    return 0.5**0.5 * (directions[0] + directions[1 + blocks])


def sample_halves(
    truth: np.ndarray, noise: np.ndarray | float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of two halves whose mean has noise of length `noise`, [T]."""
    noise = np.broadcast_to(np.asarray(noise, dtype=np.float64), (len(truth),))[:, None]
    scale = (2 / truth.shape[1]) ** 0.5 * noise
    return truth + scale * rng.standard_normal(truth.shape), truth + scale * rng.standard_normal(truth.shape)


def products(first: np.ndarray, second: np.ndarray, share: float = 0.5) -> HalfProducts:
    return HalfProducts.of(share * first + (1 - share) * second, first, [share] * len(first))


def readouts(first: np.ndarray, second: np.ndarray, num_samples: int = 200) -> list[GradientReadout]:
    made = []
    for a, b in zip(first.astype(np.float32), second.astype(np.float32), strict=True):
        cosine, reliability = split_half(a, b, 0.5)
        whole = (a + b) / 2
        made.append(
            GradientReadout(
                sketch=whole, norm=float(np.linalg.norm(whole)), loss=1.0, num_samples=num_samples,
                num_input_tokens=1000, num_loss_tokens=500, num_batches=4, first_half=a, first_share=0.5,
                split_half_cosine=cosine, reliability=reliability,
            )
        )  # fmt: skip
    return made


def split_in_four(matrix: np.ndarray) -> np.ndarray:
    return split_by_conflict(matrix, np.ones(len(matrix)), 4)
