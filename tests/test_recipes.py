"""Every recipe parses against today's TRL, PEFT and accelerate, and a small copy of it runs from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import check
import prepare_vision_flan
import pytest
import yaml
from tiny_recipes import COPIES, RECIPES, Kitchen, read_recipe, scaled, vision_flan_items
from trl import SFTConfig

from merit_hf.adapters import lora_config
from merit_hf.config import MeritConfig
from merit_hf.sft import build_args

YAMLS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate_configs")
COUNTS = {
    "smollm2-135m": 12, "smollm2-lora": 12, "qwen2.5-3b-flan": 66, "qwen2.5-7b-mixture": 176,
    "qwen2.5-vl-3b-vision-flan": 136, "llava-tiny": 4, "quickstart": 12,
}  # fmt: skip


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.parent.name)
def test_a_recipe_parses(path: Path) -> None:
    config = MeritConfig.from_yaml(path)
    assert len(config.datasets) == COUNTS[path.parent.name]
    args = build_args(config.sft)
    assert isinstance(args, SFTConfig)
    for key, value in config.sft.items():
        assert getattr(args, key) == value or key in ("lr_scheduler_type", "save_strategy"), key
    assert (config.peft is not None) == (path.parent.name == "smollm2-lora")
    if config.peft is not None:
        assert lora_config(config.peft).r == config.peft["r"]


def test_no_recipe_is_left_out() -> None:
    assert {path.parent.name for path in YAMLS} == set(COPIES) == set(COUNTS)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_differs_in_sizes_alone(name: str) -> None:
    """What decides how a recipe trains is tried as it stands, but for numbers that say how much."""
    recipe, copy = read_recipe(name), scaled(name)
    assert recipe.keys() == copy.keys()
    sizes = {"max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"}
    assert {key for key in recipe["sft"] if recipe["sft"][key] != copy["sft"][key]} <= sizes
    assert {key for key in recipe["plan"] if recipe["plan"][key] != copy["plan"][key]} <= {
        "num_groups", "num_samples", "sketch_dim",
    }  # fmt: skip
    for section in ("peft", "merge"):
        assert recipe.get(section) == copy.get(section)
    assert all(entry in recipe["datasets"] for entry in copy["datasets"])


@pytest.mark.parametrize("name", COPIES)
def test_a_readme_names_what_is_there(name: str) -> None:
    text = (RECIPES / name / "README.md").read_text()
    (path,) = (RECIPES / name).glob("*.yaml")
    assert f"recipes/{name}/{path.name}" in text, "the one command"
    assert (RECIPES / "accelerate_configs" / f"{COPIES[name].config}.yaml").exists()
    if COPIES[name].config != "single_gpu":
        assert f"accelerate_configs/{COPIES[name].config}.yaml" in text
    assert f"[{name}]({name}" in (RECIPES / "README.md").read_text()


def test_costs_are_those_of_the_formula() -> None:
    """Parameters as the models' cards have them, and no README with other numbers."""
    costs = {name: check.cost_of(name) for name in check.MODELS}
    billions = {name: round(cost.num_parameters / 1e9, 2) for name, cost in costs.items()}
    assert billions == {
        "smollm2-135m": 0.13, "smollm2-lora": 0.13, "qwen2.5-3b-flan": 3.09, "qwen2.5-7b-mixture": 7.62,
        "qwen2.5-vl-3b-vision-flan": 3.75,
    }  # fmt: skip
    assert costs["smollm2-135m"].num_parameters == 134_515_008
    assert costs["smollm2-lora"].num_trained < 0.05 * costs["smollm2-lora"].num_parameters
    assert costs["qwen2.5-vl-3b-vision-flan"].num_trained == costs["qwen2.5-3b-flan"].num_parameters
    for name in check.MODELS:
        assert check.cost_block(name) in (RECIPES / name / "README.md").read_text()


def test_vision_flan_becomes_a_file_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, items = vision_flan_items(tmp_path / "images", ("GQA", "ITM", "unwanted"))
    items[0]["conversations"][1]["value"] = " "
    (images / items[1]["image"]).unlink()
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(items))
    arguments = ["--annotations", str(annotations), "--images", str(images), "--output", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as problems:
        prepare_vision_flan.main(arguments)
    assert len(str(problems.value).splitlines()) == 134
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["GQA.jsonl", "ITM.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "data/GQA.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    assert rows[0]["prompt"] == [{"role": "user", "content": "GQA?"}]
    assert (tmp_path / "data" / rows[0]["images"][0]).samefile(images / "GQA_2.png")
    assert "32 rows of 2 tasks" in capsys.readouterr().out
    (line,) = prepare_vision_flan.advice({"GQAs": 0, "ITM": 3}, {"GQA", "ITM"})
    assert line == "`GQAs` has no rows; the collection has `GQA`. Correct its line in mixture.yaml, or delete it."


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    with Kitchen(tmp_path_factory.mktemp("kitchen")) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_a_small_copy_runs(name: str, kitchen: Kitchen) -> None:
    outcome = kitchen.run(name)
    assert outcome.tokens
    assert outcome.killed
    assert outcome.resume
    assert outcome.merged
    several = COPIES[name].config != "single_gpu"
    assert (outcome.num_processes, outcome.wrapper) == ((2, "DistributedDataParallel") if several else (1, None))
    plan = yaml.safe_load((kitchen.user.folder / name / "mixture.yaml").read_text())
    assert outcome.num_datasets == len(plan["datasets"])
