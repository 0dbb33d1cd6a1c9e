"""What a merged model was made of, as its merit.json says: the models of its mergekit_config.yml, in their order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merit_hf.plan import PartitionPlan


@dataclass(frozen=True)
class Parent:
    """A model that went into a merge.

    Attributes:
        kind: `merged` (an earlier merged model, in the stead of its groups), `group` or `base` (θ0, where the mean is
            interpolated to it).
        number: of a group.
        repo: `org/name@sha`; None where it was a folder.
        files_sha256: of its files; None for the base.
    """

    kind: Literal["merged", "group", "base"]
    number: int | None
    repo: str | None
    files_sha256: str | None

    @property
    def name(self) -> str:
        """What to call its folder."""
        return f"groups/{self.number}" if self.kind == "group" else {"merged": "merged-before"}.get(self.kind, "base")


def parents(manifest: Mapping[str, Any]) -> list[Parent]:
    """The models of a merged model's recipe."""
    before = manifest.get("with_merged")
    inside = before["groups"] if before else []
    found = [Parent("merged", None, _repo(before), before["files_sha256"])] if before else []
    found += [
        Parent("group", group["group"], _repo(group), group.get("files_sha256"))
        for group in manifest["groups"]
        if group["group"] not in inside
    ]
    if manifest.get("interpolate_to_init", 1) != 1:
        found.append(Parent("base", None, _repo(manifest["base"]), None))
    return found


def merge_command(plan: PartitionPlan, manifest: Mapping[str, Any]) -> str:
    """The `merit merge` call that makes this model again."""
    made_of = [parent for parent in parents(manifest) if parent.kind != "base"]
    in_repos = all(parent.repo for parent in made_of)
    names = {
        parent: "{}@{:.12}".format(*parent.repo.split("@")) if in_repos and parent.repo else parent.name
        for parent in made_of
    }
    folders = " ".join(name for parent, name in names.items() if parent.kind == "group")
    before = "".join(f" --with-merged {name}" for parent, name in names.items() if parent.kind == "merged")
    command = f"merit merge {plan.repo_id or 'PLAN'} {folders}{before} --output merged"
    weights = manifest.get("weights", "tokens")
    if weights != "tokens":
        command += f" --weights {'weights.yaml' if weights == 'file' else weights}"
    if manifest.get("engine", "safetensors") != "safetensors":
        command += f" --engine {manifest['engine']}"
    if manifest.get("adapters", "dense") != "dense":
        command += f" --adapters {manifest['adapters']}"
    if manifest.get("svd_rank"):
        command += f" --svd-rank {manifest['svd_rank']}"
    if manifest.get("method", "linear") != "linear":
        command += f" --method {manifest['method']}"
        command += "".join(f" --parameter {key}={json.dumps(v)}" for key, v in manifest["parameters"].items())
    if manifest.get("interpolate_to_init", 1) != 1:
        command += f" --interpolate-to-init {manifest['interpolate_to_init']:g}"
    if manifest.get("asked_out_dtype"):
        command += f" --out-dtype {manifest['asked_out_dtype']}"
    if any("stopped_at_step" in group for group in manifest["groups"]):
        command += " --allow-partial"
    return command + (" --allow-missing" if len(manifest["groups"]) < plan.num_groups else "")


def _repo(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['repo_id']}@{entry['revision']}" if entry.get("repo_id") else None
