"""One task of lighteval on a model that is loaded already. Only this room has lighteval.

Everything that lighteval writes (its cache of answers, the tokenizer that it loads) goes into a folder that is thrown
away: what is kept between calls is `harness`'s.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from merit_hf.config import ConfigError


def known_tasks(tasks: Sequence[str], own: Path | None, stamps: tuple[tuple[str, int, int], ...]) -> set[str]:
    """Names of tasks and of groups of them, such as `mmlu` of `mmlu:anatomy`: those in `own`, and lighteval's.

    Where all `tasks` are one's own, lighteval's are left out: to import them takes long, and on the first import one
    of them downloads what it needs.

    Args:
        own (`Path`, *optional*): a Python file of one's own with a `TASKS_TABLE`. stamps: tell its versions apart.

    Raises:
        ConfigError: lighteval cannot be imported, or `own` cannot be run or holds no tasks.
    """
    ours = set() if own is None else _with_groups(_own_tasks(str(own), stamps))
    return ours if ours.issuperset(tasks) else ours | _their_tasks()


@functools.lru_cache(maxsize=2)
def _own_tasks(own: str, stamps: tuple[tuple[str, int, int], ...]) -> dict[str, Any]:
    """{name: its config} of the tasks in a file."""
    try:
        table = getattr(_registry().create_custom_tasks_module(own), "TASKS_TABLE", ())
    except Exception as error:  # anybody's code: whatever it raises is told
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ConfigError(f"--include-path {own}: it cannot be run: {reason}") from error
    if not table:
        raise ConfigError(f"--include-path {own}: no TASKS_TABLE with tasks in it. Give a file of lighteval tasks.")
    return {config.name: config for config in table}


@functools.lru_cache(maxsize=1)
def _their_tasks() -> set[str]:
    try:
        return _with_groups(_registry().load_all_task_configs())
    except OSError as error:
        raise ConfigError(
            f"--harness lighteval: its tasks cannot be imported: {_one_line(error)}. The first time, it downloads "
            "what one of them needs: run it once with the network. Tasks of your own (--include-path) do without."
        ) from error


def _registry() -> Any:
    try:
        from lighteval.tasks.registry import Registry
    except ImportError as error:
        raise ConfigError(
            f"--harness lighteval: it cannot be imported ({error}). pip install 'merit_hf[lighteval]'."
        ) from error
    logging.getLogger("lighteval").setLevel(logging.ERROR)
    return Registry


def _with_groups(names: Iterable[str]) -> set[str]:
    count = Counter(name.partition(":")[0] for name in names)
    return {*names, *(group for group, number in count.items() if number > 1)}


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    own: Path | None,
    stamps: tuple[tuple[str, int, int], ...],
    *,
    num_fewshot: int,
    limit: int | None,
    apply_chat_template: bool,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """{name of the task, or of each of a group: {metric: {"value", "stderr"}}}, as lighteval gives them."""
    grads = torch.is_grad_enabled()
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.transformers.transformers_model import TransformersModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    logging.getLogger("lighteval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="merit-lighteval-") as scratch:
        # lighteval reads the tokenizer from a folder, and keeps its cache below the model's name. No weights are here.
        folder = Path(scratch, "model")
        tokenizer.save_pretrained(folder)
        config = TransformersModelConfig(
            model_name=str(folder), batch_size=batch_size, device=str(model.device),
            override_chat_template=apply_chat_template, cache_dir=scratch,
        )  # fmt: skip
        parameters = PipelineParameters(
            launcher_type=ParallelismManager.NONE, max_samples=limit,
            custom_tasks_directory=None if own is None else str(own),
        )  # fmt: skip
        ours = {} if own is None else _own_tasks(str(own), stamps)
        kind = _own_pipeline(ours) if task in _with_groups(ours) else Pipeline
        try:
            pipeline = kind(
                f"{task}|{num_fewshot}", parameters, EvaluationTracker(scratch, save_details=False), config, model
            )
            pipeline.evaluate()
            results = pipeline.get_results()["results"]
        finally:
            # It turns gradients off for the whole process.
            torch.set_grad_enabled(grads)
    suffix = f":{num_fewshot}"
    return {name.removesuffix(suffix): _metrics(values) for name, values in results.items() if name.endswith(suffix)}


def _own_pipeline(ours: Mapping[str, Any]) -> Any:
    """lighteval's pipeline, with no other tasks than `ours`: its own takes in all of lighteval's."""
    from lighteval.pipeline import Pipeline
    from lighteval.tasks.lighteval_task import LightevalTask

    class OwnTasks(_registry()):  # type: ignore[misc]
        def __init__(self, tasks: str) -> None:
            self.tasks_list = tasks.split(",")
            self._task_registry = dict(ours)
            self.task_to_configs = self._update_task_configs()

    class OwnPipeline(Pipeline):
        def _init_tasks_and_requests(self, tasks: str) -> None:
            self.registry = OwnTasks(tasks)
            self.tasks_dict = self.registry.load_tasks()
            LightevalTask.load_datasets(self.tasks_dict, 1)
            limit = self.pipeline_parameters.max_samples
            self.documents_dict = {task.full_name: task.get_docs(limit) for task in self.tasks_dict.values()}
            self.sampling_docs = defaultdict(list)
            for doc in (doc for docs in self.documents_dict.values() for doc in docs):
                for method in doc.sampling_methods:
                    self.sampling_docs[method].append(doc)
            self.evaluation_tracker.task_config_logger.log(self.tasks_dict)

    return OwnPipeline


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in values if not (name.endswith("_stderr") and name.removesuffix("_stderr") in values)]
    return {name: {"value": values[name], "stderr": values.get(f"{name}_stderr")} for name in names}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
