"""Sums: nearest to the float64 mean where promised, within the proven bound elsewhere; distances to 6 digits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging import assert_nearest

from merit_hf.device_sums import DeviceSums
from merit_hf.sums import Sums, round_to_bfloat16

U = 2.0**-24
SIZE = (1 << 16) + 1234  # whole blocks and a rest


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (round_to_bfloat16(values) >> 16).astype(np.uint16)


def merged(parts: Sequence[np.ndarray], fractions: Sequence[float], dtype: str = "BF16") -> tuple[np.ndarray, list]:
    out = np.empty(len(parts[0]) * {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[dtype], dtype=np.uint8)
    squares = Sums(fractions)(parts[0], parts[1:], None, dtype, out)
    return out, squares


def exact(parts: Sequence[np.ndarray], fractions: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ w x and Σ |w x| in float64, and the parts' numbers."""
    values = np.stack([Sums.to_float64(part) for part in parts])
    weights = np.array(fractions)[:, None]
    return (weights * values[1:]).sum(0), np.abs(weights * values[1:]).sum(0), values


def check(parts: Sequence[np.ndarray], fractions: Sequence[float]) -> None:
    out, squares = merged(parts, fractions)
    mean, terms, values = exact(parts, fractions)
    got = out.view(np.uint16)
    safe = terms <= 2 * np.abs(mean)
    assert_nearest(torch.from_numpy(got[safe].view(np.int16)).view(torch.bfloat16), torch.from_numpy(mean[safe]))
    number = Sums.to_float64(got)
    half = (Sums.to_float64((got & 0x7FFF) + 1) - np.abs(number)) / 2
    assert bool((np.abs(number - mean) <= half + 2.01 * len(fractions) * U * terms + 2.0**-140).all())
    wanted = [((mean - values[0]) ** 2).sum(), ((number - mean) ** 2).sum()]
    wanted += [((value - values[0]) ** 2).sum() for value in values[1:]]
    assert squares[0] == pytest.approx(wanted[0], rel=2e-6)
    assert squares[2:] == pytest.approx(wanted[2:], rel=5e-7)
    assert squares[1] == pytest.approx(wanted[1], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    weights=st.lists(st.floats(1e-9, 1), min_size=1, max_size=7),
    spread=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    scale=st.sampled_from([1e-25, 0.02, 1e15]),
)
@example(seed=0, weights=[1.0, 1e-5], spread=1e-4, scale=0.02)  # hardly anything but the weights' float32 is rounded
@example(seed=0, weights=[0.5, 2.0**-14, 2.0**-14], spread=1e-4, scale=1e15)  # all moves are one unit of bfloat16
def test_bfloat16_is_nearest_or_within_its_bound(seed: int, weights: list[float], spread: float, scale: float) -> None:
    """`spread` 1 and more are unrelated models, whose terms cancel; scales 1e-25 and 1e15 leave float32's squares."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(SIZE)
    parts = [base] + [base + spread * generator.standard_normal(SIZE) for _ in weights]
    check([bfloat16(scale * part) for part in parts], [weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 1, 1], [3, 1], [1, 1, 1], [1 - 2**-20, 2**-20], [1e-30, 1]])
def test_exact_and_almost_middles(weights: list[float]) -> None:
    """Halves and quarters of neighbouring values are ties, and a little weight more is a hair beside one."""
    generator = np.random.default_rng(0)
    fractions = [weight / sum(weights) for weight in weights]
    first = bfloat16(generator.standard_normal(SIZE))
    parts = [first] + [first + generator.integers(0, 4, SIZE).astype(np.uint16) for _ in weights]
    check(parts, fractions)
    out, _ = merged(parts, fractions)
    mean, _, _ = exact(parts, fractions)
    assert np.array_equal(out.view(np.uint16), bfloat16(mean))


def test_few_sums_that_float32_puts_on_the_wrong_side_of_a_middle() -> None:
    """In more places than a few, all would be summed in float64."""
    generator = np.random.default_rng(0)
    first = bfloat16(generator.standard_normal(SIZE))
    other = first + (generator.random(SIZE) < 0.02).astype(np.uint16)
    for fractions in ([0.3, 0.2, 0.5], [0.1, 0.4, 0.5], [0.37, 0.13 - 2**-30, 0.5 + 2**-30]):
        parts = [first, first, first, other]
        out, _ = merged(parts, fractions)
        mean, _, _ = exact(parts, fractions)
        assert np.array_equal(out.view(np.uint16), bfloat16(mean))


def test_weights_beyond_1_and_below_0() -> None:
    """θ0 + 1.5 (θ̄ − θ0): θ0 is a term of its own."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal(SIZE)
    groups = [bfloat16(base + 0.01 * generator.standard_normal(SIZE)) for _ in range(2)]
    check([bfloat16(base), *groups, bfloat16(base)], [0.9, 0.6, -0.5])


