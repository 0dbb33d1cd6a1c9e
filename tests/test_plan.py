"""The plan: what it is identified by, what it publishes, and that a second run gives the same one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import as_chat, make_base, make_mixture, task_rows, write_jsonl
from trl import SFTConfig

from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.conflict import conflict_matrix
from merit_hf.estimate import estimate_lines, estimate_plan
from merit_hf.plan import LOCAL_NAME, PLAN_NAME, PartitionPlan, group_identity
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import BATCH_FIELDS, IDENTITY_FIELDS, build_args, identity_fields

QUIET = Progress(quiet=True)
TASKS = ("copy", "reverse", "count", "first")


def make_plan(config: Path, output: Path, *overrides: str) -> PartitionPlan:
    return MeritPlanner(MeritConfig.from_yaml(config, overrides), QUIET).plan(output)


def edit(config: Path, change: Callable[[dict[str, Any]], None], name: str = "edited.yaml") -> Path:
    content = yaml.safe_load(config.read_text())
    change(content)
    path = config.with_name(name)
    path.write_text(yaml.safe_dump(content))
    return path


def plan_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def facts(plan: PartitionPlan) -> dict[str, Any]:
    """All of a plan but what a run costs and where it lies."""
    content = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    for name in ("cost", "folder", "local", "conflict_matrix"):
        content.pop(name)
    matrix = plan.conflict_matrix
    return {**content, "matrix": None if matrix is None else matrix.tolist(), "sha256": plan.sha256}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("plan-inputs"), TASKS, count=10)


@pytest.fixture(scope="module")
def plan(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> PartitionPlan:
    """The plan of the mixture. Read only."""
    return make_plan(mixture, tmp_path_factory.mktemp("plan-output") / "plan")


@pytest.fixture
def copy(plan: PartitionPlan, tmp_path: Path) -> Path:
    """A plan folder to damage."""
    return Path(shutil.copytree(str(plan.folder), tmp_path / "copy"))


def test_a_saved_plan_loads_as_it_was(plan: PartitionPlan, tmp_path: Path) -> None:
    again = PartitionPlan.from_pretrained(plan.folder)
    assert facts(again) == facts(plan)
    assert again.local == plan.local
    assert again.cost == plan.cost
    plan.save_pretrained(tmp_path / "saved")
    saved = PartitionPlan.from_pretrained(tmp_path / "saved")
    assert facts(saved) == facts(plan)
    for name in ("data/datasets.parquet", "data/groups.parquet", "data/conflict.parquet"):
        assert pq.read_table(tmp_path / "saved" / name).equals(pq.read_table(plan.folder / name))
    recorded = json.loads((plan.folder / PLAN_NAME).read_text())
    assert recorded["sha256"] == plan.sha256
    assert recorded["schema_version"] == 1


def test_what_the_plan_holds(plan: PartitionPlan) -> None:
    assert plan.names == sorted(TASKS)
    assert {name for group in plan.groups for name in group.datasets} == set(TASKS)
    assert [group.group for group in plan.groups] == [0, 1]
    for group in plan.groups:
        members = plan.members(group.group)
        assert [member.name for member in members] == group.datasets
        for count in ("num_examples", "num_input_tokens", "num_loss_tokens"):
            assert getattr(group, count) == sum(getattr(member, count) for member in members)
        assert group.train_input_tokens == group.num_input_tokens, "one epoch"
    assert sum(group.weight for group in plan.groups) == pytest.approx(1)
    assert all(d.num_sampled == 8 and d.num_examples == 10 and d.gradient_norm > 0 for d in plan.datasets)
    sketches = load_file(plan.folder / "sketches.safetensors")["sketches"]
    assert sketches.dtype == np.float32
    assert sketches.shape == (4, 4096)
    assert np.array_equal(conflict_matrix(sketches), plan.conflict_matrix)
    assert np.array_equal(plan.load_sketches(), sketches)


def test_the_tables_are_readable_by_load_dataset_with_the_promised_columns(plan: PartitionPlan) -> None:
    """As the viewer reads them, by the `configs:` of the card."""
    card = (plan.folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    files = {entry["config_name"]: entry["data_files"] for entry in metadata["configs"]}
    assert set(files) == {"datasets", "conflict", "groups"}
    tables = {
        name: datasets.load_dataset("parquet", data_files=str(plan.folder / "data" / f"{name}.parquet"), split="train")
        for name in files
    }
    for name in files:
        assert f"data/{name}.parquet" in str(files[name])
    columns = {
        "datasets": "dataset group num_examples num_input_tokens num_loss_tokens gradient_norm coordinates repo_id",
        "conflict": "dataset_a dataset_b cosine",
        "groups": "group datasets num_examples num_input_tokens num_loss_tokens weight",
    }
    for name, wanted in columns.items():
        assert set(wanted.split()) <= set(tables[name].column_names)
    assert tables["datasets"]["dataset"][:] == sorted(TASKS)
    pairs = {(row["dataset_a"], row["dataset_b"]): row["cosine"] for row in tables["conflict"]}
    assert len(pairs) == 4 * 3
    assert all(pairs[a, b] == pairs[b, a] for a, b in pairs)
    assert tables["groups"]["weight"][:] == [group.weight for group in plan.groups]


def test_only_local_json_knows_where_things_lie(plan: PartitionPlan, mixture: Path) -> None:
    assert plan_files(plan.folder) >= {
        "README.md",
        PLAN_NAME,
        LOCAL_NAME,
        "sketches.safetensors",
        "data/groups.parquet",
    }
    assert any(name.startswith("figures/") and name.endswith(".png") for name in plan_files(plan.folder))
    needles = [str(mixture.parent).encode(), str(plan.folder.parent).encode(), mixture.parent.name.encode(), b".jsonl"]
    for name in sorted(plan_files(plan.folder) - {LOCAL_NAME}):
        content = (plan.folder / name).read_bytes()
        assert not [needle for needle in needles if needle in content], name
        # Compressed columns hide text from a search of the bytes.
        if name.endswith(".parquet"):
            assert not [n for n in needles if n.decode() in str(pq.read_table(plan.folder / name).to_pylist())], name
    local = json.loads((plan.folder / LOCAL_NAME).read_text())
    assert local["datasets"]["copy"]["path"] == str(mixture.parent.resolve() / "data/copy.jsonl")
    assert local["base"] == str((mixture.parent / "base").resolve())


def test_a_plan_without_its_local_json_still_loads(copy: Path, plan: PartitionPlan) -> None:
    (copy / LOCAL_NAME).unlink()
    stranger = PartitionPlan.from_pretrained(copy)
    assert stranger.sha256 == plan.sha256
    with pytest.raises(ConfigError, match="not on this machine"):
        stranger.base_folder()


@pytest.mark.parametrize(
    "field",
    ["cost", "versions", "bounds", "explained", "skipped", "local", "conflict_matrix", "config", "folder", "repo_id"],
)
def test_identity_ignores(field: str, plan: PartitionPlan) -> None:
    other = {
        "conflict_matrix": None,
        "config": {**plan.config, "hub": {}},
        "folder": Path("elsewhere"),
        "repo_id": "a/b",
    }
    assert replace(plan, **{field: other.get(field, {"changed": 1})}).sha256 == plan.sha256


def rebuilt(plan: PartitionPlan, **values: Any) -> PartitionPlan:
    """The plan with other parts and the groups' hashes that follow from them."""
    changed = replace(plan, **values)
    groups = [
        replace(g, group_sha256=group_identity(changed.base, changed.members(g.group), changed.group_sft(g.group)))
        for g in changed.groups
    ]
    return replace(changed, groups=groups)


