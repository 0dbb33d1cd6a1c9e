"""Train one group of a plan: TRL's SFTTrainer with MeritCallback, from the pinned base.

    accelerate launch -m merit_hf.training PLAN --group 0 --output runs/mixture/groups/0

Checkpoints lie in `OUTPUT.part`; the same command goes on from the last complete one. `OUTPUT` appears at the end, or
where the training is told to stop before it (`train.stop_at_step`, `train.max_hours`, a file `OUTPUT.part/STOP`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from merit_hf.alongside import STOP_NAME, ShowSteps, StopEarly, evaluate_aside, held_out_rows
from merit_hf.callback import MeritCallback, stopped_checkpoint
from merit_hf.config import ConfigError, MeritError
from merit_hf.entry import exit_on_error
from merit_hf.errors import StoppedError
from merit_hf.hub import current_user, fetch_folder
from merit_hf.manifest import MIX_FILES, TRAINER_STATE, end_of_training, hash_files, read_manifest
from merit_hf.mix import write_mix
from merit_hf.mixture import prepare_group
from merit_hf.placement import check_placement, parse_placement, parse_places
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import (
    BATCH_FIELDS,
    build_args,
    check_reporting,
    load_model,
    load_tokenizer,
    open_trainer,
    restore_renamed,
)
from merit_hf.sharing.community import contribute, may_write
from merit_hf.sharing.publish import push_group, read_remote_manifest
from merit_hf.stopping import StopOnSigterm
from merit_hf.train_section import PREFIX, TrainSection, train_section
from merit_hf.workers import check_processes

_RUN_NAME = "run.json"
# Where a Trainer with `hub_strategy: checkpoint` puts its newest one.
_LAST_CHECKPOINT = "last-checkpoint"
_LOGS = "runs"


def train_group(
    plan: PartitionPlan,
    group: int,
    output: str | Path,
    placement: Mapping[str, Any] | None = None,
    num_processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a group and leave its checkpoint in `output`: weights, tokenizer, merit.json and card.

    Args:
        plan ([`PartitionPlan`]): the plan.
        group (`int`): which group.
        output (`str` or `Path`): the folder to make. A finished checkpoint of the same group is left as it is.
        placement (`dict`, *optional*): SFT fields that do not change the result, over the plan's own: batch per
            device, accumulation, saving, logging, evaluating. Their batch product must be the planned one. Beside them
            keys of CONFIG's `train:`, as `train.KEY`.
        num_processes (`int`, *optional*): how many processes were asked for; another number is refused.
        progress ([`Progress`], *optional*): where to show it.

    Raises:
        ConfigError: no such group, a field that is part of the plan's identity, or a batch that cannot be divided.
        MeritError: base, data or settings are not the planned ones; `output` holds something else.
    """
    output = Path(output)
    planned = plan.group(group)
    part = output.with_name(output.name + ".part")
    section = train_section(plan.config.get("train", {}), placement or {})
    placement = {key: value for key, value in (placement or {}).items() if not key.startswith(PREFIX)}
    args = _group_args(plan, group, part, placement, num_processes)
    if _is_done(plan, group, output, part, section):
        if args.push_to_hub and args.process_index == 0:
            push_group(output, str(args.hub_model_id), args.hub_private_repo)
        return output
    state = PartialState()
    progress = progress or Progress(quiet=not state.is_main_process)
    if state.is_main_process:
        _discard_stale(part, planned.group_sha256)
        if args.push_to_hub:
            _resume_from_hub(part, str(args.hub_model_id), planned.group_sha256, progress)
    state.wait_for_everyone()
    checkpoint = last_checkpoint(part)
    if checkpoint is not None and _is_enough(checkpoint, planned.num_steps, section, part):
        state.wait_for_everyone()
        if state.is_main_process:
            stopped_checkpoint(plan, checkpoint, part / "final")
    else:
        _train(plan, group, part, args, section, checkpoint, progress)
    if state.is_main_process:
        _publish(part, output)
        if read_manifest(output)["status"] == "stopped":
            progress.note(f"group {group}: {_stopped_line(plan, group, output)}")
        if args.push_to_hub:
            pushed = push_group(output, str(args.hub_model_id), args.hub_private_repo)
            progress.note(f"group {group}: pushed {pushed.url}")
    state.wait_for_everyone()
    return output


