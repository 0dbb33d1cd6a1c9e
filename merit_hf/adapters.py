"""LoRA adapters: the `peft:` block, the wrapped model, and what an adapter's folder holds.

    model = add_adapter(model, {"r": 16, "target_modules": "all-linear"}, seed=42)
    settings = adapter_settings("runs/groups/0")            # as in plan.json's `peft`, comparable with ==

Supported is what can be merged exactly: LoRA on linear layers that starts at the base (B = 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import INDEX_NAME, SINGLE_NAME, TensorInfo, read_header
from merit_hf.errors import ConfigError, MeritError

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
# The fields of LoraConfig that decide what is trained and how it is scaled.
LORA_FIELDS = (
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "r", "rank_pattern", "target_modules", "use_rslora",
)  # fmt: skip
_REASONS = {
    "use_dora": "DoRA's rescaled weights are not W + s·B·A, so they cannot be merged as such",
    "modules_to_save": "modules that are trained whole are no low-rank update",
    "bias": "trained biases are no low-rank update",
    "lora_bias": "trained biases are no low-rank update",
    "target_parameters": "only linear layers are merged",
    "trainable_token_indices": "only linear layers are merged",
}
# What adapter_config.json says besides; none of it changes the weights.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
# How PEFT names what it wraps.
PREFIX = "base_model.model."


def lora_config(peft: Mapping[str, Any]) -> Any:
    """The `LoraConfig` of a `peft:` block, or of a plan's `peft`.

    Raises:
        ConfigError: a field that cannot be merged exactly, or a value that PEFT refuses.
    """
    from peft import LoraConfig

    defaults = LoraConfig()
    for key, value in peft.items():
        neutral = key == "task_type" and value == "CAUSAL_LM"
        if key not in LORA_FIELDS and not neutral and value != getattr(defaults, key):
            reason = _REASONS.get(key, "merit cannot merge what it changes")
            raise ConfigError(f"peft.{key}={value!r} is not supported: {reason}. Leave it out.")
    start = peft.get("init_lora_weights", True)
    if start is not True and start != "gaussian":
        raise ConfigError(
            f"peft.init_lora_weights={start!r}: every group must start at the base (B = 0). Give true or gaussian."
        )
    if not 0 <= peft.get("lora_dropout", 0.0) < 1:
        raise ConfigError(f"peft.lora_dropout={peft['lora_dropout']!r}: expected a share from 0 up to, but below, 1.")
    try:
        return LoraConfig(**{key: peft[key] for key in peft if key in LORA_FIELDS}, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft: {_one_line(error)}") from error


def lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding fields of a LoraConfig's dict or an adapter_config.json, as JSON values that compare with `==`."""
    settings = {name: config[name] for name in LORA_FIELDS}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings[name], set | list | tuple):
            settings[name] = sorted(settings[name])
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = dict(settings[name] or {})
    settings["lora_dropout"] = float(settings["lora_dropout"])
    return settings


def add_adapter(model: Any, peft: Mapping[str, Any], seed: int) -> Any:
    """`model` (changed in place) with a fresh adapter, the only part of it that still trains; a `PeftModel`.

    A is drawn from `seed`, as SFTTrainer draws it when it is given a `peft_config`; B is zero.

    Raises:
        ConfigError: the fields do not fit the model, or name something other than linear layers inside it.
    """
    from peft import get_peft_model
    from transformers import set_seed

    config = lora_config(peft)
    set_seed(seed)
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"peft: {_one_line(error)}") from error
    _refuse_other_layers(wrapped)
    return wrapped


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the adapter of `folder` on it, still trainable: the very network that was trained."""
    from peft import PeftModel

    adapter_settings(folder)
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise MeritError(f"{folder}: the adapter does not fit its base: {_one_line(error)}") from error


def model_settings(model: Any) -> dict[str, Any] | None:
    """The settings of a model's adapter, with the target modules as PEFT resolved them; None without an adapter.

    Raises:
        ConfigError: several adapters, or one that is not LoRA.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    kinds = {name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in configs.items()}
    if kinds != {"default": "LORA"}:
        raise ConfigError(f"the model has the adapters {kinds}; expected one LoRA adapter named default.")
    return lora_settings(configs["default"].to_dict())


