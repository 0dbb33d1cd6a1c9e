"""The loopback Hub, as unmodified clients see it.

Clients that must go through LFS over HTTP, and the large libraries, run in processes of their own.
"""

import base64
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    server.exchanges.clear()
    yield server
    server.heal()


@pytest.fixture
def alice(hub: HubServer) -> HfApi:
    return hub.api("alice")


@pytest.fixture
def bob(hub: HubServer) -> HfApi:
    return hub.api("bob")


@pytest.fixture
def repo_id(alice: HfApi, request: pytest.FixtureRequest) -> str:
    """A public model repository of the organisation, named after the test, with one text file."""
    name = f"org/{request.node.name}".replace("[", "-").replace("]", "")
    alice.create_repo(name)
    alice.upload_file(path_or_fileobj=b"zero", path_in_repo="a.txt", repo_id=name)
    return name


def add(path: str, content: str | bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def refusal(hub: HubServer, repo_id: str, key: str, **value: object) -> str:
    """Posts a commit that no client would make and returns the reason why the Hub does not take it."""
    lines = [{"key": "header", "value": {"summary": "bad", "description": ""}}, {"key": key, "value": value}]
    url, headers = (
        f"{hub.endpoint}/api/models/{repo_id}/commit/main",
        {"Authorization": f"Bearer {hub.token('alice')}"},
    )
    answer = httpx2.post(url, content="\n".join(map(json.dumps, lines)), headers=headers)
    assert answer.status_code == 400
    return answer.json()["error"]


def run(hub: HubServer, code: str, *arguments: object, **options: str) -> dict:
    """Runs a client process; its last line of output is JSON."""
    done = hub.run(code, *map(str, arguments), **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


UPLOAD = """
import json, sys
from huggingface_hub import HfApi
from pathlib import Path
info = HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
print(json.dumps({"oid": info.oid}))
"""

DOWNLOAD = """
import hashlib, json, sys
from huggingface_hub import hf_hub_download
content = open(hf_hub_download(sys.argv[1], sys.argv[2]), "rb").read()
print(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to upload: one regular file, one below a folder, one of 1 MB for LFS."""
    path = tmp_path / "folder"
    (path / "notes").mkdir(parents=True)
    (path / "README.md").write_text("---\ntags: [merit]\n---\n# A card\n")
    (path / "notes" / "ä b.txt").write_text("one")
    (path / "weights.bin").write_bytes(os.urandom(2**20))
    return path


def lfs_sha256(api: HfApi, repo_id: str, path: str = "weights.bin") -> str:
    return api.get_paths_info(repo_id, path)[0].lfs.sha256


# Accounts and repositories


def test_whoami(hub: HubServer, alice: HfApi) -> None:
    assert alice.whoami()["name"] == "alice"
    assert alice.whoami()["orgs"][0]["name"] == "org"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(hub.endpoint, token="hf_wrong").whoami()


def test_create_and_delete(alice: HfApi, bob: HfApi, repo_id: str) -> None:
    with pytest.raises(HfHubHTTPError, match="already created"):
        alice.create_repo(repo_id)
    assert alice.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        bob.create_repo("org/of-bob")
    assert bob.create_repo("mine").repo_id == "bob/mine"
    bob.delete_repo("bob/mine")
    assert not bob.repo_exists("bob/mine")
    assert bob.repo_exists(repo_id)
    with pytest.raises(RepositoryNotFoundError):
        bob.delete_repo(repo_id)


def test_only_members_write(hub: HubServer, bob: HfApi, repo_id: str) -> None:
    with pytest.raises(HfHubHTTPError, match="write access"):
        bob.create_commit(repo_id, [add("b.txt", "x")], commit_message="direct")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        hub.api(None).create_commit(repo_id, [add("b.txt", "x")], commit_message="anonymous", create_pr=True)


def test_private(hub: HubServer, alice: HfApi, bob: HfApi, repo_id: str, tmp_path: Path) -> None:
    alice.update_repo_settings(repo_id, private=True)
    assert alice.model_info(repo_id).private
    for api, status in ((bob, 404), (hub.api(None), 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
        assert repo_id not in [model.id for model in api.list_models(author="org")]


def test_gated(hub: HubServer, alice: HfApi, bob: HfApi, repo_id: str, tmp_path: Path) -> None:
    alice.update_repo_settings(repo_id, gated="auto")
    for api, status in ((bob, 403), (hub.api(None), 401)):
        assert api.model_info(repo_id).gated == "auto"
        with pytest.raises(GatedRepoError) as caught:
            api.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo_id)
    alice.grant_access(repo_id, "bob")
    bob.auth_check(repo_id)
    assert Path(bob.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)).read_text() == "zero"


def test_card_reaches_info_and_search(alice: HfApi, repo_id: str) -> None:
    card = "---\nbase_model: [org/a, org/b]\nbase_model_relation: merge\ndatasets: [org/d]\ntags: [merit]\n---\n"
    results = "- {dataset: {id: org/d, task_id: t}, value: 0.5}\n"
    alice.create_commit(repo_id, [add("README.md", card), add(".eval_results/d.yaml", results),
                                  add(".eval_results/bad.yaml", "a: [")], commit_message="card")  # fmt: skip
    info = alice.model_info(repo_id)
    assert {"merit", "base_model:org/a", "base_model:merge:org/b", "dataset:org/d"} <= set(info.tags)
    assert info.card_data.base_model_relation == "merge"
    assert info.eval_results[0].value == 0.5
    assert [model.id for model in alice.list_models(filter=["merit", "base_model:merge:org/a"])] == [repo_id]


def test_bad_card_is_refused_before_upload(hub: HubServer, alice: HfApi, repo_id: str) -> None:
    for card in ("---\nbase_model: /tmp/model\n---\n", "---\na: [\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            alice.create_commit(repo_id, [add("README.md", card)], commit_message="card")
        assert "Invalid metadata" in refusal(hub, repo_id, "file", path="README.md", content=b64(card))


def test_collection(alice: HfApi, bob: HfApi, repo_id: str) -> None:
    created = alice.create_collection("MERIT run", namespace="org")
    alice.add_collection_item(created.slug, repo_id, "model", note="merged")
    alice.add_collection_item(created.slug, repo_id, "model", exists_ok=True)
    (item,) = bob.get_collection(created.slug).items
    assert (item.item_id, item.note) == (repo_id, "merged")
    assert alice.create_collection("MERIT run", namespace="org", exists_ok=True).slug == created.slug
    with pytest.raises(HfHubHTTPError, match="rights"):
        bob.add_collection_item(created.slug, "bob/x", "model")


# Commits, refs, pull requests


def test_upload_folder_and_pinned_snapshot(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    first = run(hub, UPLOAD, repo_id, folder)["oid"]
    assert {file.rfilename for file in alice.model_info(repo_id).siblings} == {
        ".gitattributes", "README.md", "a.txt", "notes/ä b.txt", "weights.bin"}  # fmt: skip
    assert [entry.path for entry in alice.list_repo_tree(repo_id, "notes")] == ["notes/ä b.txt"]
    assert run(hub, UPLOAD, repo_id, folder)["oid"] == first, "unchanged files make no commit"
    alice.create_tag(repo_id, tag="v1")
    alice.create_commit(repo_id, [add("notes/ä b.txt", "two")], commit_message="later")
    for revision, text in ((first, "one"), ("v1", "one"), ("main", "two")):
        path = Path(alice.snapshot_download(repo_id, revision=revision, cache_dir=folder.parent / "cache"))
        assert (path / "notes" / "ä b.txt").read_text() == text
        assert (path / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
    checks = alice.verify_repo_checksums(repo_id, revision=first, cache_dir=folder.parent / "cache")
    assert checks.checked_count == 5
    assert not checks.mismatches
    assert all(not exchange.authorized for exchange in hub.exchanges if exchange.path.startswith("/lfs/"))


def test_missing_things(hub: HubServer, alice: HfApi, repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError):
        alice.hf_hub_download(repo_id, "missing.txt", cache_dir=tmp_path)
    for revision in ("missing", "refs/pr/9", "no..name", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            alice.hf_hub_download(repo_id, "a.txt", revision=revision, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        alice.delete_file("missing.txt", repo_id)
    assert "never uploaded" in refusal(hub, repo_id, "lfsFile", path="w.bin", algo="sha256", oid="0" * 64, size=1)
    assert "Invalid path" in refusal(hub, repo_id, "file", path="../ä.txt", content=b64("x"))


def test_stale_parent(alice: HfApi, repo_id: str) -> None:
    head = alice.model_info(repo_id).sha

    def claim(number: int) -> int:
        """The status that the Hub answered with."""
        try:
            message = f"claim {number}"
            alice.create_commit(repo_id, [add("claim", str(number))], commit_message=message, parent_commit=head)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(claim, range(4))) == [200, 412, 412, 412]
    assert len(alice.list_repo_commits(repo_id)) == 3


def test_branches_tags_and_squash(alice: HfApi, repo_id: str) -> None:
    first = alice.model_info(repo_id).sha
    alice.create_branch(repo_id, branch="exp/1")
    alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="title\n\ntext", revision="exp/1")
    assert alice.file_exists(repo_id, "b.txt", revision="exp/1")
    assert not alice.file_exists(repo_id, "b.txt")
    alice.create_tag(repo_id, tag="v1", revision="exp/1")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        alice.create_tag(repo_id, tag="v1")
    refs = alice.list_repo_refs(repo_id)
    assert {ref.name: ref.target_commit for ref in refs.branches}["main"] == first
    assert refs.tags[0].ref == "refs/tags/v1"
    alice.super_squash_history(repo_id, branch="exp/1")
    assert len(alice.list_repo_commits(repo_id, revision="exp/1")) == 1
    assert len(alice.list_repo_commits(repo_id, revision="v1")) == 3
    alice.delete_tag(repo_id, tag="v1")
    alice.delete_branch(repo_id, branch="exp/1")
    with pytest.raises(RevisionNotFoundError):
        alice.delete_tag(repo_id, tag="v1")
    alice.create_commit(repo_id, [add("d/1", "1"), add("d/2", "2")], commit_message="two")
    alice.delete_folder("d", repo_id)
    assert alice.list_repo_files(repo_id) == [".gitattributes", "a.txt"]


def test_pull_requests_and_conflict(alice: HfApi, bob: HfApi, repo_id: str, tmp_path: Path) -> None:
    for api, name in ((bob, "bob"), (alice, "alice")):
        api.create_commit(repo_id, [add("claims/0.json", name)], commit_message=f"claim of {name}", create_pr=True)
    assert not alice.file_exists(repo_id, "claims/0.json")
    bob.create_commit(repo_id, [add("claims/1.json", "more")], commit_message="more", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="write access"):
        bob.create_commit(repo_id, [add("claims/1.json", "x")], commit_message="x", revision="refs/pr/2")
    path = alice.hf_hub_download(repo_id, "claims/0.json", revision="refs/pr/2", cache_dir=tmp_path)
    assert Path(path).read_text() == "alice"

    details = alice.get_discussion_details(repo_id, 1)
    assert details.author == "bob"
    assert details.conflicting_files == []
    assert "+more" in details.diff
    with pytest.raises(HfHubHTTPError, match="write access"):
        bob.merge_pull_request(repo_id, 1)
    alice.merge_pull_request(repo_id, 1, comment="welcome")
    merged = alice.get_discussion_details(repo_id, 1)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == alice.model_info(repo_id).sha
    assert [event.type for event in merged.events] == ["comment", "commit", "commit", "comment", "status-change"]

    assert alice.get_discussion_details(repo_id, 2).conflicting_files == ["claims/0.json"]
    with pytest.raises(HfHubHTTPError) as caught:
        alice.merge_pull_request(repo_id, 2)
    assert caught.value.response.status_code == 409
    alice.comment_discussion(repo_id, 2, "held by bob")
    alice.change_discussion_status(repo_id, 2, "closed")
    assert not list(alice.get_repo_discussions(repo_id, discussion_status="open"))
    assert [d.num for d in alice.get_repo_discussions(repo_id, author="bob", discussion_type="pull_request")] == [1]
    assert len(alice.list_repo_refs(repo_id, include_pull_requests=True).pull_requests) == 2


# The large libraries


def test_load_dataset(hub: HubServer, alice: HfApi) -> None:
    alice.create_repo("org/plan", repo_type="dataset")
    card = ("---\nconfigs:\n- {config_name: datasets, data_files: data/datasets.parquet}\n"
            "- {config_name: conflict, data_files: data/conflict.parquet}\n---\n")  # fmt: skip
    code = """
import json, sys
from datasets import Dataset, load_dataset
from huggingface_hub import CommitOperationAdd, HfApi
operations = [CommitOperationAdd("README.md", sys.argv[1].encode())]
tables = {"datasets": {"dataset": ["x"]}, "conflict": {"dataset_a": ["x", "y"], "cosine": [0.5, -0.5]}}
for name, table in tables.items():
    Dataset.from_dict(table).to_parquet(f"{name}.parquet")
    operations.append(CommitOperationAdd(f"data/{name}.parquet", f"{name}.parquet"))
sha = HfApi().create_commit("org/plan", operations, commit_message="plan", repo_type="dataset").oid
HfApi().delete_file("data/conflict.parquet", "org/plan", repo_type="dataset")
loaded = [load_dataset("org/plan", config, split="train", revision=sha)[:] for config in tables]
print(json.dumps(loaded))
"""
    assert run(hub, code, card) == [{"dataset": ["x"]}, {"dataset_a": ["x", "y"], "cosine": [0.5, -0.5]}]


def test_trainer_pushes_and_transformers_loads(hub: HubServer, alice: HfApi, bob: HfApi) -> None:
    code = """
import json, torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c"])}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
tokenizer.push_to_hub("org/tiny")
sha = model.push_to_hub("org/tiny").oid
torch.nn.init.zeros_(model.lm_head.weight)
model.push_to_hub("org/tiny")
torch.manual_seed(0)
pinned = AutoModelForCausalLM.from_pretrained("org/tiny", revision=sha)
latest = AutoModelForCausalLM.from_pretrained("org/tiny")
args = SFTConfig("out", hub_model_id="org/sft", push_to_hub=True, max_steps=2, save_steps=1, use_cpu=True, bf16=False,
                 report_to="none", hub_strategy="checkpoint", per_device_train_batch_size=1)
trainer = SFTTrainer(pinned, args, train_dataset=Dataset.from_dict({"text": ["a b c", "c b a"]}),
                     processing_class=AutoTokenizer.from_pretrained("org/tiny"))
trainer.train()
trainer.push_to_hub()
print(json.dumps({"sha": sha, "pinned": pinned.lm_head.weight.abs().sum().item() > 0,
                  "latest": latest.lm_head.weight.abs().sum().item()}))
"""
    result = run(hub, code)
    assert result["pinned"]
    assert result["latest"] == 0.0
    files = alice.list_repo_files("org/sft")
    assert {"model.safetensors", "README.md", "last-checkpoint/optimizer.pt"} <= set(files)

    hub.exchanges.clear()
    metadata = bob.get_safetensors_metadata("org/tiny", revision=result["sha"])
    assert metadata.files_metadata["model.safetensors"].tensors["lm_head.weight"].shape == [6, 16]
    reads = [exchange for exchange in hub.exchanges if exchange.path.startswith("/lfs/")]
    assert [(exchange.range, exchange.status) for exchange in reads] == [("bytes=0-100000", 206)]


def test_xet(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    run(hub, UPLOAD, repo_id, folder, HF_HUB_DISABLE_XET="0")
    assert not any(exchange.path.startswith("/lfs/") for exchange in hub.exchanges), "went through the CAS"
    sha256 = lfs_sha256(alice, repo_id)
    through_xet = run(hub, DOWNLOAD, repo_id, "weights.bin", user="bob", HF_HUB_DISABLE_XET="0")
    assert through_xet["sha256"] == sha256
    assert not any(exchange.path.startswith("/lfs/") for exchange in hub.exchanges), "came through the CAS"
    assert run(hub, DOWNLOAD, repo_id, "weights.bin", user=None)["sha256"] == sha256, "and over HTTP"


# Faults


def test_rate_limit(hub: HubServer, alice: HfApi, repo_id: str) -> None:
    hub.fail("status", "/preupload/", "POST", status=429, retry_after=1)
    start = time.monotonic()
    alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="waits, then goes through")
    assert time.monotonic() - start >= 1
    hub.fail("status", "/commit/", "POST", status=429, retry_after=1)
    with pytest.raises(HfHubHTTPError, match="429"):  # the client does not repeat a commit by itself
        alice.create_commit(repo_id, [add("c.txt", "c")], commit_message="refused")
    assert alice.list_repo_files(repo_id) == [".gitattributes", "a.txt", "b.txt"]


@pytest.mark.parametrize("status", [500, 503])
def test_server_error(hub: HubServer, alice: HfApi, repo_id: str, status: int, tmp_path: Path) -> None:
    hub.fail("status", "/commit/", "POST", status=status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="b")
    assert not alice.file_exists(repo_id, "b.txt")
    alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="again")
    hub.fail("status", "/resolve/", "HEAD", status=status)
    assert Path(alice.hf_hub_download(repo_id, "b.txt", cache_dir=tmp_path)).read_text() == "b", "retried"


def test_dropped_upload(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    hub.fail("drop_request", "^/lfs/", "PUT")
    run(hub, UPLOAD, repo_id, folder)
    puts = [exchange.status for exchange in hub.exchanges if exchange.method == "PUT"]
    assert puts == [0, 200], "the client sent it again"
    assert lfs_sha256(alice, repo_id)
    hub.fail("drop_request", "/commit/", "POST")
    (folder / "new.txt").write_text("new")
    assert hub.run(UPLOAD, repo_id, str(folder)).returncode != 0
    assert not alice.file_exists(repo_id, "new.txt")
    run(hub, UPLOAD, repo_id, folder)
    assert alice.file_exists(repo_id, "new.txt")


def test_lost_answer(hub: HubServer, alice: HfApi, repo_id: str) -> None:
    hub.fail("lose_response", "/commit/", "POST")
    with pytest.raises(httpx2.TransportError):
        alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="b")
    head = alice.model_info(repo_id).sha
    assert alice.file_exists(repo_id, "b.txt"), "the commit was made all the same"
    assert alice.create_commit(repo_id, [add("b.txt", "b")], commit_message="b").oid == head, "again is a no-op"


def test_dropped_download(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    (folder / "weights.bin").write_bytes(os.urandom(24 * 2**20))  # the client keeps what it has in steps of 10 MiB
    run(hub, UPLOAD, repo_id, folder)
    hub.exchanges.clear()
    hub.fail("drop_response", "^/lfs/")
    assert run(hub, DOWNLOAD, repo_id, "weights.bin")["sha256"] == lfs_sha256(alice, repo_id)
    first, second = [exchange for exchange in hub.exchanges if exchange.path.startswith("/lfs/")]
    assert first.num_bytes == 12 * 2**20
    assert second.status == 206
    assert second.range == f"bytes={10 * 2**20}-", "resumed, not begun anew"


def test_truncated_file(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    run(hub, UPLOAD, repo_id, folder)
    hub.fail("truncate", "^/lfs/")
    done = hub.run(DOWNLOAD, repo_id, "weights.bin")
    assert done.returncode != 0
    assert "Consistency check failed" in done.stderr
    assert run(hub, DOWNLOAD, repo_id, "weights.bin")["sha256"] == lfs_sha256(alice, repo_id)


def test_corrupt_file(hub: HubServer, alice: HfApi, repo_id: str, folder: Path) -> None:
    run(hub, UPLOAD, repo_id, folder)
    hub.fail("corrupt", "^/lfs/")
    alice.snapshot_download(repo_id, cache_dir=folder.parent / "cache")
    checks = alice.verify_repo_checksums(repo_id, cache_dir=folder.parent / "cache")
    assert [mismatch["path"] for mismatch in checks.mismatches] == ["weights.bin"], "the client itself did not notice"


def test_slow_answer(hub: HubServer, alice: HfApi, repo_id: str, tmp_path: Path) -> None:
    hub.fail("slow", "/resolve/", "HEAD", seconds=0.5)
    assert Path(alice.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path, etag_timeout=0.2)).read_text() == "zero"
    heads = [exchange.status for exchange in hub.exchanges if exchange.method == "HEAD"]
    assert len(heads) == 2, "the client gave up on the first answer and asked again, with more patience"
    path = alice.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)
    hub.fail("slow", "/resolve/", "HEAD", times=9, seconds=0.5)
    assert path == alice.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path, etag_timeout=0.1), "from the cache"
