"""Where the files of a plan lie, and the two that are JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merit_hf.config import ConfigError, MeritError

SCHEMA_VERSION = 1
PLAN_NAME = "plan.json"
LOCAL_NAME = "local.json"


def read_local(folder: Path) -> dict[str, Any]:
    """The content of local.json; empty where there is none."""
    path = folder / LOCAL_NAME
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def read_content(folder: Path) -> dict[str, Any]:
    """The content of plan.json. Raises MeritError where it is none that this release reads."""
    path = folder / PLAN_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MeritError(f"{path}: not valid JSON ({error}). Restore it, or plan again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise MeritError(
            f"{path}: schema_version {version}, expected {SCHEMA_VERSION}. Use the merit_hf release that wrote it, or "
            "plan again."
        )
    return content


def holds_plan(output: Path) -> bool:
    """Whether a plan lies in the folder `output`, which is to hold one. An empty folder counts as none.

    Raises:
        ConfigError: something else is there.
    """
    if (output / PLAN_NAME).is_file():
        return True
    if output.exists() and not (output.is_dir() and next(output.iterdir(), None) is None):
        raise ConfigError(f"{output} exists and is no plan. Give another --output, or delete it.")
    return False


def locate_plan(path: str | Path, revision: str | None) -> tuple[Path, str | None, str | None]:
    """Folder, repo id and commit of a plan; the last two are None for a folder.

    Raises:
        ConfigError: there is no plan.
    """
    folder = Path(path)
    if (folder / PLAN_NAME).is_file():
        return folder, None, None
    if folder.exists():
        raise ConfigError(
            f"{path}: no {PLAN_NAME} in it, so it is not a plan. `merit plan CONFIG --output DIR` makes one."
        )
    repo_id, _, at = str(path).partition("@")
    from merit_hf.hub import fetch_plan, pin_revision

    sha = pin_revision(repo_id, at or revision, "dataset", "plan")
    return fetch_plan(repo_id, sha, PLAN_NAME), repo_id, sha
