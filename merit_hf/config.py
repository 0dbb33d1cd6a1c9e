"""CONFIG: the one YAML that names a base, the datasets, and how to plan, train and merge.

    config = MeritConfig.from_yaml("mixture.yaml", ["plan.num_groups=2", "sft.learning_rate=2e-5"])

Every mistake is a [`ConfigError`] of one line: file, key, value found, what is valid and the nearest valid choice.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merit_hf.fields import check_fields, nearest


class MeritError(Exception):
    """A failure told in one line: what, where, found, expected, cure."""


class ConfigError(MeritError):
    """A mistake in a call or in a CONFIG file."""


# Scores of an answer against its reference; beside them, every task of reasoning-gym has a scorer of its own.
METRICS = ("exact_match", "chrf", "rouge1", "rouge2", "rougeL", "none")
REASONING_GYM = "reasoning_gym."


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseSection(_Section):
    """The merge-ready checkpoint that every group starts from.

    Args:
        model_name_or_path (`str`): a Hub id, or a folder relative to the CONFIG file.
        revision (`str`, *optional*): branch, tag or commit on the Hub; the commit found is pinned in the plan.
        freeze (`list[str]`, *optional*): modules that are not trained, by the beginning of their names in the model,
            such as `model.vision_tower`.
    """

    model_name_or_path: str
    revision: str | None = None
    freeze: list[str] = []


class DatasetSection(_Section):
    """One instruction dataset.

    Args:
        name (`str`): unique in the mixture; appears in every table.
        path (`str`): a Hub id, or a .json/.jsonl/.csv/.parquet file relative to the CONFIG file.
        config, split, revision (`str`, *optional*): as in `datasets.load_dataset`; split defaults to `"train"`.
        prompt, completion, messages, text (`str`, *optional*): the column that holds it, where its name differs.
        images (`str`, *optional*): the column that holds a row's image or images. Default: `images` or `image`, where
            there is one and the base reads images.
        chat (`bool`, *optional*, defaults to `False`): wrap plain prompt and completion strings as a user and an
            assistant turn, so that the chat template applies. TRL trains plain strings without a template.
        tag (`str`, *optional*): a label; `plan.split: by_tag` groups by it.
        eval_path, eval_split (`str`, *optional*): held-out rows, same columns. Otherwise `eval_fraction` of the rows.
        eval_fraction (`float`, *optional*, defaults to `0.05`): share of the rows that is held out of training.
        metric (`str`, *optional*): what `merit evaluate` scores answers by: one of [`METRICS`], or
            `reasoning_gym.TASK`. Default: by the length of the references.
    """

    name: str = Field(min_length=1)
    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    images: str | None = None
    chat: bool = False
    tag: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    metric: str | None = None


class PlanSection(_Section):
    """How the mixture is split.

    Args:
        split: `merit` (conflict-aware), or a baseline: `random`, `joint` (one group), `by_tag`, `kmeans`.
        num_groups (`int`, *optional*): K. Default 4, or the number of datasets where that is smaller; `joint` has one
            group and `by_tag` one a tag.
        num_samples (`int`, *optional*, defaults to `200`): examples a dataset gradient is the mean of.
        sketch: how a gradient is read out: `count_sketch`, `stride` (every `stride`-th parameter) or `exact`.
        sketch_dim (`int`, *optional*, defaults to `65536`): length of a count sketch.
        reduction: `token_mean` (summed loss over all loss tokens) or `example_mean` (mean of the examples' means).
        center: PCA of the conflict matrix less its `column` mean, of it as it is (`none`), or centred `double`.
        balance: what the groups are balanced in: `tokens`, `examples` or `datasets`.
        axes: `global` (one PCA) or `local` (again inside each half).
        tokens_per_batch (`int`, *optional*, defaults to `2048`): largest micro-batch, padding included, in tokens.
        seed (`int`, *optional*, defaults to `0`): of samples, sketch and random splits.
    """

    split: Literal["merit", "random", "joint", "by_tag", "kmeans"] = "merit"
    num_groups: int | None = Field(default=None, ge=1)
    num_samples: int = Field(default=200, ge=1)
    sketch: Literal["count_sketch", "stride", "exact"] = "count_sketch"
    sketch_dim: int = Field(default=65536, ge=16)
    stride: int = Field(default=5, ge=1)
    reduction: Literal["token_mean", "example_mean"] = "token_mean"
    center: Literal["column", "none", "double"] = "column"
    balance: Literal["tokens", "examples", "datasets"] = "tokens"
    axes: Literal["global", "local"] = "global"
    tokens_per_batch: int = Field(default=2048, ge=1)
    seed: int = Field(default=0, ge=0)


class MergeSection(_Section):
    """How the groups become one model.

    Args:
        engine: `safetensors` (streaming, key-checked) or `mergekit`.
        weights (`str`, *optional*, defaults to `"tokens"`): `tokens`, `loss_tokens`, `uniform`, or a YAML file that
            maps group to weight.
        out_dtype (`str`, *optional*): of the merged weights. Default: the base's.
        adapters: of LoRA groups, `dense` (a full checkpoint), `concat` (an adapter of summed rank; both are exact) or
            `svd` (an adapter of rank `svd_rank`).
        svd_rank (`int`, *optional*): rank of the merged adapter; required with `svd`.
        method (`str`, *optional*, defaults to `"linear"`): one of mergekit's, where `engine` is `mergekit`: `ties`,
            `dare_ties`, `slerp`, `karcher`, …
        parameters (`dict`, *optional*): of the method, by mergekit's names, such as `density`.
    """

    engine: Literal["safetensors", "mergekit"] = "safetensors"
    weights: str = "tokens"
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    adapters: Literal["dense", "concat", "svd"] = "dense"
    svd_rank: int | None = Field(default=None, ge=1)
    method: str = "linear"
    parameters: dict[str, Any] = {}


class HubSection(_Section):
    """Where `merit run` publishes what it made.

    Args:
        push (`bool`, *optional*, defaults to `False`): upload plan, groups and merged model when all are done.
        namespace (`str`, *optional*): user or organisation. Default: the token's owner.
        private (`bool`, *optional*, defaults to `True`): visibility of repos that do not exist yet.
        license (`str`, *optional*): of the merged model. Default: what follows from base and data; where that is not
            clear, the push is refused until this is given.
    """

    push: bool = False
    namespace: str | None = None
    private: bool = True
    license: str | None = None


class MeritConfig(_Section):
    """CONFIG as read. `root` is the folder that relative paths refer to; it is not part of CONFIG."""

    base: BaseSection
    datasets: list[DatasetSection] = Field(min_length=1)
    plan: PlanSection = PlanSection()
    sft: dict[str, Any] = {}
    peft: dict[str, Any] | None = None
    merge: MergeSection = MergeSection()
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
        content = _read_mapping(path)
        for override in overrides:
            _apply_override(content, override)
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
        return self.plan.num_groups or min(4, len(self.datasets))

    def _check_across(self, source: str) -> None:
        names = [dataset.name for dataset in self.datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
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
        check_merge_method(self.merge.engine, self.merge.method, self.merge.parameters, source)
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
        if self.peft is None and self.merge.adapters != "dense":
            raise ConfigError(
                f"{source}: merge.adapters={self.merge.adapters}, but without `peft:` the groups are whole models. "
                "Leave merge.adapters out, or add `peft:`."
            )
        if (self.merge.adapters == "svd") != (self.merge.svd_rank is not None):
            raise ConfigError(
                f"{source}: merge.adapters={self.merge.adapters} with merge.svd_rank={self.merge.svd_rank}: `svd` "
                "needs a rank, and nothing else takes one."
            )


def check_merge_method(engine: str, method: str, parameters: typing.Mapping[str, Any], source: str) -> None:
    """Methods other than the mean are mergekit's.

    Raises:
        ConfigError: another engine is to run one, or parameters are given to a mean.
    """
    if method != "linear" and engine != "mergekit":
        raise ConfigError(f"{source}: method {method} is mergekit's, and engine is {engine}. Set engine to mergekit.")
    if method == "linear" and parameters:
        raise ConfigError(f"{source}: parameters {sorted(parameters)} for method linear, which has none. Set method.")


def check_metric(name: str, where: str) -> None:
    """Raises ConfigError where `name` is no metric of `merit evaluate`."""
    if name not in METRICS and not re.fullmatch(re.escape(REASONING_GYM) + r"\w+", name):
        choices = [*METRICS, f"{REASONING_GYM}TASK"]
        raise ConfigError(f"{where}={name!r} is not one of {', '.join(choices)}. {nearest(name, choices)}")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as a string, for want of a point; here it is the number that people mean."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML."""
    return yaml.load(text, _Loader) if text else None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a CONFIG yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', error)}.") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty. It needs at least `base:` and `datasets:`.")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected a mapping with `base:` and `datasets:`, found a {type(content).__name__}."
        )
    return content


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override `{override}`: expected key=value, such as plan.num_groups=2.")
    parts = key.split(".")
    node: Any = content
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            named = {item.get("name"): item for item in node if isinstance(item, dict)}
            if part not in named:
                raise ConfigError(f"override `{override}`: no dataset is named `{part}`. {nearest(part, named)}")
            node = named[part]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override `{override}`: `{'.'.join(parts[: depth + 1])}` holds a value, not keys.")
    if isinstance(node, list):
        raise ConfigError(f"override `{override}`: name a dataset and its key: datasets.NAME.KEY=VALUE.")
    try:
        node[parts[-1]] = parse_value(text)
    except yaml.YAMLError:
        raise ConfigError(f"override `{override}`: the value is not valid YAML.") from None


def _keys(model: Any) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _section_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    sections: dict[Any, type[BaseModel]] = {
        "base": BaseSection, "datasets": DatasetSection, "plan": PlanSection, "merge": MergeSection, "hub": HubSection,
    }  # fmt: skip
    return sections.get(location[0], MeritConfig) if len(location) > 1 else MeritConfig


def _explain(error: ValidationError, content: dict[str, Any], source: str) -> str:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    location, value = first["loc"], first["input"]
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
    return f"{source}: {key}={value!r} ({type(value).__name__}): expected {expected}."


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
