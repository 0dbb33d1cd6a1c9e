"""CONFIG as a plan records it: what may be published, what stays on this machine, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merit_hf.choices import WEIGHTINGS as WEIGHTINGS
from merit_hf.config import MeritConfig
from merit_hf.data import is_local

# Fields of SFTConfig that may hold the path of a file; all of them are placement.
_SFT_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
# Keys of `plan` that may hold the path of a file or a folder.
_PLAN_FILES = ("affinity", "embedding_model", "optimizer_state")


def published_config(config: MeritConfig) -> dict[str, Any]:
    """CONFIG with its defaults resolved and nothing in it that names a file of this machine."""
    # How `merit run` goes is no part of a plan.
    content = config.model_dump(mode="json", exclude={"run"})
    content["plan"]["num_groups"] = config.num_groups
    for key in _PLAN_FILES:
        if _is_file(key, content["plan"][key], config.root):
            content["plan"][key] = "file"
    content["sft"].pop("chat_template_path", None)
    for field in _SFT_FILES:
        if isinstance(content["sft"].get(field), str):
            del content["sft"][field]
    if is_local(content["base"]["model_name_or_path"], config.root):
        content["base"]["model_name_or_path"] = None
    for entry in content["datasets"]:
        if is_local(entry["path"], config.root):
            entry["path"] = None
        if entry["eval_path"] is not None and is_local(entry["eval_path"], config.root):
            # Without its own file, nothing is held out of the rows that were planned.
            entry["eval_path"], entry["eval_fraction"] = None, 0.0
    if content["merge"]["weights"] not in WEIGHTINGS:
        content["merge"]["weights"] = "file"
    return content


def local_settings(config: MeritConfig, base: Path) -> dict[str, Any]:
    """The paths that `published_config` leaves out, absolute: base, datasets' files, SFT files, weights file."""
    root = config.root.resolve()

    def absolute(path: str) -> str:
        return str((root / path).expanduser().resolve())

    entries: dict[str, dict[str, str]] = {}
    for spec in config.datasets:
        paths = {"path": spec.path, "eval_path": spec.eval_path}
        local = {key: absolute(path) for key, path in paths.items() if path is not None and is_local(path, root)}
        if local:
            entries[spec.name] = local
    sft = {field: absolute(config.sft[field]) for field in _SFT_FILES if isinstance(config.sft.get(field), str)}
    weights = config.merge.weights
    named = {key: getattr(config.plan, key) for key in _PLAN_FILES}
    files = {key: absolute(path) for key, path in named.items() if path is not None and _is_file(key, path, root)}
    return {
        "base": str(base),
        "root": str(root),
        "datasets": entries,
        "sft": sft,
        **({"plan": files} if files else {}),
        "merge_weights": None if weights in WEIGHTINGS else absolute(weights),
    }


def _is_file(key: str, path: str | None, root: Path) -> bool:
    """Whether a key of `plan` names something on this machine; only a model may be elsewhere."""
    return path is not None and (key != "embedding_model" or is_local(path, root))


def first_difference(planned: Any, found: Any, key: str = "") -> str | None:
    """`key: planned there, found here` for the first place where two resolved configs differ."""
    if isinstance(planned, dict) and isinstance(found, dict):
        for name in sorted(planned.keys() | found.keys()):
            difference = first_difference(planned.get(name), found.get(name), f"{key}.{name}" if key else str(name))
            if difference:
                return difference
        return None
    if isinstance(planned, list) and isinstance(found, list):
        return first_difference(_by_name(planned), _by_name(found), key)
    return None if planned == found else f"{key}: {planned!r} there, {found!r} here"


def _by_name(entries: list[Any]) -> dict[str, Any]:
    return {entry["name"] if isinstance(entry, dict) else str(i): entry for i, entry in enumerate(entries)}
