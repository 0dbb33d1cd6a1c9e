"""Which groups are to be trained, where to and how; and the command line that trains one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from merit_hf.config import ConfigError
from merit_hf.launchers.jobs import Job, log_path
from merit_hf.plan import PartitionPlan

# One of these is in any config of accelerate's.
_ACCELERATE_KEYS = {"compute_environment", "distributed_type", "num_machines", "num_processes"}


@dataclass(frozen=True)
class Request:
    """Groups of one plan to train.

    Attributes:
        plan: loaded from a folder or the Hub.
        groups, outputs: which groups, and a folder for each.
        placement: `sft.KEY=VALUE` and `train.KEY=VALUE` texts.
        num_processes, accelerate_config: for `accelerate launch`.
    """

    plan: PartitionPlan
    groups: Sequence[int]
    outputs: Sequence[Path]
    placement: Sequence[str] = ()
    num_processes: int | None = None
    accelerate_config: Path | None = None

    def __post_init__(self) -> None:
        if self.accelerate_config is not None:
            _check_accelerate(self.accelerate_config)

    @property
    def source(self) -> str:
        """The plan as another process finds it: an absolute folder, or `org/name@commit`."""
        plan = self.plan
        return str(Path(str(plan.folder)).resolve()) if plan.repo_id is None else f"{plan.repo_id}@{plan.revision}"

    @property
    def is_distributed(self) -> bool:
        """Whether a group is trained by several processes, or as a config of accelerate's says."""
        return self.num_processes not in (None, 1) or self.accelerate_config is not None

    @property
    def words(self) -> list[str]:
        """What of this is given to `merit train` beside plan, group and output."""
        words = list(self.placement)
        words += [] if self.num_processes is None else ["--num-processes", str(self.num_processes)]
        config = self.accelerate_config
        return words + ([] if config is None else ["--accelerate-config", str(config.absolute())])

    def only(self, groups: Sequence[int]) -> Request:
        """The same for some of the groups."""
        outputs = dict(zip(self.groups, self.outputs, strict=True))
        return replace(self, groups=list(groups), outputs=[outputs[group] for group in groups])

    def job(
        self,
        launcher: str,
        group: int,
        command: list[str],
        job_id: str | None = None,
        options: Any = None,
        **details: object,
    ) -> Job:
        """The record of a start of `group`, with its log beside its output, and all that `merit train` was given."""
        output = dict(zip(self.groups, self.outputs, strict=True))[group]
        return Job(
            launcher=launcher, plan_sha256=self.plan.sha256, group=group,
            group_sha256=self.plan.group(group).group_sha256, output=str(output.absolute()), job_id=job_id,
            command=command, log=str(log_path(output)),
            details={**details, "options": shlex.join([*_as_words(options), *self.words])},
        )  # fmt: skip


def _as_words(options: Any) -> list[str]:
    """A launcher's options as they are given to `merit train`."""
    words: list[str] = []
    for option in () if options is None else fields(options):
        value, flag = getattr(options, option.name), f"--{option.name.replace('_', '-')}"
        if option.name == "extra":  # of sbatch's own
            words += [word for key, text in value.items() for word in ("--slurm", f"{key}={text}")]
        elif value is True:
            words.append(flag)
        elif value != option.default:
            several = isinstance(value, list | tuple)
            words += [word for item in (value if several else [value]) for word in (flag, str(item))]
    return words


def training_command(request: Request, group: int, output: Path, python: str = sys.executable) -> list[str]:
    """`python -m merit_hf.training …` of one group, in this process' own environment."""
    command = [python, "-m", *_training(request, group, output)]
    return command + ([] if request.num_processes is None else ["--num-processes", str(request.num_processes)])


def accelerate_command(request: Request, group: int, output: Path, python: str = sys.executable) -> list[str]:
    """The `accelerate launch` command line that trains one group."""
    # Without --quiet, the stack of accelerate's own launcher follows after every error of the training.
    command = [python, "-m", "accelerate.commands.launch", "--quiet"]
    if request.accelerate_config is not None:
        command += ["--config_file", str(request.accelerate_config.absolute())]
    else:
        # Said, since what is not said is warned about, and taken from whatever `accelerate config` has left.
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if request.num_processes is not None or request.accelerate_config is None:
        command += ["--num_processes", str(request.num_processes or 1)]
    if not _names_machines(request.accelerate_config):
        # Several groups may share a machine: each takes a free port.
        command += ["--main_process_port", "0"]
    command += ["-m", *_training(request, group, output)]
    return command + ([] if request.num_processes is None else ["--num-processes", str(request.num_processes)])


def _training(request: Request, group: int, output: Path) -> list[str]:
    words = ["merit_hf.training", request.source, *request.placement, "--group", str(group), "--output", str(output)]
    for name, place in request.plan.supplied.items():
        words += ["--data", f"{name}={place}"]
    return words


def _check_accelerate(config: Path) -> None:
    """Raises ConfigError where it is no config of accelerate's, whose own words for that are a stack of its code."""
    if not config.is_file():
        raise ConfigError(f"--accelerate-config {config}: no such file. `accelerate config` writes one.")
    content = _read_accelerate(config)
    if not isinstance(content, dict) or not _ACCELERATE_KEYS & content.keys():
        raise ConfigError(
            f"--accelerate-config {config}: not a config of accelerate's. Give one of recipes/accelerate_configs, or "
            "what `accelerate config` writes."
        )
    from accelerate.utils import DistributedType

    found, known = content.get("distributed_type", "NO"), [str(kind.value) for kind in DistributedType]
    if found not in (*known, False):  # YAML reads a bare NO as false
        raise ConfigError(
            f"--accelerate-config {config}: distributed_type={found!r}: accelerate knows {', '.join(known)}."
        )


def _names_machines(config: Path | None) -> bool:
    """Whether accelerate's config spans several machines, which must meet on a port that it names."""
    return config is not None and _read_accelerate(config).get("num_machines", 1) != 1


def _read_accelerate(config: Path) -> Any:
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--accelerate-config {config}: not YAML ({' '.join(str(error).split())}).") from error
