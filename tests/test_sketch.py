"""Read-outs are linear, additive over parts, the same in every process, and keep inner products."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_mixture

from merit_hf.config import ConfigError, MeritConfig
from merit_hf.conflict import conflict_matrix
from merit_hf.gradients import trained_parameters
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import load_model
from merit_hf.sketch import CountSketch, Sketch, StrideSketch, layer_parts, make_sketch

BOUNDARY = 1 << 31
GOLDEN = [0, 0, -3, -5, -5, 1, -2, 0, 0, 0, 0, 1, 0, 6, 0, 0]
GOLDEN_FAR = [0, 0, 10, 0, -2, 0, 0, -2, 8, 0, 0, -4, 0, 5, 0, -12]


def read(sketch: Sketch, tensor: torch.Tensor, name: str = "w", offset: int = 0) -> torch.Tensor:
    out = torch.zeros(sketch.dim)
    sketch.add(out, name, tensor, offset)
    return out


def vector(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def mix(x: int) -> int:
    """Wellons' lowbias32 in whole numbers."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def place(seed: int, name: str, index: int, dim: int) -> tuple[int, int]:
    """Bucket and sign of one entry, by plain Python: the definition that every later version must keep."""
    import hashlib

    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    x = mix(mix((index & 0x7FFFFFFF) ^ first) ^ mix(second ^ index >> 31))
    return (x & 0x7FFFFFFF) * dim >> 31, -1 if x >> 31 else 1


def test_golden_values() -> None:
    """Sketches of one plan come from many machines and years; these numbers must never change."""
    out = read(CountSketch(dim=16, seed=7), torch.arange(1.0, 11.0), "model.layers.0.mlp.weight")
    assert out.tolist() == GOLDEN
    out = read(CountSketch(dim=16, seed=7), torch.arange(1.0, 11.0), "model.layers.0.mlp.weight", 5 * BOUNDARY - 4)
    assert out.tolist() == GOLDEN_FAR


@pytest.mark.parametrize("offset", [0, 12345, BOUNDARY - 3, BOUNDARY, 7 * BOUNDARY - 2, (1 << 40) + 1])
@pytest.mark.parametrize("dim", [16, 1000, 65536])
def test_every_entry_goes_where_the_definition_says(offset: int, dim: int) -> None:
    sketch, values = CountSketch(dim, seed=3), torch.arange(1.0, 8.0)
    expected = torch.zeros(dim)
    for i, value in enumerate(values.tolist()):
        bucket, sign = place(3, "layer.weight", offset + i, dim)
        expected[bucket] += sign * value
    assert torch.equal(read(sketch, values, "layer.weight", offset), expected)


@pytest.mark.parametrize("kind", ["count_sketch", "stride", "exact"])
def test_linear(kind: str) -> None:
    sketch = make_sketch(kind, [("w", 5000)], dim=64, stride=3, seed=1)
    a, b = vector(5000, 1), vector(5000, 2)
    combined = 2.0 * read(sketch, a) - 0.5 * read(sketch, b)
    assert torch.allclose(read(sketch, 2.0 * a - 0.5 * b), combined, atol=1e-4)
    assert combined.abs().max() > 1