def test_identity_sees(plan: PartitionPlan) -> None:
    first, rest = plan.datasets[0], plan.datasets[1:]
    assert rebuilt(plan).sha256 == plan.sha256
    changes: list[PartitionPlan] = [
        rebuilt(plan, base={**plan.base, "weights_sha256": "0" * 64}),
        rebuilt(plan, base={**plan.base, "chat_template_sha256": "0" * 64}),
        rebuilt(plan, sft={**plan.sft, "learning_rate": 2e-3}),
        rebuilt(plan, sft={**plan.sft, "effective_batch_size": 8}),
        rebuilt(plan, datasets=[replace(first, fingerprint="0" * 64), *rest]),
        rebuilt(plan, datasets=[replace(first, tokens_digest="0" * 64), *rest]),
        rebuilt(plan, datasets=[replace(first, num_loss_tokens=1), *rest]),
        rebuilt(plan, datasets=[replace(first, name="other"), *rest]),
        rebuilt(plan, datasets=[replace(first, group=1 - first.group), *rest]),
        replace(plan, groups=plan.groups[:1]),
        replace(plan, groups=[replace(plan.groups[0], train_input_tokens=1), plan.groups[1]]),
    ]
    assert len({changed.sha256 for changed in changes} | {plan.sha256}) == len(changes) + 1
    same = rebuilt(plan, base={**plan.base, "repo_id": "org/base", "revision": "1" * 40, "dtypes": ["F32"]})
    assert same.sha256 == plan.sha256, "where the base lies is not what it is"
    named = rebuilt(plan, datasets=[replace(d, tag="x", repo_id="org/d", gradient_norm=1.0) for d in plan.datasets])
    assert named.sha256 == plan.sha256


