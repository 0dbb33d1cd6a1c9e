"""engine mergekit: its methods under our checks, against mergekit's own run and against what each method must give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from merging import Tensors, load, mean64, run_mergekit
from safetensors.torch import save_file
from test_group_merge import finish_group, make_plan
from tiny import make_base

from merit_hf.checkpoint import side_files
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import read_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME, merge_checkpoints

pytest.importorskip("mergekit")
WEIGHTS = [5, 3, 2]
METHODS = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
    "karcher": {"max_iter": 20},
    "multislerp": {},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
}
PAIRS = {"slerp", "nuslerp", "nearswap", "arcee_fusion"}
WITHOUT_WEIGHTS = {"sce", "model_stock", "karcher", "slerp", "nearswap", "arcee_fusion"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three checkpoints a little away from it, in float32."""
    root = tmp_path_factory.mktemp("family")
    base = make_base(root / "base", dtype=torch.float32)
    (base / "processor_config.json").write_text("{}")
    groups = []
    for seed in (1, 2, 3):
        groups.append(Path(shutil.copytree(base, root / str(seed))))
        move(groups[-1], seed)
    return base, groups


def move(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in load(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def norm(tensors: Tensors, origin: Tensors) -> float:
    return torch.cat([(tensors[n].double() - origin[n].double()).flatten() for n in origin]).norm().item()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_mergekits_with_every_tensor_and_side_file(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, groups = family
    groups = groups[:2] if method in PAIRS else groups
    options = {"engine": "mergekit", "method": method, "parameters": METHODS[method]}
    state = torch.get_rng_state()
    stats = merge_checkpoints(base, groups, WEIGHTS[: len(groups)], tmp_path / "ours", **options)
    assert torch.equal(torch.get_rng_state(), state)
    ours, origin = load(tmp_path / "ours"), load(base)
    recipe = yaml.safe_load((tmp_path / "ours" / MERGEKIT_CONFIG_NAME).read_text())
    assert recipe["merge_method"] == method
    torch.manual_seed(0)
    theirs = run_mergekit(tmp_path / "ours" / MERGEKIT_CONFIG_NAME, tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == origin.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], origin[name]) for name in ours)
    for path in side_files(base):
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()
    assert stats.displacement == pytest.approx(norm(ours, origin), rel=1e-9)
    assert (stats.cast_loss, stats.fractions) == (0.0, None if method in WITHOUT_WEIGHTS else stats.fractions)
    merge_checkpoints(base, groups, WEIGHTS[: len(groups)], tmp_path / "again", **options)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_task_arithmetic_is_the_base_and_a_share_of_the_mean(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, groups = family
    exact, origin = mean64(groups, WEIGHTS), load(base)
    for scale in (1.0, 0.5):
        merge_checkpoints(
            base, groups, [1000 * w for w in WEIGHTS], tmp_path / str(scale), engine="mergekit",
            method="task_arithmetic", parameters={"lambda": scale},
        )  # fmt: skip
        for name, tensor in load(tmp_path / str(scale)).items():
            wanted = origin[name].double() + scale * (exact[name] - origin[name].double())
            assert torch.allclose(tensor.double(), wanted, rtol=1e-6, atol=1e-7)


def test_slerp_goes_from_the_first_checkpoint_to_the_second_and_from_the_base_to_one(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, groups = family
    for given, start, end in ((groups[:2], groups[0], groups[1]), (groups[:1], base, groups[0])):
        for t, folder in ((0.0, start), (1.0, end)):
            output = tmp_path / f"{len(given)}-{t}"
            merge_checkpoints(
                base, given, [1] * len(given), output, engine="mergekit", method="slerp", parameters={"t": t}
            )
            expected = load(folder)
            assert all(torch.allclose(v, expected[n], rtol=1e-5, atol=1e-6) for n, v in load(output).items())


def test_the_result_is_cast_once_to_the_output(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, groups = family
    options = {"engine": "mergekit", "method": "ties", "parameters": {"density": 0.5}}
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "wide", **options)
    stats = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "narrow", out_dtype="bfloat16", **options)
    wide, narrow = load(tmp_path / "wide"), load(tmp_path / "narrow")
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert stats.cast_loss == pytest.approx(norm(narrow, wide), rel=1e-9)
    assert yaml.safe_load((tmp_path / "narrow" / MERGEKIT_CONFIG_NAME).read_text())["out_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "narrow/config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_trained_again_at_the_same_path_is_read_again(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, groups = family
    changed = Path(shutil.copytree(groups[0], tmp_path / "changed"))
    merge_checkpoints(base, [changed, groups[1]], [1, 1], tmp_path / "first", engine="mergekit")
    move(changed, seed=9)
    merge_checkpoints(base, [changed, groups[1]], [1, 1], tmp_path / "second", engine="mergekit")
    exact = mean64([changed, groups[1]], [1, 1])
    for name, tensor in load(tmp_path / "second").items():
        assert torch.allclose(tensor.double(), exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "parameters", "count", "message"),
    [
        ("tise", {}, 3, "method 'tise': mergekit has arcee_fusion, .*ties"),
        ("ties", {"densty": 0.5}, 3, "method ties: no parameter 'densty'. It takes density, int8_mask, lambda"),
        ("ties", {"weight": 0.5}, 3, "method ties: no parameter 'weight'"),
        ("ties", {"density": "half"}, 3, "method ties: parameter density='half': expected float"),
        ("slerp", {}, 2, "method slerp: needs the parameter t, such as --parameter t=0.5"),
        ("slerp", {"t": 0.5}, 3, "method slerp, 3 checkpoints: "),
        ("model_stock", {}, 1, "method model_stock, 1 checkpoints: "),
        ("linear", {"normalize": False}, 3, r"parameters \['normalize'\] for method linear, which has none"),
    ],
)
def test_a_call_that_mergekit_would_misread_is_refused(
    method: str, parameters: dict, count: int, message: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, groups = family
    with pytest.raises(ConfigError, match=message):
        merge_checkpoints(
            base, groups[:count], WEIGHTS[:count], tmp_path / "out", engine="mergekit", method=method,
            parameters=parameters,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_a_method_needs_its_engine(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, groups = family
    with pytest.raises(ConfigError, match=r"method ties is mergekit's, and engine is safetensors\. Set engine"):
        merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out", method="ties")
    content = {"base": {"model_name_or_path": "b"}, "datasets": [{"name": "d", "path": "p"}]}
    with pytest.raises(ConfigError, match=r"config: method ties is mergekit's, and engine is safetensors"):
        MeritConfig.from_dict({**content, "merge": {"method": "ties"}})


def test_a_result_that_is_not_finite_is_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, groups = family
    with pytest.raises(MeritError, match=r"engine mergekit made tensor `.*` not finite .*Change merge\.parameters"):
        merge_checkpoints(
            base, groups, WEIGHTS, tmp_path / "out", engine="mergekit", method="task_arithmetic",
            parameters={"lambda": 1e39},
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_manifest_and_card_say_which_method_and_claim_no_weights_where_there_are_none(tmp_path: Path) -> None:
    plan = make_plan(make_base(tmp_path / "base", seed=9))
    groups = [finish_group(plan, make_base(tmp_path / f"group-{k}", seed=k), k) for k in range(3)]
    cases = {"slerp": ({"t": 0.25}, [1]), "ties": ({"density": 0.5}, [])}
    for method, (parameters, exclude) in cases.items():
        output = tmp_path / method
        merge_groups(
            plan, groups, output, engine="mergekit", method=method, parameters=parameters, exclude=exclude
        )  # fmt: skip
        manifest = read_manifest(output)
        assert (manifest["method"], manifest["parameters"]) == (method, parameters)
        weights = [group["weight"] for group in manifest["groups"]]
        assert weights == ([None, None] if method == "slerp" else [0.6, 0.3, 0.1])
        text = (output / "README.md").read_text()
        assert f"the `{method}` merge, by mergekit, of" in text
        assert "weighted mean" not in text
        key, value = next(iter(parameters.items()))
        assert f"--engine mergekit --method {method} --parameter {key}={value}" in text
        recipe = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
        assert recipe["base_model"] == ("groups/0" if method == "slerp" else "base")
        assert str(tmp_path) not in text
