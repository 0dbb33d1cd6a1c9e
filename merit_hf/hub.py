"""Reading from the Hub: revisions, listings, headers and downloads, bounded before they begin. `hub_write` writes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    # Of whatever HTTP library the client is built on: a broken connection, a timeout.
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from merit_hf.checkpoint import TensorInfo, tensor_info
from merit_hf.config import ConfigError, MeritError

# Weights in pickle files are never fetched: nothing here reads them. Nor are copies in another layout.
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pkl", "consolidated*",
            "original/*", "onnx/*"]  # fmt: skip
# One folder deep at most, no leading dot, nothing that a shell, a URL or a glob would read as anything but a name.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][\w.+=-]*(/[A-Za-z0-9_][\w.+=-]*)?", re.ASCII)
MAX_FILES = 1000
_T = TypeVar("_T")
_NO_HEADER = (SafetensorsParsingError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
# 1,000 datasets have a million pairs of 24 bytes.
_MAX_PLAN_BYTES = 256 << 20


class HubUnavailableError(MeritError):
    """The Hub failed or cannot be reached: nobody's mistake, and nothing is known to be wrong."""


@dataclass(frozen=True)
class HubFile:
    """A file as a repo's listing tells it: `size` in bytes, git's `blob_id`; `sha256` where LFS or Xet holds it."""

    path: str
    size: int
    blob_id: str
    sha256: str | None


@contextlib.contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """The client's errors as one line that begins with `doing`, such as `pushing plan to org/name`.

    Raises:
        ConfigError: nothing is there, or there is no access. HubUnavailableError: the Hub failed or cannot be reached.
    """
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{doing}: not a Hub id: {_one_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise ConfigError(
                f"{doing}: not there, or not for you (HTTP {status}). Check the name, or log in with `hf auth login`."
            ) from error
        raise HubUnavailableError(f"{doing}: the Hub answered HTTP {status}. Run the command again.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise HubUnavailableError(f"{doing}: {_one_line(error)}. Run the command again.") from error


def pin_revision(repo_id: str, revision: str | None, repo_type: str, where: str) -> str:
    """The commit sha that `revision` (default: main) names now.

    Raises:
        ConfigError: no such repo or revision, or no access to it.
        HubUnavailableError: the Hub failed or cannot be reached.
    """
    try:
        info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type)
    except HFValidationError as error:
        raise ConfigError(
            f"{where}: `{repo_id}` is no existing path, and no Hub id either (OWNER/NAME). Check the path."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            at = f" at revision `{revision}`" if revision else ""
            raise ConfigError(
                f"{where}: no {repo_type} `{repo_id}`{at} is visible on the Hub (HTTP {status}). "
                "Check the name, or log in with `hf auth login` if it is private or gated."
            ) from error
        raise HubUnavailableError(
            f"{where}: the Hub answered HTTP {status} for `{repo_id}`. Run the command again."
        ) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise HubUnavailableError(
            f"{where}: `{repo_id}` is no existing path, and the Hub cannot be reached: {_one_line(error)}. Run the "
            "command again."
        ) from error
    return str(info.sha)


def is_plain_path(path: str) -> bool:
    """True for a name that can be written below a folder and nowhere else: no `..`, no absolute path, no odd sign."""
    return _PLAIN_PATH.fullmatch(path) is not None


def list_files(repo_id: str, revision: str, repo_type: str) -> dict[str, HubFile]:
    """{path: file} of a repo at a commit; a repo of more than `MAX_FILES` files is refused."""
    files: dict[str, HubFile] = {}
    with hub_errors(f"listing `{repo_id}@{revision[:12]}`"):
        for entry in HfApi().list_repo_tree(repo_id, revision=revision, repo_type=repo_type, recursive=True):
            if isinstance(entry, RepoFile):
                files[entry.path] = HubFile(
                    entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None
                )
            if len(files) > MAX_FILES:
                raise MeritError(f"`{repo_id}`: more than {MAX_FILES} files, so it is none of merit's repos.")
    return files


def fetch_files(repo_id: str, revision: str, repo_type: str, paths: Iterable[str]) -> Path:
    """Download just `paths` at a commit; returns the snapshot folder.

    Raises:
        MeritError: a name that is no plain relative path, or the download failed.
    """
    wanted = list(paths)
    odd = [path for path in wanted if not is_plain_path(path)]
    if odd:
        raise MeritError(f"`{repo_id}`: file name {odd[0]!r} is not a plain name, so it is not downloaded.")

    def download(again: bool) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, repo_type=repo_type, allow_patterns=wanted))

    with hub_errors(f"downloading `{repo_id}@{revision[:12]}`"):
        return arrived_whole(repo_id, revision, repo_type, download)


