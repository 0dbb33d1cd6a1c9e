"""What a merged model was made of, as its merit.json says: the models of its mergekit_config.yml, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


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


def _repo(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['repo_id']}@{entry['revision']}" if entry.get("repo_id") else None
