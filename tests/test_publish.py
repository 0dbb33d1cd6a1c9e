"""What `merit push` leaves on a loopback Hub of plans, their data, groups and merged models; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import yaml
from hub_merit import Account
from hub_state import everything, head, look, read
from hub_world import PLAN, World
from tiny import as_chat, task_rows, write_jsonl

from merit_hf.manifest import hash_files, read_manifest

pytestmark = pytest.mark.slow
FULL, BARE = "org/full", "org/bare"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """PLAN over data on the Hub, with its groups in repos, accepted and merged; and a plan over alice's own files."""
    with World(tmp_path_factory.mktemp("world")) as world:
        world.publish_base_and_data()
        world.publish_plan()
        world.train_groups()
        # Held-out rows in a file of their own for one dataset, a share of the rows for the other.
        path = world.config(local=True)
        content = yaml.safe_load(path.read_text())
        write_jsonl(world.alice.folder / "data/held.jsonl", [as_chat(row) for row in task_rows("copy", 6, seed=5)])
        content["datasets"][0] |= {"eval_path": "data/held.jsonl"}
        path.write_text(yaml.safe_dump(content))
        world.alice("plan", "local.yaml", "--output", "local").check()
        world.save("groups")
        world.bob("contribute", PLAN, "bob/group-1").check()
        world.alice("contribute", PLAN, "alice/group-0").check()
        world.alice("accept", PLAN, "--level", "weights").check()
        world.alice("merge", PLAN, "--output", "run/merged").check()
        world.alice("evaluate", "run/merged", "--plan", PLAN, "--output", "run").check()
        world.save("accepted")
        yield world


@pytest.fixture
def world(shared: World) -> World:
    shared.back_to("groups")
    return shared


@pytest.fixture
def accepted(shared: World) -> World:
    shared.back_to("accepted")
    return shared


def edit_card(account: Account, repo_id: str, metadata: str) -> None:
    code = (
        "import sys; from huggingface_hub import DatasetCard, metadata_update; import yaml; "
        "metadata_update(sys.argv[1], yaml.safe_load(sys.argv[2]), repo_type='dataset', overwrite=True)"
    )
    account("-c", code, repo_id, metadata).check()


def test_a_plan_is_one_commit_and_again_none(world: World) -> None:
    alice, before = world.alice, look(world.hub)
    alice("push", "plan", "org/two").check()
    state = look(world.hub)["dataset org/two"]
    assert state.commits == [("initial commit", "system"), ("Upload partition plan", "alice")]
    assert not state.private
    assert {"README.md", "plan.json", "data/groups.parquet", "sketches.safetensors"} <= state.files.keys()
    assert not {"local.json", ".gitignore"} & state.files.keys()
    first = head(world.hub, "dataset", "org/two")
    alice("push", "plan", "org/two").check()
    assert head(world.hub, "dataset", "org/two") == first, "pushed again, it was another commit"
    assert {name: repo for name, repo in look(world.hub).items() if name != "dataset org/two"} == before


def test_the_card_keeps_what_others_wrote_and_the_tables_load(world: World) -> None:
    configs = [{"config_name": "notes", "data_files": "notes.csv"}, {"config_name": "groups", "data_files": "old.csv"}]
    edit_card(world.alice, PLAN, yaml.safe_dump({"license": "cc0-1.0", "configs": configs, "tags": ["mine", "merit"]}))
    world.alice("push", "plan", PLAN).check()
    card = world.hub.api("bob").repo_info(PLAN, repo_type="dataset").card_data
    assert card["license"] == "cc0-1.0"
    assert set(card["tags"]) >= {"mine", "merit", "partition-plan"}
    files = {config["config_name"]: config["data_files"] for config in card["configs"]}
    assert files == {"notes": "notes.csv", **{t: f"data/{t}.parquet" for t in ("datasets", "conflict", "groups")}}
    world.bob.forget()
    code = (
        "import json, datasets; print(json.dumps({t: datasets.load_dataset('org/plan', t, split='train').to_list() "
        "for t in ('datasets', 'conflict', 'groups')}, default=str))"
    )
    tables = json.loads(world.bob("-c", code).check().out.splitlines()[-1])
    assert [row["dataset"] for row in tables["datasets"]] == ["copy", "count"]
    assert {(row["dataset_a"], row["dataset_b"]) for row in tables["conflict"]} >= {
        ("copy", "count"),
        ("count", "copy"),
    }
    assert sorted(name for row in tables["groups"] for name in row["datasets"]) == ["copy", "count"]


