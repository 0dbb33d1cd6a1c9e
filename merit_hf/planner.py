"""MeritPlanner: data → gradients → conflict matrix → groups → plan. Orchestration only.

    plan = MeritPlanner(MeritConfig.from_yaml("mixture.yaml")).plan("runs/mixture/plan")

Work in progress lies in `OUTPUT.part`; running the same thing again goes on with the datasets that are not done.
Started by `accelerate launch` or `torchrun`, the processes share the datasets between them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf import partition
from merit_hf.checkpoint import read_tensor_index, weights_sha256
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.conflict import axis_bounds, conflict_matrix, sketch_error, structure_p_value
from merit_hf.data import LoadedDataset, count_tokens, format_digest, is_local, seed_of
from merit_hf.gradients import GradientReadout, dataset_gradient, sample_indices, trained_parameters
from merit_hf.hub import resolve_model
from merit_hf.ledger import replay
from merit_hf.mixture import PreparedDataset, prepare_dataset, read_mixture
from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup, canonical_sha256, group_identity
from merit_hf.progress import Progress
from merit_hf.readouts import SKETCHES_NAME, load_readout, readout_path, save_readout, write_sketches
from merit_hf.sft import (
    build_args,
    chat_template_sha256,
    group_steps,
    identity_fields,
    load_model,
    load_tokenizer,
    open_loss,
    take_chat_template,
    training_rows,
)
from merit_hf.sketch import Sketch, make_sketch
from merit_hf.versions import library_versions
from merit_hf.workers import Worker

# What of the SFT settings changes a gradient without changing the tokens.
_LOSS_FIELDS = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef", "bf16", "fp16")
_GRADIENT_SPLITS = ("merit", "kmeans")


class MeritPlanner:
    """Plans a mixture.

    Args:
        config ([`MeritConfig`]): the checked CONFIG.
        progress ([`Progress`], *optional*): where to show it; default: stderr.
        worker ([`Worker`], *optional*): this process among several planners of the same output folder.
    """

    def __init__(self, config: MeritConfig, progress: Progress | None = None, worker: Worker | None = None) -> None:
        self.config = config
        self.worker = worker or Worker()
        self.progress = progress or Progress(quiet=not self.worker.is_main)

    def plan(self, output: str | Path) -> PartitionPlan:
        """Make the plan and save it in `output`.

        Returns:
            The plan, as loaded from `output`. A finished plan of the same inputs is returned as it is.

        Raises:
            ConfigError: a mistake in CONFIG, found before the model is loaded where that is possible; or `output` holds
                the plan of other inputs.
            MeritError: base or data cannot be read, or a gradient is not finite.
        """
        start = time.monotonic()
        output = Path(output)
        part = output.with_name(output.name + ".part")
        sft, chat_template = take_chat_template(self.config.sft, self.config.root)
        args = build_args(sft, part / "trainer")
        loaded, skipped = read_mixture(self.config.datasets, self.config.root, args, self.progress)
        self._check_group_count(len(loaded), skipped)
        folder, base, tokenizer = self._resolve_base(chat_template)
        inputs = self._inputs(base, args, loaded)
        if output.exists():
            return _finished(output, canonical_sha256(inputs), self._published_config())
        part.mkdir(parents=True, exist_ok=True)

        model = load_model(folder, args)
        prepared, dropped = self._prepare(loaded, model, tokenizer, args)
        self._check_group_count(len(prepared), skipped | dropped)
        readouts, seconds = self._gradients(prepared, model, tokenizer, args, part / "gradients", base)
        if not self.worker.is_main:
            self.worker.wait(until=output.exists, alive=lambda: 0.0)
            return PartitionPlan.from_pretrained(output)
        matrix_start = time.monotonic()
        sketches = [readout.sketch for readout in readouts]
        matrix = self._matrix(prepared, sketches)
        groups = self._split(prepared, matrix, sketches)
        plan = PartitionPlan(
            config=self._published_config(),
            base=base,
            datasets=self._datasets(prepared, readouts, groups, matrix),
            groups=[],
            sft=identity_fields(args),
            conflict_matrix=matrix,
            skipped=skipped | dropped,
            versions=library_versions(),
            inputs_sha256=canonical_sha256(inputs),
            local=self._local(folder),
            **self._axes(matrix, readouts),
        )
        plan.groups = plan_groups(plan.datasets, {d.name: d.train for d in prepared}, model, tokenizer, args, base)
        plan.cost = {
            "gradient_seconds": round(seconds, 3),
            "matrix_seconds": round(time.monotonic() - matrix_start, 3),
            "total_seconds": round(time.monotonic() - start, 3),
            "tokens": sum(readout.num_input_tokens for readout in readouts),
            "num_batches": sum(readout.num_batches for readout in readouts),
            "world_size": self.worker.world_size,
        }
        return _save(plan, sketches, part, output)

    def _check_group_count(self, num_datasets: int, left_out: dict[str, str]) -> None:
        if self.config.num_groups > num_datasets:
            reasons = "; ".join(f"`{name}`: {reason}" for name, reason in sorted(left_out.items()))
            raise ConfigError(
                f"{self.config.num_groups} groups, but only {num_datasets} datasets can be trained on ({reasons}). Set "
                f"plan.num_groups to {num_datasets} or less."
            )

    def _resolve_base(self, chat_template: str | None) -> tuple[Path, dict[str, Any], PreTrainedTokenizerBase]:
        section = self.config.base
        folder, repo_id, revision = resolve_model(
            section.model_name_or_path, section.revision, self.config.root, "base.model_name_or_path"
        )
        tokenizer = load_tokenizer(folder, chat_template)
        base = {
            "repo_id": repo_id,
            "revision": revision,
            "weights_sha256": weights_sha256(folder),
            "chat_template_sha256": chat_template_sha256(tokenizer),
            "chat_template": chat_template,
            "dtypes": sorted({info.dtype for info in read_tensor_index(folder).values()}),
        }
        return folder, base, tokenizer

    def _inputs(self, base: dict[str, Any], args: SFTConfig, loaded: Sequence[LoadedDataset]) -> dict[str, Any]:
        """What determines the plan; two calls with equal inputs make the same plan."""
        return {
            "base": {key: base[key] for key in ("weights_sha256", "chat_template_sha256")},
            "datasets": {dataset.name: dataset.fingerprint for dataset in loaded},
            "tags": {spec.name: spec.tag for spec in self.config.datasets},
            "plan": self.config.plan.model_dump(exclude={"tokens_per_batch"}),
            "sft": identity_fields(args),
        }

    def _prepare(
        self,
        loaded: Sequence[LoadedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
    ) -> tuple[list[PreparedDataset], dict[str, str]]:
        prepared, dropped = [], {}
        with self.progress.stage("Tokenising", total=len(loaded)) as stage:
            for number, dataset in enumerate(loaded, 1):
                stage.item(f"{dataset.name} ({number} of {len(loaded)})")
                ready = prepare_dataset(dataset, model, tokenizer, args)
                stage.advance()
                if ready.counts.num_loss_tokens:
                    prepared.append(ready)
                else:
                    dropped[dataset.name] = f"none of its {len(dataset.train)} examples has a loss token"
        for name, reason in dropped.items():
            self.progress.note(f"left out `{name}`: {reason}")
        for dataset in prepared:
            if dataset.num_dropped or dataset.num_truncated:
                self.progress.note(
                    f"{dataset.name}: {dataset.num_truncated} examples cut to sft.max_length={args.max_length}, "
                    f"{dataset.num_dropped} dropped for want of a loss token"
                )
        return prepared, dropped

    def _gradients(
        self,
        prepared: Sequence[PreparedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        folder: Path,
        base: dict[str, Any],
    ) -> tuple[list[GradientReadout], float]:
        """The read-out of every dataset, those on disk from an earlier try included, and the seconds of this one."""
        if self.config.plan.split not in _GRADIENT_SPLITS:
            return [], 0.0
        start = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        section = self.config.plan
        parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
        sketch = make_sketch(section.sketch, parameters, section.sketch_dim, section.stride, section.seed)
        check_disk(len(prepared), sketch.dim, folder)
        samples = {d.name: self._sample(d) for d in prepared}
        keys = {d.name: self._key(d, args, base) for d in prepared}
        paths = {d.name: readout_path(folder, d.name) for d in prepared}
        missing = [d for d in prepared if load_readout(paths[d.name], keys[d.name]) is None]
        if len(missing) < len(prepared):
            self.progress.note(
                f"going on: {len(prepared) - len(missing)} of {len(prepared)} gradients are there already"
            )
        tokens = sum(sum(map(len, samples[d.name]["input_ids"])) for d in missing)
        with self.progress.stage("Gradients", total=tokens, unit="tokens") as stage:
            # The largest first, so that no process is left alone with one at the end.
            for dataset in sorted(missing, key=lambda d: (-d.counts.num_input_tokens, d.name)):
                if not self.worker.claim(folder, paths[dataset.name].stem):
                    continue
                done = sum(load_readout(paths[d.name], keys[d.name]) is not None for d in prepared)
                stage.item(f"{dataset.name} ({done + 1} of {len(prepared)})")
                rows = samples[dataset.name]
                try:
                    with open_loss(model, tokenizer, args, rows) as trainer:
                        readout = dataset_gradient(
                            trainer, rows, sketch, section.reduction, section.tokens_per_batch, stage.advance
                        )
                except MeritError as error:
                    raise MeritError(f"dataset `{dataset.name}`: {error}") from error
                save_readout(paths[dataset.name], keys[dataset.name], readout)

        def on_disk() -> list[GradientReadout | None]:
            return [load_readout(paths[d.name], keys[d.name]) for d in prepared]

        self.worker.wait(
            until=lambda: None not in on_disk(), alive=lambda: sum(readout is not None for readout in on_disk())
        )
        return [readout for readout in on_disk() if readout is not None], time.monotonic() - start

    def _sample(self, dataset: PreparedDataset) -> datasets.Dataset:
        """Rows for the gradient, drawn among those with a loss token by (seed, dataset) alone."""
        usable = np.flatnonzero(dataset.counts.loss_tokens)
        section = self.config.plan
        return dataset.train.select(
            usable[sample_indices(len(usable), section.num_samples, seed_of(section.seed, dataset.name))]
        )

    def _key(self, dataset: PreparedDataset, args: SFTConfig, base: dict[str, Any]) -> str:
        section = self.config.plan
        return canonical_sha256(
            {
                "base": base["weights_sha256"],
                "tokens": format_digest(dataset.counts.digest),
                "fingerprint": dataset.loaded.fingerprint,
                "loss": {field: getattr(args, field) for field in _LOSS_FIELDS},
                "plan": section.model_dump(
                    include={"num_samples", "sketch", "sketch_dim", "stride", "reduction", "tokens_per_batch", "seed"}
                ),
            }
        )

    def _matrix(self, prepared: Sequence[PreparedDataset], sketches: Sequence[np.ndarray]) -> np.ndarray | None:
        if not sketches:
            return None
        try:
            return conflict_matrix(sketches)
        except ValueError as error:
            zero = [d.name for d, sketch in zip(prepared, sketches, strict=True) if not np.any(sketch)]
            raise MeritError(f"datasets {', '.join(zero)} have no gradient at the base: {error}.") from error

    def _split(
        self, prepared: Sequence[PreparedDataset], matrix: np.ndarray | None, sketches: Sequence[np.ndarray]
    ) -> np.ndarray:
        section, num_groups = self.config.plan, self.config.num_groups
        sizes = [_size(dataset, section.balance) for dataset in prepared]
        if section.split == "merit" and matrix is not None:
            return partition.split_by_conflict(matrix, sizes, num_groups, section.center, section.axes)
        if section.split == "kmeans" and matrix is not None:
            try:
                return partition.split_by_kmeans(matrix, num_groups, section.seed)
            except ValueError as error:
                raise MeritError(f"plan.split=kmeans: {error}. Lower plan.num_groups.") from error
        if section.split == "random":
            return partition.split_at_random(sizes, num_groups, section.seed)
        if section.split == "by_tag":
            tags = {spec.name: spec.tag or "" for spec in self.config.datasets}
            return partition.split_by_tag([tags[dataset.name] for dataset in prepared])
        return np.zeros(len(prepared), dtype=np.int64)

    def _datasets(
        self,
        prepared: Sequence[PreparedDataset],
        readouts: Sequence[GradientReadout],
        groups: np.ndarray,
        matrix: np.ndarray | None,
    ) -> list[PlannedDataset]:
        specs = {spec.name: spec for spec in self.config.datasets}
        section = self.config.plan
        axes = partition.num_axes_for(self.config.num_groups)
        coordinates = None if matrix is None else partition.principal_axes(matrix, max(2, axes), section.center)[0]
        rows = []
        for index, dataset in enumerate(prepared):
            readout = readouts[index] if readouts else None
            spec, loaded = specs[dataset.name], dataset.loaded
            rows.append(
                PlannedDataset(
                    name=dataset.name,
                    group=int(groups[index]),
                    tag=spec.tag,
                    format=loaded.format,
                    fingerprint=loaded.fingerprint,
                    tokens_digest=format_digest(dataset.counts.digest),
                    num_examples=dataset.counts.num_examples,
                    num_input_tokens=dataset.counts.num_input_tokens,
                    num_loss_tokens=dataset.counts.num_loss_tokens,
                    num_dropped=dataset.num_dropped,
                    num_truncated=dataset.num_truncated,
                    num_sampled=readout.num_samples if readout else 0,
                    gradient_norm=readout.norm if readout else None,
                    base_loss=readout.loss if readout else None,
                    coordinates=[] if coordinates is None else coordinates[index].tolist(),
                    repo_id=loaded.repo_id,
                    config=spec.config,
                    split=spec.split if loaded.repo_id else None,
                    revision=loaded.revision,
                )
            )
        return rows

    def _axes(self, matrix: np.ndarray | None, readouts: Sequence[GradientReadout]) -> dict[str, Any]:
        if matrix is None:
            return {"explained": [], "bounds": {}}
        section = self.config.plan
        num_axes = partition.num_axes_for(self.config.num_groups)
        _, singular_values = partition.principal_axes(matrix, num_axes, section.center)
        total = float((singular_values**2).sum()) or 1.0
        explained = [float(value**2 / total) for value in singular_values[: max(2, num_axes)]]
        error = sketch_error(len(matrix), len(readouts[0].sketch), section.sketch)
        p_value = structure_p_value(matrix, section.seed)
        verdict = "unknown" if p_value is None else "structure" if p_value <= 0.05 else "noise"
        bounds = axis_bounds(singular_values, num_axes, error) | {"structure_p_value": p_value, "verdict": verdict}
        return {"explained": explained, "bounds": bounds}

    def _published_config(self) -> dict[str, Any]:
        """CONFIG as resolved, with nothing in it that names a file of this machine."""
        content = self.config.model_dump(mode="json")
        content["plan"]["num_groups"] = self.config.num_groups
        content["sft"].pop("chat_template_path", None)
        if is_local(content["base"]["model_name_or_path"], self.config.root):
            content["base"]["model_name_or_path"] = None
        for entry in content["datasets"]:
            if is_local(entry["path"], self.config.root):
                entry["path"] = None
            if entry["eval_path"] is not None and is_local(entry["eval_path"], self.config.root):
                entry["eval_path"] = None
        return content

    def _local(self, folder: Path) -> dict[str, Any]:
        root = self.config.root.resolve()
        entries: dict[str, dict[str, str]] = {}
        for spec in self.config.datasets:
            paths = {"path": spec.path, "eval_path": spec.eval_path}
            local = {key: path for key, path in paths.items() if path is not None and is_local(path, root)}
            if local:
                entries[spec.name] = {key: str((root / path).expanduser().resolve()) for key, path in local.items()}
        return {"base": str(folder), "root": str(root), "datasets": entries}


def plan_groups(
    rows: Sequence[PlannedDataset],
    trains: dict[str, datasets.Dataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    base: dict[str, Any],
) -> list[PlannedGroup]:
    """Counts, replayed training budget, weight and identity of every group.

    `sft.max_steps` is the budget of the whole mixture: groups share it by their input tokens.
    """
    numbers = sorted({row.group for row in rows})
    members = {number: [row for row in rows if row.group == number] for number in numbers}
    tokens = {number: sum(row.num_input_tokens for row in members[number]) for number in numbers}
    budgets, identities = {}, {}
    for number in numbers:
        share = tokens[number] / sum(tokens.values())
        with group_steps(args, share):
            merged = datasets.concatenate_datasets([trains[row.name] for row in members[number]])
            counts = count_tokens(training_rows(model, tokenizer, args, merged))
            budgets[number] = replay(counts.input_tokens, counts.loss_tokens, args)
            identities[number] = group_identity(base, members[number], identity_fields(args))
    total = sum(budget.num_input_tokens for budget in budgets.values())
    return [
        PlannedGroup(
            group=number,
            datasets=[row.name for row in members[number]],
            num_examples=sum(row.num_examples for row in members[number]),
            num_input_tokens=tokens[number],
            num_loss_tokens=sum(row.num_loss_tokens for row in members[number]),
            num_steps=budgets[number].num_steps,
            train_input_tokens=budgets[number].num_input_tokens,
            train_loss_tokens=budgets[number].num_loss_tokens,
            weight=budgets[number].num_input_tokens / total,
            group_sha256=identities[number],
        )
        for number in numbers
    ]


def check_disk(num_datasets: int, dim: int, folder: Path) -> None:
    """Raises ConfigError where the read-outs, while planning and in the plan, would not fit on the disk."""
    needed, free = 2 * 4 * num_datasets * dim, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise ConfigError(
            f"{num_datasets} read-outs of {dim:,} numbers need {needed / 1e9:,.1f} GB on disk, {free / 1e9:,.1f} GB are free. "
            "Use plan.sketch=count_sketch, a larger plan.stride, or another --output."
        )


def _size(dataset: PreparedDataset, balance: str) -> float:
    return {"tokens": dataset.counts.num_input_tokens, "examples": dataset.counts.num_examples, "datasets": 1}[balance]


def _finished(output: Path, inputs_sha256: str, config: dict[str, Any]) -> PartitionPlan:
    plan = PartitionPlan.from_pretrained(output)
    if plan.inputs_sha256 == inputs_sha256:
        return plan
    difference = first_difference(plan.config, config) or "the base's weights or the datasets' rows"
    raise ConfigError(f"{output} holds the plan of other inputs ({difference}). Give another --output, or delete it.")


def first_difference(planned: Any, found: Any, key: str = "") -> str | None:
    """`key: planned → found` for the first place where two resolved configs differ."""
    if isinstance(planned, dict) and isinstance(found, dict):
        for name in sorted(planned.keys() | found.keys()):
            difference = first_difference(planned.get(name), found.get(name), f"{key}.{name}" if key else str(name))
            if difference:
                return difference
        return None
    return None if planned == found else f"{key}: {planned!r} there, {found!r} here"


def _save(plan: PartitionPlan, sketches: Sequence[np.ndarray], part: Path, output: Path) -> PartitionPlan:
    """Write everything to `part/plan`, move it to `output`, and drop the work in progress."""
    finished = part / "plan"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    plan.save_pretrained(finished)
    if sketches:
        write_sketches(finished / SKETCHES_NAME, sketches)
    os.rename(finished, output)
    shutil.rmtree(part)
    return PartitionPlan.from_pretrained(output)
