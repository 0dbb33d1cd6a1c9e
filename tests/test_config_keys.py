"""Every key of CONFIG does something: where it changes, so does what comes out.

The keys are read off CONFIG's own classes, so that a new one without a case here fails. What a case compares never
holds the CONFIG itself, which every plan repeats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from test_group_merge import finish_group
from test_group_merge import make_plan as make_groups_plan
from tiny import as_chat, make_base, make_mixture, task_rows, write_jsonl
from trl import SFTTrainer
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import (
    BaseSection,
    DatasetSection,
    HubSection,
    MergeSection,
    MeritConfig,
    PlanSection,
    RunSection,
)
from merit_hf.data import load_rows
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_model, load_tokenizer
from merit_hf.training import train_group

SECTIONS = {
    "base": BaseSection,
    "datasets": DatasetSection,
    "plan": PlanSection,
    "merge": MergeSection,
    "run": RunSection,
    "hub": HubSection,
}
KEYS = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
QUIET = Progress(quiet=True)
TASKS = ("copy", "reverse", "count", "first", "upper")


def view(plan: PartitionPlan) -> dict[str, Any]:
    """What a plan decides and reports, without the CONFIG that it repeats, and without times."""
    sketches = plan.load_sketches()
    return {
        "base": plan.base, "datasets": [asdict(d) for d in plan.datasets], "groups": [asdict(g) for g in plan.groups],
        "sft": plan.sft, "sketches": None if sketches is None else sketches.tolist(), "explained": plan.explained,
        "matrix": None if plan.conflict_matrix is None else plan.conflict_matrix.tolist(), "bounds": plan.bounds,
        "num_batches": plan.cost["num_batches"], "checkpointing": plan.cost["gradient_checkpointing"],
        "sha256": plan.sha256,
    }  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five datasets of unequal size, so that balancing in tokens and in datasets are different things."""
    path = make_mixture(tmp_path_factory.mktemp("keys"), TASKS, count=8)
    content = yaml.safe_load(path.read_text())
    for entry, count in zip(content["datasets"], (60, 8, 8, 8, 12), strict=True):
        entry.pop("eval_path")
        entry["eval_fraction"] = 0.0
        write_jsonl(path.parent / entry["path"], [as_chat(row) for row in task_rows(entry["name"], count)])
    content["plan"] = {"num_groups": 2, "num_samples": 4, "sketch_dim": 512}
    path.write_text(yaml.safe_dump(content))
    for name, first in (("first", {"copy", "upper"}), ("second", {"count", "reverse"})):
        lines = [f"{a}," + ",".join("1" if (a in first) == (b in first) else "-1" for b in TASKS) for a in TASKS]
        (path.parent / f"{name}.csv").write_text("\n".join(["dataset," + ",".join(TASKS), *lines]) + "\n")
    save_optimizer_state(path)
    return path


def save_optimizer_state(config: Path) -> None:
    """Beside CONFIG, what the Trainer's own optimizer holds after a step along a random gradient."""
    read = MeritConfig.from_yaml(config)
    args, base = build_args(read.sft), config.parent / "base"
    rows = load_rows(read.datasets[0], config.parent).train
    trainer = SFTTrainer(load_model(base, args), args=args, train_dataset=rows, processing_class=load_tokenizer(base))
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = trainer.create_optimizer()
    optimizer.step()
    torch.save(optimizer.state_dict(), config.parent / "optimizer.pt")