def test_a_plan_in_use_is_not_replaced_by_another(world: World) -> None:
    world.alice("push", "local", "org/plan-2").check()
    world.alice("push", "plan", "org/plan-2").check()
    world.alice("claim", "org/plan-2", "--group", 0).check()
    before = look(world.hub)["dataset org/plan-2"]
    refused = world.alice("push", "local", "org/plan-2")
    assert refused.code == 2
    assert "1 claims and contributions" in refused.error
    assert "another repo" in refused.error
    assert look(world.hub)["dataset org/plan-2"] == before
    # The same plan again takes no claim away.
    world.alice("push", "plan", "org/plan-2").check()
    assert look(world.hub)["dataset org/plan-2"].files["claims/group-0.json"] == before.files["claims/group-0.json"]


def test_local_data(world: World) -> None:
    """Without the data a stranger is told what is missing; with the author's files, or from the repos, all are one."""
    alice, bob = world.alice, world.bob
    sha256 = json.loads((alice.folder / "local/plan.json").read_text())["sha256"]
    said = alice("push", "local", BARE).check().out
    assert "Not on the Hub: the data of copy, count" in said
    assert "--with-data" in said
    assert str(world.folder).encode() not in everything(world.hub)
    refused = bob("train", BARE, "--group", 0, "--output", "from-bare")
    group = next(g for g in json.loads(alice("status", "local", "--json").out)["groups"] if g["group"] == 0)
    (task,) = group["datasets"]
    assert f"--data {task}=PATH" in refused.error
    assert refused.code == 2
    other = next(t for t in world.tasks if t != task)
    wrong = bob(
        "train", BARE, "--group", 0, "--output", "from-bare", "--data", f"{task}={alice.folder}/data/{other}.jsonl"
    )
    assert wrong.code == 1
    assert "fingerprint" in wrong.error
    assert not (bob.folder / "from-bare").exists()
    bob(
        "train", BARE, "--group", 0, "--output", "from-bare", "--data", f"{task}={alice.folder}/data/{task}.jsonl"
    ).check()

    alice("push", "local", FULL, "--with-data").check()
    repos = sorted(name for name in look(world.hub) if name.startswith(f"dataset {FULL}-"))
    assert len(repos) == 2
    assert all(len(look(world.hub)[name].commits) == 2 for name in repos)
    published = read(world.hub, "dataset", FULL, "plan.json")
    assert published["sha256"] == sha256 == read(world.hub, "dataset", BARE, "plan.json")["sha256"]
    copied = next(name for name in repos if "-copy-" in name).removeprefix("dataset ")
    code = (
        "import sys, json, datasets; d = datasets.load_dataset(sys.argv[1]); "
        "print(json.dumps({k: v.to_list() for k, v in d.items()}))"
    )
    rows = json.loads(bob("-c", code, copied).check().out.splitlines()[-1])
    assert rows["train"] == [as_chat(row) for row in task_rows("copy", 24)]
    assert rows["heldout"] == [as_chat(row) for row in task_rows("copy", 6, seed=5)]
    bob("train", FULL, "--group", 0, "--output", "from-full").check()
    assert hash_files(bob.folder / "from-full") == hash_files(bob.folder / "from-bare")
    mine, theirs = (read_manifest(bob.folder / name) for name in ("from-full", "from-bare"))
    assert mine["num_input_tokens"] == theirs["num_input_tokens"] > 0
    # The places stay when the plan is pushed again without its data; with it, nothing new is uploaded.
    heads = {name: head(world.hub, "dataset", name.removeprefix("dataset ")) for name in [*repos, f"dataset {FULL}"]}
    alice("push", "local", FULL).check()
    alice("push", "local", FULL, "--with-data").check()
    assert {name: head(world.hub, "dataset", name.removeprefix("dataset ")) for name in heads} == heads
    assert str(world.folder).encode() not in everything(world.hub)


