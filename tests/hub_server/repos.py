"""What the loopback Hub keeps on disk: bare git repositories, an LFS folder, and the cards inside them."""

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pygit2
import yaml
from pygit2.enums import FileMode

from .xet import LocalCas

LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".msgpack", ".npy", ".npz", ".onnx", ".parquet", ".pickle", ".pkl", ".pt",
                ".pth", ".safetensors", ".tar", ".zip")  # fmt: skip
LFS_THRESHOLD = 10 * 1024**2  # bytes: above it text goes to LFS too, as on the Hub
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)", re.DOTALL)
# The accounts, and where else they may write: two members of `org`, two strangers.
ORGANISATIONS = {"alice": ["org"], "bob": [], "carol": ["org"], "dave": []}


class HubError(Exception):
    """An answer that is not a success: HTTP status, message, the Hub's `X-Error-Code`, further headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        ascii_message = message.encode("ascii", "backslashreplace").decode().replace("\n", " ")
        self.headers = {"X-Error-Message": ascii_message} | headers | ({"X-Error-Code": code} if code else {})


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def timestamp(seconds: float | None = None) -> str:
    """Seconds since the epoch (default: now) in the one format that the client parses."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def read_card(content: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a README and what the Hub objects to in it."""
    match = FRONT_MATTER.match(content)
    try:
        data = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        return {}, [f"YAML: {error}"]
    if not isinstance(data, dict):
        return {}, ["YAML: the metadata must be a mapping"]
    data = json.loads(json.dumps(data, default=str))  # YAML dates have no JSON form
    ids = [(key, value) for key in ("base_model", "datasets") for value in as_list(data.get(key))]
    return data, [f'"{key}" with value "{value}" is not valid: use an id of the Hub' for key, value in ids
                  if not REPO_ID.fullmatch(str(value))]  # fmt: skip


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


@dataclass(frozen=True)
class Entry:
    """One file or folder of a commit; `size` in bytes and, for an LFS file, that of the content."""

    path: str
    oid: str
    size: int
    is_folder: bool = False
    sha256: str | None = None
    pointer_size: int = 0

    def to_json(self) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size} if self.sha256 else None
        described = {"type": "directory" if self.is_folder else "file", "path": self.path, "oid": self.oid}
        return described | {"size": self.size} | ({"lfs": lfs} if lfs else {})


@dataclass
class Discussion:
    """A discussion or a pull request; its changes live on `refs/pr/<num>`."""

    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str = "open"
    base: str = "refs/heads/main"
    merge_commit: str | None = None
    created: str = field(default_factory=timestamp)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add_event(self, kind: str, author: str, **data: Any) -> dict[str, Any]:
        self.events.append({"id": secrets.token_hex(12), "type": kind, "createdAt": timestamp(),
                            "author": {"name": author}, "data": data})  # fmt: skip
        return self.events[-1]

    def add_comment(self, author: str, text: str) -> dict[str, Any]:
        latest = {"raw": text, "html": text, "updatedAt": timestamp(), "author": {"name": author}}
        return self.add_event("comment", author, edited=False, hidden=False, latest=latest, history=[latest])


