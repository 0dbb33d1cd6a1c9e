"""Bad contributions: what somebody can change in a group checkpoint before it is pushed.

They are written straight into a Hub's git, since some of it no client would send.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pygit2
import torch
from hub_server import HubServer
from hub_server.repos import LFS_SUFFIXES, Repo, lfs_pointer
from pygit2.enums import FileMode
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merit_hf.manifest import hash_files

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shop:
    """Where bad contributions are made: the base, the honest checkpoints, and the files of the one that is altered."""

    base: Path
    honest: list[Path]
    folder: Path
    # Written after the files: {path: content, a link's target, or (sha256, size) of an LFS pointer}.
    odd: dict[str, bytes | tuple[str, int]]

    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "merit.json").read_text()))

    def rewrite(self, **changes: Any) -> None:
        (self.folder / "merit.json").write_text(json.dumps({**self.manifest(), **changes}))

    def rehash(self) -> None:
        self.rewrite(files=hash_files(self.folder))

    def edit(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file and hash it anew."""
        content = json.loads((self.folder / name).read_text())
        change(content)
        (self.folder / name).write_text(json.dumps(content))
        self.rehash()

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Change the weights and hash them anew."""
        tensors = load_file(self.folder / WEIGHTS)
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / WEIGHTS, {"format": "pt"}
        )
        self.rehash()

    def raw(self, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of the weights' file and hash it anew."""
        path = self.folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))
        self.rehash()

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the header of the weights' file, whose data stay as they are."""

        def replaced(raw: bytes) -> bytes:
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            change(header)
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + raw[8 + length :]

        self.raw(replaced)

    def shard(self, size: str = "40KB") -> None:
        """Save the same weights in several files."""
        model = AutoModelForCausalLM.from_pretrained(str(self.folder), dtype=torch.float32)
        (self.folder / WEIGHTS).unlink()
        model.save_pretrained(self.folder, max_shard_size=size)
        self.rehash()

    def moves(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor's move from the base by `change(name, move)`."""
        origin = load_file(self.base / WEIGHTS)
        self.tensors(lambda t: t.update({n: origin[n].float() + change(n, t[n] - origin[n].float()) for n in t}))


def copy_of(honest: list[Path], base: Path, folder: Path) -> Shop:
    return Shop(base, honest, Path(shutil.copytree(honest[0], folder)), {})


def publish(hub: HubServer, repo_id: str, shop: Shop) -> str:
    """Put the files into a new repo's git, whatever their names; returns the commit."""
    repo = Repo("model", repo_id, hub.hub.new_folder())
    hub.hub.repos["model", repo_id] = repo
    files: dict[str, bytes | tuple[str, int]] = {
        path.relative_to(shop.folder).as_posix(): path.read_bytes()
        for path in sorted(shop.folder.rglob("*"))
        if path.is_file()
    }
    return write_tree(hub, repo, files | shop.odd)


def write_tree(
    hub: HubServer, repo: Repo, files: dict[str, bytes | tuple[str, int]], links: tuple[str, ...] = ()
) -> str:
    """A commit on main that holds exactly `files`; names that git's own tools refuse are written as raw trees."""
    blobs: dict[str, tuple[int, pygit2.Oid]] = {}
    for path, content in files.items():
        if isinstance(content, tuple):
            content = lfs_pointer(*content)
        elif path.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            (hub.hub.root / "lfs" / digest).write_bytes(content)
            content = lfs_pointer(digest, len(content))
        blobs[path] = (FileMode.LINK if path in links else FileMode.BLOB, repo.git.create_blob(content))
    return repo.write("refs/heads/main", [repo.resolve("main").id], _tree(repo, blobs), "bob", "upload")


def _tree(repo: Repo, blobs: dict[str, tuple[int, pygit2.Oid]]) -> pygit2.Oid:
    entries: dict[str, tuple[int, pygit2.Oid]] = {}
    below: dict[str, dict[str, tuple[int, pygit2.Oid]]] = {}
    for path, blob in blobs.items():
        # "\\0" keeps a "/" within a name, which only a forged tree has.
        folder, slash, rest = path.partition("/")
        if slash:
            below.setdefault(folder, {})[rest] = blob
        else:
            entries[path.replace("\0", "/")] = blob
    entries |= {folder: (FileMode.TREE, _tree(repo, content)) for folder, content in below.items()}
    ordered = sorted(entries.items(), key=lambda item: item[0] + ("/" if item[1][0] == FileMode.TREE else ""))
    raw = b"".join(f"{mode:o} {name}".encode() + b"\0" + oid.raw for name, (mode, oid) in ordered)
    return repo.git.odb.write(pygit2.enums.ObjectType.TREE, raw)
