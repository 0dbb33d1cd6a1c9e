"""Architectures whose tensors transformers renames or fuses while loading: points between are right all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_mixture, make_tokenizer
from tiny_models import make_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from merit_hf import MeritConfig, MeritPlanner, diagnose, merge_groups, train_group
from merit_hf.align import align
from merit_hf.config import MeritError
from merit_hf.diagnosis.basin import Point
from merit_hf.diagnosis.interpolate import Mover, holds_the_same_tensors
from merit_hf.diagnosis.renamed import under_the_models_names
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_model

QUIET = Progress(quiet=True)
LABELS = ("base", "group-0", "group-1")


@pytest.mark.parametrize("name", ["GPT-NeoX", "Mixtral", "Qwen2-MoE", "Qwen3-MoE"])
def test_a_point_is_the_sum_of_the_models_that_transformers_loads(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / label for label in LABELS]
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    for seed, (folder, dtype) in enumerate(zip(folders, dtypes, strict=True)):
        make_model(name, folder, seed, dtype)
    args, scratch = build_args({}), tmp_path / "d" / "renamed.part"
    model = load_model(folders[0], args)
    loaded = [load_model(folder, args).state_dict() for folder in folders]
    sources = dict(zip(LABELS, align(folders[0], folders[1:]), strict=True))
    # Where names alone differ, tensors are set under the names that they are saved under; nothing is written out.
    is_rewritten = name != "GPT-NeoX"
    assert holds_the_same_tensors(model, sources["base"]) != is_rewritten
    if is_rewritten:
        scratch.mkdir(parents=True)
        (scratch / "of a call that was killed").touch()
    with under_the_models_names(model, sources, args, scratch, QUIET) as renamed:
        mover = Mover(model, renamed)
        mover.move_to(Point.of({"base": 0.2, "group-0": 1.1, "group-1": -0.3}))
        _, squares = mover.grams(LABELS[1:])
    assert not scratch.exists()
    for key, tensor in model.state_dict().items():
        exact = 0.2 * loaded[0][key].double() + 1.1 * loaded[1][key].double() - 0.3 * loaded[2][key].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
    total = sum(
        float(source.norm()) ** 2 for source in {t.data_ptr(): t.double() for t in loaded[0].values()}.values()
    )
    assert squares.sum() == pytest.approx(total, rel=1e-6)


def test_an_adapter_on_such_a_base(tmp_path: Path) -> None:
    make_model("GPT-NeoX", tmp_path / "base", 0, torch.float32)
    args = build_args({})
    lora = get_peft_model(load_model(tmp_path / "base", args), LoraConfig(r=2, target_modules=["query_key_value"]))
    with torch.no_grad():
        for parameter_name, parameter in lora.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
    lora.save_pretrained(tmp_path / "group-0")
    model = load_model(tmp_path / "base", args)
    sources = dict(zip(LABELS, align(tmp_path / "base", [tmp_path / "group-0"]), strict=False))
    with under_the_models_names(model, sources, args, tmp_path / "renamed.part", QUIET) as renamed:
        Mover(model, renamed).move_to(Point.of({"group-0": 1.0}))
    whole = PeftModel.from_pretrained(load_model(tmp_path / "base", args), tmp_path / "group-0").merge_and_unload()
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("peft.r=2", "peft.target_modules=[query_key_value]")])
def test_groups_of_a_renamed_architecture_are_diagnosed(lora: tuple[str, ...], tmp_path: Path) -> None:
    """Plan, training, merge and diagnosis of a GPT-NeoX; the losses are those of `merit evaluate`."""
    config = make_mixture(tmp_path, count=8)
    tokenizer = make_tokenizer()
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    GPTNeoXForCausalLM(GPTNeoXConfig(**values)).save_pretrained(tmp_path / "base")
    overrides = ["plan.split=random", "sft.learning_rate=0.03", *lora]
    plan = MeritPlanner(MeritConfig.from_yaml(config, overrides), QUIET).plan(tmp_path / "plan")
    groups = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in range(2)]
    merge_groups(plan, groups, tmp_path / "merged", out_dtype="float32")
    content = diagnose(plan, groups, tmp_path / "d", merged=tmp_path / "merged", epsilons=(0.25,), progress=QUIET)
    models = {"base": plan.base_folder(), "group-0": groups[0], "group-1": groups[1], "merged": tmp_path / "merged"}
    expected = evaluate_models(plan, models, 64, generate=False, progress=QUIET)["mean"]
    for label, loss in expected.items():
        assert content["overall"]["loss"][label] == pytest.approx(loss, rel=2e-5), label
    assert content["overall"]["loss"]["mean"] == pytest.approx(expected["merged"], rel=2e-5)
    gain = content["overall"]["gain"]
    assert gain["predicted_by_gradient"] == pytest.approx(gain["ladder"][0]["predicted"]["value"], rel=0.1)
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"README.md", "diagnosis.json", "measurements"}


@pytest.mark.parametrize("name", ["Llama, sequence classification", "Llama, value head"])
def test_a_model_that_lost_tensors_or_drew_them_anew_is_refused(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path / "base", 0, torch.float32)
    make_model(name, tmp_path / "group-0", 1, torch.float32)
    args = build_args({})
    sources = dict(zip(LABELS, align(tmp_path / "base", [tmp_path / "group-0"]), strict=False))
    model = load_model(tmp_path / "base", args)
    with (
        pytest.raises(MeritError, match="holds other numbers"),
        under_the_models_names(model, sources, args, tmp_path / "renamed.part", QUIET),
    ):
        pass
    assert not (tmp_path / "renamed.part").exists()