def test_private_and_gated_plans(world: World) -> None:
    alice, bob = world.alice, world.bob
    alice("push", "plan", "org/hidden", "--private").check()
    assert look(world.hub)["dataset org/hidden"].private
    refused = bob("claim", "org/hidden", "--group", 0)
    assert refused.code == 2
    assert "org/hidden" in refused.error
    assert "hf auth login" in refused.error
    alice("claim", "org/hidden", "--group", 0).check()
    world.hub.api("alice").update_repo_settings(PLAN, gated="manual", repo_type="dataset")
    try:
        refused = bob("claim", PLAN, "--group", 0)
        assert refused.code == 2
        assert "HTTP 403" in refused.error
        world.hub.api("alice").grant_access(PLAN, "bob", repo_type="dataset")
        assert "pull request #1" in bob("claim", PLAN, "--group", 0).check().out
    finally:
        repo = world.hub.hub.repos["dataset", PLAN]
        repo.gated, repo.granted = False, set()


def test_create_pr(world: World) -> None:
    world.bob(
        "-c",
        "from huggingface_hub import snapshot_download as s; s('org/plan', repo_type='dataset', local_dir='copy')",
    ).check()
    shutil.rmtree(world.bob.folder / "copy" / ".cache")
    (world.bob.folder / "copy/figures/more.txt").write_text("a figure's words")
    before = look(world.hub)["dataset org/plan"]
    refused = world.bob("push", "copy", PLAN)
    assert refused.code == 2
    assert "may not write" in refused.error
    assert "/discussions/1" in world.bob("push", "copy", PLAN, "--create-pr").check().out
    after = look(world.hub)["dataset org/plan"]
    assert (after.commits, after.files) == (before.commits, before.files)
    assert [(title, author) for title, author, _, _ in after.requests] == [("Upload partition plan", "bob")]


def test_what_a_group_push_refuses(world: World) -> None:
    bob = world.bob
    for name, change in (("early", {"status": "training"}), ("odd", {})):
        shutil.rmtree(bob.folder / name, ignore_errors=True)
        shutil.copytree(bob.folder / "group-1", bob.folder / name)
        manifest = read_manifest(bob.folder / name) | change
        (bob.folder / name / "merit.json").write_text(json.dumps(manifest))
    with open(bob.folder / "odd/config.json", "a") as file:
        file.write("\n")
    assert "its training is not finished" in bob("push", "early", "bob/early").error
    assert "config.json is not the file that its merit.json names" in bob("push", "odd", "bob/odd").error
    for arguments in (("--with-data",), ("--group-repo", "0=bob/x"), ("--plan", PLAN)):
        done = bob("push", "group-1", "bob/odd", *arguments)
        assert done.code == 2
        assert f"{arguments[0]} means nothing" in done.error
    assert not {"model bob/early", "model bob/odd"} & look(world.hub).keys()


