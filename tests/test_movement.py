"""How far AdamW can move a weight: the bound holds for whatever gradients, and is not far from what is reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merit_hf.verification.movement import Movement, measure_movement, movement_checks, step_bound

BETAS = st.tuples(
    st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.99]), st.sampled_from([0.5, 0.9, 0.95, 0.98, 0.999, 0.9999])
)


def settings_of(
    rate: float, betas: tuple[float, float], decay: float, optim: str = "adamw_torch"
) -> dict[str, object]:
    return {
        "optim": optim,
        "learning_rate": rate,
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "weight_decay": decay,
    }


def run_adamw(
    start: torch.Tensor, gradients: torch.Tensor, rate: float, betas: tuple[float, float], decay: float
) -> torch.Tensor:
    """The real optimizer over given gradients, [steps, n]; returns the weights after the last step."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=rate, betas=betas, weight_decay=decay, eps=1e-12)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def worst_gradients(steps: int, betas: tuple[float, float]) -> torch.Tensor:
    """Each step's ratio is largest where gradients grow by β2/β1."""
    growth = min(betas[1] / max(betas[0], 1e-3), 10.0)
    return torch.tensor([growth**i for i in range(steps)], dtype=torch.float64)[:, None] * 1e-6


@given(
    rate=st.floats(1e-7, 0.1), betas=BETAS, decay=st.sampled_from([0.0, 0.01, 0.1, 1.0]), steps=st.integers(1, 40),
    kind=st.sampled_from(["normal", "sign", "sparse", "growing", "spike"]), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_gradients_move_a_weight_beyond_the_bound(
    rate: float, betas: tuple[float, float], decay: float, steps: int, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(16, dtype=torch.float64, generator=generator)
    noise = torch.randn(steps, 16, dtype=torch.float64, generator=generator)
    gradients = {
        "normal": noise, "sign": noise.abs(), "sparse": noise * (noise.abs() > 1.5),
        "growing": worst_gradients(steps, betas).expand(steps, 16) * noise[0].sign(),
        "spike": torch.cat([noise[:-1] * 1e-9, noise[-1:]]),
    }[kind]  # fmt: skip
    moved = (run_adamw(start, gradients, rate, betas, decay) - start).abs().max()
    bound = step_bound(settings_of(rate, betas, decay), steps)
    assert bound is not None
    assert float(moved) <= bound[0] + bound[1] * float(start.abs().max()) + 1e-12


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_growing_gradients_come_near_the_bound(steps: int) -> None:
    """Further than (1−β1)/√(1−β2) a step, which is often taken for the limit."""
    betas = (0.9, 0.999)
    moved = float(
        run_adamw(torch.zeros(1, dtype=torch.float64), worst_gradients(steps, betas), 1e-3, betas, 0.0).abs()
    )
    bound = step_bound(settings_of(1e-3, betas, 0.0), steps)
    assert bound is not None
    assert bound[1] == 0
    assert 0.75 * bound[0] < moved <= bound[0] * (1 + 1e-9)
    if steps == 1000:
        assert moved > steps * 1e-3 * 0.1 / 0.001**0.5


def test_one_step_is_the_learning_rate() -> None:
    bound = step_bound(settings_of(1e-3, (0.9, 0.999), 0.1), 1)
    assert bound == pytest.approx((1e-3 * (1 + 1e-4), 1e-4))


def test_other_optimizers_have_no_bound() -> None:
    for optim in ("sgd", "adafactor", "lion_32bit", "adamw_torch_8bit", "adamw_bnb_8bit"):
        assert step_bound(settings_of(1e-3, (0.9, 0.999), 0.0, optim), 5) is None
    assert step_bound(settings_of(1e-3, (0.9, 0.999), 0.0, "adamw_torch_fused"), 5) is not None
    assert step_bound(settings_of(1e-3, (0.9, 0.999), 0.0), 0) is None


def make(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_movement_is_what_numpy_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(3, generator=generator),
        "n": torch.arange(4),
    }
    moved = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) if n != "n" else t for n, t in base.items()}
        for _ in "xy"
    ]
    folders = [make(tmp_path / str(k), tensors) for k, tensors in enumerate(moved)]
    found = measure_movement(make(tmp_path / "base", base), folders)
    assert found.names == ["a", "b"]
    deltas = [np.concatenate([(m[n] - base[n]).double().numpy().ravel() for n in "ab"]) for m in moved]
    np.testing.assert_allclose(found.gram, np.array([[x @ y for y in deltas] for x in deltas]), rtol=1e-6)
    np.testing.assert_allclose(found.largest[1, 0], (moved[1]["a"] - base["a"]).abs().max(), rtol=1e-6)
    np.testing.assert_allclose(found.squares.sum(axis=1), np.diag(found.gram))
    np.testing.assert_allclose(found.scale, [float(base[n].abs().max()) for n in "ab"])


