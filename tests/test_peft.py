"""LoRA groups along the whole road: the plan's gradients and identity, training, resuming, merging, evaluating."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_callback import load, raw_rows, sft_script
from tiny import make_base, make_mixture
from trl import SFTConfig, SFTTrainer

from merit_hf import MeritCallback, MeritConfig, MeritPlanner, PartitionPlan
from merit_hf.adapters import adapter_settings
from merit_hf.config import ConfigError, MeritError
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.gradients import dataset_gradient, trained_parameters
from merit_hf.group_merge import merge_groups
from merit_hf.loss import trl_loss_sum as loss_sum
from merit_hf.manifest import read_manifest
from merit_hf.mixture import prepare_dataset, read_mixture
from merit_hf.plan import PlannedDataset, group_identity
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_model, load_tokenizer, open_loss
from merit_hf.sketch import make_sketch
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
LORA = ("peft.r=4", "peft.lora_alpha=16", "peft.lora_dropout=0.1", "peft.target_modules=[q_proj, down_proj]")
PEFT: dict[str, Any] = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def plan(make_plan: Callable[..., PartitionPlan]) -> PartitionPlan:
    return make_plan(*LORA)


@pytest.fixture(scope="module")
def groups(plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lora")
    return [train_group(plan, k, folder / str(k), progress=QUIET) for k in range(2)]


# The plan


def test_a_plan_of_whole_models_keeps_its_identity() -> None:
    base = {"weights_sha256": "a" * 64, "chat_template_sha256": "c" * 64}
    members = [PlannedDataset("set", 0, None, "chat", "f" * 64, "d" * 64, 10, 600, 100)]
    sft = {"learning_rate": 1e-3, "max_steps": -1}
    golden = "306f4f49258daf16b0876f03572ab743884f79ef97aed70213083257ae94997b"
    assert group_identity(base, members, sft) == group_identity(base, members, sft, {}) == golden
    assert group_identity(base, members, sft, {"r": 4}) != golden


def test_the_settings_are_part_of_the_plan(
    plan: PartitionPlan, tiny_plan: PartitionPlan, make_plan: Callable[..., PartitionPlan]
) -> None:
    assert {key: plan.peft[key] for key in PEFT} == {**PEFT, "target_modules": ["down_proj", "q_proj"]}
    assert plan.peft["use_rslora"] is False
    assert json.loads((plan.folder / "plan.json").read_text())["peft"] == plan.peft
    assert PartitionPlan.from_pretrained(plan.folder).sha256 == plan.sha256
    assert "LoRA" in (plan.folder / "README.md").read_text()
    assert "LoRA" not in (tiny_plan.folder / "README.md").read_text()
    assert tiny_plan.peft == {}
    assert "peft" not in json.loads((tiny_plan.folder / "plan.json").read_text())
    others = [make_plan(*LORA, "plan.split=random", f"peft.{change}") for change in ("r=5", "lora_dropout=0.2")]
    same = make_plan(*LORA[:3], "plan.split=random", "peft.target_modules=[down_proj, q_proj]")
    again = make_plan(*LORA, "plan.split=random")
    assert len({p.sha256 for p in [*others, same, tiny_plan]}) == 4
    assert again.sha256 == same.sha256, "the order of the target modules is not what they are"


def test_a_field_that_is_not_supported_is_told_before_anything_is_read(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, count=4)
    (tmp_path / "data" / "copy.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"peft.use_dora=True is not supported"):
        MeritPlanner(MeritConfig.from_yaml(config, ["peft.use_dora=true"]), QUIET).plan(tmp_path / "plan")


def test_a_changed_block_is_another_plan(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, count=4)
    common = ["plan.split=random", "peft.r=2"]
    MeritPlanner(MeritConfig.from_yaml(config, common), QUIET).plan(tmp_path / "plan")
    with pytest.raises(ConfigError, match=r"holds the plan of other inputs \(peft.r: 2 there, 3 here\)"):
        MeritPlanner(MeritConfig.from_yaml(config, [*common, "peft.r=3"]), QUIET).plan(tmp_path / "plan")


def test_the_gradient_is_the_dense_one_seen_through_a(plan: PartitionPlan, tmp_path: Path) -> None:
    """∂L/∂B = s·(∂L/∂W)·Aᵀ and ∂L/∂A = s·Bᵀ·(∂L/∂W) = 0, since B starts at zero; dropout is off."""
    args = build_args(plan.config["sft"], tmp_path)
    tokenizer = load_tokenizer(plan.base_folder())
    config = MeritConfig.from_dict(
        {"base": {"model_name_or_path": "x"},
         "datasets": [{"name": "copy", "path": plan.local["datasets"]["copy"]["path"], "eval_fraction": 0.0}]}
    )  # fmt: skip
    loaded, _ = read_mixture(config.datasets, Path(), args, QUIET)
    dense, lora = load_model(plan.base_folder(), args), load_model(plan.base_folder(), args, plan.peft)
    rows = prepare_dataset(loaded[0], dense, tokenizer, args).train
    names = [name for name, _ in trained_parameters(lora)]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(lora)]
    with open_loss(lora, tokenizer, args, rows) as trainer:
        readout = dataset_gradient(trainer, rows, make_sketch("exact", parameters, 0, 1, 0))
    total = 0
    with open_loss(dense, tokenizer, args, rows) as trainer:
        for row in rows:
            batch = trainer.data_collator([row])
            loss_sum(trainer, batch).backward()
            total += int((batch["labels"][:, 1:] != -100).sum())
    found, start = dict[str, np.ndarray](), 0
    for name, size in sorted(parameters):
        found[name] = readout.sketch[start : start + size]
        start += size
    weights = dict(lora.named_parameters())
    for name, values in found.items():
        if ".lora_A." in name:
            assert not values.any()
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
        gradient = dense.get_submodule(module).weight.grad / total
        expected = 4.0 * gradient @ weights[name.replace("lora_B", "lora_A")].T
        np.testing.assert_allclose(values, expected.detach().flatten().numpy(), rtol=1e-3, atol=1e-6)
        assert np.abs(values).max() > 1e-4


def test_every_group_starts_from_the_same_a(plan: PartitionPlan, tmp_path: Path) -> None:
    """As SFTTrainer itself would draw it."""

    def start(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in trained_parameters(model)}

    args = build_args(plan.config["sft"], tmp_path / "0")
    ours = start(load_model(plan.base_folder(), args, plan.peft))
    torch.manual_seed(5)
    again = start(load_model(plan.base_folder(), args, plan.peft))
    theirs = start(
        SFTTrainer(
            str(plan.base_folder()), args=args, train_dataset=raw_rows(plan, 0), peft_config=LoraConfig(**plan.peft)
        ).model
    )
    other = start(load_model(plan.base_folder(), build_args({"seed": 1}, tmp_path / "1"), plan.peft))
    for name, value in ours.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, theirs[name])
        assert torch.equal(value, other[name]) == (".lora_B." in name)
        assert bool(value.any()) == (".lora_A." in name)


# Training


def test_a_trained_group_is_the_planned_adapter(plan: PartitionPlan, groups: list[Path]) -> None:
    for number, folder in enumerate(groups):
        assert [check for check in verify_checkpoint(plan, folder) if not check.ok] == []
        manifest, planned = read_manifest(folder), plan.group(number)
        assert manifest["peft"] == plan.peft == adapter_settings(folder)
        assert manifest["num_input_tokens"] == planned.train_input_tokens
        assert manifest["num_loss_tokens"] == planned.train_loss_tokens
        names = {path.name for path in folder.iterdir()}
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "merit.json",
            "README.md",
            "tokenizer.json",
        } < names
        assert not {"model.safetensors", "config.json", "training_args.bin"} & names
        for path in folder.iterdir():
            assert str(plan.base_folder()).encode() not in path.read_bytes(), path.name
        card = (folder / "README.md").read_text()
        assert "library_name: peft" in card
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(bool(value.any()) for name, value in tensors.items() if "lora_B" in name), "nothing was learnt"


def test_a_checkpoint_of_another_adapter_does_not_verify(
    plan: PartitionPlan, groups: list[Path], make_plan: Callable[..., PartitionPlan], tiny_groups: list[Path]
) -> None:
    other = make_plan(*LORA, "plan.split=random", "peft.r=5")
    for folder in (groups[0], tiny_groups[0]):
        check = failed(verify_checkpoint(other, folder))
        assert check is not None
        assert check.name == "group_sha256"
    checks = {check.name: check for check in verify_checkpoint(plan, tiny_groups[0])}
    assert not checks["adapter settings"].ok
    assert "adapter_config.json" in checks["adapter settings"].found


def test_a_script_of_anybodys_trains_the_same_adapter(plan: PartitionPlan, groups: list[Path], tmp_path: Path) -> None:
    """The README's script with `peft_config`."""
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, **plan.config["sft"])
    callback = MeritCallback(plan, group=0)
    trainer = SFTTrainer(
        str(plan.base_folder()), args=args, train_dataset=raw_rows(plan, 0), callbacks=[callback],
        peft_config=LoraConfig(**plan.peft),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert [check for check in verify_checkpoint(plan, tmp_path / "run") if not check.ok] == []
    intermediate = json.loads((tmp_path / "run" / "checkpoint-2" / "adapter_config.json").read_text())
    assert intermediate["base_model_name_or_path"] is None
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (groups[0], tmp_path / "run"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-4, msg=name)


def test_another_adapter_or_none_is_refused(plan: PartitionPlan, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    def script(plan: PartitionPlan, peft: dict[str, Any] | None, moved: bool = False) -> SFTTrainer:
        model, tokenizer = load(plan.base_folder())
        if peft is not None:
            model = get_peft_model(model, LoraConfig(**peft))
        if moved:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1.0
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **plan.config["sft"])
        return SFTTrainer(
            model, args=args, train_dataset=raw_rows(plan, 0), processing_class=tokenizer,
            callbacks=[MeritCallback(plan, group=0)],
        )  # fmt: skip

    cases = [
        (sft_script(plan, tmp_path), r"the plan trains an adapter, the model has none. Give SFTTrainer peft_config"),
        (script(plan, {**plan.peft, "r": 5}), r"settings differ: r: 4 there, 5 here"),
        (script(plan, dict(plan.peft), moved=True), r"has been trained already"),
        (script(tiny_plan, dict(plan.peft)), r"the plan trains all weights, the model has an adapter"),
    ]
    for trainer, said in cases:
        with pytest.raises(MeritError, match=said):
            trainer.train()


@pytest.mark.slow
def test_a_killed_training_of_an_adapter(plan: PartitionPlan, tmp_path: Path) -> None:
    """Dropout inside the adapter too: SIGKILL after a save, the same command again, the same bytes."""
    placement = {"save_steps": 2, "gradient_checkpointing": True}
    expected = jobs.Job(jobs.train, [plan.folder, 0, tmp_path / "expected", placement], tmp_path / "log")
    assert expected.wait() == 0, expected.output
    job = jobs.Job(jobs.train, [plan.folder, 0, tmp_path / "0", placement], tmp_path / "log-0")
    assert job.kill_when((tmp_path / "0.part" / "checkpoint-4" / "trainer_state.json").exists)
    again = jobs.Job(jobs.train, [plan.folder, 0, tmp_path / "0", placement], tmp_path / "log-1")
    assert again.wait() == 0, again.output
    # The state of step 4 may have been cut short in the midst of its writing.
    assert "going on from checkpoint-" in again.output
    for path in (tmp_path / "expected").iterdir():
        if path.name != "trainer_state.json":
            assert (tmp_path / "0" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, count=12)
    plan = MeritPlanner(MeritConfig.from_yaml(config, [*LORA[:2], "plan.split=random"]), QUIET).plan(tmp_path / "plan")
    one = train_group(plan, 0, tmp_path / "one", progress=QUIET)
    command = ["--config_file", jobs.ROOT / "recipes/accelerate_configs/cpu_2.yaml"]
    command += [jobs.ROOT / "recipes/train_group.py", tmp_path / "plan", "--group", 0, "--output", tmp_path / "two"]
    done = jobs.launch([*command, "--num-processes", 2, "sft.per_device_train_batch_size=2"])
    assert done.returncode == 0, done.stderr
    assert [check for check in verify_checkpoint(plan, tmp_path / "two") if not check.ok] == []
    assert read_manifest(tmp_path / "two")["num_processes"] == 2
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, tmp_path / "two"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5, msg=name)


