"""The checks of a group checkpoint that need no weights: its manifest, files and tensor headers against the plan.

Whatever a manifest or a listing says may have been written to deceive: it is compared, shown as one short line, and
never used as a name, a number or a path before its own check has passed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import SIDE_FOLDERS, TensorInfo, read_tensor_index
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import (
    MAX_FILES,
    HubUnavailableError,
    fetch_files,
    is_plain_path,
    list_files,
    read_tensor_headers,
)
from merit_hf.manifest import MANIFEST_NAME, MAX_BYTES, TRAINER_STATE, is_part, parse_manifest, read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.text import one_line
from merit_hf.verification.sources import FolderSource, Source

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
# What transformers, PEFT and merit write beside weights; further names are known where the base has them.
_SIDE_FILES = {
    "README.md", "merit.json", "config.json", "generation_config.json", "model.safetensors.index.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "trainer_state.json", "LICENSE", "LICENSE.txt", "NOTICE",
}  # fmt: skip
_CONFIG_BYTES = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")
# Room for tokenizers, configs and cards beside the weights.
_SIDE_BYTES = 256 << 20


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str
    expected: str
    found: str
    ok: bool


def failed(checks: list[Check]) -> Check | None:
    """The first check that failed."""
    return next((check for check in checks if not check.ok), None)


def manifest_checks(plan: PartitionPlan, source: Source) -> tuple[list[Check], int | None]:
    """The checks of level `manifest`, and the group that the checkpoint is of, where that is known.

    Stops at a manifest of something else, since nothing after it would have a meaning.

    Raises:
        ConfigError: a folder has no manifest. MeritError: a folder's manifest cannot be read, or the Hub failed.
    """
    on_hub = not isinstance(source, FolderSource)
    checks = [Check("revision", "a commit", str(source.revision), True)] if on_hub else []
    try:
        source.sizes  # noqa: B018
    except (HubUnavailableError, ConfigError):
        raise
    except MeritError as error:
        return [*checks, Check("number of files", f"at most {MAX_FILES}", shorten(str(error)), False)], None
    manifest = _manifest(source, checks)
    if manifest is None:
        return checks, None
    kind, number = manifest.get("kind"), manifest.get("group")
    known = type(number) is int and 0 <= number < plan.num_groups
    checks += [compare("kind", "group", kind), compare("group", f"0 to {plan.num_groups - 1}", number, known)]
    if not isinstance(number, int) or failed(checks):
        return checks, None
    planned = plan.group(number)
    base, datasets = _mapping(manifest.get("base")), manifest.get("datasets")
    members = [_mapping(member) for member in datasets] if isinstance(datasets, list) else []
    expected, steps = {member.name: member.fingerprint for member in plan.members(number)}, manifest.get("num_steps")
    checks += [
        compare("status", "complete", manifest.get("status")),
        *_listing_checks(plan, source),
        compare("group_sha256", planned.group_sha256, manifest.get("group_sha256")),
        compare("base weights", plan.base["weights_sha256"], base.get("weights_sha256")),
        compare("chat template", plan.base["chat_template_sha256"], base.get("chat_template_sha256")),
        _compare_mappings("datasets", expected, {shorten(m.get("name")): m.get("fingerprint") for m in members}),
        _compare_mappings("SFT settings", plan.group_sft(number), _mapping(manifest.get("sft"))),
        compare("num_steps", planned.num_steps, steps, type(steps) is int and steps == planned.num_steps),
        *_token_checks(plan, number, manifest),
        _recorded_files(source, manifest),
    ]
    # Files that are not the manifest's own are not looked into: a listing may name what the Hub cannot even read.
    return (checks + structure_checks(plan, source) if checks[-1].ok else checks), number


def structure_checks(plan: PartitionPlan, source: Source) -> list[Check]:
    """Tensors against the base's; of an adapter, its settings and tensors against the plan's."""
    return _adapter_checks(plan, source) if plan.peft else [tensor_check(source, base_tensors(plan))]


def base_tensors(plan: PartitionPlan) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the base: from its folder here, else by range requests, without weights."""
    local = plan.local.get("base")
    if local and Path(local).is_dir():
        return read_tensor_index(Path(local))
    if plan.base["repo_id"] is None:
        # Says that the base is missing, and what to do.
        return read_tensor_index(plan.base_folder())
    repo_id, revision = plan.base["repo_id"], plan.base["revision"]
    names = [path for path in list_files(repo_id, revision, "model") if WEIGHTS.fullmatch(path)]
    return read_tensor_headers(repo_id, revision, names)


