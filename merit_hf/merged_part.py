"""An earlier merged model as one part of another merge, in the stead of the groups that it was merged from.

    part = open_merged(plan, "org/merged", lambda numbers: group_weights(plan, numbers, "tokens"))

Whoever has the merged model of others, and not their groups, adds a branch to it all the same: the mean of means,
weighted by the tokens behind each, is the mean of all groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import INDEX_NAME
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import fetch_files, is_plain_path
from merit_hf.manifest import MANIFEST_NAME, MAX_BYTES, parse_manifest
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.sharing.registry import is_repo_id
from merit_hf.verification.checks import WEIGHTS, Check, base_tensors, compare, failed, shorten, tensor_check
from merit_hf.verification.sources import FolderSource, HubSource, Source, open_source

OPTION = "--with-merged"
# What of it is read: its weights, and what says how they are stored.
_CONFIGS = (INDEX_NAME, "config.json", "adapter_config.json")
_NUMBERS = ("num_input_tokens", "num_loss_tokens")


@dataclass(frozen=True)
class MergedPart:
    """A verified merged model.

    Attributes:
        folder: where its weights lie here.
        entries: of its merit.json, one a group: what each was weighted and trained with.
        group_displacements: ‖θ_k − θ0‖, in the order of `entries`.
        record: what the next merit.json says of it.
    """

    folder: Path
    entries: list[dict[str, Any]]
    group_displacements: list[float]
    record: dict[str, Any]

    @property
    def numbers(self) -> list[int]:
        return [entry["group"] for entry in self.entries]


def open_merged(
    plan: PartitionPlan,
    given: str | Path,
    weights: Callable[[Sequence[int]], list[float]],
    adapters: str = "dense",
) -> MergedPart:
    """The merged model in a folder or Hub repo, after checking that it is a mean of this plan's groups.

    Args:
        plan ([`PartitionPlan`]): the plan of the next merge: the one it was merged under, or an extension of it.
        given (`str` or `Path`): folder or `org/name[@revision]`.
        weights (`Callable`): from groups of the plan to their weights in the next merge, not normalised.
        adapters (`str`, *optional*, defaults to `"dense"`): the form of the next merge, see [`merge_groups`].

    Raises:
        ConfigError: neither folder nor repo. MeritError: the first check that failed: what it found and expected.
    """
    source = open_source(given, OPTION)
    if MANIFEST_NAME not in source.sizes:
        raise ConfigError(
            f"{OPTION} {source.name}: no {MANIFEST_NAME} in it, so nothing says what it was merged from. Give a model "
            "that `merit merge` wrote."
        )
    manifest = parse_manifest(source.read(MANIFEST_NAME, MAX_BYTES), f"{source.name}: {MANIFEST_NAME}")
    _refuse(source, _origin_checks(plan, manifest, adapters))
    entries = _entries(source, manifest)
    _refuse(source, _group_checks(plan, manifest, entries, weights))
    files = {name: digest for name, digest in manifest["files"].items() if WEIGHTS.fullmatch(name) or name in _CONFIGS}
    _refuse(source, _file_checks(plan, source, files, adapters))
    folder = _fetch(source, list(files))
    changed = [name for name, digest in files.items() if _sha256(folder / name) != digest]
    found = shorten(f"{', '.join(changed)} has changed")
    _refuse(source, [Check("checksums", "as in its merit.json", found, not changed)])
    return MergedPart(
        folder,
        entries,
        [float(value) for value in manifest["stats"]["group_displacements"]],
        {
            "plan_sha256": manifest["plan"]["sha256"],
            "repo_id": source.repo_id if isinstance(source, HubSource) else None,
            "revision": source.revision,
            "files_sha256": canonical_sha256(manifest["files"]),
            "groups": [entry["group"] for entry in entries],
            "displacement": float(manifest["stats"]["displacement"]),
        },
    )


def _origin_checks(plan: PartitionPlan, manifest: Mapping[str, Any], adapters: str) -> list[Check]:
    """Kind, plan, base and way of the merge, before anything else of the manifest has a meaning."""
    named, base = _mapping(manifest.get("plan")).get("sha256"), _mapping(manifest.get("base"))
    ancestor = plan.extends(named) if isinstance(named, str) else None
    form = manifest.get("adapters", "dense")
    return [
        compare("kind", "merged", manifest.get("kind")),
        compare("plan", f"{plan.sha256} or one that it extends", named, ancestor is not None),
        compare("base weights", plan.base["weights_sha256"], base.get("weights_sha256")),
        compare("chat template", plan.base["chat_template_sha256"], base.get("chat_template_sha256")),
        compare("method", "linear", manifest.get("method", "linear")),
        compare("interpolate_to_init", 1, manifest.get("interpolate_to_init", 1)),
        # A full model is no sum of factors, and what svd has cut off is in no group.
        compare(
            "adapters", "dense" if adapters == "dense" else "concat", form,
            form == "concat" or form == adapters == "dense",
        ),
    ]  # fmt: skip


def _entries(source: Source, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups as the manifest lists them, nothing of another type in them."""
    raw, distances = manifest.get("groups"), _mapping(manifest.get("stats")).get("group_displacements")
    entries = [_entry(_mapping(entry)) for entry in raw] if isinstance(raw, list) else []
    known = [entry for entry in entries if entry is not None]
    whole = (
        0 < len(known) == len(entries)
        and len({entry["group"] for entry in known}) == len(known)
        and isinstance(distances, list)
        and len(distances) == len(known)
        and all(_is_number(value) for value in [*distances, _mapping(manifest.get("stats")).get("displacement")])
        and isinstance(manifest.get("files"), dict)
        and all(isinstance(digest, str) for digest in manifest["files"].values())
    )
    _refuse(source, [Check("groups", "as merit merge writes them", "something else", whole)])
    return known


