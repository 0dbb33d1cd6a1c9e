"""Merging LoRA adapters adds up what they add to the base, never A and B by themselves: dense, concat and svd."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import assert_nearest, load, needs_mergekit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_base
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from merit_hf.adapted import AdaptedCheckpoint, Adapter
from merit_hf.adapter_merge import merge_adapters_into, product_norm, truncate
from merit_hf.adapters import (
    adapter_settings,
    is_adapter,
)
from merit_hf.align import Checkpoint
from merit_hf.config import ConfigError, MeritError
from merit_hf.group_merge import adapters_recipe
from merit_hf.merge import merge_checkpoints
from merit_hf.sft import build_args, load_checkpoint

WEIGHTS = [123456789, 45678901, 7654321]
FRACTIONS = [weight / sum(WEIGHTS) for weight in WEIGHTS]
# Of a weight of [1000, 192], a piece of the streaming merge ends in the midst of a row.
SHAPE = {"hidden_size": 192, "intermediate_size": 1000, "num_hidden_layers": 1}
PLAIN = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "down_proj"]}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "plain": (PLAIN, {UP: 16 / 4, Q: 16 / 4}),
    "rslora": ({**PLAIN, "use_rslora": True}, {UP: 16 / math.sqrt(4), Q: 16 / math.sqrt(4)}),
    "rank pattern": ({**PLAIN, "rank_pattern": {"up_proj": 2}}, {UP: 16 / 2, Q: 16 / 4}),
    "alpha pattern": ({**PLAIN, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}, {UP: 3 / 4, Q: 16 / 4}),
    "all linear": ({"r": 3, "target_modules": "all-linear"}, {UP: 8 / 3, Q: 8 / 3}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", seed=3, **SHAPE)


@pytest.fixture(scope="module")
def family(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Three adapters for each case, made once. Read only."""
    root, made = tmp_path_factory.mktemp("adapters"), dict[str, list[Path]]()

    def make(case: str) -> list[Path]:
        if case not in made:
            made[case] = [make_adapter(base, root / case / str(k), k, 0.05, **CASES[case][0]) for k in range(3)]
        return made[case]

    return make