def test_a_group_keeps_its_hash_when_another_changes(plan: PartitionPlan) -> None:
    target = plan.members(0)[0]
    changed = [replace(d, fingerprint="0" * 64) if d is target else d for d in plan.datasets]
    other = rebuilt(plan, datasets=changed)
    assert other.groups[0].group_sha256 != plan.groups[0].group_sha256
    assert other.groups[1].group_sha256 == plan.groups[1].group_sha256


def rewrite_table(path: Path, column: str, row: int, value: Any) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row][column] = value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("datasets", "group", 1), ("datasets", "fingerprint", "0" * 64), ("datasets", "num_input_tokens", 1),
        ("groups", "train_input_tokens", 10**9), ("groups", "group_sha256", "0" * 64),
        ("groups", "weight", 0.9), ("groups", "datasets", ["copy"]), ("groups", "num_input_tokens", 10**9),
        ("groups", "train_loss_tokens", 1), ("groups", "num_steps", 1),
    ],
)  # fmt: skip
def test_a_changed_table_is_refused(table: str, column: str, value: Any, copy: Path, plan: PartitionPlan) -> None:
    row = next(i for i, d in enumerate(plan.datasets) if d.group == 0) if table == "datasets" else 0
    rewrite_table(copy / "data" / f"{table}.parquet", column, row, value)
    with pytest.raises(MeritError) as caught:
        PartitionPlan.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def tampered(content: dict[str, Any], key: str) -> dict[str, Any]:
    if key == "sft.learning_rate":
        content["sft"]["learning_rate"] = 1.0
    elif key == "base.weights_sha256":
        content["base"]["weights_sha256"] = "0" * 64
    else:
        content[key] = "0" * 64 if key == "sha256" else 99
    return content


@pytest.mark.parametrize("key", ["sft.learning_rate", "base.weights_sha256", "sha256", "schema_version"])
def test_a_changed_plan_json_is_refused(key: str, copy: Path) -> None:
    path = copy / PLAN_NAME
    path.write_text(json.dumps(tampered(json.loads(path.read_text()), key)))
    with pytest.raises(MeritError) as caught:
        PartitionPlan.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_plan_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"no plan\.json"):
        PartitionPlan.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"/none` is no existing path, and no Hub id either \(OWNER/NAME\)\. Check"):
        PartitionPlan.from_pretrained(tmp_path / "none")
    for damage in ("{", "[]", "{}"):
        (copy / PLAN_NAME).write_text(damage)
        with pytest.raises(MeritError) as caught:
            PartitionPlan.from_pretrained(copy)
        assert "\n" not in str(caught.value)


