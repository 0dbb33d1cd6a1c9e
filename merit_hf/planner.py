"""MeritPlanner: data → gradients → conflict matrix → groups → plan. Orchestration only.

    plan = MeritPlanner(MeritConfig.from_yaml("mixture.yaml")).plan("runs/mixture/plan")
    accelerate launch -m merit_hf.planner mixture.yaml --output runs/mixture/plan

Work in progress lies in `OUTPUT.part`; running the same thing again goes on with the datasets that are not done.
Started by `accelerate launch` or `torchrun`, the processes of one machine share the datasets between them.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from merit_hf.adapters import lora_config, model_settings
from merit_hf.checkpoint import read_tensor_index, weights_sha256
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.conflict import MANY_DATASETS
from merit_hf.data import LoadedDataset
from merit_hf.entry import exit_on_error
from merit_hf.findings import partition_mixture
from merit_hf.gradients import trained_parameters
from merit_hf.groups import GRADIENT_SPLITS, mixture_steps, plan_groups
from merit_hf.hub import resolve_model
from merit_hf.measure import keep_readouts, measure_gradients
from merit_hf.mixture import PreparedDataset, name_images, prepare_mixture, read_mixture
from merit_hf.oversized import planned_parts, with_parts
from merit_hf.plan import PLAN_NAME, PartitionPlan, canonical_sha256
from merit_hf.plan_files import holds_plan
from merit_hf.progress import Progress
from merit_hf.readouts import SKETCHES_NAME, GradientReadout, write_sketches
from merit_hf.resolved import first_difference, local_settings, published_config
from merit_hf.sft import (
    build_args,
    chat_template_sha256,
    check_trainable,
    identity_fields,
    load_model,
    load_tokenizer,
    take_chat_template,
)
from merit_hf.sharded import shard_model
from merit_hf.sketch import layer_parts
from merit_hf.split_inputs import cut_oversized, given_affinity, plan_inputs
from merit_hf.tables import ConflictPairs
from merit_hf.versions import library_versions
from merit_hf.vision import takes_images
from merit_hf.workers import Worker, check_processes


class MeritPlanner:
    """Plans a mixture.

    Args:
        config ([`MeritConfig`]): the checked CONFIG.
        progress ([`Progress`], *optional*): where to show it; default: stderr.
        worker ([`Worker`], *optional*): this process among several planners of the same output folder.
        parent ([`PartitionPlan`], *optional*): a plan of the same base and settings, whose stored gradients are taken
            in place of measuring those datasets again.
    """

    def __init__(
        self,
        config: MeritConfig,
        progress: Progress | None = None,
        worker: Worker | None = None,
        parent: PartitionPlan | None = None,
    ) -> None:
        self.config = self._given = config
        self.parent = parent
        self.worker = worker or Worker()
        self.progress = progress or Progress(quiet=not self.worker.is_main)

    @classmethod
    def from_trainer(
        cls,
        trainer: SFTTrainer,
        datasets: Mapping[str, Dataset],
        data_dir: str | Path,
        *,
        plan: Mapping[str, Any] | None = None,
        held_out: Mapping[str, Dataset] | None = None,
        tags: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> MeritPlanner:
        """A planner for the base, chat template and settings of an `SFTTrainer`, as the same CONFIG would give.

        Args:
            trainer ([`~trl.SFTTrainer`]): not yet trained. Its own `train_dataset` is not looked at.
            datasets: what is to be split, by name: rows in a format of TRL's, not tokenised.
            data_dir: folder to write the rows to, so that groups can be trained from the plan.
            plan (`dict`, *optional*): keys of CONFIG's `plan:`.
            held_out, tags (`dict`, *optional*): held-out rows, and labels for a split by tag, by dataset.

        Raises:
            ConfigError: the trainer was trained already, trains an adapter, or `plan` is refused.
        """
        from merit_hf.from_trainer import config_from_trainer

        return cls(config_from_trainer(trainer, datasets, data_dir, plan, held_out, tags), progress)

    def plan(self, output: str | Path) -> PartitionPlan:
        """Make the plan and save it in `output`.

        Returns:
            The plan, as loaded from `output`. A finished plan of the same inputs is returned as it is.

        Raises:
            ConfigError: a mistake in CONFIG, found before the model is loaded where that is possible; or `output`
                holds the plan of other inputs.
            MeritError: base or data cannot be read, or a gradient is not finite.
        """
        start = time.monotonic()
        # Cutting datasets into parts replaces entries; another call starts from those that were given.
        self.config = self._given
        output = Path(output)
        # What stands in the way is told before anything is read.
        holds_plan(output)
        part = output.with_name(output.name + ".part")
        sft, chat_template = take_chat_template(self.config.sft, self.config.root)
        args = build_args(sft)
        check_trainable(args, self.config.peft)
        if self.config.peft is not None:
            # A field that is not supported is told before anything is read.
            lora_config(self.config.peft)
        loaded, skipped = self._read(args)
        check_group_count(self.config, len(loaded), skipped)
        # A matrix that does not fit is told before any model is loaded.
        given_affinity(self.config, [dataset.name for dataset in loaded])
        folder, base, tokenizer = self._resolve_base(chat_template, any(dataset.images for dataset in loaded))
        inputs = self._inputs(base, args, loaded)
        if holds_plan(output):
            finished = _finished(output, canonical_sha256(inputs), self.config, folder)
            if self.worker.is_main:
                # A kill between the rename and the clean-up leaves it.
                shutil.rmtree(part, ignore_errors=True)
            return finished
        if self.worker.is_main:
            (part / "gradients").mkdir(parents=True, exist_ok=True)

        model = load_model(folder, args, self.config.peft, base.get("freeze", ()))
        peft = model_settings(model) or {}
        if self.worker.shards and self.config.plan.split in GRADIENT_SPLITS:
            # Before a Trainer would put the whole of it on one device.
            shard_model(model)
        prepared, dropped = prepare_mixture(loaded, model, tokenizer, args, self.progress)
        check_group_count(self.config, len(prepared), skipped | dropped)
        prepared = self._cut_oversized(prepared, model, tokenizer, args)
        readouts, seconds = self._measure(prepared, model, tokenizer, args, base, part / "gradients", output, peft)
        if not self.worker.is_main and not self.worker.shards:
            self.worker.wait(until=(output / PLAN_NAME).exists)
            return PartitionPlan.from_pretrained(output)
        matrix_start = time.monotonic()
        found = partition_mixture(self.config, prepared, readouts, tokenizer)
        by_layer = self.config.plan.sketch_by_layer and readouts
        names = [name for name, _ in trained_parameters(model)]
        plan = PartitionPlan(
            config=published_config(self.config),
            base=base,
            datasets=found.datasets,
            groups=[],
            sft=identity_fields(args),
            peft=peft,
            conflict_matrix=found.matrix,
            explained=found.explained,
            bounds=found.bounds,
            trust=found.trust,
            layers=layer_parts(names, self.config.plan.sketch_dim) if by_layer else {},
            skipped=skipped | dropped,
            versions=library_versions(),
            inputs_sha256=canonical_sha256(inputs),
            local=local_settings(self.config, folder),
            parent_sha256=self.parent.sha256 if self.parent else None,
        )
        trains = {dataset.name: dataset.train for dataset in prepared}
        steps_of_all = mixture_steps(trains, model, tokenizer, args)
        plan.sft |= steps_of_all
        plan.groups = plan_groups(plan.datasets, trains, model, tokenizer, args, base, peft, steps_of_all)
        plan.cost = {
            "gradient_seconds": round(seconds, 3),
            "matrix_seconds": round(time.monotonic() - matrix_start, 3),
            "total_seconds": round(time.monotonic() - start, 3),
            "tokens": sum(readout.num_input_tokens for readout in readouts),
            "num_batches": sum(readout.num_batches for readout in readouts),
            "world_size": self.worker.world_size,
            "gradient_checkpointing": self.config.plan.gradient_checkpointing,
        }
        # Processes that share a model go through the same steps; one of them writes.
        if not self.worker.is_main:
            self.worker.wait(until=(output / PLAN_NAME).exists)
            return PartitionPlan.from_pretrained(output)
        firsts = [readout.first_half for readout in readouts if readout.first_half is not None]
        sketches = [readout.sketch for readout in readouts]
        return save_plan(plan, sketches, part, output, first_halves=firsts if len(firsts) == len(sketches) else ())

    def _cut_oversized(
        self,
        prepared: Sequence[PreparedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
    ) -> list[PreparedDataset]:
        """With `plan.split_oversized`, parts in place of datasets that outweigh every group, in CONFIG too."""
        self.config, cut = cut_oversized(self.config, prepared, model, tokenizer, args, self.progress)
        return cut

    def _read(self, args: SFTConfig) -> tuple[list[LoadedDataset], dict[str, str]]:
        """The datasets; CONFIG then names the columns of images that were found, so that the plan does."""
        takes = functools.cache(lambda: takes_images(self._locate_base()[0]))
        loaded, skipped = read_mixture(self.config.datasets, self.config.root, args, self.progress, takes)
        found = {dataset.name: dataset.images for dataset in loaded if dataset.images}
        if found and not takes():
            name, column = next(iter(found.items()))
            raise ConfigError(
                f"datasets.{name}.images={column!r}, but the base {self.config.base.model_name_or_path} reads no "
                "images. Give a base that does (image-text-to-text), or leave `images` out to train on the text alone."
            )
        self.config = name_images(self.config, loaded, args)
        return loaded, skipped

    def _locate_base(self) -> tuple[Path, str | None, str | None]:
        section = self.config.base
        return resolve_model(section.model_name_or_path, section.revision, self.config.root, "base.model_name_or_path")

    def _resolve_base(
        self, chat_template: str | None, images: bool
    ) -> tuple[Path, dict[str, Any], PreTrainedTokenizerBase]:
        folder, repo_id, revision = self._locate_base()
        tokenizer = load_tokenizer(folder, chat_template, images)
        freeze = sorted(set(self.config.base.freeze))
        base = {
            "repo_id": repo_id,
            "revision": revision,
            "weights_sha256": weights_sha256(folder),
            "chat_template_sha256": chat_template_sha256(tokenizer),
            "chat_template": chat_template,
            "dtypes": sorted({info.dtype for info in read_tensor_index(folder).values()}),
            **({"freeze": freeze} if freeze else {}),
        }
        return folder, base, tokenizer

    def _inputs(self, base: dict[str, Any], args: SFTConfig, loaded: Sequence[LoadedDataset]) -> dict[str, Any]:
        """What determines the plan; two calls with equal inputs make the same plan."""
        weights = {dataset.name: dataset.weight for dataset in loaded if dataset.weight != 1}
        return {
            "base": {key: base[key] for key in ("weights_sha256", "chat_template_sha256", "freeze") if key in base},
            "datasets": {dataset.name: dataset.fingerprint for dataset in loaded},
            "tags": {spec.name: spec.tag for spec in self.config.datasets},
            **({"weights": weights} if weights else {}),
            "plan": plan_inputs(self.config),
            "sft": identity_fields(args),
            **({} if self.config.peft is None else {"peft": self.config.peft}),
        }

    def _measure(
        self,
        prepared: Sequence[PreparedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        base: dict[str, Any],
        folder: Path,
        output: Path,
        peft: dict[str, Any],
    ) -> tuple[list[GradientReadout], float]:
        if self.config.plan.split not in GRADIENT_SPLITS:
            return [], 0.0
        # A process that is late finds the folder gone again, and the plan in its place.
        self.worker.wait(until=lambda: folder.exists() or (output / PLAN_NAME).exists())
        moments_change = self.config.plan.precondition == "adam" and self.config.plan.optimizer_state is None
        if self.parent is not None and not moments_change:
            keep_readouts(self.parent, prepared, args, self.config.plan, folder, peft, self.config.root)
        return measure_gradients(
            prepared,
            model,
            tokenizer,
            args,
            self.config.plan,
            base["weights_sha256"],
            folder,
            self.worker,
            self.progress,
            peft,
            self.config.root,
            base.get("freeze", ()),
        )


def check_group_count(config: MeritConfig, num_datasets: int, left_out: Mapping[str, str]) -> None:
    """Raises ConfigError where there are more groups than datasets that can be trained on; says what is left out."""
    if config.num_groups > num_datasets:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in sorted(left_out.items()))
        raise ConfigError(
            f"{config.num_groups} groups, but only {num_datasets} datasets can be trained on ({reasons}). "
            f"Set plan.num_groups to {num_datasets} or less."
        )


def _finished(output: Path, inputs_sha256: str, given: MeritConfig, base: Path) -> PartitionPlan:
    """The plan that is there, with the settings of now where they do not decide it (placement, merge, paths)."""
    plan = PartitionPlan.from_pretrained(output)
    given = with_parts(given, planned_parts(plan.config["datasets"], given))
    config, local = published_config(given), local_settings(given, base)
    if plan.inputs_sha256 != inputs_sha256:
        difference = first_difference(plan.config, config) or "the base's weights, the datasets' rows or a file"
        raise ConfigError(
            f"{output} holds the plan of other inputs ({difference}). Give another --output, or delete it."
        )
    if (plan.config, plan.local) != (config, local):
        plan.config, plan.local = config, local
        plan.save_settings(output)
    return plan


def save_plan(
    plan: PartitionPlan,
    sketches: Sequence[np.ndarray],
    part: Path,
    output: Path,
    pairs: ConflictPairs | None = None,
    first_halves: Sequence[np.ndarray] = (),
) -> PartitionPlan:
    """Write everything to `part/plan`, move it to `output`, and drop the work in progress.

    `pairs`: as in [`PartitionPlan.save_pretrained`].
    """
    finished = part / "plan"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    plan.save_pretrained(finished, pairs)
    if sketches:
        write_sketches(finished / SKETCHES_NAME, sketches, first_halves)
    os.rename(finished, output)
    shutil.rmtree(part)
    saved = PartitionPlan.from_pretrained(output)
    if pairs is None and len(plan.datasets) > MANY_DATASETS:
        # At hand, so that it need not be made of the sketches again.
        saved.conflict_matrix = plan.conflict_matrix
    return saved


def main(argv: Sequence[str] | None = None) -> None:
    """The command behind recipes/plan.py: `merit plan` for several processes."""
    parser = argparse.ArgumentParser(
        description="Plan a mixture. Run the same command again to resume.",
        epilog="Example: accelerate launch -m merit_hf.planner mixture.yaml --output runs/mixture/plan",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML that names base, datasets and settings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as plan.num_groups=2")
    parser.add_argument("--output", required=True, help="folder for the plan")
    parser.add_argument("--num-processes", type=int, help="refuse to run with another number of processes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_intermixed_args(argv)
    with exit_on_error(options.debug):
        worker = Worker.from_environment()
        check_processes(worker.world_size, options.num_processes)
        planner = MeritPlanner(MeritConfig.from_yaml(options.config, options.overrides), worker=worker)
        plan = planner.plan(options.output)
        planner.progress.note(f"Plan {plan.sha256[:12]} is in {options.output}.")


if __name__ == "__main__":
    main()
