"""What `merit extend` is given: new datasets, and settings that must be the plan's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.hub import resolve_model
from merit_hf.overrides import read_mapping
from merit_hf.plan import PartitionPlan
from merit_hf.reading import is_local
from merit_hf.sft import chat_template_sha256, load_tokenizer, take_chat_template

_SECTIONS = ("base", "datasets", "plan", "sft", "peft", "merge", "run", "hub")
_TEMPLATE = "chat_template_path"


def read_extension(path: str | Path, plan: PartitionPlan) -> list[dict[str, Any]]:
    """The dataset entries of a YAML file, local paths made absolute.

    What the file says of base, read-out and training must be what the plan says.

    Raises:
        ConfigError: no datasets, an unknown key, a section of merging or running, or a setting that is not the plan's.
    """
    path = Path(path)
    content = read_mapping(path, "It needs `datasets:`.")
    root = path.resolve().parent
    for section in ("merge", "run", "hub"):
        if section in content:
            raise ConfigError(f"{path}: `{section}:` is the plan's own, and no extension changes it. Leave it out.")
    unknown = sorted(map(str, content.keys() - set(_SECTIONS)))
    if unknown:
        raise ConfigError(f"{path}: unknown key `{unknown[0]}`. An extension has `datasets:` as a CONFIG has.")
    entries = content.get("datasets")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: `datasets:` must list at least one dataset with `name` and `path`.")
    for section in ("base", "plan", "sft", "peft"):
        given = content.get(section) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{path}: `{section}:` must hold keys, found {given!r}.")
        _check_section(section, given, plan, str(path), root)
    return [_with_absolute_paths(entry, root) for entry in entries]


def new_config(plan: PartitionPlan, entries: list[dict[str, Any]], source: str) -> MeritConfig:
    """A CONFIG of the new datasets alone under the plan's settings.

    Raises:
        ConfigError: an entry is wrong, or a name is taken.
    """
    taken = sorted({str(entry.get("name")) for entry in entries} & set(plan.names))
    if taken:
        raise ConfigError(f"{source}: the plan has a dataset `{taken[0]}` already. Give the new one another name.")
    return plan_config(plan, entries, source, None, as_planned=False)


def plan_config(
    plan: PartitionPlan, entries: list[dict[str, Any]], source: str, num_groups: int | None, as_planned: bool = True
) -> MeritConfig:
    """A CONFIG of any datasets under the plan's settings, with this machine's paths.

    `as_planned`: in as many groups, of the same shares, as the plan's.
    """
    content = {key: value for key, value in plan.config.items() if key in _SECTIONS and value is not None}
    pinned = plan.base["repo_id"] is not None
    content["base"] = {
        "model_name_or_path": plan.base["repo_id"] if pinned else str(plan.base_folder()),
        **({"revision": plan.base["revision"]} if pinned else {}),
        "freeze": plan.base.get("freeze", []),
    }
    content["datasets"] = entries
    content["plan"] = {**plan.config["plan"], **plan.local.get("plan", {}), "num_groups": num_groups}
    if not as_planned:
        content["plan"] |= {"num_groups": None, "group_shares": None}
    content["sft"] = {**plan.config["sft"], **plan.local.get("sft", {})}
    planned = plan.config["merge"]["weights"]
    weights = plan.local.get("merge_weights") or ("tokens" if planned == "file" else planned)
    content["merge"] = {**plan.config["merge"], "weights": weights}
    return MeritConfig.from_dict(content, source, Path(plan.local.get("root", ".")))


def check_base(plan: PartitionPlan, folder: Path, where: str) -> None:
    """Raises ConfigError where the weights in `folder` are not those of the plan's base."""
    found = weights_sha256(folder)
    if found != plan.base["weights_sha256"]:
        raise ConfigError(
            f"{where}: another base: weights {found[:12]}, the plan's gradients were taken at "
            f"{plan.base['weights_sha256'][:12]}. Gradients at two bases cannot be compared: plan again."
        )


def check_template(plan: PartitionPlan, tokenizer: Any, where: str) -> None:
    """Raises ConfigError where a tokenizer's chat template is not the plan's."""
    found = chat_template_sha256(tokenizer)
    if found != plan.base["chat_template_sha256"]:
        raise ConfigError(
            f"{where}: another chat template: sha256 {str(found)[:12]}, the plan's is "
            f"{str(plan.base['chat_template_sha256'])[:12]}. Leave it out, or plan again."
        )


def _check_section(section: str, given: Mapping[str, Any], plan: PartitionPlan, source: str, root: Path) -> None:
    if section == "base" and given.get("model_name_or_path"):
        name, revision = str(given["model_name_or_path"]), given.get("revision")
        folder, _, _ = resolve_model(name, revision, root, "base.model_name_or_path")
        check_base(plan, folder, f"{source}: base.model_name_or_path={name}")
        if "freeze" in given and sorted(given["freeze"]) != plan.base.get("freeze", []):
            raise ConfigError(
                f"{source}: base.freeze={given['freeze']}, the plan's is {plan.base.get('freeze', [])}. Leave it out, "
                "or plan again."
            )
        return
    planned = plan.config.get(section) or {}
    for key, value in given.items():
        if section == "sft" and key == _TEMPLATE:
            _, template = take_chat_template(dict(given), root)
            check_template(plan, load_tokenizer(plan.base_folder(), template), f"{source}: sft.{_TEMPLATE}={value}")
        elif planned.get(key) != value:
            raise ConfigError(
                f"{source}: {section}.{key}={value!r}, but the plan was made with {planned.get(key)!r}. An extension "
                f"takes the plan's own settings: leave {section}.{key} out, or plan again."
            )


def _with_absolute_paths(entry: Mapping[str, Any], root: Path) -> dict[str, Any]:
    paths = {
        key: str((root / Path(entry[key]).expanduser()).resolve())
        for key in ("path", "eval_path")
        if isinstance(entry.get(key), str) and is_local(entry[key], root)
    }
    return {**entry, **paths}
