"""mergekit as an engine for its other methods, with checks before and after. The only room that imports it.

use = check_method("ties", {"density": 0.5}, num_checkpoints=4)
result = run_mergekit(mergekit_config(…), folder, expected=names and shapes)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from merit_hf.align import Checkpoint
from merit_hf.checkpoint import TensorInfo
from merit_hf.config import ConfigError, MeritError

LINEAR = "linear"
_CURE = "Merge with engine safetensors."


@dataclass(frozen=True)
class MethodUse:
    """How a method is called.

    Attributes:
        name (`str`): mergekit's.
        parameters (`dict`): for all checkpoints alike.
        takes_weights (`bool`): whether each checkpoint has a weight; else the method's own rule decides.
        takes_base (`bool`): whether θ0 is an input, as what differences are taken from.
    """

    name: str = LINEAR
    parameters: Mapping[str, Any] | None = None
    takes_weights: bool = True
    takes_base: bool = False


def check_method(name: str, parameters: Mapping[str, Any], num_checkpoints: int) -> MethodUse:
    """Hold a method and its parameters against what the installed mergekit says of itself.

    A method of exactly two models, one of them called its base (slerp, nearswap), takes two checkpoints, the first one
    as that base; a single checkpoint is paired with θ0.

    Raises:
        ConfigError: no such method; a parameter is unknown, missing or of a wrong type; too many or few checkpoints.
    """
    methods = _methods()
    if name not in methods:
        raise ConfigError(f"method {name!r}: mergekit has {', '.join(sorted(methods))}.")
    spec = methods[name].spec
    known = {parameter.name: parameter for parameter in spec.parameters if parameter.name != "weight"}
    if name == LINEAR:
        known = {}  # `normalize` is what makes it a mean
    for key in parameters:
        if key not in known:
            raise ConfigError(f"method {name}: no parameter {key!r}. It takes {', '.join(sorted(known)) or 'none'}.")
    missing = [key for key, parameter in known.items() if parameter.required and key not in parameters]
    if missing:
        raise ConfigError(f"method {name}: needs the parameter {missing[0]}, such as --parameter {missing[0]}=0.5.")
    for key, value in parameters.items():
        if not isinstance(value, list | dict):  # those are mergekit's gradients and filters
            try:
                known[key].validate(value)
            except ValueError:
                kind = getattr(known[key].value_type, "__name__", str(known[key].value_type))
                raise ConfigError(f"method {name}: parameter {key}={value!r}: expected {kind}.") from None
    takes_base = spec.contract.base.value in ("required", "optional")
    if spec.contract.max_inputs == 2 and takes_base:
        takes_base = num_checkpoints < 2
    try:
        models = [f"checkpoint {number}" for number in range(num_checkpoints)]
        base = "base" if takes_base else models[0]
        spec.contract.validate_ids([*models, base] if takes_base else models, base)
    except ValueError as error:
        raise ConfigError(f"method {name}, {num_checkpoints} checkpoints: {_first_line(error)}.") from None
    takes_weights = any(parameter.name == "weight" for parameter in spec.parameters)
    return MethodUse(name, dict(parameters), takes_weights, takes_base)


def mergekit_config(
    references: Sequence[str],
    fractions: Sequence[float],
    out_dtype: str,
    use: MethodUse,
    base: str,
    interpolate_to_init: float = 1.0,
) -> str:
    """The YAML that `mergekit-yaml` takes; for `linear` it gives the same mean, within one rounding of `out_dtype`.

    A mean that is interpolated to θ0 has θ0 as its last model, with the weight that the others leave.

    Where θ0 is no input, `base_model` is one of the models, since mergekit otherwise takes config and tokenizer from
    any of them.
    """
    models = [_model(reference) for reference in references]
    entries = [
        {"model": model, "parameters": {"weight": interpolate_to_init * fraction}}
        if use.takes_weights
        else {"model": model}
        for model, fraction in zip(models, fractions, strict=True)
    ]
    if interpolate_to_init != 1:
        entries.append({"model": _model(base), "parameters": {"weight": 1 - interpolate_to_init}})
    shared = {"normalize": True} if use.name == LINEAR else dict(use.parameters or {})
    config = {
        "merge_method": use.name,
        "models": entries,
        "base_model": _model(base) if use.takes_base else models[0],
        **({"parameters": shared} if shared else {}),
        "dtype": "float32",
        "out_dtype": out_dtype,
    }

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(config, Dumper=Plain, sort_keys=False, allow_unicode=True, width=1000)


def run_mergekit(recipe: str, folder: Path, expected: Mapping[str, TensorInfo], device: str = "cpu") -> Checkpoint:
    """mergekit's merge of `recipe` into a new `folder`, with the tensors of `expected` and no fewer.

    Random methods (dare, della) draw from torch's generator at seed 0, so that a merge run again gives the same; the
    caller's generators stay as they were.

    Raises:
        MeritError: mergekit would lose tensors (named before anything is read), lost or reshaped some, or failed.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, device=device)
    try:
        with _forgetful(), _silent(), torch.random.fork_rng():
            torch.manual_seed(0)
            planned = _planned_names(recipe, options)
            if not expected.keys() - planned:
                run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(folder), options)
    except Exception as error:  # whatever mergekit raises on an architecture that it does not know
        raise MeritError(f"engine mergekit failed: {_first_line(error)}. {_CURE}") from error
    _refuse_lost("would lose", expected, planned)
    result = Checkpoint(folder)
    _refuse_lost("lost", expected, set(result.tensors))
    for name, info in expected.items():
        if result.tensors[name].shape != info.shape:
            raise MeritError(
                f"engine mergekit gave {name} the shape {result.tensors[name].shape}, expected {info.shape}. {_CURE}"
            )
    return result


