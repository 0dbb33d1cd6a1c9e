"""What a stranger's plan and repo can do here: nothing but what its fields say, and those are text."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from contributions import write_tree
from hub_server import HubServer
from hub_server.repos import Repo

from merit_hf.cards import plan_dataset_card, validate_card
from merit_hf.config import ConfigError, MeritError
from merit_hf.identity import DERIVED_FIELDS, IDENTITY_FIELDS
from merit_hf.plan import PartitionPlan
from merit_hf.sft import build_args, load_model
from merit_hf.sharing.accept import Decision, _comment
from merit_hf.sharing.untrusted import SAFE_PLACEMENT, check_pinned, vet_plan
from merit_hf.verification.checks import shorten

SHA = "c" * 40
HOSTILE = [
    "{{ 7 * 7 }}{% for x in y %}", "<script>alert(1)</script>", "</td><img src=x onerror=a()>", "[a](javascript:x)",
    "| a | b |\n|---|", "---\nlicense: mit\n---", "a: &b [*b]", "../../etc/passwd", "/etc/passwd", "a\x00b\x1b[31m",
    "\u202eevil\u2066", "x" * 5000, "`" * 40, "@everyone", "https://evil.example/x", "# top\n\n* list",
]  # fmt: skip


@pytest.fixture
def content(tiny_plan: PartitionPlan) -> dict[str, Any]:
    """plan.json of a plan that could lie on the Hub."""
    found = copy.deepcopy(tiny_plan.to_dict())
    found["base"] |= {"repo_id": "org/base", "revision": SHA}
    for entry in found["config"]["datasets"]:
        entry |= {"path": f"org/{entry['name']}", "eval_path": None}
    return found


def test_an_honest_plan_keeps_what_decides_the_training(content: dict[str, Any]) -> None:
    vetted = vet_plan(content, "org/plan")
    assert vetted["sft"] == content["sft"]
    assert vetted["config"]["datasets"] == content["config"]["datasets"]
    for field in ("learning_rate", "max_length", "num_train_epochs", "per_device_train_batch_size"):
        assert vetted["config"]["sft"][field] == content["config"]["sft"][field]


@pytest.mark.parametrize("key", ["path", "eval_path"])
@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.jsonl", "~/x.json", "data/mine.jsonl", "a/b.csv",
    "a/b.PARQUET",
                                  "file:///etc/passwd", "C:\\x", "hf://a/b", "s3://a/b", "a/../b", "", 7,
                                      ["a"]])  # fmt: skip
def test_a_dataset_path_is_a_hub_id(key: str, path: Any, content: dict[str, Any]) -> None:
    content["config"]["datasets"][0][key] = path
    with pytest.raises(MeritError, match="no Hub id"):
        vet_plan(content, "org/plan")


@pytest.mark.parametrize(
    "base", [{"repo_id": "/etc"}, {"repo_id": "../base"}, {"revision": "main"}, {"revision": None}, {"repo_id": None}]
)
def test_a_base_is_a_repo_at_a_commit(base: dict[str, Any], content: dict[str, Any]) -> None:
    content["base"] |= base
    with pytest.raises(MeritError, match="expected a repo at a commit sha"):
        vet_plan(content, "org/plan")


def test_a_planned_dataset_is_pinned() -> None:
    check_pinned("org/x", SHA, "x", "org/plan")
    for repo_id, revision in (("org/x", "main"), ("org/x", None), ("../x", SHA), (None, SHA)):
        with pytest.raises(MeritError, match="commit sha"):
            check_pinned(repo_id, revision, "x\n", "org/plan")


FOREIGN = {
    "report_to": "wandb", "push_to_hub": True, "hub_model_id": "bob/x", "hub_token": "x", "deepspeed": "/tmp/ds.json",
    "fsdp_config": "/tmp/f.json", "accelerator_config": "/tmp/a.json", "trust_remote_code": True,
        "output_dir": "/tmp/x",
    "logging_dir": "/tmp/x", "run_name": "x", "chat_template_path": "/etc/passwd", "resume_from_checkpoint": "/tmp/x",
    "hub_strategy": "checkpoint", "dataset_kwargs": {"skip_prepare_dataset": True}, "torch_compile_backend": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", FOREIGN)
def test_placement_is_not_the_authors(field: str, content: dict[str, Any]) -> None:
    content["config"]["sft"][field] = FOREIGN[field]
    assert field not in vet_plan(content, "org/plan")["config"]["sft"]


@pytest.mark.parametrize("field", FOREIGN)
def test_a_plan_does_not_decide_what_identity_is(field: str, content: dict[str, Any]) -> None:
    """With the field in both places, and the hashes over them, everything else would be in order."""
    content["config"]["sft"][field] = content["sft"][field] = FOREIGN[field]
    with pytest.raises(MeritError, match=f"counts sft.{field} as its identity"):
        vet_plan(content, "org/plan")


def test_no_list_of_ours_holds_a_field_that_acts(content: dict[str, Any]) -> None:
    assert not set(FOREIGN) & {*IDENTITY_FIELDS, *DERIVED_FIELDS, *SAFE_PLACEMENT}
    assert set(content["sft"]) <= {*IDENTITY_FIELDS, *DERIVED_FIELDS}


def test_model_arguments_never_bring_code(content: dict[str, Any]) -> None:
    content["config"]["sft"]["model_init_kwargs"] = {
        "trust_remote_code": True, "code_revision": "main", "dtype": "float32", "attn_implementation": ["x"],
        "quantization_config": {}, "cache_dir": "/tmp",
    }  # fmt: skip
    assert vet_plan(content, "org/plan")["config"]["sft"]["model_init_kwargs"] == {"dtype": "float32"}
    content["config"]["sft"]["model_init_kwargs"] = "trust"
    assert "model_init_kwargs" not in vet_plan(content, "org/plan")["config"]["sft"]


@pytest.mark.parametrize("name", ["json", "csv", "text", "imagefolder", "parquet"])
def test_a_file_format_is_no_repo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would read every such file of the current folder."""
    from merit_hf.config import DatasetSection
    from merit_hf.reading import _read

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.json").write_text('{"text": "secret"}')
    spec = DatasetSection(name="x", path=f"org/{name}", eval_path=name)
    with pytest.raises(ConfigError, match="meant as a Hub id"):
        _read(spec, name, "train", tmp_path / "elsewhere", None)
    (tmp_path / "org/mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="meant as a Hub id"):
        _read(spec, "org/mine", "train", tmp_path / "elsewhere", None)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_in_comments_and_lines(text: str) -> None:
    for verdict in ("accepted", "refused"):
        comment = _comment(Decision(1, text, text, verdict, text))
        assert "<script" not in comment
        assert "<img" not in comment
        assert "](" not in comment
        assert "{{" not in comment
        assert "\n" not in comment
        assert "\x1b" not in comment
        assert "\u202e" not in comment
        assert len(comment) < 2500
        assert not re.search(r"(?<!<!-- -->)@everyone", comment)
    line = shorten(text)
    assert "\n" not in line
    assert "\x1b" not in line
    assert "\u202e" not in line
    assert len(line) <= 120


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_dataset_names_are_inert_in_a_plans_card(text: str, tiny_plan: PartitionPlan) -> None:
    import dataclasses

    name = tiny_plan.datasets[0].name
    renamed = [
        dataclasses.replace(d, name=text, tag=text, repo_id=None) if d.name == name else d for d in tiny_plan.datasets
    ]
    groups = [
        dataclasses.replace(g, datasets=[text if n == name else n for n in g.datasets]) for g in tiny_plan.groups
    ]
    card = plan_dataset_card(dataclasses.replace(tiny_plan, datasets=renamed, groups=groups, skipped={text: text}))
    plain = plan_dataset_card(dataclasses.replace(tiny_plan, skipped={"x": "y"}))
    validate_card(card)
    assert "<script" not in card
    assert "<img" not in card
    assert "](javascript" not in card
    assert "{{ 7" not in card
    assert "\x1b" not in card
    assert "\u202e" not in card
    # An absolute path of this or another machine is cut; others are text like any other.
    assert " /etc/passwd" not in card
    # No new rows, headings or blocks: only the cells differ.
    assert card.count("\n") == plain.count("\n")
    assert card.split("\n---\n")[0] == plain.split("\n---\n")[0]


FETCH = """
import sys
from merit_hf.config import MeritError
from merit_hf.hub import fetch_files, fetch_plan, list_files, pin_revision
repo, kind = sys.argv[1:]
sha = pin_revision(repo, None, kind, "test")
try:
    if kind == "dataset":
        print(fetch_plan(repo, sha, "plan.json"))
    else:
        print(fetch_files(repo, sha, kind, list_files(repo, sha, kind)))
except MeritError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_no_file_is_written_outside_the_cache(kind: str, tmp_path: Path) -> None:
    """A forged git tree, as no client sends it: names with `..`, names with slashes, a link, and what they lead to."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    names = [
        "../../../evil.parquet",
        "data/../../../../evil.parquet",
        "..",
        "\0evil-absolute.parquet",
        "data/x\ny.parquet",
    ]
    with HubServer() as hub:
        for number, name in enumerate([*names, "data/link.parquet"]):
            repo = Repo(kind, f"bob/x{number}", hub.hub.new_folder())
            hub.hub.repos[kind, repo.id] = repo
            target = str(secret).encode()
            write_tree(hub, repo, {"plan.json": b"{}", name: target}, ("data/link.parquet",))
            done = subprocess.run(
                [sys.executable, "-c", FETCH, repo.id, kind], cwd=tmp_path, text=True, capture_output=True,
                env=hub.environ("alice", HF_HOME=str(tmp_path / "home/cache/hf")), timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-500:]
            if kind == "model" and number < 5 and name != "\0evil-absolute.parquet":
                assert done.stdout.startswith("refused:"), (name, done.stdout)
        written = [path for path in tmp_path.rglob("*") if "evil" in path.name]
        assert all((tmp_path / "home/cache/hf") in path.parents for path in written), written
        links = [path for path in (tmp_path / "home").rglob("*.parquet") if path.is_symlink()]
        assert all(path.resolve().is_relative_to(tmp_path / "home/cache/hf") for path in links)
    assert secret.read_text() == "mine"


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[" * 200_000, b"[]", b'{"schema_version": 1}', b'{"schema_version": 1, "sft": [], "config": []}',
     json.dumps({"schema_version": 1, "sft": {}, "base": {}, "config": {"datasets": [1], "sft": {}}}).encode()],
)  # fmt: skip
def test_a_plan_of_nonsense_is_one_line(raw: bytes, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    import shutil

    assert tiny_plan.folder is not None
    folder = Path(shutil.copytree(tiny_plan.folder, tmp_path / "plan"))
    (folder / "plan.json").write_bytes(raw)
    with pytest.raises(MeritError):
        PartitionPlan.from_pretrained(folder)


def test_foreign_code_runs_for_a_named_repo_only(base_dir: Path) -> None:
    """`true` would hold for whatever base a plan names."""
    for named in (True, "org/other", 1):
        with pytest.raises(ConfigError, match="name whose code may run"):
            load_model(base_dir, build_args({"model_init_kwargs": {"trust_remote_code": named}}))
    load_model(base_dir, build_args({"model_init_kwargs": {"trust_remote_code": str(base_dir)}}))
