"""What both merges make of a tiny model: a sentence each. Used by merge_speed.py."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import PreTrainedModel

from merit_hf.merge import MERGEKIT_CONFIG_NAME, merge_checkpoints

WEIGHTS = [3, 1]
Tensors = Mapping[str, torch.Tensor]


def compare(name: str, folder: Path) -> tuple[str, str]:
    """Merge two checkpoints of an architecture with both, hold the results against float64, and load them."""
    logging.disable(logging.WARNING)
    base, *groups = [folder / part for part in ("base", "group-0", "group-1")]
    for seed, path in enumerate((base, *groups)):
        kind = make_model(name, path, seed)
    loaded = [load(path) for path in groups]
    exact = {
        key: sum(w * tensors[key].double() for w, tensors in zip(WEIGHTS, loaded, strict=True)) / sum(WEIGHTS)
        for key in loaded[0]
    }
    expected = state(kind, base)[1]
    merge_checkpoints(base, groups, WEIGHTS, folder / "ours")
    ours = verdict(kind, folder / "ours", exact, expected, state(kind, folder / "ours")[0], slack=0.0)
    try:
        run_mergekit(folder / "ours" / MERGEKIT_CONFIG_NAME, folder / "theirs")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(str(folder), "…")
        theirs = f"refuses: {reason[:150]}"
    else:
        slack = torch.finfo(torch.float32).eps
        theirs = verdict(kind, folder / "theirs", exact, expected, state(kind, folder / "ours")[0], slack)
    shutil.rmtree(folder)
    return ours, theirs


def verdict(
    kind: type[PreTrainedModel], output: Path, exact: Tensors, expected: set[str], right: Tensors, slack: float
) -> str:
    merged = load(output)
    lost, added = sorted(exact.keys() - merged.keys()), sorted(merged.keys() - exact.keys())
    wrong = [key for key in merged.keys() & exact.keys() if not near(merged[key], exact[key], slack)]
    values, odd = state(kind, output)
    odd = odd - expected
    differs = [key for key in right if not torch.allclose(values[key], right[key], rtol=2**-7, atol=1e-6)]
    if wrong:
        return f"**wrong** values in {len(wrong)} tensors: {names(wrong)}"
    if lost and not differs and not odd and added:
        return f"right, {len(lost)} of {len(exact)} tensors under other names ({names(added)})"
    if lost:
        loads = f"; the loaded model is wrong in {len(differs)}" if differs else ""
        return f"**loses** {len(lost)} of {len(exact)} tensors: {names(lost)}{loads}"
    if odd or differs:
        return f"**loads wrongly**: {names(sorted(odd) or differs)}"
    return f"right ({len(exact)} tensors)"


def near(values: torch.Tensor, exact: torch.Tensor, slack: float) -> bool:
    """Within half a spacing of the dtype: what one rounding may change."""
    limit = torch.finfo(values.dtype)
    spacing = limit.eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=limit.tiny))))
    bound = spacing * (0.5 + 1e-9) + slack * exact.abs().max() + limit.smallest_normal * limit.eps
    return bool(((values.double() - exact).abs() <= bound).all())


def state(kind: type[PreTrainedModel], folder: Path) -> tuple[Tensors, set[str]]:
    """What a model holds once it is loaded, in float32, and the keys that were missing or unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    odd = {str(key) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[what]}
    return model.state_dict(), odd


def run_mergekit(recipe: Path, output: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    run_merge(config, str(output), MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False))


def load(folder: Path) -> Tensors:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def names(keys: list[str], count: int = 2) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(f"`{key}`" for key in keys[:count]) + more
