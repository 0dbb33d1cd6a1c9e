"""`merit push`: a plan, a group checkpoint or a merged model, from its folder to the Hub.

Cards are made and checked before anything is uploaded, a push is one commit, and it can be run again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from merit_hf import tables
from merit_hf.cards import EVALUATION_FIGURE, keep_metadata, merged_model_card, plan_dataset_card, validate_card
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import list_files, model_licence, pin_revision, read_file
from merit_hf.hub_write import (
    EvalResultEntry,
    Pushed,
    collect,
    commit,
    eval_result_entries_to_yaml,
    folder_files,
    push_files,
    validate_model_card,
)
from merit_hf.manifest import MANIFEST_NAME, MAX_BYTES, hash_files, parse_manifest, read_manifest
from merit_hf.parents import parents
from merit_hf.plan import LOCAL_NAME, PLAN_NAME, PartitionPlan, canonical_sha256
from merit_hf.sharing.licences import merged_licence
from merit_hf.sharing.registry import MERGED_NAME, entry_of, is_repo_id

CARD_NAME = "README.md"
MERGEKIT_CONFIG_NAME = "mergekit_config.yml"
_MAX_CARD_BYTES = 1 << 20
# Not part of the checkpoint, and worth reading: losses by step.
_LOGS = ("trainer_state.json",)


def push_plan(plan: PartitionPlan, repo_id: str, private: bool | None = None, create_pr: bool = False) -> Pushed:
    """Upload a plan's folder as one commit of a dataset repo; claims and contributions there stay as they are.

    What the repo's card says besides (licence, languages, other `configs:`) is kept, and so are the places of data
    that an earlier push published.

    Raises:
        ConfigError: the plan is not in a folder here, or the repo holds another plan that people work on.
    """
    if plan.folder is None or plan.repo_id is not None:
        raise ConfigError("only a plan in a folder of this machine can be pushed: save it, and load it from there.")
    check_repo_id(repo_id)
    before = _published(repo_id)
    in_use = [path for path in before if entry_of(path)]
    known = json.loads(before[PLAN_NAME]) if PLAN_NAME in before else {}
    if known.get("sha256") not in (None, plan.sha256) and in_use:
        raise ConfigError(
            f"`{repo_id}` holds plan {str(known['sha256'])[:12]} with {len(in_use)} claims and contributions, and "
            f"this is plan {plan.sha256[:12]}. Push it to another repo."
        )
    if known.get("sha256") == plan.sha256:
        plan = _with_places(plan, PartitionPlan.from_pretrained(repo_id))
    named = copy.copy(plan)
    named.repo_id = repo_id
    card = plan_dataset_card(named)
    card = keep_metadata(card, before.get(CARD_NAME, b"").decode(errors="replace"))
    validate_card(card)
    replace = {
        CARD_NAME: card.encode(),
        PLAN_NAME: (json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) + "\n").encode(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "data").mkdir()
        tables.write_datasets(Path(scratch), plan.datasets)
        replace["data/datasets.parquet"] = (Path(scratch) / "data" / "datasets.parquet").read_bytes()
    assert plan.folder is not None
    files = folder_files(plan.folder, ignore=(LOCAL_NAME,)) | replace
    return push_files(files, repo_id, "dataset", private, "Upload partition plan", create_pr=create_pr)


def push_group(
    folder: Path, repo_id: str, private: bool | None = None, create_pr: bool = False, licence: str | None = None
) -> Pushed:
    """Upload a finished group checkpoint as one commit, which also removes what an intermediate push left in the repo.

    Raises:
        MeritError: it is not finished, or a file is not the one that its manifest names.
    """
    check_repo_id(repo_id)
    manifest = read_manifest(folder)
    if manifest.get("status") != "complete":
        raise MeritError(f"{folder}: its training is not finished, so it is not pushed. Run `merit train` again.")
    _check_files(folder, manifest)
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    if licence:
        card = keep_metadata(card, f"---\nlicense: {json.dumps(licence)}\n---\n")
    _check_model_card(card)
    names = [*manifest["files"], MANIFEST_NAME, *(name for name in _LOGS if (folder / name).is_file())]
    files: dict[str, bytes | Path] = {name: folder / name for name in names}
    return push_files(
        {**files, CARD_NAME: card.encode()}, repo_id, "model", private, f"Upload group {manifest['group']}",
        prune=True, create_pr=create_pr,
    )  # fmt: skip


@dataclass(frozen=True)
class Publication:
    """A published merged model: its commit, its collection, and the plan's commit that names it, where there are."""

    pushed: Pushed
    collection: str | None
    registered: Pushed | None