def test_a_weight_that_went_too_far_is_seen(tiny_plan, tiny_groups: list[Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, sft, steps = tiny_plan.base_folder(), tiny_plan.group_sft(0), tiny_plan.group(0).num_steps
    copy = Path(shutil.copytree(tiny_groups[0], tmp_path / "copy"))
    tensors, origin = load_file(copy / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    bound = step_bound(sft, steps)
    assert bound is not None
    most = float(origin[name].abs().max())
    for factor, ok in ((0.9, True), (1.2, False)):
        tensors[name][0, 0] = origin[name][0, 0].float() + factor * (bound[0] + bound[1] * most)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        checks = {c.name: c for c in movement_checks(measure_movement(base, [copy]), 0, sft, [steps])}
        assert checks["largest move"].ok is ok, (factor, checks["largest move"])


def synthetic(cosine: float, ratio: float = 1.0) -> Movement:
    """Two checkpoints of one tensor of 10⁶ elements with this cosine and ratio of lengths."""
    gram = np.array([[ratio**2, cosine * ratio], [cosine * ratio, 1.0]])
    squares = np.diag(gram)[:, None].copy()
    return Movement(
        ["w"], np.array([1_000_000]), squares, np.sqrt(squares) / 50, np.ones(1), gram, np.ones(2, bool),
        [["F32"]] * 2, np.zeros(1, bool), np.zeros(1, bool),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cosine", "ratio", "steps", "failed"),
    [
        (0.3, 1.0, [10, 10], []), (-0.3, 1.0, [10, 10], []), (0.006, 1.0, [10, 10], []),
        (0.004, 1.0, [10, 10], ["direction"]),
        (0.95, 1.0, [10, 10], []), (0.995, 1.0, [10, 10], ["own weights"]), (1.0, 0.5, [10, 10], ["own weights"]),
        (0.3, 9.0, [10, 10], []), (0.3, 11.0, [10, 10], ["displacement"]), (0.3, 0.09, [10, 10], ["displacement"]),
        (0.3, 0.09, [10, 30], []), (0.3, 25.0, [30, 10], []),
    ],
)  # fmt: skip
def test_verdicts_at_their_limits(cosine: float, ratio: float, steps: list[int], failed: list[str]) -> None:
    sft = settings_of(1.0, (0.9, 0.999), 0.0)
    checks = movement_checks(synthetic(cosine, ratio), 0, sft, steps)
    assert [check.name for check in checks if not check.ok] == failed
    assert all(type(check.ok) is bool for check in checks)


@pytest.mark.parametrize(
    ("ours", "theirs", "ok"),
    [
        (0.0064, 0.0201, True),  # a norm's weights, seen between honest groups
        (0.019, 0.002, True), (0.021, 0.002, False),  # a tensor that was exchanged
        (0.0, 0.019, True), (0.0, 0.021, False),  # one that was left as it was
        (0.2, 0.7, True), (0.2, 0.85, False),
    ],
)  # fmt: skip
def test_a_tensors_share_of_the_move_is_judged_where_it_has_one(ours: float, theirs: float, ok: bool) -> None:
    """Two tensors; the second has the share that is asked for, the first the rest of a move of length 1."""
    share = np.array([ours, theirs])
    squares = np.stack([1 - share**2, share**2], axis=1)
    gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    movement = Movement(
        ["w", "norm"], np.array([1_000_000, 256]), squares, np.sqrt(squares) / 50, np.ones(2), gram, np.ones(2, bool),
        [["F32"] * 2] * 2, np.zeros(2, bool), np.zeros(2, bool),
    )  # fmt: skip
    checks = {
        check.name: check for check in movement_checks(movement, 0, settings_of(1.0, (0.9, 0.999), 0.0), [10, 10])
    }
    assert checks["displacement by tensor"].ok is ok