def test_distances_that_cancel_vanish_or_have_no_range() -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal(SIZE).astype(np.float32)
    step = (2.0**-6 * generator.integers(-3, 4, SIZE)).astype(np.float32)
    for factor in (1.0, 2.0**-90, 2.0**90):
        parts = [factor * base, factor * (base + step), factor * (base - step)]
        fractions = [0.5, 0.5]
        _, squares = merged([np.float32(part) for part in parts], fractions, "F32")
        mean, _, values = exact([np.float32(part) for part in parts], fractions)
        wanted = [((mean - values[0]) ** 2).sum()] + [((value - values[0]) ** 2).sum() for value in values[1:]]
        assert [squares[0], *squares[2:]] == pytest.approx(wanted, rel=1e-6)
    assert merged([base, base], [1.0], "F32")[1] == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("ratio", [8, 60])
def test_groups_that_move_against_each_other(ratio: int, dtype: str) -> None:
    """What float32 cuts off the weights counts `ratio` times in the little that is left: of a distance, 1e-6 at 60."""
    generator = np.random.default_rng(0)
    base, step = generator.standard_normal(SIZE), 0.01 * generator.standard_normal(SIZE)
    moved = [base, base + step * (1 + 1 / ratio) / 0.3, base - step * (1 - 1 / ratio) / 0.7]
    parts = [bfloat16(part) if dtype == "BF16" else np.float32(part) for part in moved]
    mean, _, values = exact(parts, [0.3, 0.7])
    _, squares = merged(parts, [0.3, 0.7], dtype)
    assert squares[0] == pytest.approx(((mean - values[0]) ** 2).sum(), rel=2e-6)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_device_gives_the_same(dtype: str) -> None:
    """The accelerator's code, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, generator=generator)
    tensors = [base, *(base + 0.01 * torch.randn(SIZE, generator=generator) for _ in range(3))]
    fractions = [0.61, 0.27, 0.12]
    ours, squares = merged([tensor.numpy() for tensor in tensors], fractions, dtype)
    theirs = np.empty_like(ours)
    found = DeviceSums("cpu", fractions)(tensors[0], tensors[1:], None, dtype, theirs)
    assert found == pytest.approx(squares, rel=1e-6)
    if dtype == "F64":  # additions in another order, or fused, may differ in the last bits
        assert np.allclose(ours.view(np.float64), theirs.view(np.float64), rtol=1e-12, atol=1e-15)
    else:
        assert (ours == theirs).mean() > 0.999


def test_bfloat16_is_rounded_once() -> None:
    tiny = 2.0**-40
    values = np.array([1 + 2**-8 + tiny, -1 - 2**-8 - tiny, 1 + 3 * 2**-8 - tiny, 1 + 2**-8, 1 + 3 * 2**-8])
    rounded = round_to_bfloat16(values).view(np.float32).tolist()
    assert rounded == [1 + 2**-7, -1 - 2**-7, 1 + 2**-7, 1.0, 1 + 2**-6]
    low = np.arange(0, 0x7F00, dtype=np.uint16)
    below, above = Sums.to_float64(low), Sums.to_float64(low + np.uint16(1))
    for hair, wanted in ((1 + 2.0**-45, low + np.uint16(1)), (1 - 2.0**-45, low)):
        middle = (below + above) / 2 * hair
        assert np.array_equal(bfloat16(middle), wanted)
        assert np.array_equal(bfloat16(-middle), wanted | 0x8000)


def test_a_merge_loads_no_torch(tmp_path) -> None:
    """What a merge of whole checkpoints imports is most of what a small one takes."""
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from safetensors.numpy import save_file\n"
        "from merit_hf.merge import merge_checkpoints\n"
        "root = Path(sys.argv[1])\n"
        "for k in range(3):\n"
        "    (root / str(k)).mkdir()\n"
        "    (root / str(k) / 'config.json').write_text('{}')\n"
        "    save_file({'x': np.full(5000, k, dtype=np.float32)}, root / str(k) / 'model.safetensors')\n"
        "merge_checkpoints(root / '0', [root / '1', root / '2'], [1, 3], root / 'out')\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'scipy', 'sklearn', 'pandas', 'pyarrow', 'pydantic'}\n"
        "sys.stdout.write(json.dumps(sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
