"""CONFIG: the one YAML that names a base, the datasets, and how to plan, train and merge.

    config = MeritConfig.from_yaml("mixture.yaml", ["plan.num_groups=2", "sft.learning_rate=2e-5"])

Every mistake is a [`ConfigError`] of one line: file, key, value found, what is valid and the nearest valid choice.
"""

from __future__ import annotations

import re
import typing
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from merit_hf.choices import (
    check_adapters,
    check_choices,
    check_merge_method,
    check_part,
    check_rounds,
    check_selection,
    check_stream,
)
from merit_hf.errors import ConfigError as ConfigError
from merit_hf.errors import MeritError as MeritError
from merit_hf.fields import check_fields, nearest
from merit_hf.overrides import apply_override, read_mapping
from merit_hf.overrides import parse_value as parse_value
from merit_hf.sections import BaseSection as BaseSection
from merit_hf.sections import DatasetSection as DatasetSection
from merit_hf.sections import HubSection as HubSection
from merit_hf.sections import MergeSection as MergeSection
from merit_hf.sections import PlanSection as PlanSection
from merit_hf.sections import RunSection as RunSection
from merit_hf.sections import Section
from merit_hf.train_section import TrainSection

# Scores of an answer against its reference; beside them, every task of reasoning-gym has a scorer of its own.
METRICS = ("exact_match", "chrf", "rouge1", "rouge2", "rougeL", "none")
REASONING_GYM = "reasoning_gym."


class MeritConfig(Section):
    """CONFIG as read. `root` is the folder that relative paths refer to; it is not part of CONFIG."""

    base: BaseSection
    datasets: list[DatasetSection] = Field(min_length=1)
    plan: PlanSection = PlanSection()
    sft: dict[str, Any] = Field(default={})
    peft: dict[str, Any] | None = None
    train: TrainSection = TrainSection()
    merge: MergeSection = MergeSection()
    run: RunSection = RunSection()
    hub: HubSection = HubSection()
    root: Path = Field(default=Path(), exclude=True)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> MeritConfig:
        """Read CONFIG, apply `key=value` overrides (`datasets.NAME.key=value` for a dataset) and check all of it.

        Raises:
            ConfigError: the file cannot be read as a mapping, a key is unknown, a value has the wrong type or is
                out of range, dataset names repeat, or there are more groups than datasets.
        """
        path = Path(path)
        content = read_mapping(path)
        for override in overrides:
            apply_override(content, override)
        config = cls.from_dict(content, source=str(path), root=path.resolve().parent)
        check_sft(config.sft, str(path))
        check_peft(config.peft, str(path))
        return config

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "config", root: Path = Path()) -> MeritConfig:
        """Check a mapping; [`~MeritConfig.from_yaml`] also asks TRL and PEFT about the values of `sft` and `peft`."""
        if "root" in content:
            raise ConfigError(f"{source}: unknown key `root`. {nearest('root', _keys(cls))}")
        try:
            config = cls.model_validate({**content, "root": root})
        except ValidationError as error:
            raise ConfigError(_explain(error, content, source)) from None
        config._check_across(source)
        return config

    @property
    def num_groups(self) -> int:
        """K, with the defaults of `plan.split` resolved."""
        if self.plan.split == "joint":
            return 1
        if self.plan.split == "by_tag":
            return len({dataset.tag for dataset in self.datasets})
        if self.plan.group_shares is not None:
            return len(self.plan.group_shares)
        return self.plan.num_groups or min(4, len(self.datasets))

    def _check_across(self, source: str) -> None:
        names = [dataset.name for dataset in self.datasets]
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            places = [f"datasets[{i}]" for i, name in enumerate(names) if name == repeated[0]]
            raise ConfigError(
                f"{source}: {' and '.join(places)} are both named `{repeated[0]}`. Give each its own `name`."
            )
        wanted = self.plan.num_groups
        if wanted is not None and wanted > len(names):
            raise ConfigError(
                f"{source}: plan.num_groups={wanted}, but there are {len(names)} datasets and no group may be empty. "
                f"Set plan.num_groups to {len(names)} or less, or add datasets."
            )
        if wanted is not None and self.plan.split in ("joint", "by_tag") and wanted != self.num_groups:
            raise ConfigError(
                f"{source}: plan.num_groups={wanted}, but plan.split={self.plan.split} gives {self.num_groups}. "
                "Leave plan.num_groups out."
            )
        if self.plan.sketch_by_layer and self.plan.sketch != "count_sketch":
            raise ConfigError(
                f"{source}: plan.sketch_by_layer is for plan.sketch=count_sketch, which is {self.plan.sketch} here. "
                "Leave one of them out."
            )
        check_choices(self.plan, len(names), source)
        for dataset in self.datasets:
            check_selection(dataset.name, dataset.data_files, dataset.where, source)
            if dataset.part is not None:
                check_part(dataset.name, dataset.part, source)
            check_stream(dataset, source)
        merge = self.merge
        check_merge_method(merge.engine, merge.method, merge.parameters, source, merge.interpolate_to_init)
        check_rounds(self, source)
        for dataset in self.datasets:
            if dataset.metric is not None:
                check_metric(dataset.metric, f"{source}: datasets.{dataset.name}.metric")
        untagged = [dataset.name for dataset in self.datasets if dataset.tag is None]
        if self.plan.split == "by_tag" and untagged:
            raise ConfigError(f"{source}: plan.split=by_tag, but dataset `{untagged[0]}` has no `tag`. Give it one.")
        if self.peft is not None and self.base.freeze:
            raise ConfigError(
                f"{source}: base.freeze={self.base.freeze} with `peft:`, which trains nothing of the base. Leave "
                "base.freeze out, and keep adapters off modules with peft.exclude_modules."
            )
        check_adapters(self, source)