def test_an_output_that_is_empty_is_free_and_another_is_told_before_anything_is_read(
    mixture: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert make_plan(mixture, tmp_path / "empty", "plan.split=random").folder == tmp_path / "empty"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").touch()
    with pytest.raises(ConfigError, match=r"taken exists and is no plan. Give another --output"):
        make_plan(mixture, tmp_path / "taken", "datasets.copy.path=data/none.jsonl")


def test_a_finished_plan_is_returned_and_other_inputs_are_refused(mixture: Path, plan: PartitionPlan) -> None:
    stamp = (plan.folder / PLAN_NAME).stat().st_mtime_ns
    again = make_plan(mixture, plan.folder)
    assert facts(again) == facts(plan)
    assert (plan.folder / PLAN_NAME).stat().st_mtime_ns == stamp
    for override, named in (
        ("plan.num_groups=3", "plan.num_groups: 2 there, 3 here"),
        ("plan.seed=5", "plan.seed: 0 there, 5 here"),
        ("sft.learning_rate=0.5", "sft.learning_rate: 0.001 there, 0.5 here"),
        ("datasets.copy.tag=z", "datasets.copy.tag: 'c' there, 'z' here"),
    ):
        with pytest.raises(ConfigError, match=named) as caught:
            make_plan(mixture, plan.folder, override)
        assert str(plan.folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not plan.folder.with_name("plan.part").exists()


def test_other_rows_under_the_same_name_are_refused(mixture: Path, plan: PartitionPlan, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "other.jsonl", [as_chat(row) for row in task_rows("copy", 10, seed=5)])
    with pytest.raises(ConfigError, match="rows"):
        make_plan(mixture, plan.folder, f"datasets.copy.path={rows}")


def test_the_same_data_elsewhere_in_other_order_and_batches_give_the_same_plan(
    mixture: Path, plan: PartitionPlan, tmp_path: Path
) -> None:
    """Listed backwards, in another folder and file format, with other micro-batches and placement."""
    shutil.copytree(mixture.parent / "base", tmp_path / "base")

    def move(content: dict[str, Any]) -> None:
        content["datasets"].reverse()
        for entry in content["datasets"]:
            rows = datasets.load_dataset("json", data_files=str(mixture.parent / entry["path"]), split="train")
            entry["path"] = f"{entry['name']}.parquet"
            rows.to_parquet(str(tmp_path / entry["path"]))
            entry.pop("eval_path")
            entry["eval_fraction"] = 0.0
        content["plan"]["tokens_per_batch"] = 60
        content["sft"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 7}

    moved = tmp_path / "moved.yaml"
    moved.write_text(edit(mixture, move).read_text())
    other = make_plan(moved, tmp_path / "plan")
    assert other.sha256 == plan.sha256
    assert [group.datasets for group in other.groups] == [group.datasets for group in plan.groups]
    assert np.allclose(other.conflict_matrix, plan.conflict_matrix, atol=1e-5)
    assert other.cost["num_batches"] > plan.cost["num_batches"]


def test_the_sample_of_a_dataset_does_not_depend_on_the_others(
    mixture: Path, plan: PartitionPlan, tmp_path: Path
) -> None:
    fewer = edit(mixture, lambda content: content.update(datasets=content["datasets"][1:3]))
    small = make_plan(fewer, tmp_path / "plan", "plan.num_samples=8")
    for dataset in small.datasets:
        same = plan.datasets[plan.names.index(dataset.name)]
        assert (dataset.gradient_norm, dataset.base_loss) == (same.gradient_norm, same.base_loss)
        index = plan.names.index(dataset.name)
        assert np.array_equal(small.load_sketches()[small.names.index(dataset.name)], plan.load_sketches()[index])


def test_one_dataset_and_one_group(mixture: Path, tmp_path: Path) -> None:
    alone = edit(mixture, lambda content: (content.update(datasets=content["datasets"][:1]), content.pop("plan")))
    single = make_plan(alone, tmp_path / "single", "plan.sketch_dim=64", "plan.num_samples=4")
    assert single.num_groups == 1
    assert single.groups[0].weight == 1.0
    assert single.conflict_matrix.tolist() == [[1.0]]
    assert PartitionPlan.from_pretrained(single.folder).sha256 == single.sha256
    one = make_plan(mixture, tmp_path / "one", "plan.num_groups=1", "plan.num_samples=2")
    assert one.num_groups == 1
    assert one.groups[0].datasets == sorted(TASKS)
    joint = make_plan(mixture, tmp_path / "joint", "plan.split=joint", "plan.num_groups=null")
    assert joint.groups == one.groups, "K=1 is joint training"
    assert joint.sha256 == one.sha256
    assert joint.conflict_matrix is None
    assert joint.load_sketches() is None


class Stopped(MeritPlanner):
    """Stops when all gradients are there and the plan is not."""

    def _measure(self, *args: Any) -> Any:
        super()._measure(*args)
        raise KeyboardInterrupt


class Watched(MeritPlanner):
    """Notes when the read-outs were written, before the plan takes their place."""

    part: Path
    written: dict[str, int]

    def _measure(self, *args: Any) -> Any:
        measured = super()._measure(*args)
        self.written = {path.name: path.stat().st_mtime_ns for path in self.part.glob("*.npy")}
        return measured


def test_a_second_run_continues_with_what_is_missing(mixture: Path, plan: PartitionPlan, tmp_path: Path) -> None:
    """As after a kill: read-outs of some datasets and no plan yet, one of them half-written."""
    output, part = tmp_path / "plan", tmp_path / "plan.part" / "gradients"
    config = MeritConfig.from_yaml(mixture)
    with pytest.raises(KeyboardInterrupt):
        Stopped(config, QUIET).plan(output)
    readouts = sorted(part.glob("*.npy"))
    assert len(readouts) == 4
    assert not output.exists()
    readouts[0].unlink()
    readouts[1].with_suffix(".json").unlink()
    readouts[2].with_suffix(".json").write_text('{"key": "')
    before = {path.name: path.stat().st_mtime_ns for path in readouts[1:]}
    planner = Watched(config, QUIET)
    planner.part = part
    again = planner.plan(output)
    assert facts(again) == facts(plan)
    assert np.array_equal(again.load_sketches(), plan.load_sketches())
    measured_again = [name for name, stamp in before.items() if planner.written[name] != stamp]
    assert measured_again == [readouts[1].name, readouts[2].name]
    assert not (tmp_path / "plan.part").exists()


def test_readouts_of_other_inputs_are_not_continued(mixture: Path, tmp_path: Path) -> None:
    """Stale read-outs in the work folder, made under another seed, change nothing."""
    clean = make_plan(mixture, tmp_path / "clean", "plan.num_samples=3")
    with pytest.raises(KeyboardInterrupt):
        Stopped(MeritConfig.from_yaml(mixture, ["plan.num_samples=3", "plan.seed=1"]), QUIET).plan(tmp_path / "plan")
    assert facts(make_plan(mixture, tmp_path / "plan", "plan.num_samples=3")) == facts(clean)


def test_what_cannot_be_trained_on_is_left_out_and_recorded(mixture: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "empty.jsonl", [])
    long = {"prompt": "copy: " + "red " * 200, "completion": "red"}
    write_jsonl(tmp_path / "long.jsonl", [as_chat(long)] * 3)

    def add(content: dict[str, Any]) -> None:
        content["datasets"] = content["datasets"][:2] + [
            {"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("empty", "long")
        ]

    config = edit(mixture, add)
    made = make_plan(config, tmp_path / "plan", "plan.num_samples=2")
    assert made.names == ["copy", "reverse"]
    assert set(made.skipped) == {"empty", "long"}
    assert "no rows" in made.skipped["empty"]
    assert "loss token" in made.skipped["long"]
    with pytest.raises(ConfigError, match=r"3 groups, but only 2 datasets.*`empty`"):
        make_plan(config, tmp_path / "other", "plan.num_groups=3")
    dry = estimate_plan(MeritConfig.from_yaml(config), QUIET)
    assert (dry.skipped, dry.num_datasets) == (made.skipped, 2)
    assert any(line.startswith("Left out: empty (it has no rows") for line in estimate_lines(dry, 1.0))
    with pytest.raises(ConfigError, match=r"3 groups, but only 2 datasets.*`empty`"):
        estimate_plan(MeritConfig.from_yaml(config, ["plan.num_groups=3"]), QUIET)


def test_a_missing_column_is_found_before_the_base_is_touched(tmp_path: Path) -> None:
    """The base here is a folder without any weights: reading it would be the error."""
    (tmp_path / "base").mkdir()
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    path = tmp_path / "mixture.yaml"
    entry = {"name": "math", "path": "rows.jsonl", "prompt": "questoin", "completion": "answer"}
    path.write_text(yaml.safe_dump({"base": {"model_name_or_path": "base"}, "datasets": [entry]}))
    with pytest.raises(ConfigError, match=r"datasets.math.prompt='questoin'.*Did you mean `question`"):
        make_plan(path, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    assert not (tmp_path / "plan.part").exists()
    with pytest.raises(MeritError, match="base"):
        make_plan(path, tmp_path / "plan", "datasets.math.prompt=question")


def test_by_tag_kmeans_and_random_are_groups_too(mixture: Path, plan: PartitionPlan, tmp_path: Path) -> None:
    tagged = make_plan(mixture, tmp_path / "tag", "plan.split=by_tag", "plan.num_groups=null")
    assert [group.datasets for group in tagged.groups] == [["copy", "count"], ["first"], ["reverse"]]
    kmeans = make_plan(mixture, tmp_path / "kmeans", "plan.split=kmeans")
    assert np.array_equal(kmeans.conflict_matrix, plan.conflict_matrix)
    assert kmeans.num_groups == 2
    random = [make_plan(mixture, tmp_path / f"r{seed}", "plan.split=random", f"plan.seed={seed}") for seed in range(3)]
    assert len({tuple(group.datasets[0] for group in made.groups) for made in random}) > 1
    for made in random:
        assert sorted(name for group in made.groups for name in group.datasets) == sorted(TASKS)
        assert made.conflict_matrix is None
        assert made.datasets[0].num_sampled == 0


def test_max_steps_is_the_budget_of_the_mixture(mixture: Path, tmp_path: Path) -> None:
    made = make_plan(mixture, tmp_path / "plan", "plan.split=random", "sft.max_steps=10")
    assert sum(group.num_steps for group in made.groups) == 10
    for group in made.groups:
        assert made.group_sft(group.group)["max_steps"] == group.num_steps
    assert made.sft["max_steps"] == 10


def test_secrets_do_not_reach_the_plan(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.hub_token") as caught:
        make_plan(mixture, tmp_path / "plan", "plan.split=random", "sft.hub_token=hf_verysecret")
    assert "verysecret" not in str(caught.value)


# Where and how the same training runs. A new SFTConfig field belongs in one of the lists of merit_hf/sft.py or here.
_PLACEMENT = """
output_dir bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size logging_strategy
logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
hub_revision ignore_data_skip restore_callback_states_from_checkpoint full_determinism use_cpu
accelerator_config parallelism_config dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank trust_remote_code
dataset_num_proc pad_to_multiple_of eval_packing activation_offloading pad_token
"""
PLACEMENT = set(_PLACEMENT.split())
# Not in the identity themselves, because what they decide is: the tokens' digest, the template's and weights' hashes.
BY_THEIR_EFFECT = {"chat_template_path", "dataset_text_field", "dataset_kwargs", "model_init_kwargs"}


def test_every_field_of_sftconfig_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    lists = [set(IDENTITY_FIELDS), set(BATCH_FIELDS), PLACEMENT, BY_THEIR_EFFECT]
    assert fields - set.union(*lists) == set(), "new fields of SFTConfig: does each decide the trained weights?"
    assert sum(len(part) for part in lists) == len(set.union(*lists)), "a field is in two lists"
    known_once = {"gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rank"}
    assert set.union(*lists) - fields <= known_once, "fields that SFTConfig no longer has"


def test_identity_fields_are_plain_json_and_placement_is_not_in_them(tmp_path: Path) -> None:
    def identity(**sft: Any) -> dict[str, Any]:
        return identity_fields(build_args(sft, tmp_path / "trainer"))

    default = identity()
    assert json.loads(json.dumps(default, allow_nan=False)) == default
    placement = {"logging_steps": 3, "save_steps": 9, "dataloader_num_workers": 0, "pad_to_multiple_of": 8}
    assert identity(**placement) == default
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert (
        identity(**batch)
        == identity(per_device_train_batch_size=8)
        == identity(gradient_accumulation_steps=8, per_device_train_batch_size=1)
    )
    assert identity(learning_rate=1) == identity(learning_rate=1.0)
    for changed in (
        {"learning_rate": 1e-3}, {"seed": 7}, {"num_train_epochs": 2}, {"max_length": 9}, {"packing": True},
        {"optim": "sgd"}, {"lr_scheduler_type": "cosine"}, {"warmup_steps": 3}, {"weight_decay": 0.1},
        {"completion_only_loss": True}, {"per_device_train_batch_size": 3}, {"max_steps": 4}, {"max_grad_norm": 0.5},
    ):  # fmt: skip
        assert identity(**changed) != default, changed
    # The order of the examples follows from the seed unless it is given.
    assert identity(seed=7)["data_seed"] == 7
    assert identity(seed=7, data_seed=8)["data_seed"] == 8


def test_another_base_or_template_is_another_plan(mixture: Path, tmp_path: Path) -> None:
    random = ("plan.split=random",)
    shas = [make_plan(mixture, tmp_path / "plan", *random).sha256]
    make_base(tmp_path / "base", seed=1)
    shas.append(make_plan(mixture, tmp_path / "p2", *random, f"base.model_name_or_path={tmp_path / 'base'}").sha256)
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>{% endfor %}")
    made = make_plan(mixture, tmp_path / "p3", *random, f"sft.chat_template_path={template}")
    shas.append(made.sha256)
    assert len(set(shas)) == 3
    assert made.base["chat_template"] == template.read_text()
    assert str(tmp_path) not in (made.folder / PLAN_NAME).read_text()