def compare(name: str, expected: Any, found: Any, ok: bool | None = None) -> Check:
    """A check of equality, or with the verdict given."""
    return Check(name, shorten(expected), shorten(found), expected == found if ok is None else ok)


def shorten(value: Any) -> str:
    """Whatever `value` is, as one line of at most 120 characters."""
    try:
        return one_line(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str), 120)
    except RecursionError:
        return "something nested too deeply to show"


def _listing_checks(plan: PartitionPlan, source: Source) -> list[Check]:
    on_hub = not isinstance(source, FolderSource)
    paths = list(source.sizes)
    # Here a Trainer's leftovers are one's own; in a repo, others would download them.
    tolerated = () if on_hub else TRAINER_STATE
    pickles = [path for path in paths if path.lower().endswith(_PICKLES) and path not in tolerated]
    odd = [path for path in paths if not is_plain_path(path)]
    unknown = [path for path in paths if not _is_known(path) and path not in (*pickles, *odd, *tolerated)]
    checks = [
        Check("file names", "plain names", _listed(odd) or "plain names", not odd),
        Check("no pickled weights", "none", _listed(pickles) or "none", not pickles),
        Check("known files", "safetensors and known side files", _listed(unknown) or "only these", not unknown),
    ]
    if on_hub:
        tensors = base_tensors(plan).values()
        limit = sum(max(info.num_bytes, 4 * info.num_elements) for info in tensors) + _SIDE_BYTES
        total = sum(source.sizes.values())
        checks.append(Check("size", f"at most {limit:,} bytes", f"{total:,} bytes", total <= limit))
    return checks


