"""LoRA adapters: the `peft:` block, what a folder of an adapter says, and what is refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_adapter_merge import PLAIN, SHAPE
from tiny import make_adapter, make_base

from merit_hf.adapters import (
    adapter_settings,
    add_adapter,
    expected_adapter_tensors,
    lora_config,
    model_settings,
    publish_adapter_config,
    read_adapter_index,
)
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.sft import build_args, check_trainable, load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", seed=3, **SHAPE)


def test_settings_are_the_same_of_a_model_and_of_its_folder(base: Path, tmp_path: Path) -> None:
    for number, lora in enumerate([{"r": 2}, {"target_modules": "all-linear"}, {"target_modules": ".*q_proj"}]):
        model = add_adapter(load_model(base), lora, seed=0)
        model.save_pretrained(tmp_path / str(number))
        found = model_settings(model)
        assert adapter_settings(tmp_path / str(number)) == found
        assert found == json.loads(json.dumps(found))
        # What PEFT resolved is taken as it is by the next model.
        assert model_settings(add_adapter(load_model(base), found, seed=0)) == found
        shapes = {name: info.shape for name, info in read_adapter_index(tmp_path / str(number)).items()}
        assert expected_adapter_tensors(base, found) == shapes


def test_the_published_config_names_no_place_and_has_one_order(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "a", 0, **PLAIN)
    assert str(base) in (folder / "adapter_config.json").read_text()
    publish_adapter_config(folder, "org/base", "f" * 40)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "f" * 40)
    assert config["target_modules"] == sorted(PLAIN["target_modules"])
    publish_adapter_config(folder, None, None)
    text = (folder / "adapter_config.json").read_text()
    assert str(base.parent) not in text
    assert json.loads(text)["base_model_name_or_path"] is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "peft.use_dora=True is not supported: DoRA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "peft.modules_to_save=.* no low-rank update"),
    "biases": ({"bias": "all"}, "peft.bias='all' is not supported"),
    "a field of another method": ({"use_qalora": True}, "peft.use_qalora=True is not supported"),
    "an adapter that changes the base": ({"init_lora_weights": "pissa"}, "peft.init_lora_weights='pissa'"),
    "an adapter that is not zero": ({"init_lora_weights": False}, "peft.init_lora_weights=False"),
    "dropout": ({"lora_dropout": 1.0}, "peft.lora_dropout=1.0"),
    "no rank": ({"r": 0}, "peft: .*r"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "reaches `model.embed_tokens`, a Embedding"),
    "the output layer": ({"target_modules": ["lm_head"]}, "lm_head"),
    "nothing of the model": ({"target_modules": ["no_such"]}, "peft: .*no_such"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case: str, base_dir: Path) -> None:
    peft, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said) as caught:
        add_adapter(load_model(base_dir), peft, seed=0)
    assert "\n" not in str(caught.value)


def test_fields_that_say_nothing_pass() -> None:
    config = lora_config({"bias": "none", "use_dora": False, "task_type": "CAUSAL_LM", "modules_to_save": None})
    assert config.r == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("peft.lora_alfa=3", "unknown key `peft.lora_alfa` .value 3.. Did you mean `lora_alpha`"),
        ("peft.r=many", "peft.r='many' .str.: expected int"),
        ("peft.use_rslora=1", "peft.use_rslora=1 .int.: expected bool"),
        ("peft.init_lora_weights=gausian", "peft.init_lora_weights='gausian'"),
        ("peft=3", "peft=3"),
        ("merge.adapters=concat", "merge.adapters=concat, but without `peft:`"),
    ],
)
def test_a_mistake_in_the_block_is_one_line(override: str, said: str, tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        MeritConfig.from_yaml(tiny_config, [override])
    for pair in (["merge.adapters=svd"], ["merge.svd_rank=3"]):
        with pytest.raises(ConfigError, match="needs a rank"):
            MeritConfig.from_yaml(tiny_config, ["peft.r=2", *pair])


def test_a_quantised_base_is_never_silently_a_whole_one(base_dir: Path) -> None:
    args = build_args({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}})
    with pytest.raises(ConfigError, match=r"quantised weights cannot be trained. Add `peft:`"):
        check_trainable(args, None)
    check_trainable(args, {})
    if importlib.util.find_spec("bitsandbytes"):
        model = load_model(base_dir, args, {"r": 2})
        assert "4bit" in type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")).__name__
        return
    with pytest.raises(
        MeritError, match=r"quantization_config: .* cannot be quantised here: .*bitsandbytes"
    ) as caught:
        load_model(base_dir, args, {"r": 2})
    assert "\n" not in str(caught.value)