def check_metric(name: str, where: str) -> None:
    """Raises ConfigError where `name` is no metric of `merit evaluate`."""
    if name not in METRICS and not re.fullmatch(re.escape(REASONING_GYM) + r"\w+", name):
        choices = [*METRICS, f"{REASONING_GYM}TASK"]
        raise ConfigError(f"{where}={name!r} is not one of {', '.join(choices)}. {nearest(name, choices)}")


def _keys(model: Any) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _section_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    sections: dict[Any, type[BaseModel]] = {
        "base": BaseSection, "datasets": DatasetSection, "plan": PlanSection, "train": TrainSection,
        "merge": MergeSection, "run": RunSection, "hub": HubSection,
    }  # fmt: skip
    return sections.get(location[0], MeritConfig) if len(location) > 1 else MeritConfig


def _explain(error: ValidationError, content: dict[str, Any], source: str) -> str:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    if first["type"] == "missing":
        # A key that is wanted under another name.
        strange = (other for other in error.errors() if other["type"] == "extra_forbidden")
        first = next((other for other in strange if other["loc"][:-1] == first["loc"][:-1]), first)
    # Of a key that takes a number or a word, pydantic names the alternative behind the key.
    location, value = tuple(part for part in first["loc"] if part != "constrained-int"), first["input"]
    words = [
        f" or {other['ctx']['expected']}"
        for other in error.errors()[1:]
        if other["type"] == "literal_error" and other["loc"][:-1] == location
    ]
    entries = content.get("datasets")
    listed = entries if isinstance(entries, list) else []
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in listed]
    shown = [
        f"{names[part]}" if i == 1 and isinstance(part, int) and part < len(names) and names[part] else str(part)
        for i, part in enumerate(location)
    ]
    key = ".".join(shown)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return (
            f"{source}: unknown key `{key}` (value {value!r}). {nearest(location[-1], _keys(_section_of(location)))}"
        )
    if kind == "missing":
        return f"{source}: `{key}` is missing and has no default. Add it."
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{source}: {key}={value!r} is not one of {', '.join(choices)}. {nearest(value, choices)}"
    expected = first["msg"].replace("Input should be ", "").replace("a valid ", "")
    return f"{source}: {key}={value!r} ({type(value).__name__}): expected {expected}{''.join(words)}."


def check_sft(sft: dict[str, Any], source: str) -> None:
    """Names and types of `sft` against the installed TRL's SFTConfig (imported here: it brings torch)."""
    if not sft:
        return
    from trl import SFTConfig

    _check_fields(sft, "sft", SFTConfig, source)


def check_peft(peft: dict[str, Any] | None, source: str) -> None:
    """Names and types of `peft` against the installed PEFT's LoraConfig (imported here: it brings torch)."""
    if not peft:
        return
    from peft import LoraConfig

    _check_fields(peft, "peft", LoraConfig, source)


def _check_fields(values: dict[str, Any], section: str, kind: type, source: str) -> None:
    try:
        check_fields(values, section, kind)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
