"""merit.json: what a checkpoint says about itself, and the checks that hold it against the plan."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import read_tensor_index
from merit_hf.config import ConfigError, MeritError
from merit_hf.plan import PartitionPlan
from merit_hf.versions import library_versions

MANIFEST_NAME = "merit.json"
SCHEMA_VERSION = 1
# Never read by anything here; a Trainer leaves them beside the weights.
TRAINER_STATE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def group_manifest(
    plan: PartitionPlan,
    group: int,
    ledger: dict[str, int],
    num_steps: int,
    sft: dict[str, Any],
    status: str,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """merit.json of a group checkpoint, without the hashes of its files.

    Args:
        ledger: num_input_tokens, num_loss_tokens, num_padding_tokens that were processed.
        sft: the identity fields that were trained with.
        status: `training` (an intermediate save) or `complete`.
        facts: further entries, such as `final_loss` and `num_processes`.
    """
    planned = plan.group(group)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "group",
        "status": status,
        "plan": {"repo_id": plan.repo_id, "revision": plan.revision, "sha256": plan.sha256},
        "group": group,
        "group_sha256": planned.group_sha256,
        "base": {key: plan.base[key] for key in ("repo_id", "revision", "weights_sha256", "chat_template_sha256")},
        "datasets": [
            {
                "name": member.name,
                "fingerprint": member.fingerprint,
                "num_examples": member.num_examples,
                "num_input_tokens": member.num_input_tokens,
                "repo_id": member.repo_id,
                "revision": member.revision,
            }
            for member in plan.members(group)
        ],
        **ledger,
        "num_steps": num_steps,
        "sft": sft,
        **(facts or {}),
        "versions": library_versions(),
        "files": {},
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Raises ConfigError where `folder` is no checkpoint of merit's, MeritError where merit.json cannot be read."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no {MANIFEST_NAME} in it, so nothing says what it was trained on. Give a folder that `merit "
            "train` wrote."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MeritError(f"{path}: not valid JSON ({error}). Restore it from the training's output.") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise MeritError(
            f"{path}: schema_version {found!r}, expected {SCHEMA_VERSION}. Use the merit_hf release that wrote it."
        )
    return manifest


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write merit.json in one step, so that a reader never sees half of it."""
    path = Path(folder) / MANIFEST_NAME
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def hash_files(folder: str | Path) -> dict[str, str]:
    """{name: sha256} of the files that make a checkpoint: not its card, its manifest, trainer state, or dot files."""
    hashes = {}
    for path in sorted(Path(folder).iterdir()):
        # The Hub adds .gitattributes; a dot file is no part of a model.
        is_part = path.name not in (MANIFEST_NAME, "README.md", *TRAINER_STATE) and not path.name.startswith(".")
        if path.is_file() and is_part:
            with open(path, "rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str
    expected: str
    found: str
    ok: bool


def verify_checkpoint(plan: PartitionPlan, folder: str | Path) -> list[Check]:
    """Hold a group checkpoint against the plan, the cheap checks first; stops at a manifest of something else.

    Raises:
        ConfigError: there is no manifest. MeritError: it cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kind, number = manifest.get("kind"), manifest.get("group")
    known = type(number) is int and 0 <= number < plan.num_groups
    checks = [
        _check("kind", "group", kind),
        _check("group", f"0 to {plan.num_groups - 1}", number, known),
    ]
    if not isinstance(number, int) or not all(check.ok for check in checks):
        return checks
    planned = plan.group(number)
    base, datasets = _mapping(manifest.get("base")), manifest.get("datasets")
    members = [_mapping(member) for member in datasets] if isinstance(datasets, list) else []
    checks += [
        _check("status", "complete", manifest.get("status")),
        _check("group_sha256", planned.group_sha256, manifest.get("group_sha256")),
        _check("base weights", plan.base["weights_sha256"], base.get("weights_sha256")),
        _check("chat template", plan.base["chat_template_sha256"], base.get("chat_template_sha256")),
        _check_mapping("datasets", _names(plan, number), {str(m.get("name")): m.get("fingerprint") for m in members}),
        _check_mapping("SFT settings", plan.group_sft(number), _mapping(manifest.get("sft"))),
        _check("num_steps", planned.num_steps, manifest.get("num_steps")),
        *_token_checks(plan, number, manifest),
        *_file_checks(folder, manifest),
    ]
    if plan.local.get("base") and Path(plan.local["base"]).is_dir():
        base_folder = Path(plan.local["base"])
        checks.append(_adapter_check(folder, base_folder, plan) if plan.peft else _tensor_check(folder, base_folder))
    return checks


def failed(checks: list[Check]) -> Check | None:
    """The first check that failed."""
    return next((check for check in checks if not check.ok), None)


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
        if isinstance(processes, int) and processes > 1:
            longest = plan.sft["max_length"] or planned.num_input_tokens
            epochs = -(-planned.train_input_tokens // max(1, planned.num_input_tokens))
            slack = epochs * plan.sft["effective_batch_size"] * longest
        ok = isinstance(found, int) and expected <= found <= expected + slack
        text = str(expected) + (
            f" (up to {slack} more: {processes} processes fill their last batches)" if slack else ""
        )
        checks.append(Check(field, text, str(found), ok))
    return checks


def _file_checks(folder: Path, manifest: dict[str, Any]) -> list[Check]:
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES and p.name not in TRAINER_STATE]
    checks = [_check("no pickled weights", "none", ", ".join(pickles) or "none")]
    recorded = _mapping(manifest.get("files"))
    found = hash_files(folder)
    missing = sorted(set(recorded) - set(found))
    changed = sorted(name for name in recorded if name in found and recorded[name] != found[name])
    added = sorted(set(found) - set(recorded))
    wrong = [f"{name} is missing" for name in missing] + [f"{name} has changed" for name in changed]
    wrong += [f"{name} is not in the manifest" for name in added]
    if not recorded:
        wrong = ["the manifest lists no files"]
    checks.append(
        Check("files", f"{len(recorded)} as hashed in the manifest", "; ".join(wrong) or "the same", not wrong)
    )
    return checks


def _tensor_check(folder: Path, base: Path) -> Check:
    expected = read_tensor_index(base)
    stated = f"{len(expected)} named and shaped as in the base"
    try:
        found = read_tensor_index(folder)
    except MeritError as error:
        return Check("tensors", stated, str(error), False)
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    wrong += [f"{name} is not in the base" for name in sorted(set(found) - set(expected))]
    wrong += [
        f"{name} has shape {list(found[name].shape)}, the base {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if expected[name].shape != found[name].shape
    ]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Check("tensors", stated, "; ".join(wrong[:3]) + more or "the same", not wrong)


def _adapter_check(folder: Path, base: Path, plan: PartitionPlan) -> Check:
    from merit_hf.adapters import adapter_differences

    wrong = adapter_differences(folder, base, plan.peft)
    return Check("tensors", "those of the planned adapter", "; ".join(wrong[:3]) or "the same", not wrong)


def _names(plan: PartitionPlan, number: int) -> dict[str, str]:
    return {member.name: member.fingerprint for member in plan.members(number)}


def _check(name: str, expected: Any, found: Any, ok: bool | None = None) -> Check:
    return Check(name, _short(expected), _short(found), expected == found if ok is None else ok)


def _check_mapping(name: str, expected: dict[str, Any], found: dict[str, Any]) -> Check:
    """Of two mappings that differ, only what differs is shown."""
    keys = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    shown = keys or sorted(expected)
    return _check(
        name,
        {key: expected.get(key) for key in shown},
        {key: found.get(key) for key in shown},
        expected == found,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 120 else text[:117] + "…"