def arrived_whole(repo_id: str, revision: str, repo_type: str, download: Callable[[bool], _T]) -> _T:
    """`download(again)`, and what it has added to the cache held against the Hub's hashes.

    The client holds a download against its size alone, and keeps it. A file of other content is deleted and the
    download done once more (`again=True`), so that it can poison no later command.

    Args:
        revision: a commit sha.

    Raises:
        HubUnavailableError: a file arrived damaged twice.
    """
    folder = _cached_snapshot(repo_id, revision, repo_type)
    before = _files_below(folder)
    for again in (False, True):
        try:
            result = download(again)
        except Exception:
            # What cannot be read may be unreadable because it is damaged.
            if again or not _drop_damaged(repo_id, revision, repo_type, folder, before):
                raise
            continue
        damaged = _drop_damaged(repo_id, revision, repo_type, folder, before)
        if not damaged:
            return result
    raise HubUnavailableError(f"{damaged[0]} of `{repo_id}` arrived damaged twice. Run the command again.")


def _cached_snapshot(repo_id: str, revision: str, repo_type: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type), "snapshots", revision)


def _files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _drop_damaged(repo_id: str, revision: str, repo_type: str, folder: Path, known: set[str]) -> list[str]:
    """Delete those files below `folder`, `known` ones aside, that are not what the Hub has; returns their names."""
    new = sorted(_files_below(folder) - known)
    if not new:
        return []
    described = HfApi().get_paths_info(repo_id, new, revision=revision, repo_type=repo_type)
    listed = [
        HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in described
        if isinstance(entry, RepoFile)
    ]
    damaged = [file.path for file in listed if not _is_whole(folder / file.path, file)]
    for path in damaged:
        # The snapshot links to a blob, which other commits may link to as well.
        (folder / path).resolve().unlink()
        (folder / path).unlink(missing_ok=True)
    return damaged


def _is_whole(path: Path, file: HubFile) -> bool:
    """Whether a file here has the content that the Hub lists: its sha256, or git's hash of it."""
    if file.sha256 is None:
        return git_hash(path.read_bytes()) == file.blob_id
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def is_unavailable(error: BaseException) -> bool:
    """Whether a library's error in loading from the Hub means that the Hub failed, not that nothing is there."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code not in (401, 403, 404)
    if isinstance(error, HubUnavailableError):
        return True
    return isinstance(error, HTTPError | OSError) and not isinstance(error, FileNotFoundError)


def read_file(repo_id: str, revision: str, repo_type: str, file: HubFile, max_bytes: int) -> bytes:
    """One small file of a commit.

    Raises:
        MeritError: larger than `max_bytes`, or the download failed.
    """
    if file.size > max_bytes:
        raise MeritError(f"`{repo_id}`: {file.path} has {file.size:,} bytes, at most {max_bytes:,} are read.")
    with hub_errors(f"reading {file.path} of `{repo_id}@{revision[:12]}`"):
        for again in (False, True):
            local = hf_hub_download(
                repo_id, file.path, revision=revision, repo_type=repo_type, force_download=again
            )  # fmt: skip
            if _is_whole(Path(local), file):
                return Path(local).read_bytes()
        Path(local).unlink()
        raise HubUnavailableError(f"{file.path} of `{repo_id}` arrived damaged twice. Run the command again.")


# A commit does not change, and verification asks for the base's headers once a checkpoint.
@functools.lru_cache(maxsize=1024)
def _read_header(repo_id: str, revision: str, file: str) -> dict[str, TensorInfo]:
    with hub_errors(f"reading the header of {file} in `{repo_id}`"):
        header = HfApi().parse_safetensors_file_metadata(repo_id, file, revision=revision)
    return {
        name: tensor_info(info.dtype, info.shape, file, *info.data_offsets) for name, info in header.tensors.items()
    }


def read_tensor_headers(repo_id: str, revision: str, files: Iterable[str]) -> dict[str, TensorInfo]:
    """Every tensor in safetensors `files` of a model repo, by range requests: no weights are downloaded.

    Raises:
        MeritError: a header cannot be read, or two files hold the same tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            found = _read_header(repo_id, revision, file)
        except _NO_HEADER:
            # Nobody is refused for bytes that were damaged on their way here: those come out right the second time.
            try:
                found = _read_header(repo_id, revision, file)
            except _NO_HEADER as error:
                raise MeritError(f"{file}: not a safetensors file: {_one_line(error)}") from error
        for name in found.keys() & tensors.keys():
            raise MeritError(f"tensor {name} is in both {tensors[name].file} and {file}")
        tensors |= found
    return dict(sorted(tensors.items()))


