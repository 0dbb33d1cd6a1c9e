"""Checkpoints → one merged checkpoint, with the mergekit config that makes the same.

    merge_checkpoints(base, [first, second], weights=[3, 1], output="merged")

Any fine-tunes of one base; `group_merge.merge_groups` takes a plan's groups and verifies them first.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merit_hf.align import FLOATS, align
from merit_hf.average import Average, dtype_name
from merit_hf.checkpoint import ShardWriter, TensorInfo, atomic_folder, read_model_config, side_files
from merit_hf.choices import check_merge_method
from merit_hf.config import ConfigError
from merit_hf.hub import repo_of_snapshot
from merit_hf.mergekit_engine import LINEAR, MethodUse, check_method, mergekit_config, run_mergekit

MERGEKIT_CONFIG_NAME = "mergekit_config.yml"
_OUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class MergeStats:
    """What a merge did. All distances are Euclidean over all floating parameters, computed in float64.

    Attributes:
        num_tensors, num_parameters: of the merged model as stored.
        fractions: the normalised weight of each checkpoint in the mean θ̄; None where the method takes none.
        displacement: ‖θ − θ0‖ of the merged model, before the cast.
        group_displacements: ‖θ_k − θ0‖, in the order of the checkpoints.
        cast_loss: ‖cast(θ) − θ‖. cast_share: its share of the displacement.
        out_dtype: of most parameters.
        seconds: wall time.
    """

    num_tensors: int
    num_parameters: int
    fractions: list[float] | None
    displacement: float
    group_displacements: list[float]
    cast_loss: float
    out_dtype: str
    seconds: float

    @property
    def cast_share(self) -> float:
        return self.cast_loss / self.displacement if self.displacement else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For merit.json: without the time, and to 6 digits, so that a merge run again writes the same bytes."""
        distances = {
            "displacement": self.displacement,
            "group_displacements": self.group_displacements,
            "cast_loss": self.cast_loss,
            "cast_share": self.cast_share,
        }
        return {"num_tensors": self.num_tensors, "num_parameters": self.num_parameters, **_six_digits(distances)}


def merge_checkpoints(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    weights: Sequence[float],
    output: str | Path,
    out_dtype: str | None = None,
    engine: str = "safetensors",
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    *,
    method: str = LINEAR,
    parameters: Mapping[str, Any] | None = None,
    device: str = "cpu",
    interpolate_to_init: float = 1.0,
) -> MergeStats:
    """Write θ̄ = Σ_k w_k θ_k, w normalised, with every side file of the base and `mergekit_config.yml`.

    Args:
        base (`str` or `Path`): folder of θ0: gives keys, dtypes and side files, and is where displacements start.
        checkpoints (`Sequence`): folders of θ_k, fine-tuned from it.
        weights (`Sequence[float]`): one a checkpoint, positive.
        output (`str` or `Path`): new folder. Work goes on in `output.part`; a finished folder is complete.
        out_dtype (`str`, *optional*): `float32`, `bfloat16` or `float16`. Default: each tensor's dtype in the base.
        engine (`str`, *optional*, defaults to `"safetensors"`): `safetensors` streams the mean in float64;
            `mergekit` lets mergekit compute in float32, with checks before and after, and casts its result once.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): of an output file.
        progress (`Callable`, *optional*): called after each tensor with tensors done and in all.
        method (`str`, *optional*, defaults to `"linear"`): of mergekit: `ties`, `dare_ties`, `slerp`, `karcher`, … θ0
            is the base of those that take one.
        parameters (`Mapping`, *optional*): of the method, by mergekit's names: `{"density": 0.5}`.
        device (`str`, *optional*, defaults to `"cpu"`): where it is computed; needs float64.
        interpolate_to_init (`float`, *optional*, defaults to `1.0`): α of θ = θ0 + α (θ̄ − θ0), more than 0 and at most
            2, in place of θ̄: θ0 joins the sum with the weight 1 − α, and all is rounded once.

    Raises:
        ConfigError: a weight is not positive and finite, a checkpoint is listed twice, a method or parameter does not
            exist, there is no such device, `interpolate_to_init` is out of range or the method is not linear, or
            `output` exists.
        MeritError: the checkpoints do not fit the base or each other, hold a non-finite value, or cannot be read;
            mergekit would lose tensors.
    """
    with atomic_folder(Path(output)) as part:
        stats = merge_into(
            part, base, checkpoints, weights, out_dtype, engine, max_shard_size, progress, method=method,
            parameters=parameters, device=device, interpolate_to_init=interpolate_to_init,
        )  # fmt: skip
    return stats


