"""`merit split`, and the choices of how to split, through real plans: each changes the groups as it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_plan import edit, plan_files
from tiny import as_chat, make_mixture, task_rows, write_jsonl
from trl import SFTTrainer
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.data import hold_out, load_rows
from merit_hf.estimate import Estimate, estimate_lines, estimate_plan
from merit_hf.mixture import plan_specs
from merit_hf.pipeline import joint_config
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.precondition import denominators, state_moments
from merit_hf.progress import Progress
from merit_hf.repartition import repartition
from merit_hf.sft import build_args, load_model, load_tokenizer, open_loss, tokenize_rows
from merit_hf.training import train_group

QUIET = Progress(quiet=True)
TASKS = ("copy", "reverse", "count", "first", "upper")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tasks; `upper` is as large as the others together."""
    path = make_mixture(tmp_path_factory.mktemp("split"), TASKS, count=8)
    write_jsonl(path.parent / "data/upper.jsonl", [as_chat(row) for row in task_rows("upper", 32)])
    return path


@pytest.fixture(scope="module")
def planned(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PartitionPlan]:
    """`planned("plan.seed=1", …)`: what `merit plan` makes of the mixture, once. Read only."""
    folder, made = tmp_path_factory.mktemp("planned"), {}

    def plan(*overrides: str) -> PartitionPlan:
        if overrides not in made:
            config = MeritConfig.from_yaml(mixture, overrides)
            made[overrides] = MeritPlanner(config, QUIET).plan(folder / str(len(made)))
        return made[overrides]

    return plan