def update(folder: Path, module: str, scaling: float) -> torch.Tensor:
    """s·B·A in float64, from the file alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return scaling * (b @ a)


def merged_adapter(base: Path, folders: list[Path], output: Path, method: str, rank: int | None = None) -> Any:
    output.mkdir()
    return merge_adapters_into(output, base, folders, WEIGHTS[: len(folders)], method, rank)


def weights_with(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of base and adapter as PEFT itself merges them, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload()
    return {name: value for name, value in merged.state_dict().items() if name != "lm_head.weight"}


# Dense


@pytest.mark.parametrize("case", CASES)
def test_dense_is_the_base_and_the_weighted_sum_of_what_the_adapters_add(
    case: str, base: Path, family: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    folders, scalings = family(case), CASES[case][1]
    stats = merge_checkpoints(base, folders, WEIGHTS, tmp_path / "out", out_dtype="float32")
    merged, origin = load(tmp_path / "out"), load(base)
    assert merged.keys() == origin.keys()
    for module, scaling in scalings.items():
        name = f"{module}.weight"
        parts = [update(folder, module, scaling) for folder in folders]
        exact = origin[name].double() + sum(w * part for w, part in zip(FRACTIONS, parts, strict=True))
        assert_nearest(merged[name], exact)
        assert (merged[name] - origin[name].float()).norm() > 0.01
    untouched = "model.layers.0.self_attn.k_proj.weight" if case != "all linear" else "model.norm.weight"
    assert torch.equal(merged[untouched], origin[untouched].float())
    moved = sum((merged[name].double() - origin[name].double()).square().sum() for name in merged).sqrt()
    assert stats.displacement == pytest.approx(float(moved), rel=1e-6)


def test_dense_is_not_made_of_the_mean_factors(
    base: Path, family: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    folders = family("plain")
    merge_checkpoints(base, folders, WEIGHTS, tmp_path / "out", out_dtype="float32")
    factors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    a, b = (
        sum(w * f[f"base_model.model.{UP}.lora_{x}.weight"] for w, f in zip(FRACTIONS, factors, strict=True))
        for x in "AB"
    )
    found = load(tmp_path / "out")[f"{UP}.weight"] - load(base)[f"{UP}.weight"].float()
    assert (found - 4 * b @ a).norm() > 0.3 * found.norm()


def test_one_adapter_is_what_peft_makes_of_it(base: Path, family: Callable[[str], list[Path]], tmp_path: Path) -> None:
    for case in CASES:
        folder = family(case)[0]
        merge_checkpoints(base, [folder], [1], tmp_path / case, out_dtype="float32")
        for name, expected in weights_with(base, folder).items():
            torch.testing.assert_close(load(tmp_path / case)[name].double(), expected, rtol=1e-6, atol=1e-8)


def test_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D, a square one among them, and a checkpoint that names its tensors without the model's prefix."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).save_pretrained(
        tmp_path / "base"
    )
    tensors = {name.removeprefix("transformer."): value for name, value in load(tmp_path / "base").items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    lora = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [make_adapter(tmp_path / "base", tmp_path / str(k), k, 0.1, **lora) for k in range(2)]
    merge_checkpoints(tmp_path / "base", folders, [1, 3], tmp_path / "out")
    exact = [weights_with(tmp_path / "base", folder) for folder in folders]
    for name, value in load(tmp_path / "out").items():
        expected = 0.25 * exact[0][f"transformer.{name}"] + 0.75 * exact[1][f"transformer.{name}"]
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(load(tmp_path / "out")["h.0.attn.c_proj.weight"], tensors["h.0.attn.c_proj.weight"])


@settings(max_examples=50, deadline=None)
@given(bounds=st.tuples(st.integers(0, 192_000), st.integers(0, 200_000)))
def test_a_slice_is_that_part_of_the_whole(
    bounds: tuple[int, int], base: Path, family: Callable[[str], list[Path]]
) -> None:
    folder = family("plain")[0]
    opened = AdaptedCheckpoint(Checkpoint(base), folder)
    whole = (load(base)[f"{UP}.weight"].double() + update(folder, UP, 4)).reshape(-1)
    part = opened.flat(f"{UP}.weight")[slice(*bounds)]
    torch.testing.assert_close(part, whole[slice(*bounds)], rtol=1e-12, atol=1e-14)


# One adapter of several


@pytest.mark.parametrize("case", CASES)
def test_concat_adds_what_dense_adds(
    case: str, base: Path, family: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    folders = family(case)
    dense = merge_checkpoints(base, folders, WEIGHTS, tmp_path / "dense", out_dtype="float32")
    stats = merged_adapter(base, folders, tmp_path / "concat", "concat")
    expected = load(tmp_path / "dense")
    for name, value in weights_with(base, tmp_path / "concat").items():
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-5, atol=1e-6)
    adapter = Adapter(tmp_path / "concat")
    for module in adapter.modules:
        assert adapter.rank(module) == sum(Adapter(folder).rank(module) for folder in folders)
        assert adapter.scaling(module) == 1
    assert stats.relative_error == 0
    assert stats.displacement == pytest.approx(dense.displacement, rel=1e-6)
    assert stats.group_displacements == pytest.approx(dense.group_displacements, rel=1e-6)


@pytest.mark.parametrize("case", ["plain", "rank pattern"])
def test_svd_is_the_nearest_of_its_rank_and_says_what_it_cuts(
    case: str, base: Path, family: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    folders, scalings = family(case), CASES[case][1]
    merged_adapter(base, folders, tmp_path / "concat", "concat")
    stats = merged_adapter(base, folders, tmp_path / "svd", "svd", 3)
    cut, total = 0.0, 0.0
    for module in Adapter(tmp_path / "svd").modules:
        exact = update(tmp_path / "concat", module, 1)
        found = update(tmp_path / "svd", module, 1)
        values = torch.linalg.svdvals(exact)
        best = float(values[3:].square().sum().sqrt())
        assert float((exact - found).norm()) == pytest.approx(best, rel=1e-5)
        cut, total = cut + best**2, total + float(exact.norm()) ** 2
    assert stats.relative_error == pytest.approx(math.sqrt(cut / total), rel=1e-5)
    assert 0.05 < stats.relative_error < 1
    assert (stats.rank, adapter_settings(tmp_path / "svd")["r"]) == (3, 3)
    assert set(scalings) <= set(Adapter(tmp_path / "svd").modules)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 12), inner=st.integers(1, 12), summed=st.integers(1, 16), rank=st.integers(1, 16),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_truncation_by_the_small_core(out: int, inner: int, summed: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(shape, generator=generator).double() for shape in ((out, summed), (summed, inner)))
    assert product_norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-9)
    if rank > summed:
        with pytest.raises(ConfigError, match="more than the adapters' summed rank"):
            truncate((b, a), rank)
        return
    (kept_b, kept_a), cut = truncate((b, a), rank)
    assert kept_b.shape == (out, rank)
    assert kept_a.shape == (rank, inner)
    values = torch.linalg.svdvals(b @ a)
    assert cut == pytest.approx(float(values[rank:].norm()), abs=1e-9)
    assert float((b @ a - kept_b @ kept_a).norm()) == pytest.approx(cut, abs=1e-9)


def test_a_merged_adapter_works_with_its_base(base: Path, family: Callable[[str], list[Path]], tmp_path: Path) -> None:
    merged_adapter(base, family("plain"), tmp_path / "concat", "concat")
    names = {path.name for path in (tmp_path / "concat").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "config.json" not in names
    assert is_adapter(tmp_path / "concat")
    merge_checkpoints(base, family("plain"), WEIGHTS, tmp_path / "dense", out_dtype="float32")
    assert not is_adapter(tmp_path / "dense")
    args = build_args({})
    ids = torch.arange(20)[None]
    logits = [
        load_checkpoint(folder, base, args).eval()(input_ids=ids).logits
        for folder in (tmp_path / "concat", tmp_path / "dense", base)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.01


@needs_mergekit
def test_mergekit_takes_the_recipe_of_adapters(
    base: Path, family: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    recipe = adapters_recipe(base, family("plain"), WEIGHTS, "float32")
    assert "lora" in recipe
    options = MergeOptions(quiet=True, write_model_card=False, lora_merge_cache=str(tmp_path / "cache"))
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(tmp_path / "theirs"), options)
    merge_checkpoints(base, family("plain"), WEIGHTS, tmp_path / "ours", out_dtype="float32")
    theirs = load(tmp_path / "theirs")
    for name, value in load(tmp_path / "ours").items():
        # mergekit merges each adapter into the base's own bfloat16 first.
        torch.testing.assert_close(theirs[name], value, rtol=2**-7, atol=2**-7 * float(value.abs().max()))


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_adapters_that_do_not_merge(base: Path, base_dir: Path, tmp_path: Path) -> None:
    first = f"base_model.model.{Q}.lora_A.weight"
    changes: dict[str, tuple[Callable[..., object], str]] = {
        "nan": (lambda t: t[first].fill_(float("nan")), "not finite"),
        "half": (lambda t: t.pop(first), "lora_A.weight is missing"),
        "more": (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "lm_head.weight is no factor of one",
        ),
    }
    for name, (change, said) in changes.items():
        folder = damage(make_adapter(base, tmp_path / name, 0, **PLAIN), change)
        with pytest.raises(MeritError, match=said):
            merge_checkpoints(base, [folder], [1], tmp_path / "out")
        with pytest.raises(MeritError, match=said):
            merged_adapter(base, [folder], tmp_path / f"{name}-out", "concat")
    other = make_base(tmp_path / "other", hidden_size=64, num_hidden_layers=1)
    ours, theirs = (make_adapter(b, tmp_path / b.parent.name, 0, **PLAIN) for b in (base, other))
    with pytest.raises(MeritError, match=r"is for a weight of .*, the base's is"):
        merge_checkpoints(base, [ours, theirs], [1, 1], tmp_path / "out")
    with pytest.raises(MeritError, match="Merge adapters of one base"):
        merged_adapter(base, [ours, theirs], tmp_path / "bases", "concat")
    deeper = make_adapter(base_dir, tmp_path / "deeper", 0, **PLAIN)
    with pytest.raises(MeritError, match=r"adapts `model.layers.1.mlp.down_proj`, and 0 tensors of the base"):
        merge_checkpoints(base, [deeper], [1], tmp_path / "out")
    dora = make_adapter(base, tmp_path / "dora", 0, use_dora=True, **PLAIN)
    with pytest.raises(MeritError, match="use_dora=True is not supported: DoRA"):
        merge_checkpoints(base, [dora], [1], tmp_path / "out")
