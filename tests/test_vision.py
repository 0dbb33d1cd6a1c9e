"""Images in the data: the same in every form, counted and summed as TRL's own collator has them, never confused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import make_llava
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import as_chat, make_mixture, task_rows, write_jsonl
from tiny_vl import make_vl_mixture
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import SFTTrainer

from merit_hf.callback import MeritCallback
from merit_hf.config import ConfigError, DatasetSection, MeritConfig, MeritError
from merit_hf.data import LoadedDataset, load_rows
from merit_hf.gradients import GradientSettings, dataset_gradient
from merit_hf.images import embedded
from merit_hf.manifest import hash_files, read_manifest, write_manifest
from merit_hf.mixture import PreparedDataset, prepare_dataset
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import build_args, collate, load_model, load_tokenizer, open_loss
from merit_hf.sketch import make_sketch
from merit_hf.training import train_group
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
SFT = {"max_length": None, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
FROZEN = "base.freeze=[model.vision_tower]"


@pytest.fixture(scope="module")
def vl_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_mixture(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def base(vl_config: Path) -> Path:
    return vl_config.parent / "base"


@pytest.fixture(scope="module")
def vl_plan(vl_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PartitionPlan]:
    made: dict[tuple[str, ...], PartitionPlan] = {}

    def make(*overrides: str) -> PartitionPlan:
        if overrides not in made:
            config = MeritConfig.from_yaml(vl_config, overrides)
            made[overrides] = MeritPlanner(config, QUIET).plan(tmp_path_factory.mktemp("plan") / "plan")
        return made[overrides]

    return make


def bare(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


ROWS = make_llava.colour_rows("colours?", "{} and {}", 6, images=2)
CONTENTS = [row["images"] for row in ROWS]
SINGLE = make_llava.colour_rows("colour?", "{}", 6)


def as_paths(folder: Path) -> str:
    for i, images in enumerate(CONTENTS):
        for j, content in enumerate(images):
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / f"pictures/{i}-{j}.png").write_bytes(content)
    rows = [{**bare(r), "images": [f"pictures/{i}-{j}.png" for j in range(2)]} for i, r in enumerate(ROWS)]
    return write_jsonl(folder / "paths.jsonl", rows).name


def as_bytes(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "bytes.parquet")
    return "bytes.parquet"


def as_structs(folder: Path) -> str:
    rows = [{**bare(r), "images": [{"bytes": b, "path": "gone.png"} for b in r["images"]]} for r in ROWS]
    datasets.Dataset.from_list(rows).to_parquet(folder / "structs.parquet")
    return "structs.parquet"


def as_feature(folder: Path) -> str:
    rows = datasets.Dataset.from_list(ROWS).cast_column("images", datasets.List(datasets.Image()))
    rows.to_parquet(folder / "feature.parquet")
    return "feature.parquet"


def as_pil(folder: Path) -> str:
    """Given as PIL images, which `datasets` saves as PNG."""
    rows = [{**bare(r), "images": [Image.open(BytesIO(b)) for b in r["images"]]} for r in ROWS]
    datasets.Dataset.from_list(rows).to_parquet(folder / "pil.parquet")
    return "pil.parquet"


def load(folder: Path, file: str, **values: Any) -> LoadedDataset:
    spec = DatasetSection(name="two", path=file, eval_fraction=0.0, **values)
    return load_rows(spec, folder, takes_images=lambda: True)


def prepare(base: Path, loaded: LoadedDataset) -> tuple[PreparedDataset, PreTrainedModel, Any]:
    model, processor = load_model(base), load_tokenizer(base, images=True)
    return prepare_dataset(loaded, model, processor, build_args(SFT)), model, processor


@pytest.mark.parametrize("write", [as_paths, as_bytes, as_structs, as_feature])
def test_every_form_of_the_same_images_is_the_same_data(write: Callable[[Path], str], tmp_path: Path) -> None:
    loaded = load(tmp_path, write(tmp_path))
    assert loaded.images == "images"
    assert loaded.fingerprint == load(tmp_path, as_bytes(tmp_path)).fingerprint
    for row, contents in zip(loaded.train, CONTENTS, strict=True):
        for image, content in zip(row["images"], contents, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(content))))


def test_pil_images_are_the_bytes_that_they_were_saved_as(tmp_path: Path) -> None:
    first, again = load(tmp_path, as_pil(tmp_path)), load(tmp_path, "pil.parquet")
    assert first.fingerprint == again.fingerprint
    assert np.array_equal(np.asarray(first.train[0]["images"][1]), np.asarray(Image.open(BytesIO(CONTENTS[0][1]))))


def test_one_image_a_row_is_a_list_of_one_and_a_row_may_have_none(tmp_path: Path) -> None:
    rows = [{**bare(row), "image": row["images"][0]} for row in SINGLE]
    rows[2]["image"] = None
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "one.parquet")
    loaded = load(tmp_path, "one.parquet")
    assert loaded.images == "image"
    assert [len(row["images"]) for row in loaded.train] == [1, 1, 0, 1, 1, 1]


def test_an_image_that_changes_is_other_data(base: Path, tmp_path: Path) -> None:
    before = load(tmp_path, as_paths(tmp_path))
    counts = prepare(base, before)[0].counts
    other = make_llava.png(make_llava.picture("white", random.Random(7)))
    (tmp_path / "pictures/3-1.png").write_bytes(other)
    after = load(tmp_path, "paths.jsonl")
    changed = prepare(base, after)[0].counts
    assert before.fingerprint != after.fingerprint
    assert counts.digest != changed.digest
    assert counts.num_input_tokens == changed.num_input_tokens


def test_a_text_base_passes_over_a_column_of_images(tmp_path: Path) -> None:
    """Its data is what it was before images could be read."""
    config = make_mixture(tmp_path, ("copy",), count=6)
    rows = [as_chat(row) for row in task_rows("copy", 6)]
    plain = load_rows(MeritConfig.from_yaml(config, ["plan.num_groups=1"]).datasets[0], tmp_path).fingerprint
    write_jsonl(tmp_path / "data/copy.jsonl", [{**row, "image": "no-such-file.png"} for row in rows])
    plan = MeritPlanner(MeritConfig.from_yaml(config, ["plan.num_groups=1"]), QUIET).plan(tmp_path / "plan")
    assert plan.datasets[0].fingerprint == plain
    assert not plan.has_images
    write_jsonl(tmp_path / "data/copy.jsonl", [{**row, "image": None} for row in rows])
    overrides = ["plan.num_groups=1", "datasets.copy.images=image", "datasets.copy.eval_path=null"]
    planner = MeritPlanner(MeritConfig.from_yaml(config, overrides), QUIET)
    with pytest.raises(ConfigError, match=r"datasets\.copy\.images='image', but the base .* reads no images"):
        planner.plan(tmp_path / "other")


def test_tokens_are_those_of_trls_trainer_on_the_raw_rows(base: Path, tmp_path: Path) -> None:
    prepared, model, processor = prepare(base, load(tmp_path, as_paths(tmp_path)))
    raw = datasets.Dataset.from_list(
        [{**bare(row), "images": [Image.open(BytesIO(content)) for content in row["images"]]} for row in ROWS]
    )
    theirs = SFTTrainer(load_model(base), args=build_args(SFT), train_dataset=raw, processing_class=processor)
    batch = theirs.data_collator([raw[i] for i in range(6)])
    mask = batch["attention_mask"].bool()
    for column in ("input_ids", "labels"):
        expected = [values[m].tolist() for values, m in zip(batch[column], mask, strict=True)]
        assert [row[column] for row in prepared.train] == expected
    assert prepared.counts.num_input_tokens == int(mask.sum())
    assert prepared.counts.num_loss_tokens == int((batch["labels"][:, 1:] != -100).sum())
    marker = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert {row["input_ids"].count(marker) for row in prepared.train} == {2 * make_llava.TOKENS_AN_IMAGE}
    with open_loss(model, processor, build_args(SFT), prepared.train) as trainer:
        first, second = (collate(trainer, prepared.train, [0, 3, 5]) for _ in range(2))
    assert first.keys() == second.keys() >= {"pixel_values", "input_ids"}
    assert all(torch.equal(first[key], second[key]) for key in first), "collating changed what is stored"


def gradient(base: Path, loaded: LoadedDataset, tokens_per_batch: int = 4096) -> np.ndarray:
    prepared, model, processor = prepare(base, loaded)
    parameters = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    sketch = make_sketch("exact", parameters, 16, 1, 0)
    with open_loss(model, processor, build_args(SFT), prepared.train) as trainer:
        settings = GradientSettings(tokens_per_batch)
        return dataset_gradient(trainer, prepared.train, sketch, settings=settings).sketch


def test_the_gradient_is_that_of_the_models_own_loss_and_the_images_matter(base: Path, tmp_path: Path) -> None:
    found = gradient(base, load(tmp_path, as_paths(tmp_path)))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(base)
    total = 0
    for row, contents in zip(ROWS, CONTENTS, strict=True):
        question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        prompt = f"<|user|><image><image>{question}<|end|><|assistant|>"
        images = [Image.open(BytesIO(content)) for content in contents]
        batch = processor(images=images, text=f"{prompt}{answer}<|end|>", return_tensors="pt")
        start = processor(images=images, text=prompt, return_tensors="pt")["input_ids"].shape[1]
        targets = batch["input_ids"][0, start:]
        logits = model(**batch).logits[0, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        total += len(targets)
    # The read-out is in the order of names.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in sorted(model.named_parameters())]
    parts = [part.flatten() for part in gradients]
    expected = (torch.cat(parts) / total).numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    one_by_one = gradient(base, load(tmp_path, "paths.jsonl"), tokens_per_batch=1)
    assert np.linalg.norm(found - one_by_one) < 1e-5 * np.linalg.norm(expected)
    # The same files under other questions.
    names = sorted((tmp_path / "pictures").iterdir())
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, [*contents[5:], *contents[:5]], strict=True):
        name.write_bytes(content)
    shuffled = gradient(base, load(tmp_path, "paths.jsonl"))
    assert np.linalg.norm(shuffled - expected) > 0.01 * np.linalg.norm(expected)


def broken(vl_config: Path, folder: Path, rows: Callable[[dict[str, Any]], dict[str, Any]], *overrides: str) -> None:
    """Plan the mixture with the rows of `two` changed."""
    shutil.copytree(vl_config.parent, folder, dirs_exist_ok=True)
    path = folder / "data/two.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [rows(line) for line in lines])
    MeritPlanner(MeritConfig.from_yaml(folder / "mixture.yaml", overrides), QUIET).plan(folder / "plan")


def same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": "colours?", "completion": row["completion"][0]["content"]}


def messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"images": row["images"], "messages": row["prompt"] + row["completion"]}


def with_prompt(content: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, "prompt": [{"role": "user", "content": content}]}


BLOCK, TEXT = {"type": "image", "text": None}, {"type": "text", "text": "colours?"}
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...], str]] = {
    "cut sequences": (same, ("sft.max_length=64",), r"sft\.max_length=64, but dataset .* Set sft\.max_length=null"),
    "packing": (same, ("sft.packing=true",), r"sft\.packing=True, but dataset"),
    "padding to a multiple": (same, ("sft.pad_to_multiple_of=8",), r"sft\.pad_to_multiple_of=8, but dataset"),
    "no such column": (same, ("datasets.two.images=pictures",), r"datasets\.two\.images='pictures': no such column"),
    "no such file": (lambda r: {**r, "images": ["gone.png"]}, (), r"two\.images='images', row 0: no such file"),
    "a number": (lambda r: {**r, "images": [3]}, (), r"row 0: expected a path, bytes or an image, found a int"),
    "not an image": (lambda r: {**r, "images": ["two.jsonl"]}, (), r"`two` .*row 0: an image cannot be read"),
    "plain text": (plain, (), r"`two` is plain prompt-completion, .*datasets\.two\.chat=true"),
    "two forms": (messages, (), r"`two` is conversational language modeling, but .*Bring all datasets into one"),
    "tools": (lambda r: {**r, "tools": "[]"}, (), r"`two` has the column `tools`"),
    "a written token": (with_prompt("<image>colours?"), (), r"`two` .*row 0: a text holds the image token"),
    "too few places": (with_prompt([BLOCK, TEXT]), (), r"`two` .*row 0: TRL refuses it: Number of images"),
    "sound": (with_prompt([{"type": "audio", "text": None}]), (), r"row 0: content of type 'audio', expected text"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_trained(name: str, vl_config: Path, tmp_path: Path) -> None:
    change, overrides, said = MISTAKES[name]
    with pytest.raises(ConfigError, match=said) as error:
        broken(vl_config, tmp_path / "mixture", change, *overrides)
    assert "\n" not in str(error.value)


def test_chat_wraps_plain_text_and_blocks_place_the_images(vl_config: Path, tmp_path: Path) -> None:
    def blocks(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": [{"role": "user", "content": [BLOCK, BLOCK, TEXT]}]}

    for name, change, override in (("a", plain, ("datasets.two.chat=true",)), ("b", blocks, ())):
        broken(vl_config, tmp_path / name, change, *override)
    plans = [PartitionPlan.from_pretrained(tmp_path / name / "plan") for name in "ab"]
    digests = [{d.name: d.tokens_digest for d in plan.datasets} for plan in plans]
    assert digests[0] == digests[1]


TRAININGS = {
    "one epoch": (),
    "part of an epoch": ("sft.num_train_epochs=1.4",),
    "accumulation": ("sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=2"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_takes_the_planned_tokens(name: str, vl_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    plan = vl_plan(*TRAININGS[name])
    planned = next(group for group in plan.groups if "repeat" in group.datasets)
    manifest = read_manifest(train_group(plan, planned.group, tmp_path / "group", progress=QUIET))
    assert manifest["num_input_tokens"] == planned.train_input_tokens
    assert manifest["num_loss_tokens"] == planned.train_loss_tokens
    assert manifest["num_padding_tokens"] > 0


def own_trainer(plan: PartitionPlan, group: int, folder: Path, rows: datasets.Dataset, model: Any) -> SFTTrainer:
    base = plan.base_folder()
    args = build_args(plan.config["sft"], folder)
    return SFTTrainer(
        model, args=args, train_dataset=rows, processing_class=load_tokenizer(base, images=True),
        callbacks=[MeritCallback(plan, group)],
    )  # fmt: skip


def raw_rows(plan: PartitionPlan, root: Path, group: int) -> datasets.Dataset:
    """The group's rows as anybody would load them: PIL images, nothing tokenised."""
    entries = {entry["name"]: entry for entry in plan.config["datasets"]}
    found = []
    for name in plan.group(group).datasets:
        path = plan.local["datasets"][name]["path"]
        spec = DatasetSection(name=name, path=path, eval_fraction=0.0, images=entries[name]["images"])
        rows = load_rows(spec, root).train.to_list()
        found += [{**row, "images": row.get("images", [])} for row in rows]
    features = datasets.Dataset.from_list([bare(row) for row in found]).features
    features["images"] = datasets.List(datasets.Image())
    return datasets.Dataset.from_list(found, features=features)


