"""The cards of plans, groups and merged models: facts from a plan and a manifest, put into cards/*.md.

Metadata holds Hub ids only. What came from elsewhere (names, manifests) is shown as text, never as markup or template.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import DatasetCardData, ModelCardData

from merit_hf.card_evaluation import answer_table, eval_results, evaluation_table, harness_table
from merit_hf.config import MeritError
from merit_hf.conflict import MANY_DATASETS
from merit_hf.parents import merge_command, parents
from merit_hf.text import (
    Markdown,
    code,
    escape_markdown,
    fenced,
    find_local_paths,
    hide_local_paths,
    markdown_table,
)
from merit_hf.trust_words import trust_sentences, trust_verdict

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan
    from merit_hf.tables import ConflictPairs

# What each `plan.split` does with the datasets.
_SPLITS = {
    "merit": "so that those whose gradients conflict are kept apart",
    "kmeans": "by k-means on their gradients, as a baseline",
    "kmeans_text": "by k-means on embeddings of their texts, as a baseline",
    "affinity": "so that those are kept together that are akin by a matrix given from a file",
    "random": "at random, as a baseline",
    "by_tag": "by their tags",
    "joint": "all in one group, as a baseline",
}
_TABLES = ("datasets", "conflict", "groups")
# The picture of an evaluation, in the folder of the merged model.
EVALUATION_FIGURE = "figures/held_out_loss.png"
_MAX_PAIRS = 5
_MAX_NOTE = 2000


def plan_dataset_card(plan: PartitionPlan, pairs: ConflictPairs | None = None) -> str:
    """README.md of a plan; its `configs:` make the Hub's viewer show the tables. `pairs`: where they are at hand."""
    shown = [table for table in _TABLES if table != "conflict" or plan.is_measured]
    configs = [
        {
            "config_name": table,
            "data_files": f"data/{table}.parquet",
            **({"default": True} if table == "datasets" else {}),
        }
        for table in shown
    ]
    data = DatasetCardData(configs=configs, tags=["merit", "partition-plan", "instruction-tuning"])
    return _render(
        "plan_dataset_card.md",
        data.to_yaml(),
        plan=plan,
        base=_base(plan.base),
        sections=plan.config["plan"],
        how=_SPLITS[plan.config["plan"]["split"]],
        groups=plan.groups,
        members={group.group: _names(group.datasets) for group in plan.groups},
        pairs=_extreme_pairs(plan, pairs),
        tested=MANY_DATASETS,
        weights=_settings(
            {d["name"]: d["weight"] for d in plan.config.get("datasets", []) if d.get("weight", 1.0) != 1.0}
        ),
        added=[dataset.name for dataset in plan.datasets if dataset.projected_group is not None],
        bounds=_bounds(plan),
        trust=_trust(plan),
        settings=_settings(plan.sft),
        lora=_lora(plan.peft) if plan.peft else None,
        versions=_settings(plan.versions),
        plan_id=Markdown(plan.repo_id or "PLAN"),
    )


def group_model_card(plan: PartitionPlan, manifest: Mapping[str, Any]) -> str:
    """README.md of a group checkpoint."""
    data = ModelCardData(
        library_name="peft" if manifest.get("peft") else "transformers",
        base_model=manifest["base"].get("repo_id"),
        base_model_relation=("adapter" if manifest.get("peft") else "finetune")
        if manifest["base"].get("repo_id")
        else None,
        datasets=_hub_datasets(manifest["datasets"]) or None,
        tags=["merit", "merit-group", "sft", "trl", *(["lora"] if manifest.get("peft") else [])],
    )
    return _render(
        "group_model_card.md",
        data.to_yaml(),
        plan=plan,
        manifest=manifest,
        base=_base(manifest["base"]),
        num_groups=len(plan.groups),
        planned_steps=plan.group(manifest["group"]).num_steps,
        held_out=[
            [h["dataset"], f"{h['first']:.4f} ({h['first_step']:,})", f"{h['last']:.4f} ({h['last_step']:,})"]
            for h in manifest.get("held_out_loss", [])
        ],
        rows=[
            [d["name"], _source(d), f"{d['num_examples']:,}", f"{d['num_input_tokens']:,}"]
            for d in manifest["datasets"]
        ],
        settings=_settings(manifest["sft"]),
        lora=_lora(manifest.get("peft", {})),
        versions=_settings(manifest["versions"]),
        plan_id=Markdown(plan.repo_id or "PLAN"),
    )


