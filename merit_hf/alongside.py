"""What goes on beside the steps of a training: what is shown, the held-out losses, and a stop before the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from merit_hf.gradients import sample_indices
from merit_hf.mixture import PreparedDataset, plan_specs, prepare_dataset, read_mixture
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress, Stage
from merit_hf.seeds import seed_of
from merit_hf.train_section import TrainSection

# Put into a training's folder of unfinished work, it stops the training at its next step.
STOP_NAME = "STOP"
# Steps between two agreements of several processes, each of which waits for all of them.
_ASK_EVERY = 10


def held_out_rows(
    plan: PartitionPlan,
    group: int,
    prepared: Sequence[PreparedDataset],
    section: TrainSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    progress: Progress,
) -> dict[str, datasets.Dataset]:
    """{dataset: tokenised held-out rows} to evaluate on while training: the rows that `merit evaluate` takes.

    Empty where `args` ask for no evaluation. Datasets without held-out rows are left out; where none has any, `args`
    no longer ask for it.

    Args:
        prepared: the group's own datasets.

    Raises:
        ConfigError: with `eval_datasets: all`, a dataset of another group is not on this machine.
    """
    if args.eval_strategy == IntervalStrategy.NO and not args.eval_on_start:
        return {}
    found = {dataset.name: dataset.eval for dataset in prepared}
    others = [name for name in plan.names if name not in found] if section.eval_datasets == "all" else []
    if others:
        specs, root = plan_specs(plan, others)
        loaded, _ = read_mixture(specs, root, args, progress)
        found |= {dataset.name: prepare_dataset(dataset, model, tokenizer, args).eval for dataset in loaded}
    rows = {
        name: rows.select(sample_indices(len(rows), section.eval_num_samples, seed_of("evaluate", name)))
        for name, rows in sorted(found.items())
        if rows is not None
    }
    if not rows:
        progress.note(f"group {group}: none of its datasets has held-out rows, so nothing is evaluated on the way")
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return rows


def evaluate_aside(trainer: Trainer) -> None:
    """Let evaluations of `trainer` leave torch's random numbers as they were.

    Every pass of a DataLoader draws one, so that dropout would go on differently after an evaluation.
    """
    evaluate = trainer.evaluate
    device = trainer.args.device
    devices = [] if device.type == "cpu" else [device]

    def evaluate_with_random_state(*args: Any, **kwargs: Any) -> dict[str, float]:
        kind = "cuda" if device.type == "cpu" else device.type
        with torch.random.fork_rng(devices=devices, device_type=kind):
            return evaluate(*args, **kwargs)

    trainer.evaluate = evaluate_with_random_state  # type: ignore[method-assign]


class ShowSteps(TrainerCallback):
    """Shows steps, training loss, and the held-out loss of every dataset."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stage.update(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stage.update(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for key, value in (logs or {}).items():
            if key == "loss":
                self._stage.item(f"step {state.global_step} of {state.max_steps}, loss {float(value):.3f}")
            elif key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval_").removesuffix("_loss")
                self._stage.item(f"held-out loss of {name} {float(value):.3f} at step {state.global_step}")


class StopEarly(TrainerCallback):
    """Saves and stops at a step, after a time, or where a file asks for it; all processes at the same step."""

    def __init__(self, section: TrainSection, part: Path) -> None:
        self._section = section
        self._file = part / STOP_NAME
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._stops(args, state.global_step):
            control.should_save = control.should_training_stop = True

    def _stops(self, args: Any, step: int) -> bool:
        if self._section.stop_at_step is not None and step >= self._section.stop_at_step:
            return True
        if args.world_size == 1:
            return self._is_asked_to()
        if step % _ASK_EVERY:
            return False
        # Clocks differ, and a file is not seen everywhere in the same moment.
        wish = torch.tensor([self._is_asked_to()], dtype=torch.int64, device=args.device)
        torch.distributed.all_reduce(wish)
        return bool(wish.item())

    def _is_asked_to(self) -> bool:
        hours = self._section.max_hours
        late = hours is not None and time.monotonic() - self._start >= 3600 * hours
        return late or self._file.exists()