def test_a_training_goes_on_on_another_machine(world: World) -> None:
    """Killed while it pushes to the Hub; in an empty folder it goes on to the very bytes of one that was not."""
    bob, push = world.bob, ("sft.push_to_hub=true", "sft.hub_model_id=bob/resumed", "sft.hub_strategy=checkpoint",
                            "sft.save_steps=2", "sft.save_total_limit=9", "sft.logging_steps=1")  # fmt: skip
    command = ("train", PLAN, "--group", 1, *push)
    # Slow commits, so that the last one is still under way however fast the training was.
    world.hub.fail("slow", "bob/resumed/commit", "POST", times=99, seconds=8.0)
    running = bob.start(*command, "--output", "first-machine")
    while not (manifest := _pushed_steps(world)):
        assert not (running.folder / "code").exists(), running.out + running.err
    running.kill()
    assert running.code == -9
    world.hub.heal()
    assert not (bob.folder / "first-machine").exists()
    assert manifest["status"] == "training"
    files = look(world.hub)["model bob/resumed"].files
    assert "last-checkpoint/optimizer.pt" in files, files.keys()
    # Somebody else's trainer state is code, and is not run.
    refused = world.alice("train", PLAN, "--group", 1, *push, "--output", "second-machine")
    assert refused.code == 2
    assert "not yours" in refused.error
    assert not list(world.alice.folder.glob("second-machine.part/checkpoint-*"))
    refused = bob("train", PLAN, "--group", 0, *push, "--output", "second-machine")
    assert refused.code == 2
    assert "holds another group's training" in refused.error
    shutil.rmtree(bob.folder / "second-machine.part")
    bob.forget()
    done = bob(*command, "--output", "second-machine").check()
    assert "going on from checkpoint-" in done.err + done.out
    whole, resumed = bob.folder / "group-1", bob.folder / "second-machine"
    assert hash_files(resumed) == hash_files(whole)
    for field in ("num_input_tokens", "num_loss_tokens", "num_steps"):
        assert read_manifest(resumed)[field] == read_manifest(whole)[field]
    state = look(world.hub)["model bob/resumed"]
    assert not [path for path in state.files if "/" in path or path.endswith((".bin", ".pt", ".pth"))], state.files
    assert read(world.hub, "model", "bob/resumed", "merit.json") == read_manifest(resumed)
    refused = bob(*command, "--output", "third-machine")
    assert refused.code == 2
    assert "finished checkpoint" in refused.error
    bob("verify", PLAN, "bob/resumed").check()


def _pushed_steps(world: World) -> dict | None:
    """merit.json of the intermediate push, once one of a checkpoint is there."""
    repo = world.hub.hub.repos.get(("model", "bob/resumed"))
    if repo is None or "last-checkpoint/trainer_state.json" not in look(world.hub)["model bob/resumed"].files:
        return None
    return read(world.hub, "model", "bob/resumed", "merit.json")


def test_a_merged_model(accepted: World) -> None:
    hub, alice = accepted.hub, accepted.alice
    said = alice("push", "run/merged", "org/merged").check().out
    assert f"/commit/{head(accepted.hub, 'model', 'org/merged')}" in said
    info = hub.api("bob").model_info("org/merged")
    assert {f"base_model:merge:{repo}" for repo in ("alice/group-0", "bob/group-1")} <= set(info.tags)
    assert {"merge", "mergekit", "merit", "dataset:org/copy", "dataset:org/count"} <= set(info.tags)
    # An Apache base and MIT data.
    assert info.card_data.license == "apache-2.0"
    evaluation = json.loads((alice.folder / "run/evaluation.json").read_text())
    values = sorted(round(row["loss"]["merged"], 6) for row in evaluation["datasets"].values())
    (index,) = info.model_index
    assert {result["dataset"]["type"] for result in index["results"]} == {"org/copy", "org/count"}
    told = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    assert sorted(told) == pytest.approx(values, abs=1e-4)
    assert sorted(entry.value for entry in info.eval_results) == values
    # The recipe names repos at commits and nothing of this machine, and mergekit reads it.
    files = look(hub)["model org/merged"].files
    assert {
        "mergekit_config.yml",
        "merit.json",
        "README.md",
        ".eval_results/merit.yaml",
        "tokenizer.json",
    } <= files.keys()
    repo = hub.hub.repos["model", "org/merged"]
    recipe = (repo.read(repo.resolve("main"), "mergekit_config.yml") or b"").decode()
    models = [model["model"] for model in yaml.safe_load(recipe)["models"]]
    assert models == [f"{r}@{head(accepted.hub, 'model', r)}" for r in ("alice/group-0", "bob/group-1")]
    code = (
        "import sys, yaml; from mergekit.config import MergeConfiguration as C; c = C.model_validate(yaml.safe_load("
        "sys.argv[1])); print(sorted({(str(m.model.path), m.model.revision) for m in c.referenced_models()}))"
    )
    read_by_mergekit = alice("-c", code, recipe).check().out
    assert all(part in read_by_mergekit for model in models for part in model.split("@"))
    assert str(accepted.folder).encode() not in everything(accepted.hub)
    # Noted in the plan, and one collection for all of it, however often it is pushed.
    merged = read(hub, "dataset", PLAN, "merged.json")
    assert (merged["repo_id"], merged["revision"]) == ("org/merged", head(accepted.hub, "model", "org/merged"))
    before = {name: head(accepted.hub, *name.split(" ")) for name in look(hub)}
    alice("push", "run/merged", "org/merged").check()
    assert {name: head(accepted.hub, *name.split(" ")) for name in look(hub)} == before
    (collection,) = hub.hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [PLAN, "org/merged", "alice/group-0", "bob/group-1"]
    # The published model loads where nothing is cached, and is the merged one.
    accepted.bob.forget()
    code = (
        "from transformers import pipeline; generate = pipeline('text-generation', 'org/merged'); "
        "print(len(generate('red')[0]['generated_text']) > 0)"
    )
    assert "True" in accepted.bob("-c", code).check().out


