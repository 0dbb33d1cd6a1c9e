"""`merit push DIR REPO_ID`: sees what lies in DIR, publishes it, and says what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merit_hf.config import ConfigError, MeritError
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.plan import PLAN_NAME, PartitionPlan
from merit_hf.sharing.publish import check_repo_id, push_group, push_merged, push_plan

EVALUATION_NAME = "evaluation.json"


def push_directory(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    with_data: bool = False,
    licence: str | None = None,
    plan: str | None = None,
    group_repos: Mapping[str, str] | None = None,
    evaluation: Path | None = None,
) -> Iterator[str]:
    """Publish what is in `folder`; yields what to tell the user, each line once its commit has been confirmed.

    Raises:
        ConfigError: the folder holds nothing of merit's, or an option that means nothing for what it holds.
    """
    check_repo_id(repo_id)
    if (folder / PLAN_NAME).is_file():
        _refuse(plan=plan, group_repo=group_repos, evaluation=evaluation, license=licence)
        yield from _plan(PartitionPlan.from_pretrained(folder), repo_id, private, create_pr, with_data)
        return
    if not (folder / MANIFEST_NAME).is_file():
        raise ConfigError(f"{folder}: neither a plan, nor a group checkpoint, nor a merged model of merit's.")
    _refuse(with_data=with_data)
    manifest = read_manifest(folder)
    if manifest.get("kind") == "group":
        _refuse(plan=plan, group_repo=group_repos, evaluation=evaluation)
        pushed = push_group(folder, repo_id, private, create_pr, licence)
        yield f"Pushed group {manifest['group']}: {pushed.url}"
        yield f"Next: merit contribute {manifest['plan']['repo_id'] or 'PLAN'} {repo_id}@{pushed.revision[:12]}"
        return
    loaded = _plan_of(folder, manifest, plan)
    done = push_merged(
        folder, repo_id, loaded, private=private, create_pr=create_pr, licence=licence,
        group_repos=_numbered(group_repos or {}), evaluation=_evaluation(folder, loaded, evaluation),
    )  # fmt: skip
    yield f"Pushed the merged model: {done.pushed.url}"
    if done.registered is not None:
        yield f"Noted in the plan: {done.registered.url}"
    if done.collection is not None:
        yield f"Collection with plan and groups: {done.collection}"


def _plan(plan: PartitionPlan, repo_id: str, private: bool | None, create_pr: bool, with_data: bool) -> Iterator[str]:
    if with_data:
        from merit_hf.sharing.publish_data import publish_data

        plan = publish_data(plan, repo_id, private)
    pushed = push_plan(plan, repo_id, private, create_pr)
    yield f"Pushed plan {plan.sha256[:12]}: {pushed.url}"
    published = PartitionPlan.from_pretrained(repo_id) if not create_pr else plan
    local = [dataset.name for dataset in published.datasets if dataset.repo_id is None]
    if local:
        yield (
            f"Not on the Hub: the data of {', '.join(local[:5])}{' …' if len(local) > 5 else ''}. Others need the "
            "files (--data NAME=PATH); --with-data uploads them."
        )
    if published.base["repo_id"] is None:
        yield "Not on the Hub: the base, which was a folder. Nobody else can train; plan from a base on the Hub."
    yield f"Next: merit claim {repo_id} --group 0, or merit status {repo_id}"


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing for what is in this folder. Leave it out.")


def _numbered(group_repos: Mapping[str, str]) -> dict[int, str]:
    for number in group_repos:
        if not number.isdigit():
            raise ConfigError(f"--group-repo {number}={group_repos[number]}: expected K=OWNER/NAME.")
    return {int(number): repo for number, repo in group_repos.items()}


def _plan_of(folder: Path, manifest: Mapping[str, Any], given: str | None) -> PartitionPlan:
    """The plan of a merged model: as given, from the repo that its manifest names, or of the run it lies in."""
    named = manifest["plan"]
    if given is not None:
        return PartitionPlan.from_pretrained(given)
    if named.get("repo_id"):
        return PartitionPlan.from_pretrained(named["repo_id"], named.get("revision"))
    beside = folder.resolve().parent / "plan"
    if (beside / PLAN_NAME).is_file():
        return PartitionPlan.from_pretrained(beside)
    raise ConfigError(f"{folder}: its plan is in no repo, and not in {beside}. Give it with --plan.")


def _evaluation(folder: Path, plan: PartitionPlan, given: Path | None) -> dict[str, Any] | None:
    """What was given, else the run's evaluation where it is of this plan's merged model."""
    path = given or folder.resolve().parent / EVALUATION_NAME
    if given is None and not path.is_file():
        return None
    try:
        evaluation = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MeritError(f"{path}: not a readable evaluation ({error}). Run `merit evaluate` again.") from error
    fits = evaluation.get("plan_sha256") == plan.sha256 and "merged" in evaluation.get("models", [])
    return evaluation if given is not None or fits else None
