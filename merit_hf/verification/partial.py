"""What a training that was stopped should have processed: replayed from the plan's data, never taken on trust."""

from __future__ import annotations

import datasets

from merit_hf.data import count_tokens
from merit_hf.ledger import Budget, replay
from merit_hf.mixture import prepare_group
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import build_args, group_steps, load_model, load_tokenizer, training_rows


class Replays:
    """The budgets of the first steps of a plan's groups, each replayed once.

    Needs the group's data on this machine; the rows must be in the order of `merit train`, dataset after
    dataset by name, since the order decides which of them the first steps take.
    """

    def __init__(self, plan: PartitionPlan, progress: Progress | None = None) -> None:
        self._plan = plan
        self._progress = progress or Progress()
        self._known: dict[tuple[int, int], Budget] = {}

    def __call__(self, group: int, num_steps: int) -> Budget:
        """Tokens of the first `num_steps` steps of a group.

        Raises:
            ConfigError: a dataset is not on this machine. MeritError: it is not the one that was planned.
        """
        key = (group, num_steps)
        if key not in self._known:
            self._known[key] = self._replay(*key)
        return self._known[key]

    def _replay(self, group: int, num_steps: int) -> Budget:
        plan = self._plan
        base = plan.base_folder()
        args = build_args({**plan.config["sft"], **plan.local.get("sft", {})})
        tokenizer = load_tokenizer(base, plan.base.get("chat_template"), plan.has_images)
        model = load_model(base, args)
        prepared = prepare_group(plan, group, model, tokenizer, args, self._progress)
        rows = datasets.concatenate_datasets([dataset.train for dataset in prepared])
        counts = count_tokens(training_rows(model, tokenizer, args, rows))
        with group_steps(args, num_steps):
            return replay(counts.input_tokens, counts.loss_tokens, args)
