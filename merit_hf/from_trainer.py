"""CONFIG of an SFTTrainer that somebody has already: its base, template and settings, and data by name."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from safetensors import safe_open
from trl import SFTConfig, SFTTrainer

from merit_hf.checkpoint import read_tensor_index
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.hub import resolve_model
from merit_hf.resolved import first_difference
from merit_hf.sft import build_args, identity_fields, load_tokenizer
from merit_hf.vision import names_of_trained

_TEMPLATE_NAME = "chat_template.jinja"
# Of the run, or set by the planner.
_NOT_CARRIED = ("output_dir", "resume_from_checkpoint", "hub_token", "run_name", "logging_dir")


def config_from_trainer(
    trainer: SFTTrainer,
    rows: Mapping[str, datasets.Dataset],
    data_dir: str | Path,
    plan: Mapping[str, Any] | None = None,
    held_out: Mapping[str, datasets.Dataset] | None = None,
    tags: Mapping[str, str] | None = None,
) -> MeritConfig:
    """CONFIG with the trainer's base, chat template and settings, and datasets that are written to `data_dir`.

    Raises:
        ConfigError: the trainer has an adapter, was trained already, or has settings that CONFIG cannot say; names of
            `held_out` or `tags` are not among the datasets; or what [`MeritConfig`] refuses.
    """
    args, model = trainer.args, trainer.model
    assert isinstance(args, SFTConfig)
    assert model is not None
    if isinstance(model, PeftModel):
        raise ConfigError(
            "from_trainer plans trainings of all weights, and this trainer's model has an adapter. Use a CONFIG with "
            "`peft:`, whose adapter every group starts from."
        )
    for what, names in (("held_out", held_out or {}), ("tags", tags or {})):
        unknown = sorted(set(names) - set(rows))
        if unknown:
            raise ConfigError(f"from_trainer: {what} has `{unknown[0]}`, datasets have {', '.join(sorted(rows))}.")
    named = str(getattr(model.config, "_name_or_path", "") or "")
    if not named:
        raise ConfigError("from_trainer: the trainer's model was loaded from no folder or Hub id, so it has no base.")
    folder, repo_id, revision = resolve_model(
        named, getattr(model.config, "_commit_hash", None), Path(), "the trainer's model"
    )
    _check_untrained(trainer, folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = sorted(names_of_trained(model) - trained)
    if frozen:
        raise ConfigError(
            f"from_trainer: parameter `{frozen[0]}` is frozen ({len(frozen)} are). Write a CONFIG with base.freeze, "
            "and plan from it."
        )
    data_dir = Path(data_dir).resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    sft = _settings(args)
    template = getattr(trainer.processing_class, "chat_template", None)
    if template != load_tokenizer(folder).chat_template and template is not None:
        (data_dir / _TEMPLATE_NAME).write_text(template, encoding="utf-8")
        sft["chat_template_path"] = str(data_dir / _TEMPLATE_NAME)
    entries = []
    for name, dataset in sorted(rows.items()):
        entry: dict[str, Any] = {"name": name, "path": _write(dataset, data_dir, name), "eval_fraction": 0.0}
        if held_out and name in held_out:
            entry["eval_path"] = _write(held_out[name], data_dir, f"{name} held out")
        if tags and name in tags:
            entry["tag"] = tags[name]
        entries.append(entry)
    base = {"model_name_or_path": repo_id or str(folder), **({"revision": revision} if repo_id else {})}
    content = {"base": base, "datasets": entries, "plan": dict(plan or {}), "sft": sft}
    return MeritConfig.from_dict(content, source="from_trainer", root=data_dir)


def _settings(args: SFTConfig) -> dict[str, Any]:
    """The fields of `args` that differ from what an empty `sft:` gives, so that `sft:` with them is `args`."""
    plain = build_args({})
    sft: dict[str, Any] = {}
    for field in dataclasses.fields(SFTConfig):
        value, default = getattr(args, field.name, None), getattr(plain, field.name, None)
        value = value.value if isinstance(value, enum.Enum) else value
        default = default.value if isinstance(default, enum.Enum) else default
        if field.init and field.name not in _NOT_CARRIED and value != default and _is_plain(value):
            sft[field.name] = value
    difference = first_difference(identity_fields(args), identity_fields(build_args(sft)))
    if difference:
        raise ConfigError(f"from_trainer: args.{difference}. Plan from a CONFIG, whose `sft:` says it.")
    return sft


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _check_untrained(trainer: SFTTrainer, folder: Path) -> None:
    """Gradients are those at the base: weights that have moved would be another plan's."""
    assert trainer.model is not None
    mine = trainer.model.state_dict()
    index = read_tensor_index(folder)
    by_file: dict[str, list[str]] = {}
    for name in index.keys() & mine.keys():
        by_file.setdefault(index[name].file, []).append(name)
    moved = 0
    for file, names in sorted(by_file.items()):
        with safe_open(folder / file, framework="pt") as stored:
            for name in names:
                weight = mine[name].detach().cpu()
                moved += not torch.equal(stored.get_tensor(name).to(weight.dtype), weight)
    if moved or trainer.state.global_step:
        raise ConfigError(
            f"from_trainer: {moved} weights of the trainer's model are not those of {folder} any more. Make the plan "
            "before training, with a trainer of the base."
        )


def _write(rows: datasets.Dataset, folder: Path, name: str) -> str:
    """The rows as a parquet file of the folder, in one step; returns the file's name."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40]
    file = folder / f"{slug or 'data'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.parquet"
    part = file.with_suffix(".parquet.part")
    rows.to_parquet(part)
    os.replace(part, file)
    return file.name