@pytest.fixture(scope="module")
def planned(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The view of the plan under some overrides, each made once."""
    folder, made = tmp_path_factory.mktemp("plans"), {}

    def plan(*overrides: str) -> dict[str, Any]:
        if overrides not in made:
            config = MeritConfig.from_yaml(mixture, overrides)
            made[overrides] = view(MeritPlanner(config, QUIET).plan(folder / str(len(made))))
        return made[overrides]

    return plan


# key: (what both plans have, what the second one has besides, the part of the plan that must change)
PLAN_CASES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "plan.split": ((), "plan.split=random", "matrix"),
    "plan.num_groups": ((), "plan.num_groups=3", "groups"),
    "plan.num_samples": ((), "plan.num_samples=3", "sketches"),
    "plan.min_reliability": (
        ("plan.num_samples=auto", "plan.min_reliability=0.01"),
        "plan.min_reliability=0.99",
        "sketches",
    ),
    "plan.max_num_samples": (("plan.num_samples=auto",), "plan.max_num_samples=6", "sketches"),
    "plan.debias": ((), "plan.debias=split_half", "matrix"),
    "plan.sketch": ((), "plan.sketch=exact", "sketches"),
    "plan.sketch_dim": ((), "plan.sketch_dim=256", "sketches"),
    "plan.sketch_by_layer": ((), "plan.sketch_by_layer=true", "sketches"),
    "plan.stride": (("plan.sketch=stride",), "plan.stride=7", "sketches"),
    "plan.reduction": ((), "plan.reduction=example_mean", "sketches"),
    "plan.center": ((), "plan.center=none", "explained"),
    "plan.balance": ((), "plan.balance=datasets", "groups"),
    "plan.axes": (("plan.num_groups=4",), "plan.axes=local", "groups"),
    "plan.tokens_per_batch": ((), "plan.tokens_per_batch=40", "num_batches"),
    "plan.low_memory": ((), "plan.low_memory=true", "datasets"),
    "plan.gradient_checkpointing": ((), "plan.gradient_checkpointing=true", "checkpointing"),
    "plan.seed": ((), "plan.seed=1", "sketches"),
    "plan.split_seed": (("plan.split=random",), "plan.split_seed=5", "groups"),
    "plan.group_shares": ((), "plan.group_shares=[5,1]", "groups"),
    "plan.max_imbalance": (("plan.split=kmeans", "plan.balance=examples"), "plan.max_imbalance=1.3", "groups"),
    "plan.split_oversized": ((), "plan.split_oversized=true", "datasets"),
    "plan.affinity": (("plan.split=affinity", "plan.affinity=first.csv"), "plan.affinity=second.csv", "groups"),
    "plan.embedding_model": (("plan.split=kmeans_text",), "plan.embedding_model=base", "groups"),
    "plan.precondition": ((), "plan.precondition=adam", "sketches"),
    "plan.precondition_batches": (("plan.precondition=adam",), "plan.precondition_batches=2", "sketches"),
    "plan.optimizer_state": (("plan.precondition=adam",), "plan.optimizer_state=optimizer.pt", "sketches"),
    "datasets.name": ((), "datasets.copy.name=zebra", "sha256"),
    "datasets.path": ((), "datasets.copy.path=data/reverse.jsonl", "sha256"),
    "datasets.tag": (("plan.split=by_tag", "plan.num_groups=null"), "datasets.copy.tag=z", "groups"),
    "datasets.eval_fraction": ((), "datasets.copy.eval_fraction=0.5", "sha256"),
    "base.freeze": ((), "base.freeze=[model.layers.0]", "sketches"),
    "base.model_name_or_path": ((), "base.model_name_or_path=OTHER", "sha256"),
}


@pytest.mark.parametrize("key", PLAN_CASES)
def test_a_key_changes_the_plan(
    key: str, planned: Callable[..., dict[str, Any]], mixture: Path, tmp_path: Path
) -> None:
    common, override, part = PLAN_CASES[key]
    if override.endswith("OTHER"):
        override = override.replace("OTHER", str(make_base(tmp_path / "base", seed=4)))
    before, after = planned(*common), planned(*common, override)
    assert before[part] != after[part]
    if part in ("num_batches", "checkpointing") or key == "plan.low_memory":
        assert before["sha256"] == after["sha256"]


PAIRS = task_rows("copy", 8)
COLUMNS = [
    {"prompt": r["prompt"], "completion": r["completion"], "ask": r["prompt"] + "?", "answer": r["completion"] + "!",
     "chat": [{"role": "user", "content": r["prompt"]}], "messages": [{"role": "user", "content": "x"}],
     "text": r["prompt"], "body": r["completion"], "picture": ["square.png"]}
    for r in PAIRS
]  # fmt: skip
# key: (values of both, value of the second)
ROW_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "datasets.prompt": ({"prompt": "prompt", "completion": "completion"}, "ask"),
    "datasets.completion": ({"prompt": "prompt", "completion": "completion"}, "answer"),
    "datasets.messages": ({"messages": "messages"}, "chat"),
    "datasets.text": ({"text": "text"}, "body"),
    "datasets.images": ({"prompt": "prompt", "completion": "completion"}, "picture"),
    "datasets.chat": ({"prompt": "prompt", "completion": "completion"}, True),
    "datasets.eval_path": ({}, "other.jsonl"),
    "datasets.part": ({"name": "set#1"}, "1/2"),
}


@pytest.mark.parametrize("key", ROW_CASES)
def test_a_key_changes_the_rows(key: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "square.png")
    write_jsonl(tmp_path / "rows.jsonl", COLUMNS)
    write_jsonl(tmp_path / "other.jsonl", COLUMNS[:3])
    common, value = ROW_CASES[key]

    def rows(**values: Any) -> tuple[Any, ...]:
        loaded = load_rows(DatasetSection(**{"name": "set", "path": "rows.jsonl", **common, **values}), tmp_path)
        return list(loaded.train), list(loaded.eval or []), loaded.fingerprint

    before, after = rows(), rows(**{key.partition(".")[2]: value})
    assert before != after
    assert (before[2] != after[2]) == (key != "datasets.eval_path"), "held-out rows are not what is trained on"


MERGE_CASES = {
    "merge.engine": ("mergekit", "engine"),
    "merge.weights": ("uniform", "weights"),
    "merge.out_dtype": ("float32", "dtypes"),
    "merge.method": ("task_arithmetic", "method"),
    "merge.parameters": ({"lambda": 0.5}, "weights"),
    "merge.interpolate_to_init": (0.5, "weights"),
}
# What else CONFIG says where the key means something.
MERGE_BESIDES = {
    "merge.method": {"engine": "mergekit"},
    "merge.parameters": {"engine": "mergekit", "method": "task_arithmetic"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, list[Path]]:
    root = tmp_path_factory.mktemp("merge-keys")
    plan = make_groups_plan(make_base(root / "base", seed=9))
    content = {"base": {"model_name_or_path": "base"}, "datasets": [{"name": n, "path": "x"} for n in plan.names]}
    plan.config = MeritConfig.from_dict({**content, "plan": {"num_groups": 3}}).model_dump(mode="json")
    return plan, [finish_group(plan, make_base(root / f"group-{k}", seed=k), k) for k in range(3)]


def merged(plan: PartitionPlan, checkpoints: list[Path], folder: Path, **merge: Any) -> dict[str, Any]:
    """What `merit merge` makes of a plan whose CONFIG says so."""
    config = {**plan.config, "merge": {**plan.config["merge"], **merge}}
    replace(plan, config=config).save_pretrained(folder / "plan")
    done = CliRunner().invoke(
        app, ["merge", str(folder / "plan"), *map(str, checkpoints), "--output", str(folder / "merged")]
    )
    assert done.exit_code == 0, done.output
    tensors = load_file(folder / "merged" / "model.safetensors")
    manifest = json.loads((folder / "merged" / "merit.json").read_text())
    return {
        "engine": manifest["engine"],
        "method": manifest["method"],
        "weights": [tensor.double().sum().item() for _, tensor in sorted(tensors.items())],
        "dtypes": {str(tensor.dtype) for tensor in tensors.values()},
    }


@pytest.fixture(scope="module")
def merged_by_default(
    trained: tuple[PartitionPlan, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return merged(*trained, tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize("key", MERGE_CASES)
def test_a_key_changes_the_merge(
    key: str, trained: tuple[PartitionPlan, list[Path]], merged_by_default: dict[str, Any], tmp_path: Path
) -> None:
    value, part = MERGE_CASES[key]
    besides = MERGE_BESIDES.get(key, {})
    if "mergekit" in (value, besides.get("engine")):
        pytest.importorskip("mergekit")
    before = merged(*trained, tmp_path / "before", **besides) if besides.get("method") else merged_by_default
    after = merged(*trained, tmp_path / "after", **besides, **{key.partition(".")[2]: value})
    assert after[part] != before[part]


# In test_peft.py, test_the_whole_road and test_merged_groups: they mean nothing without LoRA groups.
ADAPTER_KEYS = ("merge.adapters", "merge.svd_rank")
# In test_rounds.py.
RUN_KEYS = ("run.rounds", "run.replan")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


EVALUATE_KEYS = ("datasets.metric",)


def test_a_metric_changes_how_answers_are_scored_and_nothing_else(mixture: Path, tmp_path: Path) -> None:
    found = []
    for metric in ("exact_match", "chrf"):
        overrides = ["plan.split=random", f"datasets.copy.metric={metric}", "datasets.copy.eval_fraction=0.1"]
        plan = MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(tmp_path / "plan")
        models = {"base": plan.base_folder()}
        evaluation = evaluate_models(plan, models, progress=QUIET, max_new_tokens=4)
        found.append((plan.sha256, evaluation["mean"], evaluation["datasets"]["copy"]["metric"]))
    assert found[0][:2] == found[1][:2]
    assert [metric for _, _, metric in found] == ["exact_match", "chrf"]


HUB_KEYS = ("base.revision", "datasets.config", "datasets.split", "datasets.revision", "datasets.eval_split")
READ_FROM_HUB = """
import json, sys
from pathlib import Path
from merit_hf.config import BaseSection, DatasetSection
from merit_hf.data import load_rows
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.hub import resolve_model
out = []
for values in json.loads(sys.argv[1]):
    loaded = load_rows(DatasetSection(name="set", path="org/rows", **{"eval_fraction": 0.0, **values}), Path())
    out.append([loaded.train["text"][:], loaded.eval["text"][:] if loaded.eval else None, loaded.revision])
for revision in json.loads(sys.argv[2]):
    folder, repo_id, sha = resolve_model("org/base", revision, Path(), "base")
    out.append([(folder / "config.json").read_text(), repo_id, sha])
sys.stdout.write("\\n" + json.dumps(out))
"""


def test_keys_of_things_on_the_hub(hub: HubServer) -> None:
    """base.revision, and a dataset's config, split, revision and eval_split."""
    api = hub.api("alice")
    api.create_repo("org/rows", repo_type="dataset")
    api.create_repo("org/base")
    entries = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}-{s}.jsonl"} for s in ("train", "test")]}
        for c in ("main", "other")
    ]
    entries[0]["default"] = True
    files = {
        f"{c}-{s}.jsonl": json.dumps({"text": f"{c} {s}"}) + "\n" for c in ("main", "other") for s in ("train", "test")
    }
    files["README.md"] = "---\n" + yaml.safe_dump({"configs": entries}) + "---\n"
    for name, text in files.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="org/rows", repo_type="dataset")
    old = api.repo_info("org/rows", repo_type="dataset").sha
    api.upload_file(
        path_or_fileobj=b'{"text": "newer"}\n',
        path_in_repo="main-train.jsonl",
        repo_id="org/rows",
        repo_type="dataset",
    )
    shas = [
        api.upload_file(path_or_fileobj=text, path_in_repo="config.json", repo_id="org/base").oid
        for text in (b'{"v": 1}', b'{"v": 2}')
    ]
    cases = [{}, {"config": "other"}, {"split": "test"}, {"revision": old}, {"eval_split": "test"}]
    done = hub.run(READ_FROM_HUB, json.dumps(cases), json.dumps([None, shas[0]]))
    assert done.returncode == 0, done.stderr
    *rows, newest, pinned = json.loads(done.stdout.splitlines()[-1])
    new = api.repo_info("org/rows", repo_type="dataset").sha
    assert rows == [
        [["newer"], None, new], [["other train"], None, new], [["main test"], None, new],
        [["main train"], None, old], [["newer"], ["main test"], new],
    ]  # fmt: skip
    assert newest == ['{"v": 2}', "org/base", shas[1]]
    assert pinned == ['{"v": 1}', "org/base", shas[0]]