def test_a_branch_to_a_merged_model_halfway_from_the_base(accepted: World) -> None:
    """Every model of the recipe is a repo at a commit: the earlier merged model, the new group, and the base."""
    hub, alice, bob = accepted.hub, accepted.alice, accepted.bob
    for folder in (alice.folder / "first", bob.folder / "half", bob.folder / "loose-half"):
        shutil.rmtree(folder, ignore_errors=True)
    alice("merge", PLAN, "alice/group-0", "--allow-missing", "--output", "first").check()
    alice("push", "first", "org/first").check()
    # Whatever else lies in the repo is not downloaded.
    hub.api("alice").upload_file(path_or_fileobj=b"x" * 5000, path_in_repo="payload.bin", repo_id="org/first")
    bob.forget()
    hub.exchanges.clear()
    half = ("--interpolate-to-init", "0.5")
    bob("merge", PLAN, "bob/group-1", "--with-merged", "org/first", *half, "--output", "half").check()
    assert not [exchange.path for exchange in hub.exchanges if "payload" in exchange.path]
    assert f"`org/first@{head(hub, 'model', 'org/first')[:12]}`" in (bob.folder / "half/README.md").read_text()
    bob("push", "half", "bob/half").check()
    repo = hub.hub.repos["model", "bob/half"]
    recipe = yaml.safe_load(repo.read(repo.resolve("main"), "mergekit_config.yml") or b"")
    base, group = (f"{name}@{head(hub, 'model', name)}" for name in ("org/base", "bob/group-1"))
    first = read_manifest(bob.folder / "half")["with_merged"]
    assert first["repo_id"] == "org/first"
    path, _, revision = base.partition("@")
    models = [model["model"] for model in recipe["models"]]
    assert models == [f"org/first@{first['revision']}", group, {"model": {"path": path, "revision": revision}}]
    assert sum(model["parameters"]["weight"] for model in recipe["models"]) == pytest.approx(1)
    info = hub.api("bob").model_info("bob/half")
    assert {"base_model:merge:org/first", "base_model:merge:bob/group-1"} <= set(info.tags)
    assert [entry["group"] for entry in read(hub, "model", "bob/half", "merit.json")["groups"]] == [0, 1]
    # From a folder, nobody could make it again.
    shutil.copytree(alice.folder / "first", bob.folder / "first", dirs_exist_ok=True)
    bob("merge", PLAN, "bob/group-1", "--with-merged", "first", "--output", "loose-half").check()
    refused = bob("push", "loose-half", "bob/loose-half")
    assert refused.code == 2
    assert "merge with --with-merged OWNER/NAME" in refused.error


