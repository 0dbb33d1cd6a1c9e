"""A group checkpoint to look at: a folder here, or a repo on the Hub at one commit, of which little is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from merit_hf.checkpoint import INDEX_NAME, SIDE_FOLDERS, SINGLE_NAME, TensorInfo, read_tensor_index
from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import HubFile, fetch_files, list_files, pin_revision, read_file, read_tensor_headers
from merit_hf.sharing.registry import is_repo_id
from merit_hf.text import one_line

# As PEFT calls it; `adapters`, which brings torch, is not needed to see that it is there.
ADAPTER_NAME = "adapter_model.safetensors"
# Of a model of 100,000 tensors it has some 10 MB.
_MAX_INDEX_BYTES = 64 << 20


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
        tensors = read_tensor_index(self.folder, ADAPTER_NAME if ADAPTER_NAME in self.sizes else None)
        for file in sorted({info.file for info in tensors.values()}):
            try:
                # The library refuses more than our reader, such as byte ranges with gaps.
                with safe_open(str(self.folder / file), framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise MeritError(f"{file}: not a safetensors file: {one_line(error)}") from error
        return tensors

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
        """Every tensor by name, by range requests.

        Raises:
            MeritError: a header cannot be read, a file is shorter than it says, or index and files disagree.
        """
        files = [path for path in self.sizes if path.endswith(".safetensors")]
        for file in files:
            # A server answers a range request of nothing with an error.
            if self.sizes[file] < 8:
                raise MeritError(f"{file} has {self.sizes[file]} bytes, too few for a header")
        tensors = read_tensor_headers(self.repo_id, self.revision, files)
        for name, info in tensors.items():
            if 8 + info.end > self.sizes[info.file]:
                raise MeritError(f"{info.file} ends before {name}, which its header places in it")
        if INDEX_NAME in self.sizes:
            _check_index(self.read(INDEX_NAME, _MAX_INDEX_BYTES), tensors)
        elif set(files) - {SINGLE_NAME, ADAPTER_NAME}:
            raise MeritError(f"shards without {INDEX_NAME}")
        return tensors

    def fetch(self) -> Path:
        """Download the files that the manifest level has allowed."""
        return fetch_files(self.repo_id, self.revision, "model", self.sizes)


Source = FolderSource | HubSource


def _check_index(raw: bytes, tensors: dict[str, TensorInfo]) -> None:
    try:
        mapped = dict(json.loads(raw)["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MeritError(f"{INDEX_NAME} has no readable weight_map") from error
    found = {name: info.file for name, info in tensors.items()}
    for name in sorted(mapped.keys() | found.keys()):
        if mapped.get(name) != found.get(name):
            stated, file = one_line(mapped.get(name, "no shard"), 60), found.get(name, "no shard")
            raise MeritError(f"{INDEX_NAME} puts {one_line(name, 60)} in {stated}, and it is in {file}")


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