def test_anybodys_trainer_takes_the_images_of_the_plan_and_no_others(
    vl_plan: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    plan = vl_plan()
    group = next(group.group for group in plan.groups if "two" in group.datasets)
    base, rows = plan.base_folder(), raw_rows(plan, tmp_path, group)
    trainer = own_trainer(plan, group, tmp_path / "own", rows, load_model(base))
    trainer.train()
    trainer.save_model(str(tmp_path / "own"))
    checks = verify_checkpoint(plan, tmp_path / "own", progress=QUIET)
    assert [check for check in checks if not check.ok] == []
    images = rows.select_columns(["images"])
    others = images.select([*range(3, len(rows)), 0, 1, 2])
    shuffled = datasets.concatenate_datasets([rows.remove_columns("images"), others], axis=1)
    with pytest.raises(MeritError, match="not the planned ones"):
        own_trainer(plan, group, tmp_path / "other", shuffled, load_model(base)).train()
    model = load_model(base)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(MeritError, match=r"lm_head\.weight would not be trained, and the plan trains it"):
        own_trainer(plan, group, tmp_path / "other", rows, model).train()


def test_frozen_modules_have_no_part_in_the_plan_and_stay_as_they_are(
    vl_plan: Callable[..., PartitionPlan], base: Path, tmp_path: Path
) -> None:
    plan, free = vl_plan(FROZEN), vl_plan()
    assert plan.base["freeze"] == ["model.vision_tower"]
    assert {g.group_sha256 for g in plan.groups}.isdisjoint(g.group_sha256 for g in free.groups)
    assert all(a.gradient_norm < b.gradient_norm for a, b in zip(plan.datasets, free.datasets, strict=True)
               if a.name != "repeat")  # fmt: skip
    group = next(group.group for group in plan.groups if "two" in group.datasets)
    trained = train_group(plan, group, tmp_path / "group", progress=QUIET)
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys(), "the checkpoint is complete"
    still = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    tower = {name for name in before if name.startswith("vision_tower.")}
    assert tower
    assert still >= tower
    assert not any(name.startswith(("language_model.", "multi_modal_projector.")) for name in still)
    assert all(check.ok for check in verify_checkpoint(plan, trained, progress=QUIET))
    with pytest.raises(MeritError, match=r"vision_tower\S+ would be trained, and the plan freezes"):
        own_trainer(plan, group, tmp_path / "own", raw_rows(plan, tmp_path, group), load_model(base)).train()


def test_a_checkpoint_whose_frozen_module_moved_is_refused(
    vl_plan: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    plan = vl_plan(FROZEN)
    trained = train_group(plan, 0, tmp_path / "group", progress=QUIET)
    tensors = load_file(trained / "model.safetensors")
    name = "vision_tower.embeddings.class_embedding"
    tensors[name] += 1e-4
    save_file(tensors, trained / "model.safetensors", {"format": "pt"})
    write_manifest(trained, {**read_manifest(trained), "files": hash_files(trained)})
    bad = [check for check in verify_checkpoint(plan, trained, progress=QUIET) if not check.ok]
    assert [check.name for check in bad] == ["frozen modules"]
    assert name in bad[0].found


def test_what_cannot_be_frozen_is_told(vl_config: Path, tmp_path: Path) -> None:
    def plan(*overrides: str) -> None:
        MeritPlanner(MeritConfig.from_yaml(vl_config, overrides), QUIET).plan(tmp_path / "plan")

    with pytest.raises(ConfigError, match=r"no module `model\.vision_towr`\. Did you mean `model\.vision_tower`"):
        plan("base.freeze=[model.vision_towr]")
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        plan("base.freeze=[model, lm_head]")
    with pytest.raises(ConfigError, match=r"base\.freeze=.* with `peft:`"):
        plan("base.freeze=[lm_head]", "peft.r=4")


def test_groups_with_and_without_images_verify_beside_each_other(
    vl_plan: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    plan = vl_plan("plan.num_groups=4")
    folders = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in range(4)]
    blind = next(group.group for group in plan.groups if group.datasets == ["repeat"])
    for k in (blind, (blind + 1) % 4):
        checks = verify_checkpoint(plan, folders[k], others=[folders[j] for j in range(4) if j != k], progress=QUIET)
        assert [check for check in checks if not check.ok] == []


def test_published_rows_hold_their_images_and_name_no_folder(tmp_path: Path) -> None:
    loaded = load(tmp_path, as_paths(tmp_path))
    embedded(loaded.train).to_parquet(tmp_path / "published.parquet")
    shutil.rmtree(tmp_path / "pictures")
    assert load(tmp_path, "published.parquet").fingerprint == loaded.fingerprint
    assert str(tmp_path).encode() not in (tmp_path / "published.parquet").read_bytes()
