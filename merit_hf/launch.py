"""Train groups on this machine: in this process, or through `accelerate launch`."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from merit_hf.config import ConfigError, MeritError
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress


def train_groups(
    plan: PartitionPlan,
    groups: Sequence[int],
    outputs: Sequence[Path],
    placement: Sequence[str] = (),
    num_processes: int | None = None,
    accelerate_config: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train groups one after another; finished ones are left as they are.

    Args:
        plan ([`PartitionPlan`]): the plan, loaded from a folder or the Hub.
        groups, outputs: which groups, and a folder for each.
        placement: `sft.KEY=VALUE` texts.
        num_processes, accelerate_config: for `accelerate launch`; without both, this process trains.

    Raises:
        MeritError: a launched training failed; its own message stands above.
    """
    from merit_hf.training import parse_placement, train_group

    if accelerate_config is not None and not accelerate_config.is_file():
        raise ConfigError(f"--accelerate-config {accelerate_config}: no such file. `accelerate config` writes one.")
    for group, output in zip(groups, outputs, strict=True):
        if num_processes in (None, 1) and accelerate_config is None:
            train_group(plan, group, output, parse_placement(placement), num_processes, progress)
            gc.collect()
            continue
        command = accelerate_command(plan, group, output, placement, num_processes, accelerate_config)
        code = subprocess.run(command, check=False).returncode
        if code == 2:
            raise ConfigError(f"group {group} was refused; the reason stands above.")
        if code:
            raise MeritError(
                f"training group {group} ended with exit code {code}. Run the same command again to resume."
            )


def accelerate_command(
    plan: PartitionPlan,
    group: int,
    output: Path,
    placement: Sequence[str],
    num_processes: int | None,
    accelerate_config: Path | None,
) -> list[str]:
    """The `accelerate launch` command line that trains one group."""
    source = str(plan.folder) if plan.repo_id is None else f"{plan.repo_id}@{plan.revision}"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if accelerate_config is not None:
        command += ["--config_file", str(accelerate_config)]
    if num_processes is not None:
        command += ["--num_processes", str(num_processes)]
    command += ["-m", "merit_hf.training", source, *placement, "--group", str(group), "--output", str(output)]
    for name, place in plan.supplied.items():
        command += ["--data", f"{name}={place}"]
    return command + (["--num-processes", str(num_processes)] if num_processes is not None else [])
