"""Several models on the held-out data of a plan, side by side: loss, the task's own metric, length of the answers.

    evaluation = evaluate_models(plan, {"base": plan.base_folder(), "merged": merged}, output=Path("runs/evaluation"))

What a model did on a dataset is kept in `output`/evaluation_cache as soon as it is there, so that a call that was
stopped goes on and a model that is added is the only one that runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.adapters import is_adapter, read_adapter_index
from merit_hf.cards import EVALUATION_FIGURE, merged_model_card
from merit_hf.checkpoint import read_tensor_index
from merit_hf.config import ConfigError, DatasetSection
from merit_hf.evaluation.comparison import compare, predictions
from merit_hf.evaluation.comparison_table import evaluation_table as evaluation_table
from merit_hf.evaluation.evaluator import Evaluator, write_text
from merit_hf.evaluation.held_out import HeldOut, sample_held_out, with_questions
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME
from merit_hf.mixture import plan_specs, read_mixture
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_tokenizer
from merit_hf.versions import library_versions

EVALUATION_NAME = "evaluation.json"
PREDICTIONS_NAME = "predictions.jsonl"
CACHE_NAME = "evaluation_cache"


def evaluate_models(
    plan: PartitionPlan,
    models: Mapping[str, Path],
    num_samples: int = 200,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
    *,
    generate: bool = True,
    max_new_tokens: int = 256,
    metrics: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Loss, score and answer length on held-out rows of every dataset, for every model, and their differences.

    Args:
        plan ([`PartitionPlan`]): names the datasets; their held-out rows are tokenised as for training.
        models (`dict`): {label: folder of a checkpoint}; "base" and "joint" are what the others are held against.
        num_samples (`int`, *optional*, defaults to `200`): at most so many held-out rows a dataset.
        tokens_per_batch (`int`, *optional*, defaults to `4096`): padded tokens in a batch; does not change the result.
        progress ([`Progress`], *optional*): where to show it.
        generate (`bool`, *optional*, defaults to `True`): let the models answer; otherwise losses only.
        max_new_tokens (`int`, *optional*, defaults to `256`): limit of an answer.
        metrics (`dict`, *optional*): {dataset: metric} in place of the plan's.
        output (`Path`, *optional*): where to keep finished work, and write predictions.jsonl.

    Returns:
        The content of evaluation.json, as docs/evaluate.md describes it.

    Raises:
        ConfigError: no dataset has held-out rows; a metric that is unknown, or whose library is not installed.
        MeritError: a model is not there, or cannot be read; told before anything is loaded.
    """
    progress = progress or Progress()
    for folder in models.values():
        # Hours of answers come before the last model is loaded: what cannot be read is told now.
        read_adapter_index(folder) if is_adapter(folder) else read_tensor_index(folder)
    args = build_args(plan.config["sft"])
    base = plan.base_folder()
    tokenizer, context = load_tokenizer(base, plan.base.get("chat_template"), plan.has_images), _context(base)
    held_out = _held_out(plan, tokenizer, args, num_samples, generate, metrics or {}, context, progress)
    limit = max_new_tokens if generate else None
    cache = None if output is None else output / CACHE_NAME
    evaluator = Evaluator(plan, tokenizer, args, held_out, tokens_per_batch, limit, context, cache, progress)
    measured = {label: evaluator.measure(label, folder) for label, folder in models.items()}
    groups = {dataset.name: dataset.group for dataset in plan.datasets}
    if output is not None and generate:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in predictions(groups, held_out, measured)]
        write_text(output / PREDICTIONS_NAME, "".join(lines))
    settings = {"num_samples": num_samples, "generate": generate, "max_new_tokens": limit}
    return compare(plan.sha256, groups, held_out, measured, settings, library_versions())


def save_evaluation(evaluation: dict[str, Any], folder: Path) -> Path:
    """Write evaluation.json."""
    path = folder / EVALUATION_NAME
    write_text(path, json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def update_card(plan: PartitionPlan, merged: Path, evaluation: Mapping[str, Any]) -> None:
    """Write a merged model's card again, with these numbers in it. No file that merit.json hashes is touched."""
    recipe = (merged / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8")
    picture = EVALUATION_FIGURE if (merged / EVALUATION_FIGURE).is_file() else None
    card = merged_model_card(plan, read_manifest(merged), recipe, evaluation, picture=picture)
    write_text(merged / "README.md", card)


def merged_models(plan: PartitionPlan, models: Mapping[str, Path]) -> list[Path]:
    """The folders among `models` that were merged from this plan's groups.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for folder in models.values():
        if (folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(folder)
            if manifest.get("kind") == "merged" and manifest["plan"]["sha256"] == plan.sha256:
                found.append(folder)
    if not found:
        raise ConfigError(
            f"--card: none of the models was merged from plan {plan.sha256[:12]}, so there is no card to write. Name "
            "the folder that `merit merge` made."
        )
    return found


def _held_out(
    plan: PartitionPlan,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    num_samples: int,
    generate: bool,
    metrics: Mapping[str, str],
    context: int | None,
    progress: Progress,
) -> list[HeldOut]:
    unknown = sorted(set(metrics) - set(plan.names))
    if unknown:
        raise ConfigError(f"metric of `{unknown[0]}`: the plan has no such dataset. It has: {', '.join(plan.names)}.")
    planned, root = plan_specs(plan, plan.names)
    specs = {spec.name: _with_metric(spec, metrics) for spec in planned}
    loaded, _ = read_mixture(list(specs.values()), root, args, progress)
    sampled = sample_held_out(loaded, num_samples)
    if not generate:
        return sampled
    return [
        with_questions(
            held_out, tokenizer, specs[held_out.name].metric, "call" if held_out.name in metrics else "config", context
        )
        for held_out in sampled
    ]


def _with_metric(spec: DatasetSection, metrics: Mapping[str, str]) -> DatasetSection:
    return spec.model_copy(update={"metric": metrics[spec.name]}) if spec.name in metrics else spec


def _context(base: Path) -> int | None:
    """The positions that the base knows; None where its config does not say."""
    return getattr(AutoConfig.from_pretrained(str(base)).get_text_config(), "max_position_embeddings", None)
