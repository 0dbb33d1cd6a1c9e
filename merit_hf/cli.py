"""The `merit` command. Thin: every command checks its call, runs one function, and says what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from merit_hf.config import ConfigError, parse_value
from merit_hf.entry import exit_on_error

app = typer.Typer(
    help="Split a mixture of instruction datasets by gradient conflict, fine-tune every group on its own, merge once.",
    epilog="Start with: merit run CONFIG.yaml --output runs/mixture",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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
    list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders of group checkpoints, or Hub ids.")
]
NumProcesses = Annotated[Optional[int], typer.Option(help="Train with this many processes through accelerate launch.")]
AccelerateConfig = Annotated[
    Optional[Path], typer.Option(help="Config file for accelerate launch (FSDP, ZeRO, CPU, …).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def plan(config: ConfigArgument, output: Output, overrides: Overrides = None, debug: Debug = False) -> None:
    """Gradients → conflict matrix → groups. Writes a plan that can be trained here or anywhere."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.config import MeritConfig

        # Before the libraries load: a mistake is told at once.
        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.planner import MeritPlanner
        from merit_hf.summary import plan_summary

        made = MeritPlanner(checked).plan(output)
        _print(*plan_summary(made))
        _print(
            f"Plan {made.sha256[:12]} is in {output}. Next: merit train {output} --group all --output "
            f"{output.parent}/groups"
        )


@app.command()
def train(
    plan: PlanArgument,
    group: Annotated[str, typer.Option(help="Number of a group, or `all`.")],
    output: Output,
    placement: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[sft.KEY=VALUE]...", help="SFT fields that do not change the result."),
    ] = None,
    num_processes: NumProcesses = None,
    accelerate_config: AccelerateConfig = None,
    debug: Debug = False,
) -> None:
    """Fine-tune one group, or all of them, from the base.

    TRL's SFTTrainer, one group after another; through accelerate launch where several processes are asked for.
    """
    with exit_on_error(debug):
        _quiet()
        from merit_hf.launch import train_groups
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        if group != "all" and not group.isdigit():
            raise ConfigError(f"--group {group}: expected a number from 0 to {loaded.num_groups - 1}, or `all`.")
        numbers = list(range(loaded.num_groups)) if group == "all" else [loaded.group(int(group)).group]
        outputs = [output / str(number) for number in numbers] if group == "all" else [output]
        train_groups(loaded, numbers, outputs, placement or [], num_processes, accelerate_config)
        done = " ".join(str(path) for path in outputs)
        then = f"merge {plan} {done} --output {output.parent}/merged" if group == "all" else f"verify {plan} {done}"
        _print(f"Trained: {done}. Next: merit {then}")