def _is_known(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder:
        return folder in SIDE_FOLDERS and name.endswith(".jinja")
    return name in _SIDE_FILES or WEIGHTS.fullmatch(name) is not None


def _manifest(source: Source, checks: list[Check]) -> dict[str, Any] | None:
    """A folder without a readable manifest is the caller's mistake; of a repo, it is a finding."""
    if isinstance(source, FolderSource):
        return read_manifest(source.folder)
    wanted = "readable, of a schema that is known"
    try:
        if MANIFEST_NAME not in source.sizes:
            raise MeritError("there is none")
        if source.sizes[MANIFEST_NAME] > MAX_BYTES:
            raise MeritError(f"it has {source.sizes[MANIFEST_NAME]:,} bytes")
        manifest = parse_manifest(source.read(MANIFEST_NAME, MAX_BYTES), MANIFEST_NAME)
    except HubUnavailableError:
        raise
    except MeritError as error:
        checks.append(Check(MANIFEST_NAME, wanted, shorten(str(error)), False))
        return None
    checks.append(Check(MANIFEST_NAME, wanted, "readable", True))
    return manifest


def _token_checks(plan: PartitionPlan, number: int, manifest: dict[str, Any]) -> list[Check]:
    """The ledger against the replay. Several processes repeat a few examples to fill an epoch's last batch."""
    planned = plan.group(number)
    processes = manifest.get("num_processes", 1)
    checks = []
    for field, expected in (
        ("num_input_tokens", planned.train_input_tokens),
        ("num_loss_tokens", planned.train_loss_tokens),
    ):
        found = manifest.get(field)
        slack = 0
        if type(processes) is int and processes > 1:
            longest = plan.sft["max_length"] or planned.num_input_tokens
            epochs = -(-planned.train_input_tokens // max(1, planned.num_input_tokens))
            slack = epochs * plan.sft["effective_batch_size"] * longest
        ok = type(found) is int and expected <= found <= expected + slack
        text = str(expected) + (
            f" (up to {slack} more: {processes} processes fill their last batches)" if slack else ""
        )
        checks.append(Check(field, text, shorten(found), ok))
    return checks


def _recorded_files(source: Source, manifest: dict[str, Any]) -> Check:
    """The manifest's files against the listing, and against the hashes that the listing tells."""
    recorded = _mapping(manifest.get("files"))
    found = {path for path in source.sizes if is_part(path)}
    wrong = [f"{path} is missing" for path in sorted(set(recorded) - found)]
    wrong += [f"{path} is not in the manifest" for path in sorted(found - set(recorded))]
    wrong += [
        f"{path} has changed"
        for path, digest in sorted(source.known_sha256.items())
        if path in recorded and recorded[path] != digest
    ]
    if not recorded:
        wrong = ["the manifest lists no files"]
    return Check("files", f"the {len(recorded)} in the manifest", _listed(wrong, "; ") or "the same", not wrong)


def _adapter_checks(plan: PartitionPlan, source: Source) -> list[Check]:
    """The adapter's settings, and its tensors, against those that the plan's `peft` makes on the base."""
    from merit_hf.adapters import ADAPTER_CONFIG_NAME, expected_adapter_tensors, parse_adapter_settings

    try:
        raw = source.read(ADAPTER_CONFIG_NAME, _CONFIG_BYTES) if ADAPTER_CONFIG_NAME in source.sizes else b"null"
        settings = parse_adapter_settings(raw, ADAPTER_CONFIG_NAME)
    except MeritError as error:
        return [Check("adapter settings", "as planned", shorten(str(error)), False)]
    expected = {
        name: TensorInfo("F32", shape)
        for name, shape in expected_adapter_tensors(_base_config(plan), plan.peft).items()
    }
    return [_compare_mappings("adapter settings", plan.peft, settings), tensor_check(source, expected)]


def _base_config(plan: PartitionPlan) -> Path:
    """A folder with the base's config.json; of a base on the Hub no more than that is downloaded."""
    local = plan.local.get("base")
    if plan.base["repo_id"] is None or (local and Path(local).is_dir()):
        return plan.base_folder()
    return fetch_files(plan.base["repo_id"], plan.base["revision"], "model", ["config.json"])


def tensor_check(source: Source, expected: Mapping[str, TensorInfo]) -> Check:
    """Names, shapes and dtypes against the base's."""
    stated = f"{len(expected)} named, shaped and typed as in the base"
    try:
        found = source.tensors()
    except HubUnavailableError:
        # Says nothing about the checkpoint.
        raise
    except MeritError as error:
        return Check("tensors", stated, shorten(str(error).replace(f"{source.name}/", "")), False)
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    wrong += [f"{name} is not in the base" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(expected) & set(found)):
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} has shape {list(theirs.shape)}, the base {list(ours.shape)}")
        elif ours.dtype != theirs.dtype and not {ours.dtype, theirs.dtype} <= set(_FLOATS):
            wrong.append(f"{name} has dtype {theirs.dtype}, the base {ours.dtype}")
    return Check("tensors", stated, _listed(wrong, "; ") or "the same", not wrong)


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return one_line(separator.join(one_line(item, 100) for item in items[:3])) + more


def _compare_mappings(name: str, expected: dict[str, Any], found: dict[str, Any]) -> Check:
    """Of two mappings that differ, only what differs is shown."""
    keys = sorted(
        key
        for key in expected.keys() | found.keys()
        if (key in expected, expected.get(key)) != (key in found, found.get(key))
    )
    ours, theirs = ({key: side[key] for key in keys or sorted(expected) if key in side} for side in (expected, found))
    return compare(name, ours, theirs, expected == found)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