def _entry(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    repo_id, revision = entry.get("repo_id"), entry.get("revision")
    known = (
        type(entry.get("group")) is int
        and _is_number(entry.get("weight"))
        and all(type(entry.get(key)) is int for key in _NUMBERS)
        and all(isinstance(entry.get(key), str) for key in ("files_sha256", "verified"))
        and ((repo_id is None and revision is None) or (is_repo_id(str(repo_id)) and isinstance(revision, str)))
    )
    keys = ("group", "weight", *_NUMBERS, "files_sha256", "verified", "repo_id", "revision")
    return {key: entry.get(key) for key in keys} if known else None


def _group_checks(
    plan: PartitionPlan,
    manifest: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    weights: Callable[[Sequence[int]], list[float]],
) -> list[Check]:
    """Its groups are those of the plan, and its weights those that the next merge gives them."""
    named = plan.extends(manifest["plan"]["sha256"])
    numbers = [entry["group"] for entry in entries]
    checks = (
        [compare("groups", f"of 0 to {named - 1}", numbers, all(0 <= k < named for k in numbers))] if named else []
    )
    if failed(checks):
        return checks
    values = weights(numbers)
    wanted = [value / sum(values) for value in values]
    found = [entry["weight"] for entry in entries]
    close = all(abs(there - here) < 1e-9 for there, here in zip(found, wanted, strict=True))
    shown = [[round(value, 6) for value in values] for values in (wanted, found)]
    checks.append(compare("weights", f"{shown[0]}, as this merge has them", shown[1], close))
    for entry in entries:
        planned = plan.group(entry["group"])
        for key, tokens in zip(_NUMBERS, (planned.train_input_tokens, planned.train_loss_tokens), strict=True):
            # Several processes fill their last batches with a few examples more.
            name, most = f"{key} of group {entry['group']}", tokens * 1.5
            checks.append(compare(name, f"{tokens} or a little more", entry[key], tokens <= entry[key] <= most))
    return checks


def _file_checks(plan: PartitionPlan, source: Source, files: Mapping[str, str], adapters: str) -> list[Check]:
    listed = [name for name in files if name in source.sizes and is_plain_path(name)]
    known = source.known_sha256
    wrong = [name for name in files if name not in listed or known.get(name, files[name]) != files[name]]
    found = shorten(f"{', '.join(wrong)} is missing or has changed")
    checks = [Check("files", "those in its merit.json", found, not wrong)]
    if adapters != "dense" or "adapter_config.json" in files:
        return checks
    tensors = base_tensors(plan)
    limit = sum(max(info.num_bytes, 4 * info.num_elements) for info in tensors.values()) + (64 << 20)
    size = sum(source.sizes[name] for name in listed)
    checks.append(Check("size", f"at most {limit:,} bytes", f"{size:,} bytes", size <= limit))
    return checks if failed(checks) else [*checks, tensor_check(source, tensors)]


def _fetch(source: Source, names: list[str]) -> Path:
    if isinstance(source, FolderSource):
        return source.folder
    return fetch_files(source.repo_id, source.revision, "model", names)


def _refuse(source: Source, checks: list[Check]) -> None:
    check = failed(checks)
    if check is not None:
        raise MeritError(
            f"{OPTION} {source.name}: does not verify: {check.name} is {check.found}, expected {check.expected}. Give "
            "a mean of groups of this plan, or of one that it extends, or the groups themselves."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