PUSH_KEYS = ("hub.push", "hub.namespace", "hub.private", "hub.license")
RUN_AND_PUSH = """
import json, sys
from pathlib import Path
from merit_hf import MeritConfig
from merit_hf.pipeline import run_all
from merit_hf.progress import Progress
for overrides in json.loads(sys.argv[2]):
    run_all(MeritConfig.from_yaml(sys.argv[1], overrides), Path("keys"), progress=Progress(quiet=True))
"""


@pytest.mark.slow
def test_keys_of_pushing(hub: HubServer, mixture: Path, tmp_path: Path) -> None:
    """Nothing leaves the machine unless asked; then it goes to the namespace or the token's owner, in private."""
    small = tmp_path / "small.yaml"
    content = yaml.safe_load(mixture.read_text())
    content["base"]["model_name_or_path"] = str(mixture.parent / "base")
    content["datasets"] = [{**d, "path": str(mixture.parent / d["path"])} for d in content["datasets"][1:3]]
    small.write_text(yaml.safe_dump(content))

    def repos() -> dict[str, bool]:
        api = hub.api("alice")
        found = [*api.list_models(author="org"), *api.list_models(author="alice")]
        found += [*api.list_datasets(author="org"), *api.list_datasets(author="alice")]
        return {repo.id: repo.private for repo in found if "/keys-" in repo.id}

    names = ("keys-plan", "keys-group-0", "keys-group-1", "keys-merged")
    expected: dict[str, bool] = {}
    for overrides, new in (
        ([], {}),
        (["hub.push=true"], None),
        (["hub.push=true", "hub.license=mit"], {f"alice/{name}": True for name in names}),
        (
            ["hub.push=true", "hub.license=mit", "hub.namespace=org", "hub.private=false"],
            {f"org/{name}": False for name in names},
        ),
    ):
        done = hub.run(RUN_AND_PUSH, str(small), json.dumps([overrides]))
        if new is None:
            # Base and data state no licence, so what the merged model's is has to be said.
            assert "hub.license" in done.stderr
            assert repos() == expected
            continue
        assert done.returncode == 0, done.stderr
        expected |= new
        assert repos() == expected