def merged_model_card(
    plan: PartitionPlan,
    manifest: Mapping[str, Any],
    mergekit_config: str,
    evaluation: Mapping[str, Any] | None = None,
    licence: str | None = None,
    model_name: str | None = None,
    picture: str | None = None,
) -> str:
    """README.md of a merged model, with the evaluation table where there is one.

    `model_name` is the name under which it is published: with it, metadata holds the evaluation as a `model-index`.
    `picture` is the evaluation's figure, as a path in the model's folder.
    """
    made_of = [parent for parent in parents(manifest) if parent.kind != "base"]
    in_repos = all(parent.repo for parent in made_of)
    # The base of a later round is a model of one's own; that of the first is the parent of all.
    origin = manifest.get("round", manifest)["base"]
    bases = [origin["repo_id"]] if origin.get("repo_id") else []
    # Where some groups are local, the base is the parent that all have in common, where it is on the Hub.
    named = [str(parent.repo).partition("@")[0] for parent in made_of] if in_repos else bases
    merged = {group["group"] for group in manifest["groups"]}
    members = {group.group: _names(group.datasets) for group in plan.groups}
    is_adapter = manifest.get("adapters", "dense") != "dense"
    if is_adapter:
        # What loads it is its base; the groups are its sources.
        named = bases
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=named or None,
        base_model_relation=("adapter" if is_adapter else "merge") if named else None,
        datasets=_hub_datasets([{"repo_id": d.repo_id} for d in plan.datasets if d.group in merged]) or None,
        license=licence,
        tags=["merge", "mergekit", "merit"],
        model_name=model_name,
        eval_results=eval_results(plan, evaluation) if evaluation and model_name else None,
    )
    stats = manifest.get("stats", {})
    return _render(
        "merged_model_card.md",
        data.to_yaml(),
        plan=plan,
        manifest=manifest,
        base=_base(manifest["base"]),
        stats=stats,
        cast_share=stats["cast_loss"] / stats["displacement"] if stats.get("displacement") else None,
        rows=[
            [
                str(g["group"]),
                members.get(g["group"], ""),
                f"{g['num_input_tokens']:,}",
                "–" if g["weight"] is None else f"{g['weight']:.6f}",
            ]
            for g in manifest["groups"]
        ],
        method=manifest.get("method", "linear"),
        # The groups of a round are tagged with those of the plan of all rows.
        how=_SPLITS[manifest.get("round", plan.config["plan"])["split"]],
        verified=_verified(manifest["groups"]),
        stopped=[g for g in manifest["groups"] if "stopped_at_step" in g],
        missing=[[str(number), names] for number, names in members.items() if number not in merged],
        command=Markdown(merge_command(plan, manifest)),
        trained=[str(parent.number) for parent in made_of if parent.kind == "group"]
        if manifest.get("with_merged")
        else ["all"],
        in_repos=in_repos,
        alpha=manifest.get("interpolate_to_init", 1),
        before=_before(manifest),
        round=manifest.get("round"),
        first_base=_base(manifest["round"]["base"]) if manifest.get("round") else None,
        evaluation=evaluation_table(evaluation) if evaluation else None,
        answers=answer_table(evaluation) if evaluation and evaluation.get("mean_score") else None,
        harness=harness_table(evaluation) if evaluation and evaluation.get("harness") else None,
        notes=[escape_markdown(note, _MAX_NOTE) for note in evaluation.get("notes", [])] if evaluation else [],
        picture=Markdown(f"![held-out loss of every dataset]({picture})") if picture else None,
        mergekit_config=fenced(_public_recipe(mergekit_config, manifest), "yaml"),
        versions=_settings(manifest["versions"]),
        plan_id=Markdown(plan.repo_id or "PLAN"),
    )


def keep_metadata(card: str, existing: str) -> str:
    """`card` with what an existing card's metadata holds besides: a licence, languages, further `configs:` and tags.

    Values of `card` win; `configs:` are joined by name and `tags:` united. An existing card without readable metadata
    keeps nothing.
    """
    try:
        before = yaml.safe_load(existing.split("---\n", 2)[1]) if existing.startswith("---\n") else None
    except (yaml.YAMLError, IndexError):
        before = None
    _, ours, body = card.split("---\n", 2)
    now = yaml.safe_load(ours)
    if not isinstance(before, dict):
        return card
    merged = {**before, **now}
    for key, name in (("configs", lambda item: item["config_name"]), ("tags", str)):
        old, new = before.get(key), now.get(key) or []
        if isinstance(old, list):
            taken = {name(item) for item in new}
            merged[key] = new + [
                item
                for item in old
                if (isinstance(item, dict) and "config_name" in item) == (key == "configs") and name(item) not in taken
            ]
    text = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{body}"