def merge_into(
    part: Path,
    base: str | Path,
    checkpoints: Sequence[str | Path],
    weights: Sequence[float],
    out_dtype: str | None = None,
    engine: str = "safetensors",
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    *,
    method: str = LINEAR,
    parameters: Mapping[str, Any] | None = None,
    device: str = "cpu",
    interpolate_to_init: float = 1.0,
) -> MergeStats:
    """[`merge_checkpoints`] into an existing empty folder, for callers that add files before they rename it."""
    start = time.monotonic()
    folders = [Path(checkpoint).resolve() for checkpoint in checkpoints]
    fractions = normalised_weights(folders, weights)
    _check_choice("engine", engine, ("safetensors", "mergekit"))
    _check_choice("out_dtype", out_dtype, (None, *_OUT_DTYPES))
    _check_device(device)
    check_merge_method(engine, method, parameters or {}, "merge", interpolate_to_init)
    use = check_method(method, parameters or {}, len(folders)) if engine == "mergekit" else MethodUse()
    origin, *groups = align(Path(base), folders)
    tensors = {
        name: TensorInfo(_OUT_DTYPES[out_dtype] if out_dtype and info.dtype in FLOATS else info.dtype, info.shape)
        for name, info in origin.tensors.items()
    }
    dtype = _main_dtype(tensors)
    _copy_side_files(Path(base), part, out_dtype)
    result = None
    if engine == "mergekit":
        paths = [str(f) for f in folders]
        here = mergekit_config(paths, fractions, "float32", use, str(Path(base).resolve()), interpolate_to_init)
        result = run_mergekit(here, part / "mergekit.part", tensors, device)
    terms, shares = groups, [interpolate_to_init * fraction for fraction in fractions]
    if interpolate_to_init != 1:
        # θ0 + α (θ̄ − θ0) is one sum more: θ0 takes the weight that is left.
        terms, shares = [*groups, origin], [*shares, 1 - interpolate_to_init]
    average = Average(origin, terms, shares, result, device)
    with ShardWriter(part, tensors, max_shard_size) as writer:
        dtypes = {name: FLOATS.get(tensors[name].dtype, torch.float32) for name in writer.names}
        for done, (name, pieces) in enumerate(average.stream(dtypes), start=1):
            writer.write(name, pieces)
            if progress is not None:
                progress(done, len(tensors))
    if result is not None:
        shutil.rmtree(result.folder)
    names = [model_reference(folder) for folder in folders]
    recipe = mergekit_config(names, fractions, dtype, use, model_reference(Path(base).resolve()), interpolate_to_init)
    (part / MERGEKIT_CONFIG_NAME).write_text(recipe, encoding="utf-8")
    return MergeStats(
        num_tensors=len(tensors),
        num_parameters=sum(info.num_elements for info in tensors.values()),
        fractions=fractions if use.takes_weights else None,
        displacement=math.sqrt(average.squares["displacement"]),
        group_displacements=[math.sqrt(square) for square in average.group_squares[: len(groups)]],
        cast_loss=math.sqrt(average.squares["cast"]),
        out_dtype=dtype,
        seconds=time.monotonic() - start,
    )


def model_reference(folder: Path) -> str:
    """`org/name@sha` of a snapshot in the Hub's cache, else the absolute path."""
    found = repo_of_snapshot(folder)
    return f"{found[0]}@{found[1]}" if found else str(folder)


def normalised_weights(folders: Sequence[Path], weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; ConfigError where one is not positive and finite, or a folder is listed twice."""
    if not folders:
        raise ConfigError("no checkpoints to merge: give at least one.")
    if len(weights) != len(folders):
        raise ConfigError(f"{len(weights)} weights for {len(folders)} checkpoints: give one weight each.")
    for folder, weight in zip(folders, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"{folder}: weight {weight}: expected a positive, finite number. Or leave it out.")
        if folders.count(folder) > 1:
            raise ConfigError(f"{folder}: listed twice. List it once, with the sum of its weights.")
    total = sum(weights)
    if not math.isfinite(total):
        raise ConfigError(f"the weights {list(weights)} have no finite sum. Divide them all by the largest.")
    return [weight / total for weight in weights]


def _check_choice(what: str, found: str | None, valid: Sequence[str | None]) -> None:
    if found not in valid:
        raise ConfigError(f"{what} {found!r}: expected one of {', '.join(str(v) for v in valid if v)}.")


def _check_device(device: str) -> None:
    try:
        torch.ones(1, dtype=torch.float64, device=device).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"device {device!r}: {reason}. Expected cpu, or an accelerator with float64 (cuda)."
        ) from None


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The floating dtype that most parameters are stored in."""
    sizes = dict.fromkeys(FLOATS, 0)
    for info in tensors.values():
        if info.dtype in FLOATS:
            sizes[info.dtype] += info.num_elements
    return dtype_name(FLOATS[max(sizes, key=lambda dtype: sizes[dtype])])


def _copy_side_files(base: Path, part: Path, out_dtype: str | None) -> None:
    for path in side_files(base):
        target = part / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if out_dtype is None:
        return
    config = read_model_config(base)
    for section in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        for key in _DTYPE_KEYS:
            if isinstance(section, dict) and section.get(key) is not None:
                section[key] = out_dtype
    if not any(key in config for key in _DTYPE_KEYS):
        config["dtype"] = out_dtype
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (part / "config.json").write_text(text, encoding="utf-8")


def _six_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _six_digits(item) for key, item in value.items()}
    return [_six_digits(item) for item in value] if isinstance(value, list) else float(f"{value:.6g}")