def fetch_plan(repo_id: str, revision: str, plan_name: str) -> Path:
    """The local snapshot of a plan repo at a commit: the plan and its tables, no more than a plan can weigh.

    Raises:
        ConfigError: the repo holds no plan. MeritError: its tables are larger than any plan's, or the download failed.
    """
    files = list_files(repo_id, revision, "dataset")
    if plan_name not in files:
        raise ConfigError(f"`{repo_id}@{revision[:12]}` has no {plan_name}, so it is not a plan.")
    wanted = [plan_name, *(path for path in files if path.startswith("data/") and path.endswith(".parquet"))]
    size = sum(files[path].size for path in wanted)
    if size > _MAX_PLAN_BYTES:
        raise MeritError(f"`{repo_id}`: the plan has {size:,} bytes, at most {_MAX_PLAN_BYTES:,} are downloaded.")
    return fetch_files(repo_id, revision, "dataset", wanted)


def fetch_sketches(repo_id: str, revision: str, name: str) -> None:
    """Add a plan's gradient read-outs to its snapshot, where the repo has them."""
    if name in list_files(repo_id, revision, "dataset"):
        fetch_files(repo_id, revision, "dataset", [name])


def fetch_model(repo_id: str, revision: str) -> Path:
    """The local snapshot of a model repo at a commit: safetensors and side files, never pickles."""

    def download(again: bool) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=_IGNORED))

    with hub_errors(f"downloading `{repo_id}@{revision[:12]}`"):
        return arrived_whole(repo_id, revision, "model", download)


def fetch_folder(repo_id: str, revision: str, folder: str, into: Path) -> Path | None:
    """Download one folder of a model repo below `into`, pickles included: of one's own only. None if it is empty."""
    with hub_errors(f"downloading {folder} of `{repo_id}`"):
        snapshot_download(repo_id, revision=revision, allow_patterns=[f"{folder}/*"], local_dir=into)
    shutil.rmtree(into / ".cache", ignore_errors=True)
    return into / folder if (into / folder).is_dir() else None


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


def model_licence(repo_id: str, revision: str | None, repo_type: str) -> str | None:
    """The licence that a repo's card names, if it names one."""
    with hub_errors(f"reading the card of `{repo_id}`"):
        info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type)
    licence = (getattr(info, "card_data", None) or {}).get("license")
    return licence if isinstance(licence, str) else None


def is_private(repo_id: str, revision: str | None, repo_type: str) -> bool:
    """Whether strangers do not see a repo."""
    with hub_errors(f"asking for `{repo_id}`"):
        return bool(HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type).private)


def current_user() -> tuple[str, list[str]]:
    """(name, organisations) of the token's owner.

    Raises:
        ConfigError: there is no token, or the Hub does not know it. HubUnavailableError: it cannot be reached.
    """
    try:
        owner = HfApi().whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status not in (401, 403):
            raise HubUnavailableError(
                f"asking who you are: the Hub answered HTTP {status}. Run the command again."
            ) from error
        raise ConfigError("the Hub does not know you. Log in with `hf auth login`.") from error
    except HTTPError as error:
        raise HubUnavailableError(f"asking who you are: {_one_line(error)}. Run the command again.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"this needs a token of the Hub: {_one_line(error)}. Log in with `hf auth login`."
        ) from error
    return str(owner["name"]), [str(org["name"]) for org in owner.get("orgs", [])]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