def _train(
    plan: PartitionPlan,
    group: int,
    part: Path,
    args: SFTConfig,
    section: TrainSection,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """From the base, or from `checkpoint`, to `part/final`."""
    planned, state = plan.group(group), PartialState()
    base = plan.base_folder()
    tokenizer = load_tokenizer(base, plan.base.get("chat_template"), plan.has_images)
    model = load_model(base, args, plan.peft or None, plan.base.get("freeze", ()))
    prepared = prepare_group(plan, group, model, tokenizer, args, progress)
    rows = datasets.concatenate_datasets([dataset.train for dataset in prepared])
    held_out = held_out_rows(plan, group, prepared, section, model, tokenizer, args, progress)
    stop = StopOnSigterm()
    if checkpoint is not None:
        progress.note(f"group {group}: going on from {checkpoint.name}")
        restore_renamed(model, checkpoint, args)
    with progress.stage(f"Group {group}", total=planned.num_steps, unit="steps") as stage:
        # Those that stop come before the callback of ours, which counts where a save is due.
        callbacks = [stop, StopEarly(section, part), MeritCallback(plan, group), ShowSteps(stage)]
        with open_trainer(model, tokenizer, args, rows, callbacks=callbacks, eval_dataset=held_out or None) as trainer:
            trainer.remove_callback(PrinterCallback)
            evaluate_aside(trainer)
            held = trainer.train_dataset
            if state.is_main_process and isinstance(held, datasets.Dataset):
                write_mix(plan, group, prepared, len(held), args, part)
            with stop.listening() if args.world_size == 1 else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if stop.asked and trainer.state.global_step < planned.num_steps:
                raise StoppedError(
                    f"group {group}: stopped by SIGTERM; step {trainer.state.global_step} of {planned.num_steps} is "
                    "saved. Run the same command again to go on."
                )
            # The final push is ours: one commit that also removes what the intermediate ones left.
            trainer.save_model(str(part / "final"), _internal_call=True)
            if state.is_main_process:
                trainer.state.save_to_json(str(part / "final" / "trainer_state.json"))


def last_checkpoint(part: Path) -> Path | None:
    """The newest complete checkpoint of a Trainer in `part`; a half-written one is passed over.

    The Trainer writes trainer_state.json after everything else that a resume reads.
    """
    found = []
    for folder in part.glob("checkpoint-*"):
        try:
            step = int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        found.append((step, folder))
    return max(found)[1] if found else None


def _is_done(plan: PartitionPlan, group: int, output: Path, part: Path, section: TrainSection) -> bool:
    """Whether nothing is left to do; False also where a training that was stopped is to go on."""
    planned = plan.group(group)
    status = end_of_training(planned.group_sha256, group, output)
    if status == "complete":
        # A kill between the rename and the clean-up leaves it.
        shutil.rmtree(part, ignore_errors=True)
    if status != "stopped":
        return status == "complete"
    step = read_manifest(output)["num_steps"]
    if (section.stop_at_step is not None and step >= section.stop_at_step) or (part / STOP_NAME).exists():
        return True
    if last_checkpoint(part) is None:
        raise ConfigError(
            f"{output} is group {group} stopped at step {step} of {planned.num_steps}, and {part}, from which it "
            "would go on, is not there. Accept it as it is (merit merge --allow-partial), or delete it to start again."
        )
    return False


def _is_enough(checkpoint: Path, num_steps: int, section: TrainSection, part: Path) -> bool:
    """Whether what was saved is to be published as it is, without another step."""
    step = int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    asked = section.stop_at_step is not None and step >= section.stop_at_step
    return step < num_steps and (asked or (part / STOP_NAME).exists())


def _stopped_line(plan: PartitionPlan, group: int, output: Path) -> str:
    step = read_manifest(output)["num_steps"]
    return (
        f"stopped at step {step} of {plan.group(group).num_steps}. Run it again without the stop to go on; "
        "`merit verify` and `merit merge` take it as it is with --allow-partial, weighted by the tokens of its steps."
    )


def _group_args(
    plan: PartitionPlan, group: int, part: Path, placement: Mapping[str, Any], asked_processes: int | None
) -> SFTConfig:
    check_placement(placement)
    sft = {"save_total_limit": 2, "disable_tqdm": True, **plan.config["sft"], **plan.local.get("sft", {}), **placement}
    # The arguments of a Trainer decide how the processes find each other; only then is their number known.
    num_processes = build_args(sft, part).world_size
    check_processes(num_processes, asked_processes)
    effective = plan.sft["effective_batch_size"]
    # A smaller device batch, or more processes, are made up for by accumulation, and the other way round.
    per_device = sft.get("per_device_train_batch_size", SFTConfig.per_device_train_batch_size)
    if "gradient_accumulation_steps" not in placement:
        sft["gradient_accumulation_steps"] = max(1, effective // (per_device * num_processes))
    accumulation = sft["gradient_accumulation_steps"]
    if per_device * accumulation * num_processes != effective:
        raise ConfigError(
            f"the plan trains {effective} examples a step; sft.per_device_train_batch_size={per_device} × "
            f"{accumulation} accumulation × {num_processes} processes is {per_device * accumulation * num_processes}. "
            f"Choose {' and '.join('sft.' + name for name in BATCH_FIELDS)} so that the product is {effective}."
        )
    planned_device = plan.sft.get("device_batch_size", per_device * num_processes)
    if per_device * num_processes != planned_device:
        raise ConfigError(
            f"the plan drops what does not fill a batch of {planned_device} (sft.dataloader_drop_last); "
            f"sft.per_device_train_batch_size={per_device} × {num_processes} processes is "
            f"{per_device * num_processes}. Choose them so that the product is {planned_device}."
        )
    args = build_args(sft, part)
    check_reporting(args)
    for field in ("max_steps", "warmup_steps", "lr_scheduler_kwargs"):
        setattr(args, field, plan.group_sft(group)[field])
    # What is reported of several groups would else all be called alike.
    args.run_name = args.run_name or _group_name(plan, group)
    if args.push_to_hub:
        args.hub_model_id = group_repo(plan, group, args.hub_model_id)
    return args


def group_repo(plan: PartitionPlan, group: int, given: str | None = None, owner: str | None = None) -> str:
    """`OWNER/NAME` of the group's repo: as given, else `owner`'s (default: the user's own), named after the plan."""
    if given and "/" in given:
        return given
    return f"{owner or current_user()[0]}/{given or _group_name(plan, group)}"


def _group_name(plan: PartitionPlan, group: int) -> str:
    """`NAME-group-K`, NAME being the plan's repo, or the folder that its folder is in."""
    name = plan.repo_id.partition("/")[2] if plan.repo_id else (plan.folder or Path("merit")).resolve().parent.name
    return f"{name}-group-{group}"


def _resume_from_hub(part: Path, repo_id: str, group_sha256: str, progress: Progress) -> None:
    """With `hub_strategy: checkpoint`, go on in an empty folder from what another machine pushed.

    A checkpoint holds pickles (optimizer, RNG), which run code when they are read: only one's own are.

    Raises:
        ConfigError: the repo holds another training, or the finished checkpoint.
    """
    if last_checkpoint(part) is not None:
        return
    found = read_remote_manifest(repo_id)
    if found is None:
        return
    manifest, revision = found
    if manifest.get("group_sha256") != group_sha256:
        raise ConfigError(
            f"sft.hub_model_id={repo_id}: holds another group's training "
            f"({str(manifest.get('group_sha256'))[:12]}, this is {group_sha256[:12]}). Choose another repo."
        )
    if manifest.get("status") == "complete":
        raise ConfigError(
            f"sft.hub_model_id={repo_id}: holds this group's finished checkpoint. Get it with `hf download "
            f"{repo_id}`, or choose another repo."
        )
    if not may_write(repo_id, *current_user()):
        raise ConfigError(
            f"sft.hub_model_id={repo_id}: not yours, so its trainer state, which is code, is not loaded."
        )
    folder = fetch_folder(repo_id, revision, _LAST_CHECKPOINT, part)
    if folder is None:
        return
    try:
        step = int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder)
        return
    os.rename(folder, part / f"checkpoint-{step}")
    progress.note(f"took step {step} of this group's training from `{repo_id}`")


def _discard_stale(part: Path, group_sha256: str) -> None:
    """Checkpoints of another plan or group are not resumed."""
    run = part / _RUN_NAME
    try:
        kept = json.loads(run.read_text())["group_sha256"]
    except (OSError, ValueError, KeyError):
        kept = None
    if kept != group_sha256:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        run.write_text(json.dumps({"group_sha256": group_sha256}))


def _publish(part: Path, output: Path) -> None:
    """Drop what only a Trainer reads, and let the checkpoint appear under its name in one step.

    What a stopped training goes on from stays in `part`.
    """
    final, stopped = part / "final", read_manifest(part / "final")["status"] == "stopped"
    for name in TRAINER_STATE:
        if name != "trainer_state.json":
            (final / name).unlink(missing_ok=True)
    if read_manifest(final)["files"] != hash_files(final):
        raise MeritError(f"{final}: a file changed while it was being written. Run the command again.")
    for name in MIX_FILES:
        if (part / name).exists():
            shutil.copyfile(part / name, final / name)
    if (part / _LOGS).is_dir():
        # Where a Trainer lets TensorBoard write.
        shutil.copytree(part / _LOGS, final / _LOGS, dirs_exist_ok=True)
    if output.exists():
        # Of the same training, stopped before.
        shutil.rmtree(part / "replaced", ignore_errors=True)
        os.rename(output, part / "replaced")
    os.rename(final, output)
    if not stopped:
        shutil.rmtree(part)
        return
    shutil.rmtree(part / "replaced", ignore_errors=True)
    (part / STOP_NAME).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command behind `merit train` and recipes/train_group.py."""
    parser = argparse.ArgumentParser(
        description="Train one group of a plan. Run the same command again to resume.",
        epilog="Example: accelerate launch -m merit_hf.training runs/mixture/plan --group 0 --output runs/groups/0",
    )
    parser.add_argument("plan", metavar="PLAN", help="folder of the plan, or Hub id org/name[@revision]")
    parser.add_argument(
        "placement",
        nargs="*",
        metavar="sft.KEY=VALUE",
        help="SFT fields that do not change the result; train.KEY=VALUE, such as train.max_hours=12",
    )
    parser.add_argument("--group", type=int, required=True, help="which group to train")
    parser.add_argument("--output", required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=PATH", help="where a dataset that was local lies here"
    )
    parser.add_argument("--num-processes", type=int, help="refuse to run with another number of processes")
    parser.add_argument(
        "--contribute", action="store_true", help="after the push, open the contribution to the plan's Hub repo"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_intermixed_args(argv)
    # A launcher may have handed down that it is ignored.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with exit_on_error(options.debug):
        plan = PartitionPlan.from_pretrained(options.plan)
        plan.supply(parse_places(options.data))
        placement = parse_placement(options.placement)
        if options.contribute and not placement.get("push_to_hub"):
            raise ConfigError("--contribute offers what was pushed: give sft.push_to_hub=true too.")
        train_group(plan, options.group, options.output, placement, options.num_processes)
        if options.contribute and PartialState().is_main_process:
            repo_id = group_repo(plan, options.group, placement.get("hub_model_id"))
            Progress().note(contribute(plan, repo_id))


if __name__ == "__main__":
    main()
