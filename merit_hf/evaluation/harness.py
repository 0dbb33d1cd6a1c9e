"""People's own benchmarks: the same models on tasks of lm-evaluation-harness or lighteval, by name.

Only this room has lm_eval; lighteval is in `lighteval_tasks`.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from merit_hf.config import ConfigError, MeritError
from merit_hf.evaluation.evaluator import model_identity, write_text
from merit_hf.evaluation.lighteval_tasks import known_tasks, run_task
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_checkpoint, load_tokenizer

HARNESSES = ("lm-eval", "lighteval")
# Tokens that a row of a batch is taken to hold; the harness wants rows.
_TOKENS_PER_ROW = 512


@dataclass(frozen=True)
class HarnessCall:
    """Which tasks are run, and how; every field but `include_path` is the harness's own.

    Args:
        tasks (`tuple[str, ...]`): names of tasks, groups or tags.
        include_path (`Path`, *optional*): tasks beside the harness's: a folder of YAMLs for lm-eval, a Python file
            for lighteval.
        num_fewshot (`int`, *optional*): examples before a question. Default: the task's with lm-eval, 0 with
            lighteval.
        limit (`int`, *optional*): at most so many questions a task.
        apply_chat_template (`bool`, *optional*, defaults to `False`): ask in the plan's chat template.
        harness (`str`, *optional*, defaults to `"lm-eval"`): whose tasks.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    harness: str = "lm-eval"

    @classmethod
    def of(
        cls, harness: str | None, tasks: str | None, include_path: Path | None = None, **how: Any
    ) -> HarnessCall | None:
        """The call behind the command's options; None where no harness is asked for.

        Raises:
            ConfigError: one option without another that it needs, no such harness, folder or file, or the harness
                is not installed.
        """
        given = {"--include-path": include_path, **{f"--{key.replace('_', '-')}": value for key, value in how.items()}}
        if harness is None:
            useless = [key for key, value in {"--tasks": tasks, **given}.items() if value not in (None, False)]
            if useless:
                raise ConfigError(f"{useless[0]} is an option of the harness. Add --harness {' or '.join(HARNESSES)}.")
            return None
        if harness not in HARNESSES:
            raise ConfigError(f"--harness {harness}: expected {', '.join(HARNESSES)}.")
        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        if not names:
            example = "arc_easy,gsm8k" if harness == "lm-eval" else "arc:easy,gsm8k"
            raise ConfigError(f"--harness {harness} needs --tasks, such as --tasks {example}.")
        if include_path is not None and harness == "lm-eval" and not include_path.is_dir():
            raise ConfigError(f"--include-path {include_path}: no such folder. Give the folder of the tasks' YAMLs.")
        if include_path is not None and harness == "lighteval" and not include_path.is_file():
            raise ConfigError(f"--include-path {include_path}: no such file. Give the Python file of lighteval tasks.")
        call = cls(names, include_path, **how, harness=harness)
        call.check_tasks()
        return call

    def check_tasks(self) -> None:
        """Raises ConfigError where a task is unknown, or the harness cannot be imported."""
        if self.harness == "lighteval":
            known = sorted(known_tasks(self.tasks, self.include_path, _stamps(self.include_path)))
        else:
            known = _task_manager(self).all_tasks
        for name in self.tasks:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                listed = "`lm-eval ls tasks`" if self.harness == "lm-eval" else "`lighteval tasks list`"
                hint = f"Did you mean `{near[0]}`?" if near else f"{listed} lists them."
                raise ConfigError(f"--tasks {name}: {self.harness} knows no such task. {hint}")


