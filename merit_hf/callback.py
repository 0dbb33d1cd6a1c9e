"""MeritCallback: makes anybody's Trainer script train a group of a plan, provably.

    trainer = SFTTrainer(model, args=args, train_dataset=rows, callbacks=[MeritCallback(plan, group=0)])

Before the first step it holds base, chat template, SFT settings and data against the plan. While training it keeps the
token ledger, across processes and restarts. Every save and every push carries merit.json and the group's card.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from merit_hf.adapters import ADAPTER_CONFIG_NAME, model_settings, publish_adapter_config
from merit_hf.cards import group_model_card
from merit_hf.checkpoint import weights_sha256
from merit_hf.config import MeritError
from merit_hf.data import add_digests, count_tokens, format_digest
from merit_hf.images import IMAGES
from merit_hf.ledger import TokenLedger
from merit_hf.manifest import group_manifest, hash_files, read_manifest, write_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.resolved import first_difference
from merit_hf.sft import chat_template_sha256, identity_fields
from merit_hf.sharded import wrapper_name
from merit_hf.vision import collated_tokens, is_still_the_base, is_under, names_of_trained

_BATCH_CURES = {
    "effective_batch_size": "Make per_device_train_batch_size × gradient_accumulation_steps × processes that product",
    "device_batch_size": "With dataloader_drop_last, make per_device_train_batch_size × processes that product",
}


# A script that trains group after group on one model object would go on from the group before.
_trained_models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class MeritCallback(TrainerCallback, ExportableState):
    """Args:
        plan ([`PartitionPlan`]): the plan.
        group (`int`): which of its groups this training is.

    Raises:
        MeritError: at the start of training, where base, template, settings or data are not the planned ones.
    """

    def __init__(self, plan: PartitionPlan, group: int) -> None:
        self.plan = plan
        self.group = plan.group(group).group
        self.ledger = TokenLedger()
        self.totals = dict.fromkeys(TokenLedger.FIELDS, 0)
        self.final_loss: float | None = None
        self._status = "training"
        self._trainer: Trainer | None = None
        self._save_total_limit: int | None = None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps for a resume: the ledger."""
        return {
            "args": {},
            "attributes": {"totals": dict(self.totals), "group_sha256": self.plan.group(self.group).group_sha256},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._attach()
        model = trainer.accelerator.unwrap_model(kwargs["model"])
        self._check_settings(args)
        self._check_base(model, kwargs.get("processing_class"))
        self._check_adapter(model)
        self._check_frozen(model)
        self._check_data(trainer)
        before = self._totals_before(state, args)
        # PEFT changes the model that it wraps, so a second adapter on it would not start at the base either.
        weights = model.get_base_model() if self.plan.peft else model
        if before is None and (weights in _trained_models or (self.plan.peft and _adapter_has_moved(model))):
            raise MeritError(
                f"group {self.group}: this model has been trained already, so it is not the base any more. Load the "
                "base anew for every group."
            )
        if before is not None:
            self._check_restored(trainer, model)
        _trained_models.add(weights)
        self._status = "training"
        self.final_loss = next((float(log["loss"]) for log in reversed(state.log_history) if "loss" in log), None)
        self._save_total_limit = args.save_total_limit
        self.ledger.start(model, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._before_save(args)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._before_save(args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.final_loss = float(logs["loss"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.totals = self.ledger.total()
        self.ledger.stop()
        args.save_total_limit = self._save_total_limit
        planned = self.plan.group(self.group).num_steps
        self._status = "complete" if state.global_step == planned else "stopped"

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A push while training takes the weights of the new checkpoint, and everything else from the output folder.
        self._write(self._attach(), Path(str(args.output_dir)))

    def _before_save(self, args: TrainingArguments) -> None:
        self.totals = self.ledger.total()
        # A Trainer uploads in the background, and would delete an old checkpoint while it is on its way: while one is,
        # none is deleted. The first save after it makes up for that.
        pushing = getattr(self._attach(), "push_in_progress", None)
        is_busy = pushing is not None and not pushing.is_done()
        args.save_total_limit = None if is_busy else self._save_total_limit

    def _attach(self) -> Trainer:
        """Let every save and card of the calling trainer carry ours."""
        trainer = _calling_trainer()
        if trainer is self._trainer:
            return trainer
        self._trainer = trainer
        save_model = trainer.save_model

        def save_with_manifest(output_dir: str | None = None, _internal_call: bool = False) -> None:
            save_model(output_dir, _internal_call)
            self._write(trainer, Path(output_dir or str(trainer.args.output_dir)))

        def write_card(*args: Any, **kwargs: Any) -> None:
            self._write_card(trainer, Path(str(trainer.args.output_dir)), self._manifest(trainer))

        trainer.save_model = save_with_manifest  # type: ignore[method-assign]
        trainer.create_model_card = write_card  # type: ignore[method-assign]
        return trainer

    def _manifest(self, trainer: Trainer) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "num_processes": trainer.args.world_size, "wrapper": wrapper_name(trainer.model_wrapped),
            "final_loss": self.final_loss,
        }  # fmt: skip
        if self.plan.peft:
            facts["peft"] = model_settings(trainer.accelerator.unwrap_model(trainer.model))
        held_out = held_out_losses(trainer.state.log_history, self.plan.names)
        if held_out:
            facts["held_out_loss"] = held_out
        steps, sft = trainer.state.global_step, self._identity(trainer.args)
        return group_manifest(self.plan, self.group, self.totals, steps, sft, self._status, facts)

    def _write(self, trainer: Trainer, folder: Path) -> None:
        if not trainer.is_world_process_zero():
            return
        manifest = self._manifest(trainer)
        # A push while training takes this file, rewritten there, from the checkpoint.
        if self.plan.peft and (folder / ADAPTER_CONFIG_NAME).exists():
            publish_adapter_config(folder, self.plan.base["repo_id"], self.plan.base["revision"])
        if self._status != "training":
            manifest["files"] = hash_files(folder)
        self._write_card(trainer, folder, manifest)
        write_manifest(folder, manifest)

    def _write_card(self, trainer: Trainer, folder: Path, manifest: dict[str, Any]) -> None:
        if trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(group_model_card(self.plan, manifest), encoding="utf-8")

    def _identity(self, args: TrainingArguments) -> dict[str, Any]:
        planned = self.plan.group_sft(self.group)
        # What the fields of SFT decide that a plain Trainer lacks is in the tokens, which are checked.
        fields = {**planned, **identity_fields(args, args.world_size)}
        return {**fields, "assistant_only_loss": planned["assistant_only_loss"]}

    def _check_settings(self, args: TrainingArguments) -> None:
        planned, found = self.plan.group_sft(self.group), self._identity(args)
        for field in sorted(planned):
            if planned[field] != found.get(field):
                cure = _BATCH_CURES.get(field, f"Set {field}={planned[field]!r}")
                raise MeritError(
                    f"group {self.group}: {field} is {found.get(field)!r}, planned {planned[field]!r}. {cure}, or "
                    "plan again."
                )

    def _check_base(self, model: PreTrainedModel, processing_class: Any) -> None:
        template = chat_template_sha256(processing_class) if processing_class is not None else None
        if template is not None and template != self.plan.base["chat_template_sha256"]:
            raise MeritError(
                f"group {self.group}: the chat template has sha256 {template[:12]}, planned "
                f"{self.plan.base['chat_template_sha256'][:12]}. Use the base's own tokenizer, or plan again."
            )
        source = str(getattr(model.config, "_name_or_path", ""))
        if source and Path(source).is_dir():
            found = weights_sha256(Path(source))
            if found != self.plan.base["weights_sha256"]:
                raise MeritError(
                    f"group {self.group}: the model in {source} has weights {found[:12]}, planned "
                    f"{self.plan.base['weights_sha256'][:12]}. Every group starts from the plan's base."
                )
            return
        commit = getattr(model.config, "_commit_hash", None)
        if (source, commit) != (self.plan.base["repo_id"], self.plan.base["revision"]):
            raise MeritError(
                f"group {self.group}: the model comes from {source or 'an unknown place'} at {commit}, planned "
                f"{self.plan.base['repo_id'] or 'a local base'} at {self.plan.base['revision']}. Load the plan's base."
            )

    def _check_adapter(self, model: PreTrainedModel) -> None:
        found = model_settings(model) or {}
        if found == self.plan.peft:
            return
        if found and self.plan.peft:
            what = f"the adapter's settings differ: {first_difference(self.plan.peft, found)}"
        else:
            what = (
                "the plan trains an adapter, the model has none"
                if self.plan.peft
                else ("the plan trains all weights, the model has an adapter")
            )
        cure = "peft_config=LoraConfig(**plan.peft)" if self.plan.peft else "the plain model"
        raise MeritError(f"group {self.group}: {what}. Give SFTTrainer {cure}, or plan again.")

    def _check_frozen(self, model: PreTrainedModel) -> None:
        """Of the plan's frozen modules nothing may train; of the others, at least what their gradient was taken of."""
        freeze = self.plan.base.get("freeze", [])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(is_under(name, prefix) for prefix in freeze):
                raise MeritError(
                    f"group {self.group}: {name} would be trained, and the plan freezes {', '.join(freeze)}. Call "
                    "requires_grad_(False) on these modules before the trainer is made, or plan again."
                )
        names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        others = sorted(name for name in names if not any(is_under(name, prefix) for prefix in freeze))
        # A few architectures hold parameters that never train, such as fixed positions.
        if others and not self.plan.peft and names_of_trained(model) & set(others):
            raise MeritError(
                f"group {self.group}: {others[0]} would not be trained, and the plan trains it. Leave it trainable, "
                "or plan again with base.freeze."
            )

    def _check_restored(self, trainer: Trainer, model: PreTrainedModel) -> None:
        # The first step of a warm-up may move nothing. A sharded model is restored from files of its own.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if trainer.state.global_step < 2 or self.plan.peft or sharded:
            return
        if is_still_the_base(model, self.plan.base_folder):
            raise MeritError(
                f"group {self.group}: resumed at step {trainer.state.global_step}, but with the weights of the base: "
                "transformers' Trainer does not restore tensors that it renames while loading. Resume with `merit "
                "train`, or load the checkpoint's weights into the model yourself."
            )

    def _check_data(self, trainer: Trainer) -> None:
        planned, rows = self.plan.group(self.group), trainer.train_dataset
        if isinstance(rows, datasets.Dataset) and self.plan.has_images and "input_ids" not in rows.column_names:
            # With images TRL tokenises when it collates, so the tokens are not there yet.
            rows = collated_tokens(trainer.data_collator, rows)
        if not isinstance(rows, datasets.Dataset) or "input_ids" not in rows.column_names:
            raise MeritError(
                f"group {self.group}: the training data is not a tokenised `datasets.Dataset`, so it cannot be held "
                "against the plan. Do not stream it, and let the trainer tokenise it."
            )
        columns = [name for name in ("input_ids", "labels", "seq_lengths", IMAGES) if name in rows.column_names]
        rows = rows.select_columns(columns)
        if "labels" not in columns:
            rows = rows.map(lambda row: {"labels": row["input_ids"]})
        counts = count_tokens(rows)
        cut_anew = self.plan.sft["packing"] and self.plan.sft["packing_strategy"] != "bfd"
        expected = add_digests([member.tokens_digest for member in self.plan.members(self.group)])
        if counts.num_input_tokens != planned.num_input_tokens or (
            not cut_anew and format_digest(counts.digest) != expected
        ):
            raise MeritError(
                f"group {self.group}: the training data are not the planned ones: {len(rows)} rows with "
                f"{counts.num_input_tokens} tokens (digest {format_digest(counts.digest)[:12]}), planned "
                f"{planned.num_examples} examples with {planned.num_input_tokens} tokens ({expected[:12]}) of "
                f"{', '.join(planned.datasets)}."
            )

    def _totals_before(self, state: TrainerState, args: TrainingArguments) -> dict[str, int] | None:
        if state.global_step == 0:
            return None
        stored: Any = state.stateful_callbacks or {}
        kept = stored.get(type(self).__name__, {}).get("attributes", {})
        if kept.get("group_sha256") != self.plan.group(self.group).group_sha256:
            raise MeritError(
                f"group {self.group}: the checkpoint to resume from (step {state.global_step}) was not trained under "
                "this plan and group, so its tokens are unknown. Start again without it."
            )
        # Each process adds its own count to the total; the restored one must enter once.
        return kept["totals"]


def held_out_losses(log_history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of every dataset that was evaluated while training, its first and its last held-out loss, and at which steps."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for log in log_history:
        for key in log:
            if key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval_").removesuffix("_loss")
                logged.setdefault(name, []).append((log["step"], float(log[key])))
    return [
        {"dataset": name, "first_step": first[0], "first": first[1], "last_step": last[0], "last": last[1]}
        for name in names
        if name in logged
        for first, last in [(logged[name][0], logged[name][-1])]
    ]


def stopped_checkpoint(plan: PartitionPlan, checkpoint: Path, folder: Path) -> None:
    """What a Trainer saved on the way as a checkpoint of its own, which says at which step it was stopped."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin", "optimizer_*"))
    manifest = {**read_manifest(folder), "status": "stopped", "files": hash_files(folder)}
    (folder / "README.md").write_text(group_model_card(plan, manifest), encoding="utf-8")
    write_manifest(folder, manifest)


def _adapter_has_moved(model: PreTrainedModel) -> bool:
    """Whether any B is not zero. Shards that lie in other processes count as zero."""
    return any(bool(p.detach().any()) for name, p in model.named_parameters() if ".lora_B." in name)


def _calling_trainer() -> Trainer:
    """The trainer that called the callback: transformers hands callbacks everything but the trainer itself."""
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    raise MeritError("MeritCallback works as a callback of a transformers Trainer; give it in `callbacks=`.")
