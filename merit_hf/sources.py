"""A group checkpoint to look at: a folder here, or a repo on the Hub at one commit, of which little is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from merit_hf.checkpoint import SIDE_FOLDERS, TensorInfo, read_tensor_index
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import HubFile, fetch_files, list_files, pin_revision, read_file, read_tensor_headers
from merit_hf.registry import is_repo_id

ADAPTER_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint in a folder of this machine."""

    folder: Path

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def revision(self) -> str | None:
        return None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """{path: bytes} of every file that a model can consist of: no dot files, none of a Trainer's checkpoints."""
        places = [self.folder, *(self.folder / name for name in SIDE_FOLDERS)]
        return {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for place in places
            for path in sorted(place.glob("*"))
            if path.is_file() and not path.name.startswith(".")
        }

    @property
    def known_sha256(self) -> dict[str, str]:
        """Hashes that cost no reading: none of a folder."""
        return {}

    def read(self, path: str, max_bytes: int) -> bytes:
        size = self.sizes[path]
        if size > max_bytes:
            raise MeritError(f"{path} has {size:,} bytes, at most {max_bytes:,} are read")
        return (self.folder / path).read_bytes()

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, from headers alone."""
        return read_tensor_index(self.folder, ADAPTER_NAME if ADAPTER_NAME in self.sizes else None)

    def fetch(self) -> Path:
        return self.folder


@dataclass(frozen=True)
class HubSource:
    """A checkpoint in a model repo at one commit."""

    repo_id: str
    revision: str

    @property
    def name(self) -> str:
        return f"{self.repo_id}@{self.revision[:12]}"

    @cached_property
    def _files(self) -> dict[str, HubFile]:
        return list_files(self.repo_id, self.revision, "model")

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {path: file.size for path, file in self._files.items() if path != ".gitattributes"}

    @cached_property
    def known_sha256(self) -> dict[str, str]:
        """Hashes of the files that the Hub stores by their hash."""
        return {path: file.sha256 for path, file in self._files.items() if file.sha256 is not None}

    def read(self, path: str, max_bytes: int) -> bytes:
        return read_file(self.repo_id, self.revision, "model", self._files[path], max_bytes)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, by range requests."""
        files = [path for path in self.sizes if path.endswith(".safetensors")]
        return read_tensor_headers(self.repo_id, self.revision, files)

    def fetch(self) -> Path:
        """Download the files that the manifest level has allowed."""
        return fetch_files(self.repo_id, self.revision, "model", self.sizes)


Source = FolderSource | HubSource


def open_source(checkpoint: str | Path, what: str = "CHECKPOINT") -> Source:
    """A folder, or `org/name[@revision]` pinned to the commit it names now.

    Raises:
        ConfigError: neither.
    """
    text = str(checkpoint)
    if Path(text).is_dir():
        return FolderSource(Path(text).resolve())
    repo_id, _, revision = text.partition("@")
    if text.startswith((".", "/", "~")) or not is_repo_id(repo_id):
        raise ConfigError(f"{what}: no folder `{text}`. Give a folder with a checkpoint, or a Hub id.")
    return HubSource(repo_id, pin_revision(repo_id, revision or None, "model", what))
