"""`merit train`: one group or all of them, here, on Slurm or on HF Jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from merit_hf.cli_options import (
    AccelerateConfig,
    Data,
    Debug,
    NumProcesses,
    Output,
    PlanArgument,
    named_values,
    quiet,
    say,
)
from merit_hf.config import ConfigError
from merit_hf.entry import exit_on_error

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan

# Which options are of which launcher; an option of another one is refused.
OF_LAUNCHER = {
    "local": ("jobs",),
    "slurm": (
        "partition", "account", "time", "mem", "gpus", "cpus", "array_parallelism", "setup", "restarts", "slurm",
    ),
    "hf-jobs": ("flavor", "timeout", "namespace", "image", "secrets", "hf_from", "hf_with", "contribute"),
}  # fmt: skip


def train(
    plan: PlanArgument,
    group: Annotated[str, typer.Option(help="Number of a group, or `all`.")],
    output: Output,
    placement: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[sft.KEY=VALUE]...",
            help="SFT fields that do not change the result; train.KEY=VALUE, such as train.max_hours=12.",
        ),
    ] = None,
    launcher: Annotated[str, typer.Option(help="Where it runs: local, slurm or hf-jobs.")] = "local",
    num_processes: NumProcesses = None,
    accelerate_config: AccelerateConfig = None,
    data: Data = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be started: commands, sbatch script or request.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return once the jobs are submitted; `merit status` follows them.")
    ] = False,
    jobs: Annotated[
        Optional[int],
        typer.Option(min=1, help="local: so many groups at a time. Default: one a GPU, without GPUs one."),
    ] = None,
    partition: Annotated[Optional[str], typer.Option(help="slurm: as sbatch takes it.")] = None,
    account: Annotated[Optional[str], typer.Option(help="slurm: as sbatch takes it.")] = None,
    time: Annotated[
        Optional[str],
        typer.Option(metavar="[D-]HH:MM:SS", help="slurm: limit of a job. Just before, it saves and queues again."),
    ] = None,
    mem: Annotated[Optional[str], typer.Option(help="slurm: memory of a job, such as 64G.")] = None,
    gpus: Annotated[Optional[int], typer.Option(min=0, help="slurm: GPUs of a job; several train together.")] = None,
    cpus: Annotated[Optional[int], typer.Option(min=1, help="slurm: CPU cores of a job.")] = None,
    array_parallelism: Annotated[
        Optional[int], typer.Option(min=1, help="slurm: at most so many groups at a time.")
    ] = None,
    setup: Annotated[
        Optional[list[str]],
        typer.Option(metavar="LINE", help="slurm: shell line before the training, `module load cuda`; repeatable."),
    ] = None,
    restarts: Annotated[
        Optional[int], typer.Option(min=0, help="slurm: how often a killed training is begun again. Default: 3.")
    ] = None,
    slurm: Annotated[
        Optional[list[str]],
        typer.Option(metavar="KEY=VALUE", help="slurm: any other option of sbatch, qos=long; may be repeated."),
    ] = None,
    flavor: Annotated[
        Optional[str],
        typer.Option(help="hf-jobs: the machine, a10g-large; `hf jobs hardware` lists them with prices."),
    ] = None,
    timeout: Annotated[
        Optional[str], typer.Option(help="hf-jobs: limit of a job, 90m or 2d; run again, it goes on. Default: 6h.")
    ] = None,
    namespace: Annotated[
        Optional[str], typer.Option(help="hf-jobs: who pays and owns the group repos. Default: the token's owner.")
    ] = None,
    image: Annotated[Optional[str], typer.Option(help="hf-jobs: Docker image with uv. Default: uv's own.")] = None,
    secrets: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="hf-jobs: environment variable to pass on besides HF_TOKEN; repeatable."),
    ] = None,
    hf_from: Annotated[
        Optional[str],
        typer.Option(metavar="URL", help="hf-jobs: merit_hf as git+https://… or wheel. Default: this one from PyPI."),
    ] = None,
    hf_with: Annotated[
        Optional[list[str]],
        typer.Option(metavar="PACKAGE", help="hf-jobs: what else the job installs, such as trackio; repeatable."),
    ] = None,
    contribute: Annotated[
        bool, typer.Option("--contribute", help="hf-jobs: then offer the group to the plan, as merit contribute does.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune one group, or all of them, from the base.

    TRL's SFTTrainer; through accelerate launch where several processes are asked for. Local groups are trained one
    after another, or one on each GPU; Slurm takes an array of one job a group; HF Jobs take a job a group, which
    pushes its checkpoint to the Hub. Run again, it starts only what is missing: a group that is finished, runs or
    waits is left alone.
    """
    given = {
        "jobs": jobs, "partition": partition, "account": account, "time": time, "mem": mem, "gpus": gpus,
        "cpus": cpus, "array_parallelism": array_parallelism, "setup": setup, "restarts": restarts, "slurm": slurm,
        "flavor": flavor, "timeout": timeout, "namespace": namespace, "image": image, "secrets": secrets,
        "hf_from": hf_from, "hf_with": hf_with, "contribute": contribute or None,
    }  # fmt: skip
    with exit_on_error(debug):
        quiet()
        from merit_hf.launchers.dispatch import dry_run as show
        from merit_hf.launchers.dispatch import train_groups
        from merit_hf.plan import PartitionPlan

        options = launcher_options(launcher, given)
        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        if group != "all" and not group.isdigit():
            raise ConfigError(f"--group {group}: expected a number from 0 to {loaded.num_groups - 1}, or `all`.")
        numbers = list(range(loaded.num_groups)) if group == "all" else [loaded.group(int(group)).group]
        outputs = [output / str(number) for number in numbers] if group == "all" else [output]
        how = (placement or [], num_processes, accelerate_config)
        if dry_run:
            typer.echo(show(loaded, numbers, outputs, *how, launcher=launcher, options=options))
            return
        running = train_groups(loaded, numbers, outputs, *how, launcher=launcher, options=options, wait=not no_wait)
        if no_wait:
            count = sum(job.job_id is not None for job in running)
            say(f"{count} jobs run or wait. Next: merit status {plan} --output {output}")
            return
        # Of HF Jobs the checkpoints are on the Hub.
        made = [str(job.details.get("repo_id", job.output)) for job in running] or [str(path) for path in outputs]
        said = _stopped(loaded, plan, numbers, outputs) or f"Next: merit {_next(loaded, plan, group, output, made)}"
        say(f"Trained: {' '.join(made)}. {said}")


