"""recipes/llava-tiny from end to end: it learns, the images decide, and the merged model answers about pictures."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import make_llava
import pytest
import torch
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.verification.verify import verify_checkpoint

RECIPE = Path(make_llava.__file__).parent
SIDE_FILES = {
    "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as README.md runs it, in a folder of its own; `run` holds what came out."""
    folder = tmp_path_factory.mktemp("llava")
    make_llava.main(["--output", str(folder)])
    shutil.copy(RECIPE / "mixture.yaml", folder)
    done = CliRunner().invoke(app, ["run", str(folder / "mixture.yaml"), "--output", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder


def answers(model: Path, task: str, shift: int = 0) -> list[bool]:
    """Whether each held-out question is answered right; with `shift`, under the images of another row."""
    ask = pipeline("image-text-to-text", model=str(model), dtype=torch.float32)
    rows = make_llava.TASKS[task](16, 1)
    right = []
    for number, row in enumerate(rows):
        images = [Image.open(BytesIO(content)) for content in rows[(number + shift) % len(rows)]["images"]]
        content = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": row["prompt"][0]["content"]})
        said = ask(
            text=[{"role": "user", "content": content}], max_new_tokens=12, do_sample=False, return_full_text=False
        )
        right.append(said[0]["generated_text"].strip() == row["completion"][0]["content"])
    return right


def test_groups_learn_and_the_merged_model_has_all_side_files(recipe: Path) -> None:
    plan = PartitionPlan.from_pretrained(recipe / "run/plan")
    assert [entry["images"] for entry in plan.config["datasets"]] == ["images", "images", "images", None]
    for group in plan.groups:
        folder = recipe / f"run/groups/{group.group}"
        state = json.loads((folder / "trainer_state.json").read_text())
        losses = [log["loss"] for log in state["log_history"] if "loss" in log]
        assert losses[-1] < 0.5 * losses[0]
        assert {path.name for path in folder.iterdir()} >= SIDE_FILES
        manifest = json.loads((folder / "merit.json").read_text())
        assert manifest["num_input_tokens"] == group.train_input_tokens
        assert manifest["num_loss_tokens"] == group.train_loss_tokens
        checks = verify_checkpoint(plan, folder, "behaviour", progress=Progress(quiet=True))
        assert [check for check in checks if not check.ok] == []
    merged = recipe / "run/merged"
    assert {path.name for path in merged.iterdir()} >= SIDE_FILES
    for name in SIDE_FILES - {"config.json"}:
        assert (merged / name).read_bytes() == (recipe / "base" / name).read_bytes()


@pytest.mark.parametrize(("task", "chance"), [("colour", 1 / 4), ("two", 1 / 16)])
def test_the_merged_model_answers_from_the_images(recipe: Path, task: str, chance: float) -> None:
    merged = recipe / "run/merged"
    right, shuffled = (sum(answers(merged, task, shift)) / 16 for shift in (0, 5))
    assert right >= 0.9
    assert right > sum(answers(recipe / "base", task)) / 16
    assert shuffled <= chance + 0.25


def test_an_evaluation_asks_about_the_images(recipe: Path) -> None:
    def asked(tokens_per_batch: int) -> list[dict[str, Any]]:
        output = recipe / f"answered-{tokens_per_batch}"
        arguments = ["evaluate", str(recipe / "run/merged"), "--plan", str(recipe / "run/plan")]
        arguments += ["--max-new-tokens", "12", "--tokens-per-batch", str(tokens_per_batch), "--output", str(output)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]

    lines = asked(4096)
    assert {line["dataset"] for line in lines} == set(make_llava.TASKS)
    for task in ("colour", "two"):
        right = {
            model: [x["answer"] == x["reference"] for x in lines if (x["dataset"], x["model"]) == (task, model)]
            for model in ("base", "merged")
        }
        assert sum(right["merged"]) >= 0.9 * len(right["merged"]) == 0.9 * 32
        assert sum(right["merged"]) > sum(right["base"])
    # One question after another gives the same.
    assert [line["answer"] for line in asked(1)] == [line["answer"] for line in lines]


def test_losses_of_held_out_images_fall(recipe: Path) -> None:
    arguments = ["evaluate", str(recipe / "run/merged"), "--plan", str(recipe / "run/plan"), "--no-generate"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(recipe / "evaluated")])
    assert done.exit_code == 0, done.output
    rows = json.loads((recipe / "evaluated/evaluation.json").read_text())["datasets"]
    assert set(rows) == set(make_llava.TASKS)
    assert all(row["loss"]["merged"] < row["loss"]["base"] for row in rows.values())


def test_a_diagnosis_measures_groups_with_and_without_images(recipe: Path) -> None:
    groups = [str(recipe / f"run/groups/{k}") for k in range(2)]
    arguments = ["diagnose", str(recipe / "run/plan"), *groups, "--merged", str(recipe / "run/merged")]
    done = CliRunner().invoke(app, [*arguments, "--output", str(recipe / "diagnosis")])
    assert done.exit_code == 0, done.output
    content = json.loads((recipe / "diagnosis/diagnosis.json").read_text())
    assert set(content["datasets"]) == set(make_llava.TASKS)
    for group in content["groups"]:
        assert group["own"]["held_out"]["value"] < 0