# What becomes of the groups


def test_merged_groups(plan: PartitionPlan, groups: list[Path], tmp_path: Path) -> None:
    merge_groups(plan, groups, tmp_path / "dense", out_dtype="float32")
    merge_groups(plan, groups, tmp_path / "concat", adapters="concat")
    merge_groups(plan, groups, tmp_path / "svd", adapters="svd", svd_rank=2)
    base = load_file(plan.base_folder() / "model.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    exact = base[f"{name}.weight"].double()
    for group, folder in zip(plan.groups, groups, strict=True):
        a, b = (
            load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB"
        )
        exact += group.weight * 4 * b.double() @ a.double()
    torch.testing.assert_close(dense[f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-8)
    manifests = {form: read_manifest(tmp_path / form) for form in ("dense", "concat", "svd")}
    assert [manifest["adapters"] for manifest in manifests.values()] == ["dense", "concat", "svd"]
    assert 0 < manifests["svd"]["stats"]["relative_error"] < 1
    assert manifests["concat"]["stats"]["rank"] == 8
    card = (tmp_path / "svd" / "README.md").read_text()
    assert "--adapters svd --svd-rank 2" in card
    assert str(tmp_path) not in card
    models = {"base": plan.base_folder(), **{form: tmp_path / form for form in manifests}, "group-0": groups[0]}
    mean = evaluate_models(plan, models, progress=QUIET)["mean"]
    assert mean["concat"] == pytest.approx(mean["dense"], abs=1e-5)
    assert len({round(mean[label], 6) for label in ("base", "dense", "svd", "group-0")}) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapters": "svd"}, "`svd` needs a rank"),
        ({"svd_rank": 3}, "nothing else takes one"),
        ({"adapters": "svd", "svd_rank": 9}, "svd_rank 9 is more than the adapters' summed rank 8"),
        ({"adapters": "mean"}, "expected one of dense, concat, svd"),
        ({"engine": "mergekit"}, "LoRA groups are merged by engine safetensors"),
        ({"adapters": "concat", "out_dtype": "bfloat16"}, "a merged adapter is float32"),
    ],
)
def test_a_merge_that_does_not_fit(
    options: dict[str, Any], said: str, plan: PartitionPlan, groups: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        merge_groups(plan, groups, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_whole_models_are_no_adapters(tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the plan's groups are whole models"):
        merge_groups(tiny_plan, tiny_groups, tmp_path / "out", adapters="concat")


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    """`merit run` with merge.adapters and merge.svd_rank, its refusal of others, and `merit merge` with the same."""
    config = make_mixture(tmp_path, count=11)
    run = ["run", config, "--output", tmp_path / "run", *LORA, "merge.adapters=svd"]
    for rank in (3, 2):
        job = jobs.Job(jobs.merit, [[*run, f"merge.svd_rank={rank}"]], tmp_path / f"log-{rank}")
        assert job.wait() == (0 if rank == 3 else 2), job.output
    assert "merge.svd_rank: 3 there, 2 here" in job.output
    assert "Cut to rank 3, it leaves out" in " ".join((tmp_path / "log-3").read_text().split())
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["models"] == ["base", "group-0", "group-1", "merged"]
    assert len({round(loss, 6) for loss in evaluation["mean"].values()}) == 4
    merged = load_file(tmp_path / "run" / "merged" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in merged.items() if "lora_A" in name} == {3}
    folders = [tmp_path / "run" / "groups" / str(k) for k in range(2)]
    merge = ["merge", tmp_path / "run" / "plan", *folders, "--output"]
    for options, made in (([], "adapter_model.safetensors"), (["--adapters", "dense"], "model.safetensors")):
        job = jobs.Job(jobs.merit, [[*merge, tmp_path / made, *options]], tmp_path / f"log-{made}")
        assert job.wait() == 0, job.output
        assert (tmp_path / made / made).is_file()
    again = load_file(tmp_path / "adapter_model.safetensors" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in merged.items())


@pytest.mark.slow
def test_groups_on_a_quantised_base(tmp_path: Path) -> None:
    """QLoRA: the adapters are merged into the base as it is stored, and evaluated on that."""
    pytest.importorskip("bitsandbytes")
    config = make_mixture(tmp_path, count=8)
    # bitsandbytes quantises in blocks of 64, and packs whole rows of them on a CPU.
    make_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    quantised = "sft.model_init_kwargs={quantization_config: {load_in_4bit: true}}"
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        MeritPlanner(MeritConfig.from_yaml(config, [quantised]), QUIET).plan(tmp_path / "plan")
    plan = MeritPlanner(MeritConfig.from_yaml(config, [*LORA, quantised]), QUIET).plan(tmp_path / "plan")
    groups = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in range(2)]
    for folder in groups:
        assert [check for check in verify_checkpoint(plan, folder) if not check.ok] == []
    merge_groups(plan, groups, tmp_path / "merged")
    base, merged = (load_file(f / "model.safetensors") for f in (plan.base_folder(), tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "q_proj" in name or "down_proj" in name}
    models = {"base": plan.base_folder(), "group-0": groups[0], "merged": tmp_path / "merged"}
    mean = evaluate_models(plan, models, progress=QUIET)["mean"]
    assert len(set(mean.values())) == 3