@dataclass
class Repo:
    """A repository of the Hub, `type` being "model" or "dataset". `gated` holds False, "auto" or "manual"."""

    type: str
    id: str
    folder: Path
    private: bool = False
    gated: bool | str = False
    granted: set[str] = field(default_factory=set)
    created: str = field(default_factory=timestamp)
    discussions: list[Discussion] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.git = pygit2.init_repository(self.folder, bare=True, initial_head="main")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        index = pygit2.Index()
        index.add(pygit2.IndexEntry(".gitattributes", self.git.create_blob(attributes.encode()), FileMode.BLOB))
        self.write("refs/heads/main", [], index.write_tree(self.git), "system", "initial commit")

    def discuss(self, title: str, author: str, is_pull_request: bool, comment: str) -> Discussion:
        self.discussions.append(Discussion(len(self.discussions) + 1, title, author, is_pull_request))
        self.discussions[-1].add_comment(author, comment)
        return self.discussions[-1]

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def is_member(self, user: str | None) -> bool:
        return user is not None and self.namespace in (user, *ORGANISATIONS[user])

    def resolve(self, revision: str) -> pygit2.Commit:
        """The commit of a branch, a tag, a full ref or a hash."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.git.references and name.startswith("refs/"):
                return self.git.references[name].peel(pygit2.Commit)
        if re.fullmatch("[0-9a-f]{7,40}", revision) and isinstance(found := self.git.get(revision), pygit2.Commit):
            return found
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def refs(self, prefix: str) -> list[dict[str, str]]:
        names = [name for name in self.git.references if name.startswith(prefix)]
        return [{"name": name.removeprefix(prefix), "ref": name, "targetCommit": str(self.resolve(name).id)}
                for name in names]  # fmt: skip

    def _entry(self, item: pygit2.Tree | pygit2.Blob, path: str) -> Entry:
        if not isinstance(item, pygit2.Blob):
            return Entry(path, str(item.id), 0, is_folder=True)
        pointer = LFS_POINTER.fullmatch(item.data) if item.size < 200 else None
        if pointer is None:
            return Entry(path, str(item.id), item.size)
        return Entry(path, str(item.id), int(pointer[2]), sha256=pointer[1].decode(), pointer_size=item.size)

    def entry(self, commit: pygit2.Commit, path: str) -> Entry:
        try:
            return self._entry(commit.tree[path.rstrip("/")], path.rstrip("/"))
        except KeyError:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": str(commit.id)}) from None

    def entries(self, commit: pygit2.Commit, path: str = "", recursive: bool = True) -> Iterator[Entry]:
        """Files and folders under `path`, in git's order."""
        if path and not self.entry(commit, path).is_folder:
            raise HubError(404, f"{path} is not a folder", "EntryNotFound")
        for item in commit.tree[path] if path else commit.tree:
            child = self._entry(item, f"{path}/{item.name}".lstrip("/"))
            yield child
            if recursive and child.is_folder:
                yield from self.entries(commit, child.path)

    def read(self, commit: pygit2.Commit, path: str) -> bytes | None:
        """What git stores of a file (of an LFS file: its pointer), None where there is none."""
        if path not in commit.tree:
            return None
        item = commit.tree[path]
        return item.data if isinstance(item, pygit2.Blob) else None

    def commit(self, ref: str | None, parent: pygit2.Commit, changes: list[tuple[str, bytes | None]], author: str,
               message: str) -> str:  # fmt: skip
        """Applies (path, content) in order, None deleting a file or, where the path ends in "/", a folder."""
        index = pygit2.Index()
        index.read_tree(parent.tree)
        for path, content in changes:
            if content is not None:
                blob = self.git.create_blob(content)
                index.add(pygit2.IndexEntry(path, blob, FileMode.BLOB))
                continue
            doomed = [e.path for e in index if e.path == path or (path.endswith("/") and e.path.startswith(path))]
            if not doomed:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in doomed:
                index.remove(name)
        return self.write(ref, [parent.id], index.write_tree(self.git), author, message)

    def write(self, ref: str | None, parents: list[pygit2.Oid], tree: pygit2.Oid, author: str, message: str) -> str:
        signature = pygit2.Signature(author, f"{author}@localhost")
        return str(self.git.create_commit(ref, signature, signature, message, tree, parents))

    def merged_index(self, pull: Discussion) -> pygit2.Index:
        return self.git.merge_commits(self.resolve(pull.base), self.resolve(f"refs/pr/{pull.num}"))

    def conflicts(self, pull: Discussion) -> list[str]:
        conflicts = self.merged_index(pull).conflicts if pull.status in ("open", "draft") else None
        return sorted({side.path for sides in conflicts or () for side in sides if side is not None})

    def diff(self, pull: Discussion) -> str:
        head = self.resolve(f"refs/pr/{pull.num}")
        tip = self.resolve(pull.base).id
        base = self.git.merge_base(tip, head.id) or tip  # none where the branch was squashed since
        return self.git.diff(base, head.id).patch or ""

    def merge(self, pull: Discussion, user: str) -> str:
        """Squashes a pull request onto its base, as the Hub's button does, and returns the commit."""
        if self.conflicts(pull):
            raise HubError(409, f"This pull request has conflicts: {', '.join(self.conflicts(pull))}")
        tree = self.merged_index(pull).write_tree(self.git)
        return self.write(pull.base, [self.resolve(pull.base).id], tree, user, f"{pull.title} (#{pull.num})")


class Hub:
    """All repositories, the LFS folder, accounts and collections under one folder."""

    def __init__(self, root: Path):
        self.root = root
        self.endpoint = self.cdn = ""  # known once the server has its ports
        self.organisations = ORGANISATIONS
        self.tokens = {name: f"hf_{name}{secrets.token_hex(12)}" for name in ORGANISATIONS}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.jobs: list[Any] = []  # of jobs.Job, in the order in which they came
        self.cas = LocalCas(root / "cas")
        (root / "lfs").mkdir(parents=True)
        (root / "blobs").mkdir()

    def new_folder(self) -> Path:
        """A path that nothing lies at yet."""
        return self.root / secrets.token_hex(8)

    def lfs_path(self, sha256: str) -> Path:
        """The content of an LFS object; one that came through xet is put together on first use."""
        path = self.root / "lfs" / sha256
        if not path.exists():
            self.cas.fetch(sha256, path)
        return path

    def has_lfs(self, sha256: str) -> bool:
        return (self.root / "lfs" / sha256).exists() or self.cas.find(sha256) is not None

    def blob_path(self, repo: Repo, oid: str) -> Path:
        """A regular file as a file, so that both kinds answer range requests alike."""
        path = self.root / "blobs" / oid
        if not path.exists():
            path.write_bytes(repo.git[oid].data)
        return path
