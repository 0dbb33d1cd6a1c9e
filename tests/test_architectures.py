"""The merge knows state-dict names alone: every architecture comes out whole, right to one rounding, and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from merging import assert_nearest, load, mean64, needs_mergekit
from tiny_models import MODELS, VALUE_HEAD, make_model

from merit_hf.checkpoint import read_tensor_index
from merit_hf.config import MeritError
from merit_hf.merge import MERGEKIT_CONFIG_NAME, merge_checkpoints

WEIGHTS = [123456789, 45678901, 7654321]
# What mergekit loses or renames: the number of tensors, the first of them, and how many others it writes.
LOST = {
    "Llama, attention and MLP biases": (14, "model.layers.0.mlp.down_proj.bias", 0),
    "Qwen3, attention biases": (8, "model.layers.0.self_attn.k_proj.bias", 0),
    "Mixtral": (26, "model.layers.0.block_sparse_moe.experts.0.w1.weight", 6),
    "Qwen3-MoE": (24, "model.layers.0.mlp.experts.0.down_proj.weight", 4),
    "LLaVA": (64, "language_model.lm_head.weight", 43),
    "T5, tied": (4, "decoder.block.0.layer.2.DenseReluDense.wi.weight", 8),
    "Llama, value head": (2, VALUE_HEAD[1], 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_merges_exactly_and_loads(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = make_model(name, base, 0)
    groups = [tmp_path / f"group-{k}" for k in range(3)]
    for k, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        make_model(name, groups[k], k + 1, dtype)
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out", max_shard_size="20KB")
    origin, merged, exact = load(base), load(tmp_path / "out"), mean64(groups, WEIGHTS)
    assert merged.keys() == origin.keys()
    assert ("lm_head.weight" in merged) == ("lm_head.weight" in origin)
    for key, tensor in merged.items():
        assert (tensor.dtype, tensor.shape) == (origin[key].dtype, origin[key].shape)
        assert_nearest(tensor, exact[key])
    loaded, info = model.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    heads = set(VALUE_HEAD) if name.endswith("value head") else set()
    assert {key: set(value) for key, value in info.items() if value} == ({"unexpected_keys": heads} if heads else {})
    # The values that the model holds are the merged ones, whatever names it has for them.
    held = sum(tensor.double().sum() for tensor in {t.data_ptr(): t for t in loaded.state_dict().values()}.values())
    stored = sum(tensor.double().sum() for key, tensor in merged.items() if key not in heads)
    assert held.item() == pytest.approx(stored.item(), abs=1e-9)


@needs_mergekit
@pytest.mark.parametrize("name", LOST)
def test_what_mergekit_would_lose_is_named_before_it_runs(name: str, tmp_path: Path) -> None:
    base, *groups = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate((base, *groups)):
        make_model(name, folder, k)
    count, first, others = LOST[name]
    instead = f", and write {others} others" if others else ""
    message = f"engine mergekit would lose {count} of {len(read_tensor_index(base))} tensors: {first}.*{instead}"
    with pytest.raises(MeritError, match=message):
        merge_checkpoints(base, groups, [1, 3], tmp_path / "out", engine="mergekit")
    assert not (tmp_path / "out.part").exists()


@needs_mergekit
def test_the_prediction_is_what_mergekit_does(tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    from merit_hf.mergekit_engine import planned_names

    for name in ("Llama, attention and MLP biases", "Qwen3-MoE", "Gemma 3", "SmolVLM"):
        base, *groups = [tmp_path / name / str(k) for k in range(3)]
        for k, folder in enumerate((base, *groups)):
            make_model(name, folder, k)
        merge_checkpoints(base, groups, [1, 3], tmp_path / name / "ours")
        recipe = (tmp_path / name / "ours" / MERGEKIT_CONFIG_NAME).read_text()
        config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
        run_merge(config, str(tmp_path / name / "theirs"), MergeOptions(quiet=True, write_model_card=False))
        assert read_tensor_index(tmp_path / name / "theirs").keys() == planned_names(recipe)


@needs_mergekit
@pytest.mark.parametrize("name", ["Llama, tied", "Gemma 3", "GPT-2", "Qwen2.5-VL, tied", "SmolVLM"])
def test_mergekit_agrees_where_it_keeps_everything(name: str, tmp_path: Path) -> None:
    base, *groups = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate((base, *groups)):
        make_model(name, folder, k, torch.float32)
    merge_checkpoints(base, groups, [1, 3], tmp_path / "out", engine="mergekit")
    exact = mean64(groups, [1, 3])
    merged = load(tmp_path / "out")
    assert merged.keys() == exact.keys()
    for key, tensor in merged.items():
        assert torch.allclose(tensor.double(), exact[key], rtol=1e-6, atol=1e-7)


@needs_mergekit
def test_an_architecture_that_mergekit_cannot_read(tmp_path: Path) -> None:
    base, *groups = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate((base, *groups)):
        make_model("GPT-NeoX", folder, k)
    with pytest.raises(MeritError, match=r"engine mergekit failed: .*Merge with engine safetensors"):
        merge_checkpoints(base, groups, [1, 3], tmp_path / "out", engine="mergekit")