@pytest.mark.parametrize("kind", ["count_sketch", "stride", "exact"])
def test_additive_over_shards_and_parameters(kind: str) -> None:
    sizes = {"b": 1003, "a": 400_001, "c": 7}
    sketch = make_sketch(kind, sizes.items(), dim=128, stride=5, seed=1)
    tensors = {name: vector(size, seed) for seed, (name, size) in enumerate(sizes.items())}
    whole = sum(read(sketch, tensor, name) for name, tensor in tensors.items())
    in_place, in_shards = torch.zeros(sketch.dim), torch.zeros(sketch.dim)
    for name in ("c", "a", "b"):
        sketch.add(in_place, name, tensors[name])
        cuts = [0, sizes[name] // 3, sizes[name] // 2 + 1, sizes[name]]
        for start, stop in itertools.pairwise(cuts):
            sketch.add(in_shards, name, tensors[name][start:stop], offset=start)
    assert torch.allclose(in_place, whole, atol=1e-3)
    assert torch.allclose(in_shards, whole, atol=1e-3)


@pytest.mark.parametrize("kind", ["count_sketch", "stride", "exact"])
def test_a_matrix_is_read_as_its_flat_entries_in_any_float_dtype(kind: str) -> None:
    sketch = make_sketch(kind, [("w", 600)], dim=32, stride=4, seed=1)
    matrix = vector(600).to(torch.bfloat16).reshape(20, 30)
    assert torch.equal(read(sketch, matrix), read(sketch, matrix.flatten().float()))
    assert torch.equal(read(sketch, matrix.t().contiguous().t()), read(sketch, matrix))


def test_a_chunk_over_the_32_bit_boundary_equals_its_halves() -> None:
    sketch, values = CountSketch(256, seed=0), vector(1000)
    for boundary in (BOUNDARY, 3 * BOUNDARY):
        whole = read(sketch, values, offset=boundary - 400)
        halves = read(sketch, values[:400], offset=boundary - 400) + read(sketch, values[400:], offset=boundary)
        assert torch.allclose(whole, halves, atol=1e-5)
        # The index does not wrap: the same entries 2³¹ further on lie elsewhere.
        assert not torch.allclose(whole, read(sketch, values, offset=boundary - 400 + BOUNDARY), atol=1e-2)


def test_the_same_in_another_process() -> None:
    here = read(CountSketch(64, seed=5), vector(1000), "some.name").tolist()
    script = (
        "import json, sys, torch\n"
        "from merit_hf.sketch import CountSketch\n"
        "out = torch.zeros(64)\n"
        "CountSketch(64, 5).add(out, 'some.name', torch.randn(1000, generator=torch.Generator().manual_seed(0)))\n"
        "sys.stdout.write(json.dumps(out.tolist()))\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == here


def test_seed_and_name_decide_where_entries_go() -> None:
    values = vector(1000)
    first = read(CountSketch(64, seed=0), values, "a")
    assert torch.equal(first, read(CountSketch(64, seed=0), values, "a"))
    assert not torch.allclose(first, read(CountSketch(64, seed=1), values, "a"), atol=0.1)
    assert not torch.allclose(first, read(CountSketch(64, seed=0), values, "b"), atol=0.1)


def places(seed: int, name: str, count: int, dim: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bucket and sign of many entries, read off the sketch itself by powers that do not mix."""
    buckets, signs = [], []
    sketch = CountSketch(dim, seed)
    for i in range(count):
        out = read(sketch, torch.ones(1), name, offset + i)
        buckets.append(int(out.abs().argmax()))
        signs.append(float(out.sum()))
    return np.array(buckets), np.array(signs)


def test_buckets_are_even_and_independent_of_each_other() -> None:
    count, dim = 800, 16
    a = places(0, "a", count, dim)
    others = [places(0, "b", count, dim), places(1, "a", count, dim), places(0, "a", count, dim, offset=BOUNDARY)]
    expected = count / dim
    assert ((np.bincount(a[0], minlength=dim) - expected) ** 2 / expected).sum() < 35  # χ², 15 degrees: p = 0.002
    assert abs(a[1].mean()) < 4 / count**0.5
    assert abs(np.corrcoef(a[0], a[1])[0, 1]) < 4 / count**0.5
    for buckets, signs in others:
        assert abs((buckets == a[0]).mean() - 1 / dim) < 4 * (1 / dim / count) ** 0.5
        assert abs((signs * a[1]).mean()) < 4 / count**0.5


@pytest.mark.parametrize("structure", ["dense", "sparse", "one block"])
def test_inner_products_are_unbiased_with_an_error_of_one_over_root_k(structure: str) -> None:
    """Over pairs and seeds: mean error 0, and sd within 15 % of √((‖g‖²‖h‖² + ⟨g,h⟩² − 2Σg²h²) / k)."""
    size, pairs = 20_000, 12
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((pairs, size))
    if structure == "sparse":
        vectors *= rng.random((1, size)) < 0.02
    if structure == "one block":
        vectors[:, 300:] = 0
    vectors += 0.5 * np.roll(vectors, 1, axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = vectors @ vectors.T
    above = np.triu_indices(pairs, 1)
    theory = np.sqrt(1 + exact**2 - 2 * (vectors**2) @ (vectors**2).T)[above]
    tensors = torch.tensor(vectors, dtype=torch.float32)
    for k in (256, 1024, 4096):
        scaled = []
        for seed in range(16):
            read_outs = np.stack([read(CountSketch(k, seed), tensor).numpy() for tensor in tensors])
            scaled.append((read_outs @ read_outs.T - exact)[above] * k**0.5 / theory)
        errors = np.array(scaled)
        assert abs(errors.mean()) < 0.12
        assert 0.85 < errors.std() < 1.15


def test_stride_takes_every_sth_entry_of_all_parameters_by_name() -> None:
    sizes = {"b": 7, "a": 5, "c": 1}
    tensors = {name: vector(size, seed) for seed, (name, size) in enumerate(sizes.items())}
    joined = torch.cat([tensors[name] for name in ("a", "b", "c")])
    for stride in (1, 2, 3, 5, 20):
        sketch = make_sketch("stride", list(sizes.items()), dim=0, stride=stride, seed=0)
        assert sketch.dim == len(joined[::stride])
        out = torch.zeros(sketch.dim)
        for name, tensor in tensors.items():
            sketch.add(out, name, tensor)
        assert torch.equal(out, joined[::stride])


def test_exact_is_the_gradient_itself() -> None:
    sketch = make_sketch("exact", [("b", 3), ("a", 2)], dim=16, stride=5, seed=0)
    assert isinstance(sketch, StrideSketch)
    assert sketch.dim == 5
    out = torch.zeros(5)
    sketch.add(out, "b", torch.tensor([3.0, 4.0, 5.0]))
    sketch.add(out, "a", torch.tensor([1.0, 2.0]))
    assert out.tolist() == [1, 2, 3, 4, 5]


NAMES = ["model.layers.10.w", "model.layers.2.w", "model.layers.2.v", "model.embed.weight", "model.norm.weight"]


def test_a_sketch_by_layer_keeps_inner_products_whole_and_by_layer() -> None:
    parts = layer_parts(NAMES, 30_000)
    assert list(parts) == ["2", "10", "other"]
    assert parts == {"2": (0, 10_000), "10": (10_000, 20_000), "other": (20_000, 30_000)}
    sketch = make_sketch("count_sketch", [(name, 4000) for name in NAMES], 30_000, 1, seed=3, by_layer=True)
    first, second = ({name: vector(4000, 10 * side + i) for i, name in enumerate(NAMES)} for side in range(2))
    second = {name: tensor + 0.7 * first[name] for name, tensor in second.items()}
    a, b = torch.zeros(sketch.dim), torch.zeros(sketch.dim)
    for name in NAMES:
        sketch.add(a, name, first[name])
        sketch.add(b, name, second[name][:1000])
        sketch.add(b, name, second[name][1000:], offset=1000)
    exact = {name: float(first[name] @ second[name]) for name in NAMES}
    norms = {name: float(first[name].norm() * second[name].norm()) for name in NAMES}
    members = {"2": NAMES[1:3], "10": NAMES[:1], "other": NAMES[3:]}
    for layer, (start, stop) in parts.items():
        wanted, scale = (sum(values[name] for name in members[layer]) for values in (exact, norms))
        assert float(a[start:stop] @ b[start:stop]) == pytest.approx(wanted, abs=4 * scale / 10_000**0.5)
    assert float(a @ b) == pytest.approx(sum(exact.values()), abs=4 * sum(norms.values()) / 30_000**0.5)


def test_a_sketch_too_short_for_its_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="40 numbers are too few for 3 layers; at least 48"):
        layer_parts(NAMES, 40)


@pytest.mark.slow
def test_a_plan_by_layer_has_a_matrix_of_every_layer(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, ("copy", "reverse", "count"), count=12)
    plans = {
        kind: MeritPlanner(MeritConfig.from_yaml(config, overrides), Progress(quiet=True)).plan(tmp_path / kind)
        for kind, overrides in {
            "exact": ["plan.sketch=exact"], "layers": ["plan.sketch_by_layer=true", "plan.sketch_dim=65536"],
        }.items()
    }  # fmt: skip
    assert np.abs(plans["exact"].conflict_matrix - plans["layers"].conflict_matrix).max() < 0.03
    exact = plans["exact"].load_sketches()
    start, wanted = 0, {"0": [], "1": [], "other": []}
    model = load_model(plans["exact"].base_folder())
    for name, parameter in sorted(trained_parameters(model)):
        layer = next((part for part in name.split(".") if part.isdigit()), "other")
        wanted[layer].append(exact[:, start : start + parameter.numel()])
        start += parameter.numel()
    found = plans["layers"].layer_matrices()
    assert list(found) == ["0", "1", "other"]
    for layer, matrix in found.items():
        assert np.abs(matrix - conflict_matrix(np.concatenate(wanted[layer], axis=1))).max() < 0.05
    with pytest.raises(ConfigError, match="sketch_by_layer=true"):
        plans["exact"].layer_matrices()
    short = MeritConfig.from_yaml(config, ["plan.sketch_by_layer=true", "plan.sketch_dim=32"])
    with pytest.raises(ConfigError, match=r"sketch_dim=32: 32 numbers are too few for 3 layers"):
        MeritPlanner(short, Progress(quiet=True)).plan(tmp_path / "short")
