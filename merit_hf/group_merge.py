"""A plan's group checkpoints → the merged model: verified, weighted by the plan's tokens, with merit.json and card.

    stats = merge_groups(plan, ["runs/groups/0", "runs/groups/1"], "runs/merged")

`merge` averages any checkpoints; this room knows which ones belong together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from merit_hf.adapter_merge import merge_adapters_into
from merit_hf.adapters import is_adapter
from merit_hf.cards import merged_model_card
from merit_hf.checkpoint import atomic_folder, check_new_folder, weights_sha256
from merit_hf.choices import check_merge_method
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import resolve_model
from merit_hf.manifest import hash_files, read_manifest, write_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME, MergeStats, merge_into, model_reference
from merit_hf.merge_weights import group_weights, replayed_weights
from merit_hf.merged_part import MergedPart, open_merged
from merit_hf.mergekit_engine import LINEAR, MethodUse, mergekit_config
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.verification.checks import Check, failed, manifest_checks
from merit_hf.verification.sources import FolderSource, Source, open_source
from merit_hf.verification.verify import Replay, partial_replays, verify_checkpoints
from merit_hf.versions import library_versions

SCHEMA_VERSION = 1
# What a merge asks of its groups: everything that can be seen in manifests, files and weights, without data.
LEVEL = "weights"


def merge_groups(
    plan: PartitionPlan,
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    base: str | Path | None = None,
    engine: str = "safetensors",
    weights: str | Path = "tokens",
    out_dtype: str | None = None,
    exclude: Sequence[int] = (),
    allow_missing: bool = False,
    adapters: str = "dense",
    svd_rank: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    device: str = "cpu",
    soup: Sequence[Mapping[str, Any]] | None = None,
    interpolate_to_init: float = 1.0,
    with_merged: str | Path | None = None,
    round_of: Mapping[str, Any] | None = None,
    allow_partial: bool = False,
) -> MergeStats:
    """Merge the groups of a plan once, after verifying each checkpoint against it.

    Args:
        plan ([`PartitionPlan`]): the plan they were trained from.
        checkpoints (`Sequence`): folders or Hub ids (`org/name[@revision]`), in any order.
        output (`str` or `Path`): new folder; as in [`merge_checkpoints`], also `engine`, `out_dtype`, `progress`,
            `method`, `parameters`, `device` and `interpolate_to_init`, which scales a merged adapter.
        base (`str` or `Path`, *optional*): folder or Hub id of θ0, where the plan's own is not at hand.
        weights (`str` or `Path`, *optional*, defaults to `"tokens"`): `tokens` (the plan's `train_input_tokens`),
            `loss_tokens`, `uniform`, or a YAML or JSON file that maps group to weight.
        exclude (`Sequence[int]`, *optional*): groups to leave out; the others' weights are normalised.
        allow_missing (`bool`, *optional*, defaults to `False`): merge what is there, weights normalised.
        adapters (`str`, *optional*, defaults to `"dense"`): what LoRA groups become: `dense`, the full checkpoint
            W + Σ w_k s_k B_k A_k; `concat`, the same as an adapter of summed rank; `svd`, its best approximation by an
            adapter of `svd_rank`.
        svd_rank (`int`, *optional*): see `adapters`.
        soup (`Sequence[Mapping]`, *optional*): how the groups were chosen, for the manifest; see [`greedy_soup`].
        with_merged (`str` or `Path`, *optional*): folder or Hub id of a merged model in the stead of the groups in it,
            with the sum of their weights. It was merged under this plan, or under one that this one extends.
        round_of (`Mapping`, *optional*): which round of a run this is, for the manifest; see [`rounds`].
        allow_partial (`bool`, *optional*, defaults to `False`): take trainings that were stopped before their planned
            steps, weighted by the tokens of the steps that they took, which are replayed from the group's data.

    Raises:
        ConfigError: a group is missing, given twice, not in the plan, or has no usable weight; `output` exists; or
            engine, out_dtype or adapters do not fit what the plan trains.
        MeritError: a checkpoint or the base does not verify, or the merge refuses it.
    """
    check_merge_method(engine, method, parameters or {}, "merge", interpolate_to_init)
    _check_adapters(plan, engine, out_dtype, adapters, svd_rank)
    check_new_folder(Path(output))
    before = None
    if with_merged is not None:
        _check_method_of_parts(method)
        before = open_merged(plan, with_merged, lambda numbers: group_weights(plan, numbers, weights), adapters)
    chosen = chosen_groups(plan, checkpoints, exclude, allow_missing, before.numbers if before else ())
    numbers = sorted(chosen)
    values = group_weights(plan, numbers, weights)
    folder = plan.base_folder() if base is None else _locate(base, "base")
    with atomic_folder(Path(output)) as part:
        _verify_base(plan, folder)
        # A shallow copy, since `replace` would read the conflict matrix of a large plan.
        here = copy.copy(plan)
        here.local = {**plan.local, "base": str(folder)}
        replays = partial_replays(here) if allow_partial else None
        folders = verified_folders(here, [chosen[number] for number in numbers], replays)
        trained = dict(zip(numbers, folders, strict=True))
        if replays is not None:
            values = replayed_weights(plan, trained, values, weights, replays)
        if before is not None:
            folders = [before.folder, *folders]
            values = [sum(group_weights(plan, before.numbers, weights)), *values]
        stats: MergeStats
        if adapters == "dense":
            stats = merge_into(
                part, folder, folders, values, out_dtype, engine, progress=progress, method=method,
                parameters=parameters, device=device, interpolate_to_init=interpolate_to_init,
            )  # fmt: skip
        else:
            stats = merge_adapters_into(
                part, folder, folders, values, adapters, svd_rank, progress, interpolate_to_init
            )
        if plan.peft:
            recipe = adapters_recipe(folder, folders, values, stats.out_dtype, interpolate_to_init)
            (part / MERGEKIT_CONFIG_NAME).write_text(recipe, encoding="utf-8")
        if plan.base.get("chat_template") is not None:
            # The groups were trained with a template of the plan's, not with the base's own.
            (part / "chat_template.jinja").write_text(plan.base["chat_template"], encoding="utf-8")
        manifest = _merged_manifest(plan, trained, engine, stats, part, before)
        manifest["weights"] = weights if weights in ("tokens", "loss_tokens", "uniform") else "file"
        # None is the base's own; `out_dtype` in the manifest is what that came to.
        manifest["asked_out_dtype"] = out_dtype
        if plan.peft:
            manifest |= {"peft": plan.peft, "adapters": adapters, "svd_rank": svd_rank}
        manifest["method"], manifest["parameters"] = method, dict(parameters or {})
        manifest["interpolate_to_init"] = interpolate_to_init
        if round_of is not None:
            manifest["round"] = dict(round_of)
        if soup is not None:
            manifest["soup"] = list(soup)
        write_manifest(part, manifest)
        recipe = (part / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8")
        (part / "README.md").write_text(merged_model_card(plan, manifest, recipe), encoding="utf-8")
    return stats


def _check_adapters(
    plan: PartitionPlan, engine: str, out_dtype: str | None, adapters: str, svd_rank: int | None
) -> None:
    if adapters not in ("dense", "concat", "svd"):
        raise ConfigError(f"adapters {adapters!r}: expected one of dense, concat, svd.")
    if adapters != "dense" and not plan.peft:
        raise ConfigError(f"adapters {adapters!r}: the plan's groups are whole models. Leave it out.")
    if (adapters == "svd") != (svd_rank is not None):
        raise ConfigError(
            f"adapters {adapters!r} with svd_rank {svd_rank}: `svd` needs a rank, and nothing else takes one."
        )
    if svd_rank is not None and svd_rank < 1:
        raise ConfigError(f"svd_rank {svd_rank}: expected 1 or more.")
    if plan.peft and engine != "safetensors":
        raise ConfigError(f"engine {engine!r}: LoRA groups are merged by engine safetensors. Leave it out.")
    if adapters != "dense" and out_dtype not in (None, "float32"):
        raise ConfigError(f"out_dtype {out_dtype!r}: a merged adapter is float32. Leave it out, or merge dense.")


def _check_method_of_parts(method: str) -> None:
    if method != LINEAR:
        raise ConfigError(
            f"with_merged is for a mean, which a merged model can be a part of, and method is {method}. Give the "
            "groups themselves."
        )


def adapters_recipe(
    base: Path, folders: Sequence[Path], weights: Sequence[float], out_dtype: str, interpolate_to_init: float = 1.0
) -> str:
    """The mergekit config of the same dense sum: each model is the base with one adapter on it."""
    names, origin = [model_reference(folder) for folder in folders], model_reference(base)
    fractions = [weight / sum(weights) for weight in weights]
    recipe = mergekit_config(names, fractions, out_dtype, MethodUse(), origin, interpolate_to_init)
    content = yaml.safe_load(recipe)
    for model, folder, name in zip(content["models"], folders, names, strict=False):
        if is_adapter(folder):
            model["model"] = {"model": _model_path(origin), "lora": _model_path(name)}
    content["base_model"] = copy.deepcopy(content["models"][0]["model"])
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _model_path(reference: str) -> dict[str, str]:
    """mergekit's long form of a reference: it takes `+` and `@` in a path for syntax."""
    if reference.startswith("/"):
        return {"path": reference}
    path, _, revision = reference.partition("@")
    return {"path": path, "revision": revision}


def chosen_groups(
    plan: PartitionPlan,
    checkpoints: Sequence[str | Path],
    exclude: Sequence[int],
    allow_missing: bool,
    merged: Collection[int] = (),
) -> dict[int, Source]:
    """Checkpoint by group, as the manifests say, less the excluded groups; nothing is downloaded yet.

    `merged`: groups that are there already, in a merged model.
    """
    for excluded in exclude:
        plan.group(excluded)
        if excluded in merged:
            raise ConfigError(
                f"--exclude {excluded}: group {excluded} is in the merged model, and cannot be taken out."
            )
    given: dict[int, Source] = {}
    for checkpoint in checkpoints:
        source = open_source(checkpoint, "checkpoint")
        number = _group_of(plan, source)
        if number in given:
            raise ConfigError(
                f"group {number} is given twice: {given[number].name} and {source.name}. Give one of them."
            )
        if number in merged:
            raise ConfigError(f"{source.name}: group {number} is in the merged model already. Leave it out.")
        given[number] = source
    wanted = set(range(plan.num_groups)) - set(exclude) - set(merged)
    missing = sorted(wanted - given.keys())
    if missing and not allow_missing:
        raise ConfigError(
            f"{len(wanted) - len(missing)} of {len(wanted)} groups given, no checkpoint of group "
            f"{', '.join(map(str, missing))}. Train the rest, or merge without with --allow-missing."
        )
    chosen = {number: given[number] for number in wanted & given.keys()}
    if not chosen:
        raise ConfigError("no group is left to merge. Give checkpoints, or exclude fewer groups.")
    return chosen


def _group_of(plan: PartitionPlan, source: Source) -> int:
    if isinstance(source, FolderSource):
        number = read_manifest(source.folder).get("group")
        if not isinstance(number, int) or not 0 <= number < plan.num_groups:
            raise ConfigError(
                f"{source.name}: its merit.json names group {number}, and the plan has groups 0 to "
                f"{plan.num_groups - 1}. Give checkpoints of this plan's groups."
            )
        return number
    checks, group = manifest_checks(plan, source)
    if group is None:
        raise _refused(source, checks)
    return group


def verified_folders(plan: PartitionPlan, sources: Sequence[Source], replays: Replay | None = None) -> list[Path]:
    """The folders of verified checkpoints, in order. `replays`: as in [`verify_checkpoints`].

    Raises:
        MeritError: the first check that failed, what it found and what it expected.
    """
    folders = []
    for result in verify_checkpoints(plan, sources, LEVEL, replays=replays):
        if not result.ok or result.folder is None:
            raise _refused(result.source, result.checks)
        folders.append(result.folder)
    return folders


def _refused(source: Source, checks: list[Check]) -> MeritError:
    check = failed(checks)
    assert check is not None
    if check.name == "status":
        return MeritError(
            f"{source.name}: not finished: {check.found}. Go on with merit train, accept what was trained with "
            "--allow-partial (weighted by the tokens of its steps), or plan again with as many steps."
        )
    return MeritError(
        f"{source.name}: does not verify: {check.name} is {check.found}, expected {check.expected}. Train the group "
        "again from this plan, or leave it out with --exclude."
    )


def _verify_base(plan: PartitionPlan, folder: Path) -> None:
    found, expected = weights_sha256(folder), plan.base["weights_sha256"]
    if found != expected:
        raise MeritError(
            f"{folder}: not the plan's base: weights_sha256 {found[:12]}, expected {expected[:12]}. "
            "Give the checkpoint that the plan was made from."
        )


def _locate(path: str | Path, where: str) -> Path:
    if Path(path).is_dir():
        return Path(path).resolve()
    name, _, revision = str(path).partition("@")
    return resolve_model(name, revision or None, Path(), where)[0]


def _stopped_at(plan: PartitionPlan, number: int, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Of a training that was stopped, the step and how many were planned."""
    planned = plan.group(number).num_steps
    return (
        {"stopped_at_step": manifest["num_steps"], "planned_steps": planned} if manifest["num_steps"] < planned else {}
    )


def _merged_manifest(
    plan: PartitionPlan,
    folders: Mapping[int, Path],
    engine: str,
    stats: MergeStats,
    part: Path,
    before: MergedPart | None,
) -> dict[str, Any]:
    """`stats` are of the models that went in; the manifest's are of the groups."""
    groups, record = [], {}
    fractions: Sequence[float | None] = stats.fractions or [None] * len(folders)
    distances = stats.group_displacements
    if before is not None:
        share, fractions = fractions[0], fractions[1:]
        assert share is not None
        groups = [{**entry, "weight": share * entry["weight"]} for entry in before.entries]
        record = {"with_merged": {**before.record, "weight": share}}
        distances = [*before.group_displacements, *distances[1:]]
    for (number, folder), fraction in zip(folders.items(), fractions, strict=True):
        manifest = read_manifest(folder)
        repo_id, _, revision = model_reference(folder).partition("@")
        groups.append(
            {
                "group": number,
                # None: the method takes no weights.
                "weight": fraction,
                "num_input_tokens": manifest["num_input_tokens"],
                "num_loss_tokens": manifest["num_loss_tokens"],
                **_stopped_at(plan, number, manifest),
                "files_sha256": canonical_sha256(manifest["files"]),
                "verified": LEVEL,
                "repo_id": None if repo_id.startswith("/") else repo_id,
                "revision": None if repo_id.startswith("/") else revision,
            }
        )
    in_order = sorted(range(len(groups)), key=lambda index: groups[index]["group"])
    told = replace(stats, group_displacements=[distances[index] for index in in_order]).to_dict()
    files = hash_files(part)
    # Publishing rewrites the paths in this one.
    files.pop(MERGEKIT_CONFIG_NAME)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "merged",
        "plan": {"repo_id": plan.repo_id, "revision": plan.revision, "sha256": plan.sha256},
        "base": {key: plan.base[key] for key in ("repo_id", "revision", "weights_sha256", "chat_template_sha256")},
        "groups": [groups[index] for index in in_order],
        **record,
        "out_dtype": stats.out_dtype,
        "engine": engine,
        "stats": told,
        "versions": library_versions(),
        "files": files,
    }