def run_harness(
    plan: PartitionPlan,
    models: Mapping[str, Path],
    call: HarnessCall,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Run the tasks on every model.

    Args:
        models (`dict`): {label: folder}. They are loaded as everywhere else here, with the base's tokenizer; adapters
            on their base.
        cache (`Path`, *optional*): where results are kept, a file a model and task.

    Returns:
        {"name", "version", "settings", "tasks": {task: {metric: {label: {"value", "stderr"}}}}}: the harness's
        numbers, a group's subtasks among them.

    Raises:
        MeritError: a task fails.
    """
    progress = progress or Progress()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    args = build_args(plan.config["sft"])
    with progress.stage(f"Running {call.harness}", total=len(models) * len(call.tasks)) as stage:
        for label, folder in models.items():
            model: PreTrainedModel | None = None
            for task in call.tasks:
                stage.item(f"{task} as {label}")
                file = _cache_file(cache, plan, folder, task, call)
                metrics = _known(file)
                if metrics is None:
                    model = model or load_checkpoint(folder, plan.base_folder(), args)
                    torch.nn.Module.to(model, args.device)
                    metrics = _run_task(plan, model, task, call, tokens_per_batch, label)
                    if file is not None:
                        write_text(file, json.dumps(metrics))
                for name, values in metrics.items():
                    for metric, value in values.items():
                        found.setdefault(name, {}).setdefault(metric, {})[label] = value
                stage.advance()
    return {"name": call.harness, "version": _version(call), "settings": _settings(call), "tasks": found}


def _run_task(
    plan: PartitionPlan, model: PreTrainedModel, task: str, call: HarnessCall, tokens_per_batch: int, label: str
) -> dict[str, dict[str, Any]]:
    """{name of the task or subtask: {metric: {"value", "stderr"}}}."""
    tokenizer = load_tokenizer(plan.base_folder(), plan.base.get("chat_template"))
    batch_size = max(1, tokens_per_batch // _TOKENS_PER_ROW)
    try:
        if call.harness == "lm-eval":
            return _run_lm_eval(model, tokenizer, task, call, batch_size)
        found = run_task(
            model, tokenizer, task, call.include_path, _stamps(call.include_path), batch_size=batch_size,
            num_fewshot=call.num_fewshot or 0, limit=call.limit, apply_chat_template=call.apply_chat_template,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise MeritError(f"{call.harness} failed on task `{task}` as {label}: {reason}") from error
    return {
        name: {metric: {key: _finite(value) for key, value in numbers.items()} for metric, numbers in metrics.items()}
        for name, metrics in found.items()
    }


def _run_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, call: HarnessCall, batch_size: int
) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # It warns of what a model that is loaded already would ignore, and nothing of that is given here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    output = simple_evaluate(
        lm, tasks=[task], task_manager=_task_manager(call), num_fewshot=call.num_fewshot,
        limit=call.limit, apply_chat_template=call.apply_chat_template, log_samples=False,
    )  # fmt: skip
    assert output is not None
    return {name: _metrics(values) for name, values in output["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """`acc,none` and `acc_stderr,none` → acc with value and stderr; a filter other than `none` stays in the name."""
    metrics = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or "," not in key:
            continue
        name = metric if filtered == "none" else key
        metrics[name] = {"value": _finite(value), "stderr": _finite(values.get(f"{metric}_stderr,{filtered}"))}
    return metrics


def _finite(value: Any) -> float | None:
    """The harness says "N/A", or NaN, where there is no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _task_manager(call: HarnessCall) -> Any:
    """The index that knows the call's tasks. It is kept while one's own files stay the same.

    Reading the thousands of YAMLs that come with the harness takes seconds, and is left out where all tasks are one's
    own. A group or tag of one's own may name others' tasks.
    """
    path, stamps = None if call.include_path is None else str(call.include_path), _stamps(call.include_path)
    if path is not None:
        own = _index(path, stamps, False)
        if set(call.tasks) <= set(own.all_subtasks):
            return own
    return _index(path, stamps, True)


@functools.lru_cache(maxsize=2)
def _index(include_path: str | None, stamps: tuple[tuple[str, int, int], ...], include_defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--harness lm-eval: the harness cannot be imported ({error}). pip install 'merit_hf[eval]'."
        ) from error
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _stamps(include_path: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files of one's own tasks."""
    files = [] if include_path is None else [include_path, *sorted(include_path.rglob("*"))]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


def _settings(call: HarnessCall) -> dict[str, Any]:
    """What is published of a call: no folder of this machine."""
    shown = {key: value for key, value in asdict(call).items() if key not in ("include_path", "harness")}
    return shown | {"tasks": list(call.tasks)}


def _version(call: HarnessCall) -> str:
    return version("lm_eval" if call.harness == "lm-eval" else "lighteval")


def _cache_file(cache: Path | None, plan: PartitionPlan, folder: Path, task: str, call: HarnessCall) -> Path | None:
    if cache is None:
        return None
    key = {
        "harness": call.harness,
        "version": _version(call),
        "task": task,
        "model": model_identity(folder),
        "model_init_kwargs": str(plan.config["sft"].get("model_init_kwargs")),
        "chat_template": plan.base["chat_template_sha256"],
        "settings": {**_settings(call), "tasks": None},
        "files": _stamps(call.include_path),
    }
    return cache / f"harness-{canonical_sha256(key)[:32]}.json"


def _known(file: Path | None) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError):
        return None
    return found