def expected_adapter_tensors(base: str | Path, peft: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter with these settings has on the base in a folder.

    Built without weights, on the meta device.
    """
    import torch
    from peft import get_peft_model_state_dict
    from transformers import AutoConfig

    from merit_hf.vision import auto_class

    with torch.device("meta"):
        model = auto_class(base).from_config(AutoConfig.from_pretrained(str(base)))
        wrapped = add_adapter(model, peft, seed=0)
    tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}


def is_adapter(folder: str | Path) -> bool:
    """Whether the weights in a folder are an adapter's alone."""
    folder = Path(folder)
    whole = (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file()
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not whole


def read_adapter_index(folder: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of an adapter, sorted by name; reads the header only.

    Raises:
        MeritError: there is no adapter in safetensors, or it is not complete.
    """
    path = Path(folder) / ADAPTER_NAME
    if not path.is_file():
        raise MeritError(f"{folder}: no {ADAPTER_NAME}. Give the folder of a LoRA adapter in safetensors.")
    return dict(sorted(read_header(path).items()))


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """The settings in an adapter's folder, normalised like a plan's `peft`.

    Raises:
        MeritError: adapter_config.json cannot be read, is not LoRA, or says something that cannot be merged exactly.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise MeritError(f"{folder}: no {ADAPTER_CONFIG_NAME}. Give the folder of a LoRA adapter.")
    return parse_adapter_settings(path.read_bytes(), str(path))


def parse_adapter_settings(raw: bytes, path: str) -> dict[str, Any]:
    """[`adapter_settings`] from the bytes of an adapter_config.json."""
    config = _parse_json(raw, path)
    if config.get("peft_type") != "LORA":
        raise MeritError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'.")
    for key, value in sorted(config.items()):
        if key not in LORA_FIELDS and key not in _NEUTRAL and value and value != "none":
            reason = _REASONS.get(key, "merit cannot merge what it changes")
            raise MeritError(f"{path}: {key}={value!r} is not supported: {reason}.")
    missing = sorted(set(LORA_FIELDS) - set(config))
    if missing:
        raise MeritError(f"{path}: no `{missing[0]}` in it. Save the adapter again with a current PEFT.")
    return lora_settings(config)


def publish_adapter_config(folder: str | Path, repo_id: str | None, revision: str | None) -> None:
    """Let adapter_config.json name its base by Hub id and commit, or not at all; lists in one order.

    PEFT writes the path that the base was loaded from, and sets in the order of Python's hash seed.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    config = _parse_json(path.read_bytes(), str(path))
    config |= {"base_model_name_or_path": repo_id, "revision": revision}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_other_layers(model: Any) -> None:
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    head = model.get_base_model().get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        short = name.removeprefix(PREFIX)
        if not isinstance(module.get_base_layer(), torch.nn.Linear | Conv1D):
            raise ConfigError(
                f"peft.target_modules reaches `{short}`, a {type(module.get_base_layer()).__name__}: only linear "
                "layers are merged exactly. Name others, or list it in peft.exclude_modules."
            )
        if module is head:
            raise ConfigError(
                f"peft.target_modules reaches `{short}`, the output layer, which TRL's loss reads past the adapter. "
                "List it in peft.exclude_modules."
            )


def _parse_json(raw: bytes, path: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MeritError(f"{path}: not valid JSON: {error}. Save the adapter again.") from None
    if not isinstance(content, dict):
        raise MeritError(f"{path}: expected a JSON object, found a {type(content).__name__}. Save the adapter again.")
    return content


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