def test_an_identity_field_of_sft_changes_the_plan(planned: Callable[..., dict[str, Any]]) -> None:
    random = "plan.split=random"
    before, after = planned(random), planned(random, "sft.learning_rate=0.5")
    assert before["sha256"] != after["sha256"]
    assert after["sft"]["learning_rate"] == 0.5


def test_a_placement_field_of_sft_changes_how_it_is_trained_but_not_the_plan(mixture: Path, tmp_path: Path) -> None:
    logs, shas = [], []
    for steps in (1, 2):
        config = MeritConfig.from_yaml(
            mixture, ["plan.split=random", "plan.num_groups=5", f"sft.logging_steps={steps}"]
        )
        plan = MeritPlanner(config, QUIET).plan(tmp_path / f"plan-{steps}")
        folder = train_group(plan, 0, tmp_path / f"group-{steps}", progress=QUIET)
        state = json.loads((folder / "trainer_state.json").read_text())
        logs.append(sum("loss" in entry for entry in state["log_history"]))
        shas.append(plan.sha256)
    assert shas[0] == shas[1]
    assert logs[0] > logs[1] > 0


def test_every_key_has_a_case() -> None:
    cases = [*PLAN_CASES, *ROW_CASES, *MERGE_CASES, *ADAPTER_KEYS, *RUN_KEYS, *EVALUATE_KEYS, *HUB_KEYS, *PUSH_KEYS]
    assert len(cases) == len(set(cases))
    assert set(cases) == KEYS
    assert set(MeritConfig.model_fields) == {*SECTIONS, "sft", "peft", "root"}