def validate_card(text: str) -> None:
    """Raises MeritError where the metadata is not a YAML mapping, or the card shows a path of this machine."""
    parts = text.split("---\n", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError as error:
        raise MeritError(f"the card's metadata is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise MeritError("the card does not begin with a mapping of metadata between two lines of ---.")
    paths = find_local_paths(html.unescape(text))
    if paths:
        raise MeritError(f"the card would show a path of this machine: {paths[0]}")


def how_split(plan: PartitionPlan) -> str:
    """What `plan.split` did with the datasets, as the end of a sentence."""
    return _SPLITS[plan.config["plan"]["split"]]


def _render(template: str, metadata: str, **facts: Any) -> str:
    source = importlib.resources.files("merit_hf.templates").joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        finalize=escape_markdown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"code": code, "thousands": lambda value: f"{value:,}"}
    card = environment.from_string(source).render(metadata=Markdown(metadata.strip()), table=markdown_table, **facts)
    validate_card(card)
    return card


def _names(names: Sequence[str], limit: int = 12) -> Markdown:
    shown = [escape_markdown(name) for name in names[:limit]]
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return Markdown(", ".join(shown + more))


def _base(base: Mapping[str, Any]) -> Markdown:
    weights = f"weights {code(base['weights_sha256'][:16])}"
    if base.get("repo_id"):
        return Markdown(f"{code(base['repo_id'])} at {code(base['revision'])} ({weights})")
    return Markdown(f"a local checkpoint ({weights})")


def _source(dataset: Mapping[str, Any]) -> Markdown:
    if dataset.get("repo_id"):
        return Markdown(f"{code(dataset['repo_id'])} at {code((dataset.get('revision') or '')[:12] or 'main')}")
    return Markdown(f"local, fingerprint {code(dataset['fingerprint'][:16])}")


def _hub_datasets(datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({dataset["repo_id"] for dataset in datasets if dataset.get("repo_id")})


def _settings(values: Mapping[str, Any]) -> Markdown:
    """`name` = value, …; unset ones are left out."""
    told = [
        f"{escape_markdown(name)} {code(str(value))}" for name, value in sorted(values.items()) if value is not None
    ]
    return Markdown(", ".join(told))


def _lora(peft: Mapping[str, Any]) -> Markdown:
    told = {name: ", ".join(value) if isinstance(value, list) else value for name, value in peft.items()}
    return _settings({name: value for name, value in told.items() if value not in ({}, False)})


def _extreme_pairs(plan: PartitionPlan, pairs: ConflictPairs | None) -> dict[str, Markdown] | None:
    if not plan.is_measured or len(plan.datasets) < 2:
        return None
    pairs = pairs or plan.conflict_pairs()
    assert pairs is not None

    def listed(extreme: Sequence[tuple[int, int, float]]) -> Markdown:
        cells = [[plan.names[first], plan.names[second], f"{cosine:.3f}"] for first, second, cosine in extreme]
        return markdown_table(("dataset", "dataset", "cosine"), cells)

    lowest, highest = pairs.most_extreme(_MAX_PAIRS)
    return {"conflicting": listed(lowest), "aligned": listed(highest)}


def _bounds(plan: PartitionPlan) -> dict[str, Any]:
    bounds = plan.bounds
    angles = bounds.get("sin_angle")
    return {
        "error": bounds.get("operator_norm"),
        "axes": Markdown(", ".join(f"axis {i + 1}: {angle:.2f}" for i, angle in enumerate(angles)))
        if angles
        else None,
        "p_value": bounds.get("structure_p_value"),
        "verdict": bounds.get("verdict"),
    }


def _trust(plan: PartitionPlan) -> list[Markdown] | None:
    """The verdict, then what it rests on; None for a plan without halves."""
    if plan.trust.get("verdict") is None:
        return None
    verdict = Markdown(f"**{trust_verdict(plan.trust)}**")
    return [verdict, *(Markdown(line) for line in trust_sentences(plan, escape_markdown))]


def _verified(groups: Sequence[Mapping[str, Any]]) -> Markdown | None:
    """`weights` for all groups alike, or group by group; None where a manifest does not say."""
    levels = {str(group["group"]): str(group["verified"]) for group in groups if group.get("verified")}
    if len(levels) < len(groups):
        return None
    if len(set(levels.values())) == 1:
        return Markdown(f"every group at level {code(next(iter(levels.values())))}")
    return Markdown(", ".join(f"group {number} at level {code(level)}" for number, level in levels.items()))


def _before(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The merged model that went in, and the groups that it stands for."""
    record = manifest.get("with_merged")
    if record is None:
        return None
    where = f"{record['repo_id']}@{record['revision'][:12]}" if record["repo_id"] else None
    return {**record, "where": where, "named": Markdown(", ".join(str(number) for number in record["groups"]))}


def _public_recipe(mergekit_config: str, manifest: Mapping[str, Any]) -> str:
    """The recipe with every local folder named after the group it holds."""
    content = yaml.safe_load(mergekit_config)
    names: dict[str, Any] = {}
    for model, parent in zip(content.get("models", []), parents(manifest), strict=False):
        shown = model["model"]
        if find_local_paths(str(shown)) or str(shown).startswith("/"):
            model["model"] = parent.name
            if isinstance(shown, dict) and "lora" in shown:
                base = manifest["base"]
                model["model"] = f"{base['repo_id']}@{base['revision']}" if base.get("repo_id") else "BASE"
                model["model"] += f"+{parent.name}"
        names[str(shown)] = model["model"]
    origin = content.get("base_model")
    if str(origin) in names or find_local_paths(str(origin)):
        content["base_model"] = names.get(str(origin), "base")
    return hide_local_paths(yaml.safe_dump(content, sort_keys=False))
