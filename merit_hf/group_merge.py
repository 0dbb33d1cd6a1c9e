"""A plan's group checkpoints → the merged model: verified, weighted by the plan's tokens, with merit.json and card.

    stats = merge_groups(plan, ["runs/groups/0", "runs/groups/1"], "runs/merged")

`merge` averages any checkpoints; this room knows which ones belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from merit_hf.cards import merged_model_card
from merit_hf.checkpoint import atomic_folder, weights_sha256
from merit_hf.checks import Check, failed, manifest_checks
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import resolve_model
from merit_hf.manifest import hash_files, read_manifest, write_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME, MergeStats, merge_into, model_reference
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.sources import FolderSource, Source, open_source
from merit_hf.verify import verify_checkpoints
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
    progress: Callable[[int, int], None] | None = None,
) -> MergeStats:
    """Merge the groups of a plan once, after verifying each checkpoint against it.

    Args:
        plan ([`PartitionPlan`]): the plan they were trained from.
        checkpoints (`Sequence`): folders or Hub ids (`org/name[@revision]`), in any order.
        output (`str` or `Path`): new folder; as in [`merge_checkpoints`], also `engine`, `out_dtype` and `progress`.
        base (`str` or `Path`, *optional*): folder or Hub id of θ0, where the plan's own is not at hand.
        weights (`str` or `Path`, *optional*, defaults to `"tokens"`): `tokens` (the plan's `train_input_tokens`),
            `loss_tokens`, `uniform`, or a YAML or JSON file that maps group to weight.
        exclude (`Sequence[int]`, *optional*): groups to leave out; the others' weights are normalised.
        allow_missing (`bool`, *optional*, defaults to `False`): merge what is there, weights normalised.

    Raises:
        ConfigError: a group is missing, given twice, not in the plan, or has no usable weight; or `output` exists.
        MeritError: a checkpoint or the base does not verify, or the merge refuses it.
    """
    chosen = _chosen_groups(plan, checkpoints, exclude, allow_missing)
    numbers = sorted(chosen)
    values = group_weights(plan, numbers, weights)
    folder = plan.base_folder() if base is None else _locate(base, "base")
    with atomic_folder(Path(output)) as part:
        _verify_base(plan, folder)
        folders = _verified_folders(plan, [chosen[number] for number in numbers])
        stats = merge_into(part, folder, folders, values, out_dtype, engine, progress=progress)
        if plan.base.get("chat_template") is not None:
            # The groups were trained with a template of the plan's, not with the base's own.
            (part / "chat_template.jinja").write_text(plan.base["chat_template"], encoding="utf-8")
        manifest = _merged_manifest(plan, dict(zip(numbers, folders, strict=True)), values, engine, stats, part)
        manifest["weights"] = weights if weights in ("tokens", "loss_tokens", "uniform") else "file"
        # None is the base's own; `out_dtype` in the manifest is what that came to.
        manifest["asked_out_dtype"] = out_dtype
        write_manifest(part, manifest)
        recipe = (part / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8")
        (part / "README.md").write_text(merged_model_card(plan, manifest, recipe), encoding="utf-8")
    return stats


def _chosen_groups(
    plan: PartitionPlan, checkpoints: Sequence[str | Path], exclude: Sequence[int], allow_missing: bool
) -> dict[int, Source]:
    """Checkpoint by group, as the manifests say, less the excluded groups; nothing is downloaded yet."""
    for excluded in exclude:
        plan.group(excluded)
    given: dict[int, Source] = {}
    for checkpoint in checkpoints:
        source = open_source(checkpoint, "checkpoint")
        number = _group_of(plan, source)
        if number in given:
            raise ConfigError(
                f"group {number} is given twice: {given[number].name} and {source.name}. Give one of them."
            )
        given[number] = source
    wanted = set(range(plan.num_groups)) - set(exclude)
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


def group_weights(plan: PartitionPlan, numbers: Sequence[int], weights: str | Path) -> list[float]:
    """The weight of each group in `numbers`, not normalised; see [`merge_groups`] for `weights`."""
    groups = [plan.group(number) for number in numbers]
    if weights == "tokens":
        return [group.train_input_tokens for group in groups]
    if weights == "loss_tokens":
        return [group.train_loss_tokens for group in groups]
    if weights == "uniform":
        return [1.0] * len(groups)
    table = _read_weights(Path(weights))
    unknown = sorted(set(table) - {str(number) for number in range(plan.num_groups)})
    if unknown:
        raise ConfigError(f"{weights}: weight for group {unknown[0]}; the plan has groups 0 to {plan.num_groups - 1}.")
    absent = [number for number in numbers if str(number) not in table]
    if absent:
        raise ConfigError(f"{weights}: no weight for group {absent[0]}. Add it, or exclude the group.")
    return [_number(table[str(number)], f"{weights}: group {number}") for number in numbers]


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"weights {path}: expected tokens, loss_tokens, uniform, or a file that maps group to weight."
        )
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML or JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: expected a mapping of group to weight, found a {type(table).__name__}.")
    return {str(key): value for key, value in table.items()}


def _number(value: Any, where: str) -> float:
    try:
        # Through text, since YAML 1.1 takes 1e-5 for text and `true` must not pass as 1.
        return float(str(value))
    except ValueError:
        raise ConfigError(f"{where}: weight {value!r} is not a number.") from None


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


def _verified_folders(plan: PartitionPlan, sources: Sequence[Source]) -> list[Path]:
    """The folders of verified checkpoints, in order; refuses the first that does not verify."""
    folders = []
    for result in verify_checkpoints(plan, sources, LEVEL):
        if not result.ok or result.folder is None:
            raise _refused(result.source, result.checks)
        folders.append(result.folder)
    return folders


def _refused(source: Source, checks: list[Check]) -> MeritError:
    check = failed(checks)
    assert check is not None
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


def _merged_manifest(
    plan: PartitionPlan,
    folders: Mapping[int, Path],
    values: Sequence[float],
    engine: str,
    stats: MergeStats,
    part: Path,
) -> dict[str, Any]:
    groups = []
    for (number, folder), value in zip(folders.items(), values, strict=True):
        manifest = read_manifest(folder)
        repo_id, _, revision = model_reference(folder).partition("@")
        groups.append(
            {
                "group": number,
                "weight": value / sum(values),
                "num_input_tokens": manifest["num_input_tokens"],
                "num_loss_tokens": manifest["num_loss_tokens"],
                "files_sha256": canonical_sha256(manifest["files"]),
                "verified": LEVEL,
                "repo_id": None if repo_id.startswith("/") else repo_id,
                "revision": None if repo_id.startswith("/") else revision,
            }
        )
    files = hash_files(part)
    # Publishing rewrites the paths in this one.
    files.pop(MERGEKIT_CONFIG_NAME)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "merged",
        "plan": {"repo_id": plan.repo_id, "revision": plan.revision, "sha256": plan.sha256},
        "base": {key: plan.base[key] for key in ("repo_id", "revision", "weights_sha256", "chat_template_sha256")},
        "groups": groups,
        "out_dtype": stats.out_dtype,
        "engine": engine,
        "stats": stats.to_dict(),
        "versions": library_versions(),
        "files": files,
    }