def launcher_options(launcher: str, given: dict[str, Any]) -> Any:
    """The options object of a launcher. Raises ConfigError where an option is another launcher's."""
    from merit_hf.launchers.dispatch import open_launcher

    open_launcher(launcher)
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in OF_LAUNCHER[launcher]:
            owner = next(other for other, names in OF_LAUNCHER.items() if name in names)
            raise ConfigError(f"--{name.replace('_', '-')} is an option of --launcher {owner}, not of {launcher}.")
    if launcher == "slurm":
        from merit_hf.launchers.slurm import SlurmOptions

        extra = named_values(given.pop("slurm", None), "--slurm")
        return SlurmOptions(**given, extra=extra)
    if launcher == "hf-jobs":
        from merit_hf.launchers.hf_jobs import HfJobsOptions

        return HfJobsOptions(**given)
    from merit_hf.launchers.local import LocalOptions

    return LocalOptions(**given)


def _stopped(loaded: PartitionPlan, plan: str, numbers: list[int], outputs: list[Path]) -> str | None:
    """What to do about groups that were stopped early; None where none was."""
    from merit_hf.launchers.jobs import trained

    ends = [trained(loaded.group(number).group_sha256, path) for number, path in zip(numbers, outputs, strict=True)]
    early = [str(number) for number, end in zip(numbers, ends, strict=True) if end and end["status"] == "stopped"]
    if not early:
        return None
    return (
        f"Stopped before its planned steps: group {', '.join(early)}. Next: run it again without the stop to go on, "
        f"or merit merge {plan} CHECKPOINT… --allow-partial once every group is there"
    )


def _next(loaded: PartitionPlan, plan: str, group: str, output: Path, made: list[str]) -> str:
    done = " ".join(made)
    if group == "all":
        return f"merge {plan} {done} --output {output.parent}/merged"
    if loaded.repo_id is not None:
        return f"push {done} OWNER/NAME, and merit contribute {plan} OWNER/NAME"
    return f"verify {plan} {done}"


COMMANDS = (train,)