def push_merged(
    folder: Path,
    repo_id: str,
    plan: PartitionPlan,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    licence: str | None = None,
    group_repos: Mapping[int, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    register: bool = True,
) -> Publication:
    """Publish a merged model: card with its parents, data, licence and evaluation; then a collection of all of it.

    Args:
        plan: the plan it was merged under.
        licence: its licence, where it does not follow from base and data.
        group_repos: {group: `org/name[@revision]`} of groups that were merged from folders.
        evaluation: as `merit evaluate` wrote it.
        register: note the model in the plan's repo and make the collection.

    Raises:
        ConfigError: a group is in no repo, the plan is another, or the licence has to be decided.
        MeritError: a repo does not hold the checkpoint that was merged, or a file has changed since the merge.
    """
    check_repo_id(repo_id)
    manifest = read_manifest(folder)
    if manifest["plan"]["sha256"] != plan.sha256:
        raise ConfigError(
            f"{folder}: merged under plan {manifest['plan']['sha256'][:12]}, and the plan given is {plan.sha256[:12]}."
        )
    _check_files(folder, {**manifest, "files": {**manifest["files"], **_recipe_hash(folder)}})
    manifest = _with_repos(manifest, plan, group_repos or {})
    recipe = _public_recipe(folder, manifest)
    licence = licence_of(plan, [group["group"] for group in manifest["groups"]], licence)
    if evaluation is not None and (evaluation.get("plan_sha256"), "merged" in evaluation["models"]) != (
        plan.sha256,
        True,
    ):
        raise ConfigError("the evaluation is of other models or of another plan. Run `merit evaluate` on this one.")
    picture = EVALUATION_FIGURE if evaluation is not None and (folder / EVALUATION_FIGURE).is_file() else None
    card = merged_model_card(plan, manifest, recipe, evaluation, licence, repo_id.partition("/")[2], picture)
    _check_model_card(card)
    replace = {
        CARD_NAME: card.encode(),
        MERGEKIT_CONFIG_NAME: recipe.encode(),
        MANIFEST_NAME: (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(),
        **(_eval_result_files(plan, evaluation) if evaluation else {}),
        **({picture: (folder / picture).read_bytes()} if picture else {}),
    }
    files = {name: folder / name for name in manifest["files"]} | replace
    pushed = push_files(files, repo_id, "model", private, "Upload merged model", prune=True, create_pr=create_pr)
    if create_pr or not register:
        return Publication(pushed, None, None)
    return _announce(plan, manifest, repo_id, pushed, bool(private))


def licence_of(plan: PartitionPlan, groups: Collection[int], given: str | None) -> str:
    """The licence of what is merged from `groups`: as given, else what follows from base and data on the Hub.

    Raises:
        ConfigError: it does not follow; the user has to decide.
    """
    if given is not None:
        return given
    base = plan.base["repo_id"] and model_licence(plan.base["repo_id"], plan.base["revision"], "model")
    parts = {
        model_licence(dataset.repo_id, dataset.revision, "dataset") if dataset.repo_id else None
        for dataset in plan.datasets
        if dataset.group in groups
    }
    return merged_licence(base, parts)


def check_repo_id(repo_id: str) -> None:
    """Raises ConfigError where `repo_id` is no `owner/name`."""
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ConfigError(f"REPO_ID {repo_id!r}: expected OWNER/NAME, such as my-org/my-plan.")


def _published(repo_id: str) -> dict[str, bytes]:
    """What an earlier push left in a plan's repo: card, plan.json, and the names of claims and contributions."""
    try:
        head = pin_revision(repo_id, None, "dataset", "push")
    except ConfigError:
        return {}
    files = list_files(repo_id, head, "dataset")
    read = {
        path: read_file(repo_id, head, "dataset", files[path], 64 * _MAX_CARD_BYTES)
        for path in (CARD_NAME, PLAN_NAME)
        if path in files
    }
    return read | {path: b"" for path in files if entry_of(path)}


def _with_places(plan: PartitionPlan, published: PartitionPlan) -> PartitionPlan:
    """The plan with the repos of its data that the same plan on the Hub knows, and this folder does not."""
    there = {dataset.name: dataset for dataset in published.datasets}
    entries = {entry["name"]: entry for entry in published.config["datasets"]}
    lacking = {d.name for d in plan.datasets if d.repo_id is None and there[d.name].repo_id is not None}
    return dataclasses.replace(
        plan,
        datasets=[there[d.name] if d.name in lacking else d for d in plan.datasets],
        config={
            **plan.config,
            "datasets": [entries[e["name"]] if e["name"] in lacking else e for e in plan.config["datasets"]],
        },
    )


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    found = hash_files(folder)
    wrong = sorted(
        name for name in manifest["files"].keys() | found.keys() if manifest["files"].get(name) != found.get(name)
    )
    if wrong:
        raise MeritError(
            f"{folder}: {wrong[0]} is not the file that its {MANIFEST_NAME} names. Make the folder again."
        )


def _recipe_hash(folder: Path) -> dict[str, str]:
    return {MERGEKIT_CONFIG_NAME: hash_files(folder)[MERGEKIT_CONFIG_NAME]}


def _check_model_card(card: str) -> None:
    validate_card(card)
    validate_model_card(card)


def _with_repos(manifest: dict[str, Any], plan: PartitionPlan, given: Mapping[int, str]) -> dict[str, Any]:
    """The manifest with every group's repo and commit, each held against what was merged."""
    accepted = {}
    if plan.repo_id is not None:
        from merit_hf.sharing.community import load_registry

        accepted = load_registry(plan).contributions
    unknown = sorted(set(given) - {group["group"] for group in manifest["groups"]})
    if unknown:
        raise ConfigError(f"--group-repo {unknown[0]}={given[unknown[0]]}: group {unknown[0]} is not in this merge.")
    before = manifest.get("with_merged")
    if before is not None and before["repo_id"] is None:
        raise ConfigError(
            "a merged model went into this one from a folder, so nobody could make this one again. Push it (merit "
            "push FOLDER OWNER/NAME), and merge with --with-merged OWNER/NAME."
        )
    groups = []
    for group in manifest["groups"]:
        number, known = group["group"], accepted.get(group["group"])
        if number in given:
            repo_id, _, revision = given[number].partition("@")
            check_repo_id(repo_id)
            revision = pin_revision(repo_id, revision or None, "model", f"--group-repo {number}")
        elif group["repo_id"] is not None:
            repo_id, revision = group["repo_id"], group["revision"]
        elif known is not None and known.files_sha256 == group["files_sha256"]:
            repo_id, revision = known.repo_id, known.revision
        else:
            raise ConfigError(
                f"group {number} was merged from a folder, so nobody could make this model again. Push it (merit push "
                f"FOLDER OWNER/NAME) and say so with --group-repo {number}=OWNER/NAME."
            )
        _check_same(repo_id, revision, number, group["files_sha256"])
        same = known is not None and (known.repo_id, known.revision) == (repo_id, revision)
        verified = {"verified": known.level} if known is not None and same else {}
        groups.append({**group, **verified, "repo_id": repo_id, "revision": revision})
    published = {"repo_id": plan.repo_id, "revision": plan.revision, "sha256": plan.sha256}
    return {**manifest, "plan": published, "groups": groups}


def read_remote_manifest(repo_id: str) -> tuple[dict[str, Any], str] | None:
    """(merit.json, commit) at the head of a model repo; None where there is no such repo or no manifest in it."""
    try:
        head = pin_revision(repo_id, None, "model", repo_id)
    except ConfigError:
        return None
    files = list_files(repo_id, head, "model")
    if MANIFEST_NAME not in files:
        return None
    raw = read_file(repo_id, head, "model", files[MANIFEST_NAME], MAX_BYTES)
    return parse_manifest(raw, f"{repo_id}: {MANIFEST_NAME}"), head


def _check_same(repo_id: str, revision: str, number: int, files_sha256: str) -> None:
    files = list_files(repo_id, revision, "model")
    found = None
    if MANIFEST_NAME in files:
        raw = read_file(repo_id, revision, "model", files[MANIFEST_NAME], MAX_BYTES)
        found = canonical_sha256(parse_manifest(raw, f"{repo_id}: {MANIFEST_NAME}").get("files"))
    if found != files_sha256:
        raise MeritError(
            f"`{repo_id}@{revision[:12]}` does not hold the checkpoint of group {number} that was merged "
            f"(files_sha256 {str(found)[:12]}, merged {files_sha256[:12]}). Push that checkpoint, or merge again."
        )


def _public_recipe(folder: Path, manifest: Mapping[str, Any]) -> str:
    """mergekit_config.yml with every path of this machine replaced by the repo that holds the same checkpoint."""
    recipe = yaml.safe_load((folder / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8"))
    made_of = parents(manifest)
    if len(recipe["models"]) != len(made_of):
        raise MeritError(
            f"{folder / MERGEKIT_CONFIG_NAME}: {len(recipe['models'])} models, merged were {len(made_of)}."
        )
    base = manifest["base"]
    # Methods that start from θ0 name it, the others one of their models.
    origin, start = recipe["base_model"], None
    for model, parent in zip(recipe["models"], made_of, strict=True):
        old = model["model"]
        if parent.kind == "base":
            model["model"] = {"model": _base_reference(base)}
            continue
        lora = isinstance(old, dict) and "lora" in old
        repo = str(parent.repo)
        model["model"] = {"model": _base_reference(base), "lora": _long_form(repo)} if lora else repo
        if old == origin:
            start = json.loads(json.dumps(model["model"]))
    recipe["base_model"] = {"model": _base_reference(base)} if start is None else start
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000))


def _base_reference(base: Mapping[str, Any]) -> dict[str, str]:
    if base["repo_id"] is None:
        raise ConfigError("the base that this merge names is in no repo, so nobody could make this model again.")
    return _long_form(f"{base['repo_id']}@{base['revision']}")


def _long_form(reference: str) -> dict[str, str]:
    path, _, revision = reference.partition("@")
    return {"path": path, "revision": revision}


def _eval_result_files(plan: PartitionPlan, evaluation: Mapping[str, Any]) -> dict[str, bytes]:
    """`.eval_results/*.yaml` for the datasets that are on the Hub."""
    entries = [
        EvalResultEntry(
            dataset_id=dataset.repo_id, task_id=dataset.config or "default",
            value=round(float(evaluation["datasets"][dataset.name]["loss"]["merged"]), 6),
            dataset_revision=dataset.revision, notes="held-out SFT loss in nats a token, lower is better",
        )
        for dataset in plan.datasets
        if dataset.repo_id is not None and dataset.name in evaluation["datasets"]
    ]  # fmt: skip
    if not entries:
        return {}
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {".eval_results/merit.yaml": text.encode()}


def _announce(
    plan: PartitionPlan, manifest: Mapping[str, Any], repo_id: str, pushed: Pushed, private: bool
) -> Publication:
    """Note the merged model in the plan's repo, where that is the user's, and link all of it in a collection."""
    from merit_hf.hub import current_user
    from merit_hf.sharing.community import may_write

    items: list[tuple[str, Literal["model", "dataset"], str]] = [(repo_id, "model", "merged model")]
    if before := manifest.get("with_merged"):
        items.append((before["repo_id"], "model", "merged before"))
    items += [(group["repo_id"], "model", f"group {group['group']}") for group in manifest["groups"]]
    registered = None
    if plan.repo_id is not None:
        items.insert(0, (plan.repo_id, "dataset", "partition plan"))
        if may_write(plan.repo_id, *current_user()):
            entry = {
                "plan_sha256": plan.sha256,
                "repo_id": repo_id,
                "revision": pushed.revision,
                "groups": {str(group["group"]): group["revision"] for group in manifest["groups"]},
            }
            content = (json.dumps(entry, indent=2, sort_keys=True) + "\n").encode()
            registered = commit(plan.repo_id, "dataset", {MERGED_NAME: content}, f"Merged as {repo_id}")
    namespace, _, name = repo_id.partition("/")
    return Publication(pushed, collect(namespace, f"MERIT: {name}"[:60], items, private), registered)
