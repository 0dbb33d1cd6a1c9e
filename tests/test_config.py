"""CONFIG: a mistake is one line that names file, key, value and the nearest valid choice, before anything loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from merit_hf.config import ConfigError, MeritConfig, parse_value

DATASETS = [{"name": "math", "path": "math.jsonl", "tag": "m"}, {"name": "chat", "path": "chat.jsonl", "tag": "c"}]
VALID: dict[str, Any] = {"base": {"model_name_or_path": "org/base"}, "datasets": DATASETS}


def write(folder: Path, content: Any) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def changed(**sections: Any) -> dict[str, Any]:
    return {**VALID, **sections}


def first_dataset(**values: Any) -> dict[str, Any]:
    return changed(datasets=[{**DATASETS[0], **values}, DATASETS[1]])


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        MeritConfig.from_yaml(path, overrides)
    return str(caught.value)


# content of the file, what the message must name besides the file
PLAIN_ERRORS: dict[str, tuple[Any, list[str]]] = {
    "unknown section": (changed(plann={}), ["`plann`", "{}", "`plan`"]),
    "unknown key": (changed(plan={"num_group": 2}), ["`plan.num_group`", "2", "`num_groups`"]),
    "unknown key of a dataset": (first_dataset(promt="question"), ["`datasets.math.promt`", "'question'", "`prompt`"]),
    "unknown key of the base": (
        changed(base={"model_name_or_path": "b", "revison": "main"}),
        ["`base.revison`", "'main'", "`revision`"],
    ),
    "unknown key, nothing near": (changed(hub={"zzzz": 1}), ["`hub.zzzz`", "push", "namespace", "private"]),
    "unknown choice": (changed(plan={"split": "randm"}), ["plan.split", "'randm'", "`random`"]),
    "unknown choice, nothing near": (changed(merge={"engine": "zzz"}), ["merge.engine", "'zzz'", "mergekit"]),
    "wrong type": (changed(plan={"num_samples": "many"}), ["plan.num_samples", "'many'", "str", "integer"]),
    "bool for an integer": (changed(plan={"seed": True}), ["plan.seed", "True", "bool", "integer"]),
    "integer for a bool": (changed(hub={"push": 1}), ["hub.push", "1", "int", "boolean"]),
    "fraction for an integer": (changed(plan={"num_groups": 1.5}), ["plan.num_groups", "1.5", "float", "integer"]),
    "out of range": (changed(plan={"num_groups": 0}), ["plan.num_groups", "0", "greater than or equal to 1"]),
    "fraction out of range": (first_dataset(eval_fraction=1.0), ["datasets.math.eval_fraction", "1.0", "less than 1"]),
    "section is no mapping": (changed(plan=3), ["plan", "3", "int"]),
    "sft is no mapping": (changed(sft=[1]), ["sft", "[1]", "list", "dictionary"]),
    "dataset is no mapping": (
        changed(datasets=["oops", {"name": "math", "path": "x"}]),
        ["datasets.0", "'oops'", "str"],
    ),
    "dataset without path": (changed(datasets=[{"name": "math"}]), ["datasets.math.path", "missing"]),
    "a required key misspelt": (
        changed(datasets=[{"name": "math", "pth": "x"}]), ["unknown key `datasets.math.pth`", "Did you mean `path`?"],
    ),
    "no datasets": (changed(datasets=[]), ["datasets", "[]", "at least 1"]),
    "no base": ({"datasets": DATASETS}, ["`base`", "missing"]),
    "root is not a key": (changed(root="elsewhere"), ["`root`"]),
    "duplicate names": (
        changed(datasets=[*DATASETS, {"name": "math", "path": "other.jsonl"}]),
        ["datasets[0]", "datasets[2]", "`math`", "name"],
    ),
    "more groups than datasets": (changed(plan={"num_groups": 3}), ["plan.num_groups=3", "2 datasets", "2 or less"]),
    "joint with groups": (changed(plan={"split": "joint", "num_groups": 2}), ["plan.num_groups", "2", "joint", "1"]),
    "by_tag without tag": (
        changed(plan={"split": "by_tag"}, datasets=[DATASETS[0], {"name": "chat", "path": "c"}]),
        ["plan.split", "by_tag", "`chat`", "`tag`"],
    ),
    "empty file": ("", ["empty", "`base:`", "`datasets:`"]),
    "only a comment": ("# nothing\n", ["empty"]),
    "a list": ("- a\n- b\n", ["mapping", "list"]),
    "a scalar": ("hello", ["mapping", "str"]),
    "not YAML": ("base: {a: [1\nplan: }", ["not valid YAML", "line 2"]),
    "a tab": ("base:\n\tmodel: x\n", ["not valid YAML", "line 2"]),
    "key that is no string": ("1: 2\nbase: {model_name_or_path: b}\ndatasets: [{name: a, path: b}]\n", ["1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN_ERRORS)
def test_mistakes_are_one_line_with_file_key_value_and_choice(case: str, tmp_path: Path) -> None:
    content, parts = PLAIN_ERRORS[case]
    path = write(tmp_path, content)
    message = refusal(path)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
    assert "pydantic" not in message
    assert message.endswith((".", "?")), message


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "mixture.yaml")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base: \xff\xfe")
    message = refusal(tmp_path / "latin.yaml")
    assert "latin.yaml" in message
    assert "\n" not in message


OVERRIDE_ERRORS = {
    "plan.num_group=2": ["`plan.num_group`", "2", "`num_groups`"],
    "plan.num_groups=two": ["plan.num_groups", "'two'", "integer"],
    "datasets.mth.path=x": ["datasets.mth.path=x", "`mth`", "`math`"],
    "datasets.math.promt=q": ["datasets.math.promt", "'q'", "`prompt`"],
    "plan.num_groups": ["`plan.num_groups`", "key=value"],
    "=3": ["`=3`", "key=value"],
    "base.model_name_or_path.x=3": ["base.model_name_or_path", "holds a value"],
    "datasets.math=3": ["datasets.math=3", "datasets.NAME.KEY=VALUE"],
    "plan.split=[a": ["plan.split=[a", "YAML"],
}


@pytest.mark.parametrize("override", OVERRIDE_ERRORS)
def test_a_bad_override_is_named(override: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, VALID), (override,))
    assert "\n" not in message
    for part in OVERRIDE_ERRORS[override]:
        assert part in message, f"{part!r} is not in: {message}"


def test_overrides_come_after_the_file_and_reach_everything(tmp_path: Path) -> None:
    path = write(tmp_path, changed(plan={"num_samples": 10, "num_groups": 2}))
    overrides = [
        "plan.num_samples=20", "plan.seed=7", "datasets.chat.path=data/new.jsonl", "datasets.chat.eval_fraction=0.2",
        "merge.out_dtype=float32", "hub.private=false", "base.revision=", "plan.seed=8",
    ]  # fmt: skip
    config = MeritConfig.from_yaml(path, overrides)
    assert (config.plan.num_samples, config.plan.num_groups, config.plan.seed) == (20, 2, 8)
    assert {d.name: d.path for d in config.datasets} == {"math": "math.jsonl", "chat": "data/new.jsonl"}
    assert [d.eval_fraction for d in config.datasets] == [0.05, 0.2]
    assert config.merge.out_dtype == "float32"
    assert config.hub.private is False
    assert config.base.revision is None


def test_only_base_and_datasets_are_required_and_paths_refer_to_the_file(tmp_path: Path) -> None:
    config = MeritConfig.from_yaml(write(tmp_path, VALID))
    assert config.root == tmp_path.resolve()
    assert "root" not in config.model_dump()
    assert config.merge.engine == "safetensors"
    assert config.merge.weights == "tokens"
    assert config.hub.push is False
    assert config.hub.private is True
    assert config.sft == {}


@pytest.mark.parametrize(
    ("plan", "count", "expected"),
    [({}, 2, 2), ({}, 9, 4), ({"num_groups": 3}, 9, 3), ({"split": "joint"}, 9, 1), ({"split": "by_tag"}, 9, 3)],
)
def test_the_number_of_groups_follows_from_the_split(plan: dict[str, Any], count: int, expected: int) -> None:
    entries = [{"name": f"d{i}", "path": "x", "tag": "abc"[i % 3]} for i in range(count)]
    assert MeritConfig.from_dict(changed(plan=plan, datasets=entries)).num_groups == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("2.E-4", 2e-4), ("-1e3", -1000.0), ("1.0e-5", 1e-5), ("3", 3), ("true", True), ("", None),
        ("null", None), ("[1, 2]", [1, 2]), ("a: b", {"a": "b"}), ("1e-5x", "1e-5x"), ("1.5", 1.5),
    ],
)  # fmt: skip
def test_values_are_yaml_and_1e_5_is_a_number(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


SFT_ERRORS = {
    "sft.learning_rat=1e-4": ["`sft.learning_rat`", "0.0001", "`learning_rate`"],
    "sft.max_seq_length=512": ["`sft.max_seq_length`", "512", "length`"],
    "sft.num_train_epochs=many": ["sft.num_train_epochs", "'many'", "str", "float"],
    "sft.max_length=1.5": ["sft.max_length", "1.5", "float", "int"],
    "sft.packing=1": ["sft.packing", "1", "int", "bool"],
    "sft.per_device_train_batch_size=true": ["sft.per_device_train_batch_size", "True", "bool", "int"],
    "sft.lr_scheduler_type=cosin": ["sft.lr_scheduler_type", "'cosin'", "`cosine`"],
    "sft.optim=adamw_troch": ["sft.optim", "'adamw_troch'", "`adamw_torch`"],
}


@pytest.mark.parametrize("override", SFT_ERRORS)
def test_sft_fields_are_held_against_trl(override: str, tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    message = refusal(path, (override,))
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in SFT_ERRORS[override]:
        assert part in message, f"{part!r} is not in: {message}"


def test_sft_takes_what_trl_takes(tmp_path: Path) -> None:
    text = (
        "base: {model_name_or_path: b}\ndatasets: [{name: a, path: b}]\n"
        "sft: {learning_rate: 1e-5, weight_decay: 0, max_length: null, lr_scheduler_type: cosine, packing: false,\n"
        "  lr_scheduler_kwargs: {num_cycles: 0.5}, report_to: none, optim: adamw_torch, warmup_steps: 0.1}\n"
    )
    sft = MeritConfig.from_yaml(write(tmp_path, text)).sft
    assert sft["learning_rate"] == 1e-5
    assert type(sft["learning_rate"]) is float
    assert sft["max_length"] is None
    assert sft["lr_scheduler_kwargs"] == {"num_cycles": 0.5}


def test_mistakes_outside_sft_are_found_without_torch(tmp_path: Path) -> None:
    """In a process of its own, where an import cannot have happened before."""
    paths = []
    for number, (content, _) in enumerate(PLAIN_ERRORS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(str(write(folder, content)))
    script = (
        "import json, sys\n"
        "from merit_hf import ConfigError, MeritConfig\n"
        "caught = 0\n"
        "for path in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        MeritConfig.from_yaml(path, ['sft.learning_rate=1e-4'])\n"
        "    except ConfigError:\n"
        "        caught += 1\n"
        "heavy = [m for m in ('torch', 'transformers', 'trl', 'datasets', 'numpy') if m in sys.modules]\n"
        "sys.stdout.write(json.dumps([caught, heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(paths)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [len(paths), []]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_line_refuses_a_bad_config_at_once(command: str, tmp_path: Path) -> None:
    """Exit 2, one line, no traceback, nothing written, and no time lost on imports."""
    path = write(tmp_path, changed(plan={"num_group": 2}))
    script = (
        "import atexit, sys\n"
        "from merit_hf.cli import main\n"
        "def heavy():\n"
        "    found = [m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules]\n"
        "    sys.stdout.write(f'heavy={found}')\n"
        "atexit.register(heavy)\n"
        f"sys.argv = ['merit', {command!r}, {str(path)!r}, '--output', {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("merit: error: ")
    assert "`num_groups`" in done.stderr
    assert done.stdout == "heavy=[]"
    assert [item.name for item in tmp_path.iterdir()] == ["mixture.yaml"]
