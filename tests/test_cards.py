"""Cards: metadata that the Hub reads, no path of this machine, and names that stay text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard

from merit_hf.cards import group_model_card, merged_model_card, plan_dataset_card, validate_card
from merit_hf.config import MeritError
from merit_hf.figures import save_plan_figures
from merit_hf.manifest import group_manifest
from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = [
    "a|b", "`tick`", "{{ 777*7 }}", "{% raw %}", "<script>alert(1)</script>", "line\nbreak", "[x](http://evil)",
    "---", "../../etc/passwd", "/home/me/secret.jsonl", "$x$", "**bold**",
]  # fmt: skip


def make_plan(names: list[str], num_groups: int = 2, matrix: bool = True, hub: bool = False) -> PartitionPlan:
    """A plan as the planner would make it, with made-up numbers."""
    count = len(names)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    datasets = [
        PlannedDataset(
            name=name, group=index % num_groups, tag=None, format="prompt-completion", fingerprint=f"{index:064x}",
            tokens_digest=f"{index:064x}", num_examples=10 + index, num_input_tokens=1000 + index, num_loss_tokens=300,
            num_sampled=8, gradient_norm=1.5, base_loss=2.0, coordinates=[float(vectors[index, 0]), 0.1 * index],
            repo_id=f"org/data-{index}" if hub else None, revision="c" * 40 if hub else None,
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    groups = [
        PlannedGroup(
            group=number, datasets=[d.name for d in datasets if d.group == number], num_examples=10,
            num_input_tokens=1000, num_loss_tokens=300, num_steps=5, train_input_tokens=1000, train_loss_tokens=300,
            weight=1 / num_groups, group_sha256=f"{number:064x}",
        )
        for number in range(num_groups)
    ]  # fmt: skip
    section = {"split": "merit", "seed": 0, "balance": "tokens", "num_samples": 8, "reduction": "token_mean",
               "sketch": "count_sketch", "center": "column", "axes": "global", "sketch_dim": 64}  # fmt: skip
    return PartitionPlan(
        config={"plan": section},
        base={"repo_id": "org/base" if hub else None, "revision": "b" * 40 if hub else None,
              "weights_sha256": "a" * 64, "chat_template_sha256": "d" * 64},
        datasets=datasets,
        groups=groups,
        sft={"learning_rate": 1e-5, "max_steps": -1},
        conflict_matrix=np.clip(vectors @ vectors.T, -1, 1) if matrix else None,
        explained=[0.6, 0.2],
        bounds={"operator_norm": 0.02, "eigengaps": [0.5], "sin_angle": [0.04], "structure_p_value": 0.005,
                "verdict": "structure"},
        cost={"gradient_seconds": 12.0, "tokens": 4000},
        versions={"merit_hf": "0.1.0"},
        skipped={"empty": "it has no rows"},
    )  # fmt: skip


def merged_manifest(plan: PartitionPlan) -> dict[str, Any]:
    return {
        "schema_version": 1, "kind": "merged", "weights": "tokens",
        "plan": {"repo_id": None, "revision": None, "sha256": plan.sha256},
        "base": plan.base, "out_dtype": "bfloat16", "engine": "safetensors",
        "versions": {"merit_hf": "0.1.0"}, "files": {},
        "groups": [{"group": g.group, "weight": g.weight, "num_input_tokens": g.train_input_tokens, "repo_id": None,
                    "revision": None} for g in plan.groups],
        "stats": {"num_tensors": 2, "num_parameters": 9, "displacement": 1.0, "group_displacements": [1.5, 1.25],
                  "cast_loss": 0.25},
    }  # fmt: skip


RECIPE = """merge_method: linear
models:
- model: /home/me/groups/0
- model: /home/me/groups/1
base_model: /home/me/groups/0
"""
LEDGER = {"num_input_tokens": 1000, "num_loss_tokens": 300, "num_padding_tokens": 20}


def all_cards(plan: PartitionPlan) -> list[str]:
    manifest = group_manifest(plan, 0, LEDGER, 5, plan.sft, "complete", {"final_loss": 1.5})
    labels = ["base", "merged"]
    evaluation = {
        "models": labels, "mean": dict.fromkeys(labels, 1.0),
        "datasets": {d.name: {"group": d.group, "loss": dict.fromkeys(labels, 1.0)} for d in plan.datasets},
    }  # fmt: skip
    merged = merged_model_card(plan, merged_manifest(plan), RECIPE, evaluation)
    return [plan_dataset_card(plan), group_model_card(plan, manifest), merged]


def test_the_plan_card_is_the_golden_one() -> None:
    expected = GOLDEN / "plan_card.md"
    card = plan_dataset_card(make_plan(["alpha", "beta", "gamma", "delta"]))
    assert card == expected.read_text(encoding="utf-8"), (
        "if the change is meant, write the card to tests/golden/plan_card.md"
    )


def test_the_viewer_finds_the_tables() -> None:
    card = DatasetCard(plan_dataset_card(make_plan(["a", "b"])))
    files = {config["config_name"]: config["data_files"] for config in card.data.configs}
    assert files == {name: f"data/{name}.parquet" for name in ("datasets", "conflict", "groups")}
    without = DatasetCard(plan_dataset_card(make_plan(["a", "b"], matrix=False)))
    assert "conflict" not in {config["config_name"] for config in without.data.configs}


def test_metadata_holds_hub_ids_where_there_are_any_and_nothing_where_not() -> None:
    _, group, merged = (ModelCard(text) for text in all_cards(make_plan(["a", "b"], hub=True)))
    assert group.data.base_model == "org/base"
    assert group.data.datasets == ["org/data-0"]
    assert merged.data.base_model == ["org/base"]
    assert merged.data.to_dict()["base_model_relation"] == "merge"
    assert {"merge", "mergekit", "merit"} <= set(merged.data.tags)
    for text in all_cards(make_plan(["a", "b"]))[1:]:
        assert ModelCard(text).data.base_model is None
        assert ModelCard(text).data.datasets is None


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    for card in all_cards(make_plan([name, "plain"])):
        validate_card(card)
        assert "5439" not in card
        for markup in ("<script", "**bold**", "[x](", "`tick`", "{%", "a|b", "secret.jsonl/", "/home/me", "\nbreak"):
            assert markup not in card
        tables = [line for line in card.splitlines() if line.startswith("|")]
        assert tables
        # Every row has as many cells as its header.
        blocks = card.split("\n\n")
        for block in (b.splitlines() for b in blocks if b.startswith("|")):
            assert {len(re.findall(r"(?<!\\)\|", line)) for line in block if line.startswith("|")} == {
                block[0].count("|")
            }


def test_the_recipe_names_groups_instead_of_folders() -> None:
    card = all_cards(make_plan(["a", "b"]))[2]
    assert "- model: groups/0" in card
    assert "base_model: groups/0" in card


def test_a_path_or_broken_metadata_is_refused() -> None:
    with pytest.raises(MeritError, match="path of this machine: /home/me/x"):
        validate_card("---\ntags: [a]\n---\nsee /home/me/x\n")
    for broken in ("no metadata", "---\n- a\n---\n", "---\na: [\n---\n"):
        with pytest.raises(MeritError):
            validate_card(broken)


@pytest.mark.parametrize(("count", "num_groups"), [(1, 1), (2, 2), (12, 4), (120, 9)])
def test_figures_are_the_same_bytes_twice(count: int, num_groups: int, tmp_path: Path) -> None:
    plan = make_plan([f"dataset {i:03d}" for i in range(count)], num_groups)
    for folder in ("one", "two"):
        written = save_plan_figures(plan, tmp_path / folder)
    assert written == ["figures/groups.png", "figures/conflict.png", "figures/axes.png"]
    for name in written:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert first == second
        assert first.startswith(b"\x89PNG")


def test_a_plan_without_gradients_has_no_heatmap(tmp_path: Path) -> None:
    assert save_plan_figures(make_plan(["a", "b"], matrix=False), tmp_path) == ["figures/groups.png"]


def test_names_in_figures_are_no_formulas(tmp_path: Path) -> None:
    save_plan_figures(make_plan(["$\\frac{", "b$"]), tmp_path)


@pytest.mark.parametrize(
    ("split", "words"), [("merit", "conflict are kept apart"), ("random", "at random, as a baseline")]
)
def test_a_card_says_how_the_datasets_were_split(split: str, words: str) -> None:
    plan = make_plan(["a", "b"])
    plan.config["plan"]["split"] = split
    assert words in plan_dataset_card(plan)
    assert words in merged_model_card(plan, merged_manifest(plan), RECIPE)


def test_a_partial_merge_says_what_is_missing_and_how_to_make_it_again() -> None:
    plan = make_plan(["a", "b"], hub=True)
    manifest = merged_manifest(plan) | {"weights": "uniform", "asked_out_dtype": "float32"}
    manifest["groups"] = manifest["groups"][:1]
    card = merged_model_card(plan, manifest, RECIPE)
    command = "merit merge PLAN groups/0 --output merged --weights uniform --out-dtype float32 --allow-missing"
    assert command in card
    assert "Not in this merge" in card
    assert ModelCard(card).data.datasets == ["org/data-0"]


def test_one_group_on_the_hub_is_not_the_only_parent() -> None:
    plan = make_plan(["a", "b"], hub=True)
    manifest = merged_manifest(plan)
    manifest["groups"][0]["repo_id"] = "org/group-0"
    assert ModelCard(merged_model_card(plan, manifest, RECIPE)).data.base_model == ["org/base"]
