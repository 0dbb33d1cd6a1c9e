"""What the commands of `merit` have in common: arguments, options, and how they speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from merit_hf.config import ConfigError


def without_jobs(given: Optional[list[str]]) -> Optional[list[str]]:
    """Folders of checkpoints; `groups/*` names `merit train`'s records of its jobs, beside them, too."""
    return given and [text for text in given if Path(text).name != "jobs" or (Path(text) / "merit.json").exists()]


ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML that names base, datasets and settings.")
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as plan.num_groups=2 or datasets.NAME.path=FILE."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to make. Running again goes on where it stopped.")
]
PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="Folder of a plan, or Hub id org/name[@revision].")]
Checkpoints = Annotated[
    list[str],
    typer.Argument(metavar="CHECKPOINT...", help="Folders of group checkpoints, or Hub ids.", callback=without_jobs),
]
NumProcesses = Annotated[
    Optional[int], typer.Option(min=1, help="Train with this many processes through accelerate launch.")
]
AccelerateConfig = Annotated[
    Optional[Path], typer.Option(help="Config file for accelerate launch (FSDP, ZeRO, CPU, …).")
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial",
        help="Take groups that were stopped before their planned steps, at the tokens of the steps that they took. "
        "Needs their data here.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Data = Annotated[
    Optional[list[str]],
    typer.Option(
        "--data",
        metavar="NAME=PATH",
        help="Where a dataset lies that was local where the plan was made; may be repeated.",
    ),
]


def named_values(texts: list[str] | None, option: str) -> dict[str, str]:
    """`KEY=VALUE` texts as a mapping. Raises ConfigError where one has another form."""
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {text}: expected NAME=VALUE.")
        values[name] = value
    return values


def checkpoint_folder(text: str, where: str = "CHECKPOINT") -> Path:
    from merit_hf.hub import resolve_model

    path, _, revision = text.partition("@")
    return Path(text) if Path(text).is_dir() else resolve_model(path, revision or None, Path(), where)[0]


def say(*renderables: object) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(soft_wrap=True)
    for renderable in renderables:
        if isinstance(renderable, Table):
            # A table is never cut: a pipe, or a narrow window, gets lines as long as its numbers need.
            wide = Console(width=200)
            needed = Measurement.get(wide, wide.options, renderable).maximum
            wide.width = max(console.width, needed)
            wide.print(renderable)
        else:
            console.print(renderable, highlight=False, markup=False)


def quiet() -> None:
    """Our own progress is shown; the libraries' bars and repeated advice would bury it."""
    from merit_hf.quiet import quiet_libraries

    quiet_libraries()


def report_merge(output: Path, plan: str, several: bool, soup: bool) -> None:
    """How far each merged model moved, where it is, and what to do next."""
    from merit_hf.manifest import read_manifest
    from merit_hf.summary import merge_summary

    folders = sorted(path for path in output.iterdir() if path.is_dir()) if several else [output]
    for folder in folders:
        say((f"{folder.name}: " if several else "") + merge_summary(read_manifest(folder)["stats"]))
    names = " ".join(map(str, folders))
    if soup:
        say("The held-out rows chose these groups, so they no longer judge them fairly: evaluate on other rows too.")
    say(
        f"The merged model{'s are' if several else ' is'} in {names}. Next: merit evaluate {names} --plan {plan} "
        f"--output {(output if several else output.parent) / 'evaluation'}"
    )