def planned_names(recipe: str) -> set[str]:
    """The tensors that mergekit would write for `recipe`, from headers and configs alone."""
    from mergekit.merge import MergeOptions

    with _forgetful(), _silent():
        return _planned_names(recipe, MergeOptions(quiet=True))


def _planned_names(recipe: str, options: Any) -> set[str]:
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    model = (config.base_model or config.referenced_models()[0]).config(trust_remote_code=False)
    tasks = MergePlanner(config, architecture, options, model).plan_to_disk("unused: nothing is executed")
    return {task.tensor_name for task in tasks if isinstance(task, SaveTensor)}


def _refuse_lost(verb: str, expected: Mapping[str, TensorInfo], found: set[str]) -> None:
    lost = sorted(expected.keys() - found)
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        # Experts, say, are packed into one tensor, under a name that the inputs do not have.
        others = len(found - expected.keys())
        instead = f", and write {others} others" if others else ""
        raise MeritError(f"engine mergekit {verb} {len(lost)} of {len(expected)} tensors: {shown}{instead}. {_CURE}")


def _methods() -> dict[str, Any]:
    try:
        from mergekit import merge_methods
    except ImportError as error:
        raise MeritError(f"engine mergekit: {error}. Install it with `pip install 'merit_hf[mergekit]'`.") from error
    return {method.spec.name: method for method in merge_methods.registered_methods()}


def _model(reference: str) -> str | dict[str, Any]:
    # mergekit reads `+` in a string as "with LoRA" and `@` as a revision; the long form of a path is taken as it is.
    awkward = reference.startswith("/") and set("+@") & set(reference)
    return {"model": {"path": reference}} if awkward else reference


@contextlib.contextmanager
def _forgetful() -> Iterator[None]:
    """mergekit keeps opened files and architectures by path, where another checkpoint may lie the next time."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache

    try:
        yield
    finally:
        LoaderCache().loaders.clear()
        infer_architecture_info.cache_clear()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What mergekit logs on its way is said here, where it matters, by what is refused."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
