"""merge.interpolate_to_init: θ0 + α (θ̄ − θ0), in every form that a merge takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import assert_nearest, load, make_family, make_folder, mean64, needs_mergekit, run_mergekit
from safetensors.torch import load_file
from test_group_merge import finish_group, make_plan
from tiny import make_adapter, make_base
from typer.testing import CliRunner

from merit_hf.adapter_merge import merge_adapters_into
from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.group_merge import adapters_recipe, merge_groups
from merit_hf.merge import MERGEKIT_CONFIG_NAME, merge_checkpoints
from merit_hf.report.sections import step_agreement

WEIGHTS = [123456789, 45678901, 7654321]
ADAPTER = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Path]]]:
    return make_family(tmp_path_factory.mktemp("family"))


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(1e-3, 2),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_every_value_is_the_nearest_to_the_exact_one(
    alpha: float, weights: list[float], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(64, generator=generator).to(dtype) for _ in range(len(weights) + 1)]
    with tempfile.TemporaryDirectory() as name:
        base, *groups = [make_folder(Path(name) / str(k), {"x": value}) for k, value in enumerate(values)]
        merge_checkpoints(base, groups, weights, Path(name) / "out", interpolate_to_init=alpha)
        origin, mean = values[0].double(), mean64(groups, weights)["x"]
        # Rounded once, whatever α is; the sums themselves are float64.
        exact = origin + alpha * (mean - origin)
        error = (load(Path(name) / "out")["x"].double() - exact).abs()
        near = (exact.to(torch.float32).to(dtype).double() - exact).abs()
        assert bool((error <= near + 1e-14).all())


def test_one_is_the_mean_and_half_is_the_midpoint(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.bfloat16)
    plain = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "plain")
    stats = {
        alpha: merge_checkpoints(base, groups, WEIGHTS, tmp_path / str(alpha), interpolate_to_init=alpha)
        for alpha in (0.5, 1.0)
    }
    for name in ("model.safetensors", MERGEKIT_CONFIG_NAME):
        assert (tmp_path / "1.0" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    origin, mean, half = load(base), mean64(groups, WEIGHTS), load(tmp_path / "0.5")
    for name, tensor in half.items():
        assert_nearest(tensor, (origin[name].double() + mean[name]) / 2)
    assert stats[1.0].displacement == plain.displacement
    assert stats[0.5].displacement == pytest.approx(plain.displacement / 2, rel=1e-12)
    assert stats[0.5].group_displacements == plain.group_displacements
    assert stats[0.5].fractions == plain.fractions


def test_the_way_is_a_straight_line_and_goes_on_beyond_the_mean(tmp_path: Path) -> None:
    values = [torch.randn(257, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    base, *groups = [make_folder(tmp_path / f"in-{k}", {"x": value}) for k, value in enumerate(values)]
    moved, lengths = {}, {}
    for alpha in (0.5, 1.0, 1.5, 2.0):
        stats = merge_checkpoints(base, groups, WEIGHTS, tmp_path / str(alpha), interpolate_to_init=alpha)
        moved[alpha], lengths[alpha] = load(tmp_path / str(alpha))["x"] - values[0], stats.displacement
    for alpha, step in moved.items():
        torch.testing.assert_close(step, alpha * moved[1.0], rtol=1e-12, atol=1e-12)
        assert lengths[alpha] == pytest.approx(float(step.norm()), rel=1e-9)


@needs_mergekit
@pytest.mark.parametrize("alpha", [0.3, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergekit_makes_the_same_of_the_recipe_and_as_an_engine(
    family: Callable, alpha: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, groups = family(dtype)
    stats = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "ours", interpolate_to_init=alpha)
    engine = merge_checkpoints(
        base, groups, WEIGHTS, tmp_path / "engine", engine="mergekit", interpolate_to_init=alpha
    )
    ours, origin, mean = load(tmp_path / "ours"), load(base), mean64(groups, WEIGHTS)
    for theirs in (
        run_mergekit(tmp_path / "ours" / MERGEKIT_CONFIG_NAME, tmp_path / "theirs"),
        load(tmp_path / "engine"),
    ):
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            exact = origin[name].double() + alpha * (mean[name] - origin[name].double())
            most = max(float(part.abs().max()) for part in (exact, mean[name], origin[name]))
            size = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * most
            assert bool(((tensor.double() - theirs[name].double()).abs() <= size).all())
    assert engine.displacement == pytest.approx(stats.displacement, rel=1e-5)
    recipe = yaml.safe_load((tmp_path / "ours" / MERGEKIT_CONFIG_NAME).read_text())
    assert recipe["models"][-1] == {"model": str(base), "parameters": {"weight": 1 - alpha}}


def dense_delta(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {name.rpartition(".lora_")[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in factors}


def test_a_merged_adapter_is_scaled(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", seed=3)
    groups = [make_adapter(base, tmp_path / f"in-{k}", k, 0.05, **ADAPTER) for k in range(2)]
    origin = load(base)
    for alpha in (1.0, 0.5, 1.5):
        for form, rank in (("concat", None), ("svd", 8)):
            (tmp_path / f"{form}-{alpha}").mkdir()
            stats = merge_adapters_into(
                tmp_path / f"{form}-{alpha}", base, groups, [3, 1], form, rank, interpolate_to_init=alpha
            )
            whole, made = dense_delta(tmp_path / f"{form}-1.0"), dense_delta(tmp_path / f"{form}-{alpha}")
            for name, delta in made.items():
                torch.testing.assert_close(delta, alpha * whole[name], rtol=1e-5, atol=1e-7)
            assert stats.displacement == pytest.approx(
                float(sum(d.norm() ** 2 for d in made.values()) ** 0.5), rel=1e-6
            )
        merge_checkpoints(
            base, groups, [3, 1], tmp_path / f"dense-{alpha}", out_dtype="float32", interpolate_to_init=alpha
        )
        for name, delta in dense_delta(tmp_path / f"concat-{alpha}").items():
            weight = name.removeprefix("base_model.model.") + ".weight"
            merged = load(tmp_path / f"dense-{alpha}")[weight].double()
            torch.testing.assert_close(merged - origin[weight].double(), delta, rtol=1e-4, atol=1e-6)
    recipe = yaml.safe_load(adapters_recipe(base, groups, [3, 1], "float32", 0.5))
    assert [model["parameters"]["weight"] for model in recipe["models"]] == [0.375, 0.125, 0.5]
    assert [isinstance(model["model"], dict) for model in recipe["models"]] == [True, True, False]


def test_manifest_card_and_command_say_it(tmp_path: Path) -> None:
    plan = make_plan(make_base(tmp_path / "base", seed=9))
    content = {"base": {"model_name_or_path": "base"}, "datasets": [{"name": n, "path": "x"} for n in plan.names]}
    content |= {"plan": {"num_groups": 3}, "merge": {"interpolate_to_init": 1.5}}
    plan.config = MeritConfig.from_dict(content).model_dump(mode="json")
    groups = [finish_group(plan, make_base(tmp_path / f"in-{k}", seed=k), k) for k in range(3)]
    plan.save_pretrained(tmp_path / "plan")
    for name, option in (("config", []), ("option", ["--interpolate-to-init", "0.25"])):
        call = ["merge", str(tmp_path / "plan"), *map(str, groups), "--output", str(tmp_path / name), *option]
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 0, done.output
    for name, alpha, told in (("config", 1.5, "goes on to 1.5"), ("option", 0.25, "stops at 0.25")):
        manifest = json.loads((tmp_path / name / "merit.json").read_text())
        assert manifest["interpolate_to_init"] == alpha
        assert [group["weight"] for group in manifest["groups"]] == [0.6, 0.3, 0.1], "those of the mean"
        card = (tmp_path / name / "README.md").read_text()
        assert f"It {told} of the way from the base to that mean" in card
        assert f"--interpolate-to-init {alpha}" in card
        assert "- model: base" in card
        assert str(tmp_path) not in card
    stats = merge_groups(plan, groups, tmp_path / "mean")
    shorter = json.loads((tmp_path / "option" / "merit.json").read_text())["stats"]
    assert shorter["displacement"] == pytest.approx(stats.displacement / 4, rel=1e-5)
    weights, moved = [0.6, 0.3, 0.1], stats.group_displacements
    assert step_agreement(weights, moved, shorter["displacement"] / 0.25) == pytest.approx(
        step_agreement(weights, moved, stats.displacement), abs=1e-4
    )


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({"interpolate_to_init": 0}, "merge.interpolate_to_init=0"),
        ({"interpolate_to_init": 2.5}, "merge.interpolate_to_init=2.5"),
        ({"interpolate_to_init": "half"}, "merge.interpolate_to_init='half'"),
        (
            {"interpolate_to_init": 0.5, "engine": "mergekit", "method": "ties"},
            "interpolate_to_init=0.5 is of the mean, and method is ties",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(merge: dict, said: str, tmp_path: Path) -> None:
    content = {"base": {"model_name_or_path": "base"}, "datasets": [{"name": "a", "path": "x"}], "merge": merge}
    with pytest.raises(ConfigError, match=said):
        MeritConfig.from_dict(content)
    folder = make_folder(tmp_path / "x", {"x": torch.ones(3)})
    if isinstance(merge["interpolate_to_init"], int | float):
        with pytest.raises(ConfigError, match="interpolate_to_init="):
            merge_checkpoints(folder, [folder], [1], tmp_path / "out", **merge)
    assert not (tmp_path / "out").exists()