@app.command()
def merge(
    plan: PlanArgument,
    checkpoints: Checkpoints,
    output: Output,
    engine: Annotated[Optional[str], typer.Option(help="safetensors (default) or mergekit.")] = None,
    weights: Annotated[
        Optional[list[str]],
        typer.Option(
            help="tokens (default), loss_tokens, uniform, or a YAML FILE. Given again: a model in a folder of each."
        ),
    ] = None,
    method: Annotated[
        Optional[str], typer.Option(help="With engine mergekit: ties, dare_ties, slerp, karcher, … Default: linear.")
    ] = None,
    parameter: Annotated[
        Optional[list[str]],
        typer.Option(metavar="KEY=VALUE", help="Of the method, such as density=0.5; again for more."),
    ] = None,
    out_dtype: Annotated[
        Optional[str], typer.Option(help="float32, bfloat16 or float16. Default: the base's.")
    ] = None,
    exclude: Annotated[Optional[list[int]], typer.Option(help="Leave a group out; may be given again.")] = None,
    soup: Annotated[
        bool, typer.Option("--soup", help="Add a group only where the mean held-out loss falls (greedy soup).")
    ] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Merge fewer groups than planned.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Verify the groups and average them, weighted by tokens."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        section = loaded.config["merge"]
        weightings = weights or [loaded.local.get("merge_weights") or section["weights"]]
        if soup and len(weightings) > 1:
            raise ConfigError("--soup takes one --weights. Make a soup of each with a call of its own.")
        from merit_hf.progress import Progress

        chosen = [_checkpoint(text) for text in checkpoints]
        given = {key: parse_value(text) for key, text in _named_values(parameter or [], "--parameter").items()}
        options: dict[str, Any] = {
            "engine": engine or section["engine"], "out_dtype": out_dtype or section["out_dtype"], "device": device,
            "exclude": tuple(exclude or ()), "allow_missing": allow_missing,
            "method": method or section.get("method", "linear"),
            # Those of CONFIG are of CONFIG's method.
            "parameters": given or ({} if method else section.get("parameters", {})),
        }  # fmt: skip
        if soup:
            from merit_hf.sweep import greedy_soup, soup_table

            made = greedy_soup(loaded, chosen, output, weights=weightings[0], progress=Progress(), **options)
            _print(soup_table(made))
        else:
            from merit_hf.sweep import merge_sweep

            with Progress().stage("Merging", unit="tensors") as stage:
                merge_sweep(loaded, chosen, output, weightings, progress=stage.update, **options)
        _report_merge(output, plan, len(weightings) > 1, soup)


def _report_merge(output: Path, plan: str, several: bool, soup: bool) -> None:
    from merit_hf.manifest import read_manifest
    from merit_hf.summary import merge_summary

    folders = sorted(path for path in output.iterdir() if path.is_dir()) if several else [output]
    for folder in folders:
        _print((f"{folder.name}: " if several else "") + merge_summary(read_manifest(folder)["stats"]))
    names = " ".join(map(str, folders))
    if soup:
        _print(
            "The held-out rows chose these groups, so they no longer judge them fairly: evaluate on other rows too."
        )
    _print(
        f"The merged model{'s are' if several else ' is'} in {names}. Next: merit evaluate {names} --plan {plan} "
        f"--output {output if several else output.parent}"
    )


@app.command()
def verify(plan: PlanArgument, checkpoints: Checkpoints, debug: Debug = False) -> None:
    """Check group checkpoints against the plan, line by line.

    Exits with 1 where a check fails.
    """
    with exit_on_error(debug):
        _quiet()
        from merit_hf.manifest import failed, verify_checkpoint
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        bad = 0
        for text in checkpoints:
            checks = verify_checkpoint(loaded, _checkpoint(text))
            for check in checks:
                verdict = "ok    " if check.ok else "FAILED"
                _print(f"{verdict} {text}: {check.name}: expected {check.expected}; found {check.found}")
            bad += failed(checks) is not None
        _print(f"{len(checkpoints) - bad} of {len(checkpoints)} checkpoints verify against plan {loaded.sha256[:12]}.")
        if bad:
            raise SystemExit(1)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids; the base comes first by itself.")
    ],
    plan: Annotated[str, typer.Option(help="Folder of the plan, or Hub id: its datasets' held-out rows are used.")],
    output: Output,
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many held-out rows a dataset.")] = 200,
    debug: Debug = False,
) -> None:
    """Held-out loss of base and models on every dataset."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.evaluate import evaluate_models, evaluation_table, save_evaluation
        from merit_hf.plan import PartitionPlan
        from merit_hf.summary import label_models

        loaded = PartitionPlan.from_pretrained(plan)
        labelled = label_models({text: _checkpoint(text) for text in models})
        evaluation = evaluate_models(loaded, {"base": loaded.base_folder(), **labelled}, num_samples)
        path = save_evaluation(evaluation, output)
        _print(evaluation_table(evaluation))
        _print(f"The numbers are in {path}.")


@app.command()
def run(
    config: ConfigArgument,
    output: Output,
    overrides: Overrides = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Also train one model on everything, to compare with.")
    ] = False,
    num_processes: NumProcesses = None,
    accelerate_config: AccelerateConfig = None,
    debug: Debug = False,
) -> None:
    """All of it: plan, train every group, merge, evaluate."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.config import MeritConfig

        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.pipeline import run_all
        from merit_hf.summary import plan_summary, run_summary

        result = run_all(checked, output, joint, num_processes, accelerate_config)
        _print(*plan_summary(result.plan))
        _print(*run_summary(result, output))


def _named_values(texts: list[str], option: str) -> dict[str, str]:
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {text}: expected NAME=VALUE.")
        values[name] = value
    return values


def _checkpoint(text: str) -> Path:
    from merit_hf.hub import resolve_model

    path, _, revision = text.partition("@")
    return Path(text) if Path(text).is_dir() else resolve_model(path, revision or None, Path(), "CHECKPOINT")[0]


def _print(*renderables: object) -> None:
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


def _quiet() -> None:
    """Our own progress is shown; the libraries' bars and repeated advice would bury it."""
    from merit_hf.quiet import quiet_libraries

    quiet_libraries()


def main() -> None:
    app()


if __name__ == "__main__":
    main()
