"""merit.json: what a checkpoint says about itself. `verify` holds it against the plan."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import SIDE_FOLDERS
from merit_hf.config import ConfigError, MeritError
from merit_hf.plan import PartitionPlan
from merit_hf.versions import library_versions

MANIFEST_NAME = "merit.json"
SCHEMA_VERSION = 1
# Never read by anything here; a Trainer leaves them beside the weights.
TRAINER_STATE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
# What was trained on, row by row; no part of the model.
MIX_FILES = ("mix.json", "mix.parquet")
# The manifest of a mixture of thousands of datasets is smaller.
MAX_BYTES = 16 << 20


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
        status: `training` (an intermediate save), `stopped` (ended before its planned steps) or `complete`.
        facts: further entries, such as `final_loss`, `num_processes` and `wrapper` (None, DistributedDataParallel, …).
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
    return parse_manifest(path.read_bytes(), str(path))


def end_of_training(group_sha256: str, group: int, output: Path) -> str | None:
    """How the training of the group in `output` ended: `complete`, `stopped`, or None where it is still to be made.

    Raises:
        ConfigError: it holds something else.
    """
    if not output.exists():
        return None
    manifest = read_manifest(output) if (output / MANIFEST_NAME).exists() else {}
    status = manifest.get("status")
    if manifest.get("group_sha256") == group_sha256 and status in ("complete", "stopped"):
        return str(status)
    raise ConfigError(
        f"{output} exists and is not group {group} of this plan (group_sha256 "
        f"{str(manifest.get('group_sha256'))[:12]}, planned {group_sha256[:12]}). Give another --output, or delete it."
    )


def parse_manifest(raw: bytes, where: str) -> dict[str, Any]:
    """The content of a merit.json. Raises MeritError where it is no JSON object of this schema."""
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MeritError(f"{where}: not valid JSON ({error}). Restore it from the training's output.") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise MeritError(
            f"{where}: schema_version {found!r}, expected {SCHEMA_VERSION}. Use the merit_hf release that wrote it."
        )
    return manifest


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write merit.json in one step, so that a reader never sees half of it."""
    path = Path(folder) / MANIFEST_NAME
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def hash_files(folder: str | Path) -> dict[str, str]:
    """{path: sha256} of the files that make a checkpoint: not its card, its manifest, trainer state, or dot files."""
    folder, hashes = Path(folder), {}
    for path in sorted([*folder.iterdir(), *(path for name in SIDE_FOLDERS for path in (folder / name).glob("*"))]):
        if path.is_file() and is_part(path.name):
            with open(path, "rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def is_part(name: str) -> bool:
    """Whether a file belongs to the checkpoint that merit.json describes. The Hub adds .gitattributes by itself."""
    return name not in (MANIFEST_NAME, "README.md", *TRAINER_STATE, *MIX_FILES) and not name.startswith(".")