def groups_of(plan: PartitionPlan) -> list[list[str]]:
    return [group.datasets for group in plan.groups]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(MeritError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


ALIKE = [
    ({}, ()),
    ({"num_groups": 3}, ("plan.num_groups=3",)),
    ({"split": "random", "seed": 3}, ("plan.split=random", "plan.split_seed=3")),
    ({"split": "kmeans"}, ("plan.split=kmeans",)),
    ({"split": "by_tag"}, ("plan.split=by_tag", "plan.num_groups=null")),
    ({"split": "joint"}, ("plan.split=joint", "plan.num_groups=null")),
    ({"split": "kmeans_text"}, ("plan.split=kmeans_text",)),
    ({"overrides": ["plan.balance=datasets", "plan.center=none"]}, ("plan.balance=datasets", "plan.center=none")),
    ({"overrides": ["plan.group_shares=[3,1,1]"]}, ("plan.group_shares=[3,1,1]", "plan.num_groups=null")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "overrides"), ALIKE, ids=lambda value: str(value)[:40])
def test_a_split_is_the_plan_that_merit_plan_would_have_made(
    call: dict, overrides: tuple[str, ...], planned: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    made, expected = repartition(planned(), tmp_path / "split", progress=QUIET, **call), planned(*overrides)
    assert made.sha256 == expected.sha256
    assert (made.inputs_sha256, made.config, made.local) == (expected.inputs_sha256, expected.config, expected.local)
    assert (made.datasets, made.groups, made.bounds) == (expected.datasets, expected.groups, expected.bounds)
    assert plan_files(made.folder) == plan_files(expected.folder)
    if expected.conflict_matrix is not None:
        assert np.array_equal(made.conflict_matrix, expected.conflict_matrix)
        assert np.array_equal(made.load_sketches(), expected.load_sketches())
    assert made.cost["tokens"] == 0, "no gradient was computed"
    assert repartition(planned(), tmp_path / "split", progress=QUIET, **call).sha256 == made.sha256


def test_split_on_the_command_line(planned: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    source, output = str(planned().folder), str(tmp_path / "random")
    done = CliRunner().invoke(app, ["split", source, "--split", "random", "--seed", "5", "--output", output])
    assert done.exit_code == 0, done.output
    assert f"Next: merit train {output} --group all" in done.output
    plan = PartitionPlan.from_pretrained(output)
    assert plan.config["plan"]["split_seed"] == 5
    assert plan.config["plan"]["seed"] == 0
    again = CliRunner().invoke(app, ["split", output, "--split", "merit", "--output", str(tmp_path / "merit")])
    assert again.exit_code == 2
    assert "the plan holds none" in again.output
    assert not (tmp_path / "merit").exists()


def test_what_a_split_refuses(planned: Callable[..., PartitionPlan], mixture: Path, tmp_path: Path) -> None:
    source, output = planned(), tmp_path / "refused"

    def call(*overrides: str, **kwargs: object) -> str:
        return refusal(lambda: repartition(source, output, overrides=overrides, progress=QUIET, **kwargs))

    assert "another split" in call("plan.seed=1")
    assert "Use merit plan" in call("plan.num_samples=4")
    assert "Use merit plan" in call("sft.learning_rate=1")
    assert "beside --split random" in call("plan.split=joint", split="random")
    assert "plan.split='nearest' is not one of" in call(split="nearest")
    assert "plan.num_groups=9" in call(num_groups=9)
    assert not output.exists()


def test_a_file_on_the_command_line_is_looked_up_from_there(
    planned: Callable[..., PartitionPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = planned()
    np.savez(tmp_path / "mine.npz", names=source.names, matrix=np.eye(len(source.names)))
    monkeypatch.chdir(tmp_path)
    plan = repartition(source, tmp_path / "out", "affinity", overrides=["plan.affinity=mine.npz"], progress=QUIET)
    assert plan.local["plan"]["affinity"] == str(tmp_path / "mine.npz")


def test_data_that_has_changed_is_not_split(
    planned: Callable[..., PartitionPlan], mixture: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "copy.jsonl"
    write_jsonl(changed, [as_chat(row) for row in task_rows("copy", 8, seed=9)])
    plan = PartitionPlan.from_pretrained(planned().folder)
    plan.supply({"copy": changed})
    assert "dataset `copy`: rows (fingerprint) differ" in refusal(
        lambda: repartition(plan, tmp_path / "out", split="random", progress=QUIET)
    )


def test_group_shares_decide_what_groups_hold(planned: Callable[..., PartitionPlan]) -> None:
    large_first = planned("plan.group_shares=[3,1,1]", "plan.num_groups=null", "plan.balance=datasets")
    assert [len(group.datasets) for group in large_first.groups] == [3, 1, 1]
    large_last = planned("plan.group_shares=[1,1,3]", "plan.num_groups=null", "plan.balance=datasets")
    assert [len(group.datasets) for group in large_last.groups] == [1, 1, 3]
    assert large_last.config["plan"]["num_groups"] == 3


def test_max_imbalance_moves_datasets_or_names_the_one_at_fault(
    mixture: Path, planned: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    unbounded = planned("plan.split=kmeans", "plan.balance=datasets")
    sizes = [len(group.datasets) for group in unbounded.groups]
    assert max(sizes) > 3, "k-means is not balanced"
    bounded = planned("plan.split=kmeans", "plan.balance=datasets", "plan.max_imbalance=1.2")
    assert sorted(len(group.datasets) for group in bounded.groups) == [2, 3]
    config = MeritConfig.from_yaml(mixture, ["plan.num_groups=4", "plan.max_imbalance=1.5"])
    said = refusal(lambda: MeritPlanner(config, QUIET).plan(tmp_path / "plan"))
    assert "`upper` as its largest dataset" in said
    assert "plan.split_oversized=true" in said


@pytest.mark.slow
def test_an_oversized_dataset_is_cut_and_every_part_is_a_dataset(
    mixture: Path, planned: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    overrides = ("plan.num_groups=4", "plan.split_oversized=true")
    whole, cut = planned("plan.num_groups=4"), planned(*overrides)
    parts = [name for name in cut.names if name.startswith("upper")]
    assert parts == ["upper#1", "upper#2", "upper#3"]
    assert set(cut.names) - set(parts) == set(TASKS) - {"upper"}
    for count in ("num_examples", "num_input_tokens", "num_loss_tokens"):
        total = [sum(getattr(d, count) for d in plan.datasets if d.name.startswith("upper")) for plan in (whole, cut)]
        assert total[0] == total[1], "every row is in one part"
    assert max(group.weight for group in cut.groups) < 0.4 < max(group.weight for group in whole.groups)
    # The finished plan is found again by the CONFIG that names no parts.
    again = MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(cut.folder)
    assert again.sha256 == cut.sha256
    assert again.config == cut.config
    # The joint baseline is of the same datasets, and none of the shares or bounds of a split is left in it.
    shared = [*overrides, "plan.num_groups=null", "plan.group_shares=[1,1,1,1]", "plan.max_imbalance=2.5"]
    joint = MeritPlanner(joint_config(MeritConfig.from_yaml(mixture, shared), cut), QUIET).plan(tmp_path / "joint")
    assert groups_of(joint) == [cut.names]
    # And split again, and trained, as any plan.
    split = repartition(cut, tmp_path / "split", num_groups=2, progress=QUIET)
    assert split.names == cut.names
    group = next(g.group for g in split.groups if "upper#1" in g.datasets)
    folder = train_group(split, group, tmp_path / "group", progress=QUIET)
    assert (folder / "merit.json").exists()


def test_the_file_of_a_cut_dataset_is_the_file_of_its_parts(
    mixture: Path, planned: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    cut = PartitionPlan.from_pretrained(
        shutil.copytree(planned("plan.num_groups=4", "plan.split_oversized=true").folder, tmp_path / "cut")
    )
    cut.local = {**cut.local, "datasets": {}}
    cut.supply({"upper": mixture.parent / "data/upper.jsonl"})
    specs, root = plan_specs(cut, ["upper#1", "upper#3"])
    for spec in specs:
        pinned = next(dataset for dataset in cut.datasets if dataset.name == spec.name)
        assert load_rows(spec, root).fingerprint == pinned.fingerprint
    with pytest.raises(ConfigError, match="no such dataset"):
        cut.supply({"lower": mixture})


def test_parts_hold_out_what_the_whole_would_hold_out(mixture: Path) -> None:
    spec = MeritConfig.from_yaml(mixture).datasets[-1].model_copy(update={"eval_path": None, "eval_fraction": 0.25})
    whole = load_rows(spec, mixture.parent)
    parts = [
        load_rows(spec.model_copy(update={"name": f"upper#{k}", "part": f"{k}/3"}), mixture.parent) for k in (1, 2, 3)
    ]
    for side in ("train", "eval"):
        expected = sorted(map(str, getattr(whole, side)))
        assert sorted(str(row) for part in parts for row in getattr(part, side)) == expected
    assert hold_out(whole.train, 0.0, "upper")[1] is None


def test_kmeans_on_texts_puts_what_reads_alike_together(tmp_path: Path, base_dir: Path) -> None:
    """Two vocabularies, two datasets of each; the tasks cross them, so that gradients have another order."""
    path = make_mixture(tmp_path, ("copy", "reverse", "count", "first"), count=8)
    words = {
        "copy": "alpha beta gamma delta",
        "reverse": "9 8 7 6 5 4",
        "count": "alpha gamma beta",
        "first": "7 8 4 9",
    }
    for name, text in words.items():
        rows = [as_chat({"prompt": f"{text} {i % 2}", "completion": text}) for i in range(8)]
        write_jsonl(path.parent / f"data/{name}.jsonl", rows)
    expected = [["copy", "count"], ["first", "reverse"]]
    for extra in ([], [f"plan.embedding_model={base_dir}"]):
        config = MeritConfig.from_yaml(path, ["plan.split=kmeans_text", *extra])
        plan = MeritPlanner(config, QUIET).plan(tmp_path / f"plan-{len(extra)}")
        assert groups_of(plan) == expected
        assert plan.conflict_matrix is None
        assert plan.load_sketches() is None
        assert str(base_dir) not in (plan.folder / "plan.json").read_text(), "local paths are not published"
    assert plan.config["plan"]["embedding_model"] == "file"
    assert groups_of(repartition(plan, tmp_path / "again", seed=4, progress=QUIET)) == expected


def test_an_affinity_file_takes_the_place_of_the_cosines(mixture: Path, tmp_path: Path) -> None:
    names, found = sorted(TASKS), set()
    for first in ({"copy", "upper"}, {"count", "reverse"}):
        lines = ["dataset," + ",".join(names)]
        lines += [f"{a}," + ",".join("1" if (a in first) == (b in first) else "-1" for b in names) for a in names]
        (mixture.parent / "affinity.csv").write_text("\n".join(lines) + "\n")
        overrides = ["plan.split=affinity", "plan.affinity=affinity.csv", "plan.balance=datasets"]
        output = tmp_path / min(first)
        plan = MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(output)
        # Of five datasets, three are on one side: the smaller one is of one kind.
        smaller = set(min(groups_of(plan), key=len))
        assert smaller <= first or smaller <= {*names} - first
        found.add(frozenset(smaller))
        assert plan.config["plan"]["affinity"] == "file"
    assert len(found) == 2, "another file, other groups"
    # An .npy has the rows of CONFIG's datasets, whether or not one of them is cut.
    matrix = [[1.0 if (a in first) == (b in first) else -1.0 for b in names] for a in names]
    np.save(mixture.parent / "affinity.npy", matrix)
    bare = [override.replace(".csv", ".npy") for override in overrides]
    same = MeritPlanner(MeritConfig.from_yaml(mixture, bare), QUIET).plan(tmp_path / "bare")
    assert groups_of(same) == groups_of(plan)
    cut = MeritPlanner(MeritConfig.from_yaml(mixture, [*bare[:2], "plan.split_oversized=true"]), QUIET)
    parts = [name for group in groups_of(cut.plan(tmp_path / "cut")) for name in group if "#" in name]
    assert len(parts) >= 2
    assert "holds the plan of other inputs" in refusal(
        lambda: MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(tmp_path / "copy")
    )
    again = repartition(plan, tmp_path / "again", num_groups=3, progress=QUIET)
    assert len(again.groups) == 3


def test_adam_preconditioning_by_measured_moments(mixture: Path, planned: Callable[..., PartitionPlan]) -> None:
    few = ("plan.precondition=adam", "plan.precondition_batches=3")
    plain, adam = planned(), planned(*few)
    assert not np.allclose(plain.load_sketches(), adam.load_sketches())
    read = planned("plan.sketch=exact", *few)
    norms = np.linalg.norm(read.load_sketches(), axis=1)
    assert [d.gradient_norm for d in read.datasets] == pytest.approx(norms.tolist(), rel=1e-4), "of what is compared"
    # The exact read-out is the gradient, divided entry by entry.
    exact = planned("plan.sketch=exact").load_sketches()
    divided = planned("plan.sketch=exact", *few).load_sketches()
    used = np.abs(exact) > 0
    ratios = np.where(used, divided / np.where(used, exact, 1.0), np.nan)
    assert np.nanmax(np.nanmax(ratios, axis=0) / np.nanmin(ratios, axis=0)) == pytest.approx(1, rel=1e-3)
    assert np.nanmin(ratios) > 0
    assert len(np.unique(np.float16(np.nanmax(ratios, axis=0)))) > 200, "entry by entry, not tensor by tensor"


@pytest.mark.slow
def test_adam_preconditioning_by_the_moments_of_ones_own_training(mixture: Path, tmp_path: Path) -> None:
    config = MeritConfig.from_yaml(mixture)
    base = mixture.parent / "base"
    args = build_args({**config.sft, "max_steps": 2, "save_steps": 2}, tmp_path / "warm-up")
    rows = load_rows(config.datasets[0], mixture.parent).train
    tokenizer = load_tokenizer(base)
    trainer = SFTTrainer(load_model(base, args), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    named = {id(p): n for n, p in trainer.model.named_parameters()}
    expected = {
        named[id(p)]: state["exp_avg_sq"] / (1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
        for p, state in optimizer.state.items()
    }
    checkpoint = tmp_path / "warm-up/checkpoint-2"
    model = load_model(base, args)
    ready = tokenize_rows(model, tokenizer, args, rows).rows
    with open_loss(model, tokenizer, args, ready) as loss:
        found = state_moments(checkpoint, loss)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name].float()) for name in expected)
        torch.save({"param_groups": [], "state": {}}, tmp_path / "empty.pt")
        assert "it is of 0 parameters" in refusal(lambda: state_moments(tmp_path / "empty.pt", loss))
        (tmp_path / "broken.pt").write_bytes(b"no")
        assert "not an optimizer's state" in refusal(lambda: state_moments(tmp_path / "broken.pt", loss))
        assert "no optimizer.pt there" in refusal(lambda: state_moments(tmp_path, loss))
    overrides = ["plan.precondition=adam", f"plan.optimizer_state={checkpoint}"]
    plan = MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(tmp_path / "plan")
    assert plan.config["plan"]["optimizer_state"] == "file"


def test_denominators_are_damped_roots() -> None:
    made = denominators({"a": torch.tensor([4.0, 0.0]), "never": torch.zeros(2)}, 0.5)
    assert made.keys() == {"a"}
    assert made["a"].tolist() == pytest.approx([(4 + 0.02) ** 0.5 + 0.5, 0.02**0.5 + 0.5])


@pytest.mark.slow
def test_a_trainer_gives_the_plan_of_its_config(mixture: Path, tmp_path: Path) -> None:
    path = edit(mixture, lambda c: [d.update(eval_path=None, eval_fraction=0.0) for d in c["datasets"]], "whole.yaml")
    config = MeritConfig.from_yaml(path)
    expected = MeritPlanner(config, QUIET).plan(tmp_path / "expected")
    rows = {spec.name: load_rows(spec, mixture.parent).train for spec in config.datasets}
    base = mixture.parent / "base"
    args = build_args(config.sft, tmp_path / "mine")

    def trainer() -> SFTTrainer:
        return SFTTrainer(str(base), args=args, train_dataset=rows["copy"])

    planner = MeritPlanner.from_trainer(
        trainer(), rows, tmp_path / "data", plan=yaml.safe_load(path.read_text())["plan"], progress=QUIET,
        tags={"copy": "c", "reverse": "r", "count": "c", "first": "f", "upper": "u"},
    )  # fmt: skip
    made = planner.plan(tmp_path / "made")
    assert made.sha256 == expected.sha256
    assert np.array_equal(made.conflict_matrix, expected.conflict_matrix)
    assert made.sft == expected.sft
    train_group(made, 0, tmp_path / "group", progress=QUIET)
    used = trainer()
    with torch.no_grad():
        next(used.model.parameters()).add_(1.0)
    assert "weights of the trainer's model are not those" in refusal(
        lambda: MeritPlanner.from_trainer(used, rows, tmp_path / "data")
    )
    assert "tags has `nobody`" in refusal(
        lambda: MeritPlanner.from_trainer(trainer(), rows, tmp_path / "data", tags={"nobody": "x"})
    )


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    mixture: Path, planned: Callable[..., PartitionPlan]
) -> None:
    before = sorted(mixture.parent.rglob("*"))
    done = CliRunner().invoke(app, ["plan", str(mixture), "--dry-run", "--teraflops", "0.001"])
    assert done.exit_code == 0, done.output
    for word in (
        "tokens a second on cpu, measured",
        "Memory while planning",
        "Disk",
        "GPU-hours",
        "Nothing was written",
    ):
        assert word in done.output
    assert sorted(mixture.parent.rglob("*")) == before
    plan, estimate = planned(), estimate_plan(MeritConfig.from_yaml(mixture), QUIET)
    assert estimate.num_input_tokens == sum(d.num_input_tokens for d in plan.datasets), "small: no sampling"
    assert estimate.gradient_tokens == pytest.approx(plan.cost["tokens"], rel=0.1)
    model = load_model(mixture.parent / "base")
    assert estimate.num_parameters == sum(p.numel() for p in model.parameters())
    assert estimate.parameter_bytes == 4 * estimate.num_parameters
    assert estimate.plan_bytes == 2 * 2 * 4 * 5 * 4096
    assert sum(estimate.group_flop) == pytest.approx(6 * estimate.num_parameters * estimate.num_input_tokens, rel=1e-3)
    uneven = estimate_plan(
        MeritConfig.from_yaml(mixture, ["plan.group_shares=[3,1]", "plan.split=random", "plan.num_groups=null"]), QUIET
    )
    assert uneven.group_tokens[0] == pytest.approx(3 * uneven.group_tokens[1], abs=3)
    assert uneven.gradient_tokens == 0
    missing = CliRunner().invoke(app, ["plan", str(mixture)])
    assert missing.exit_code == 2
    assert "--output is missing" in missing.output


def test_a_dry_run_counts_long_rows_and_does_not_call_possible_what_the_plan_refuses(mixture: Path) -> None:
    def dry(*overrides: str) -> Estimate:
        return estimate_plan(MeritConfig.from_yaml(mixture, overrides), QUIET)

    single, huge = dry("plan.tokens_per_batch=1"), dry("plan.tokens_per_batch=1000000000")
    longest = single.activation_bytes * 1e9 / huge.activation_bytes
    assert single.num_input_tokens / single.num_examples < longest <= 64, "a row is a batch at least"
    assert not single.remedy
    assert "lower plan.tokens_per_batch (now 1000000000)" in huge.remedy
    assert f"This may not fit here: {huge.remedy}" in estimate_lines(huge, 1.0)
    for overrides, said in (
        (("plan.split=affinity", "plan.affinity=none.csv"), "none.csv': no such file"),
        (("plan.precondition=adam", "plan.optimizer_state=none"), "no optimizer.pt there"),
        (("plan.sketch_by_layer=true", "plan.sketch_dim=16"), "plan.sketch_dim=16: 16 numbers are too few"),
    ):
        assert said in refusal(lambda overrides=overrides: dry(*overrides))