def test_what_a_merged_push_refuses(accepted: World) -> None:
    alice, hub = accepted.alice, accepted.hub
    before = look(hub)

    # Merged from folders: nobody could make it again.
    shutil.rmtree(alice.folder / "loose", ignore_errors=True)
    other = accepted.bob.folder / "group-1"
    alice("merge", "plan", "group-0", other, "--output", "loose").check()
    refused = alice("push", "loose", "org/loose", "--plan", "plan")
    assert refused.code == 2
    assert "--group-repo 0=OWNER/NAME" in refused.error
    refused = alice(
        "push",
        "loose",
        "org/loose",
        "--plan",
        "plan",
        "--group-repo",
        "0=bob/group-1",
        "--group-repo",
        "1=bob/group-1",
    )
    assert "does not hold the checkpoint of group 0 that was merged" in refused.error
    assert look(hub) == before
    repos = ("--group-repo", "0=alice/group-0", "--group-repo", "1=bob/group-1")
    refused = alice("push", "run/merged", "org/loose", "--plan", "local")
    assert refused.code == 2
    assert "merged under plan" in refused.error
    refused = alice("push", "run/merged", "org/loose", "--group-repo", "7=alice/group-0")
    assert "group 7 is not in this merge" in refused.error

    # The Hub's own word on the card comes before anything is uploaded or made.
    hub.exchanges.clear()
    hub.fail("status", "/api/validate-yaml", "POST", status=400)
    alice("push", "run/merged", "org/loose").error  # noqa: B018
    assert [e.path for e in hub.exchanges if e.path == "/api/validate-yaml"]
    written = [(e.method, e.path) for e in hub.exchanges if e.method in ("POST", "PUT") and "validate" not in e.path]
    assert written == [], written
    hub.heal()

    # A file that is not the merged one any more.
    assert look(hub) == before
    with open(alice.folder / "run/merged/config.json", "a") as file:
        file.write("\n")
    try:
        assert "is not the file that its merit.json names" in alice("push", "run/merged", "org/loose").error
    finally:
        path = alice.folder / "run/merged/config.json"
        path.write_text(path.read_text()[:-1])
    assert "model org/loose" not in look(hub)
    # Success is said only once the commit has been answered.
    hub.fail("lose_response", "/commit/", "POST")
    lost = alice("push", "loose", "org/loose", "--plan", "plan", *repos)
    assert lost.code == 1
    assert "Pushed" not in lost.out
    assert "Run the command again" in lost.error
    assert "Pushed the merged model" in alice("push", "loose", "org/loose", "--plan", "plan", *repos).check().out


def test_licences(accepted: World) -> None:
    alice = accepted.alice
    # What counts is the licence at the commits that were planned.
    edit_card(alice, "org/copy", "license: other")
    assert accepted.hub.api("bob").repo_info("org/copy", repo_type="dataset").card_data["license"] == "other"
    alice("push", "run/merged", "org/free").check()
    assert accepted.hub.api("bob").model_info("org/free").card_data.license == "apache-2.0"
    # Data without a stated licence: the user decides.
    alice("push", "local", FULL, "--with-data").check()
    for group in (0, 1):
        alice("train", FULL, "--group", group, "--output", f"own-{group}").check()
        alice("push", f"own-{group}", f"alice/own-{group}").check()
    shutil.rmtree(alice.folder / "other", ignore_errors=True)
    alice("merge", FULL, "alice/own-0", "alice/own-1", "--output", "other/merged").check()
    before = look(accepted.hub)
    refused = alice("push", "other/merged", "org/other")
    assert refused.code == 2
    assert "--license" in refused.error
    assert look(accepted.hub) == before
    alice("push", "other/merged", "org/other", "--license", "cc-by-4.0").check()
    assert accepted.hub.api("bob").model_info("org/other").card_data.license == "cc-by-4.0"
