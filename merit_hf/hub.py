"""The only room that talks to the Hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from merit_hf.config import ConfigError, MeritError

# Weights in pickle files are never fetched: nothing here reads them. Nor are second copies in another layout.
_IGNORED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.pkl",
    "consolidated*",
    "original/*",
    "onnx/*",
]


def pin_revision(repo_id: str, revision: str | None, repo_type: str, where: str) -> str:
    """The commit sha that `revision` (default: main) names now.

    Raises:
        ConfigError: no such repo or revision, or no access to it.
        MeritError: the Hub cannot be reached.
    """
    try:
        info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type)
    except HFValidationError as error:
        raise ConfigError(f"{where}: `{repo_id}` is neither an existing path nor a Hub id: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            at = f" at revision `{revision}`" if revision else ""
            raise ConfigError(
                f"{where}: no {repo_type} `{repo_id}`{at} is visible on the Hub (HTTP {status}). "
                "Check the name, or log in with `hf auth login` if it is private or gated."
            ) from error
        raise MeritError(f"{where}: the Hub answered HTTP {status} for `{repo_id}`. Run the command again.") from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise MeritError(
            f"{where}: `{repo_id}` is no existing path, and the Hub cannot be reached: {error}"
        ) from error
    return str(info.sha)


def fetch_model(repo_id: str, revision: str) -> Path:
    """The local snapshot of a model repo at a commit: safetensors and side files, never pickles."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=_IGNORED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MeritError(f"`{repo_id}@{revision}` could not be downloaded: {error}. Run the command again.") from error


def fetch_plan(repo_id: str, revision: str) -> Path:
    """The local snapshot of a plan repo at a commit."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MeritError(f"`{repo_id}@{revision}` could not be downloaded: {error}. Run the command again.") from error
    if not (folder / "plan.json").is_file():
        raise ConfigError(f"`{repo_id}@{revision[:12]}` has no plan.json, so it is not a plan.")
    return folder


def resolve_model(path: str, revision: str | None, root: Path, where: str) -> tuple[Path, str | None, str | None]:
    """A folder or a Hub id → (local folder, repo_id, revision); the last two are None for a folder."""
    folder = (root / path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{where}: `{path}` is a folder, so `revision` {revision!r} means nothing. Leave it out."
            )
        return folder.resolve(), None, None
    if folder.exists() or path.startswith((".", "/", "~")):
        raise ConfigError(f"{where}: no folder `{folder}`. Give a folder with a checkpoint, or a Hub id.")
    sha = pin_revision(path, revision, "model", where)
    return fetch_model(path, sha), path, sha


def push_folder(
    folder: Path, repo_id: str, repo_type: str, private: bool, message: str, ignore: tuple[str, ...] = ()
) -> str:
    """Upload a finished folder as one commit and return the commit's URL. Run again, unchanged files are no-ops."""
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = _again_if_busy(
            lambda: api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                repo_type=repo_type,
                commit_message=message,
                ignore_patterns=list(ignore),
            )
        )
    except (HfHubHTTPError, OSError) as error:
        raise MeritError(f"pushing {folder.name} to `{repo_id}` failed: {error}. Run the command again.") from error
    return str(commit.commit_url)


def _again_if_busy(upload: Callable[[], CommitInfo], attempts: int = 4) -> CommitInfo:
    """The client repeats its other requests, but never the commit; on a branch, repeating one is a no-op."""
    for attempt in range(1, attempts):
        try:
            return upload()
        except HfHubHTTPError as error:
            response = error.response
            if response is None or response.status_code not in (429, 500, 502, 503, 504):
                raise
            asked = response.headers.get("Retry-After", "")
            time.sleep(min(float(asked) if asked.isdigit() else 2.0**attempt, 60.0))
    return upload()


def current_user() -> str:
    """The name of the token's owner."""
    try:
        return str(HfApi().whoami()["name"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"hub.push needs a token: {error}. Log in with `hf auth login`.") from error
