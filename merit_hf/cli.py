"""The `merit` command. Thin: every command checks its call, runs one function, and says what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from merit_hf.config import ConfigError
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
        Optional[str], typer.Option(help="tokens (default), loss_tokens, uniform, or a YAML FILE.")
    ] = None,
    out_dtype: Annotated[
        Optional[str], typer.Option(help="float32, bfloat16 or float16. Default: the base's.")
    ] = None,
    exclude: Annotated[Optional[list[int]], typer.Option(help="Leave a group out; may be given again.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Merge fewer groups than planned.")] = False,
    debug: Debug = False,
) -> None:
    """Verify the groups and average them, weighted by tokens."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.group_merge import merge_groups
        from merit_hf.manifest import read_manifest
        from merit_hf.plan import PartitionPlan
        from merit_hf.progress import Progress
        from merit_hf.summary import merge_summary

        loaded = PartitionPlan.from_pretrained(plan)
        section = loaded.config["merge"]
        with Progress().stage("Merging", unit="tensors") as stage:
            merge_groups(
                loaded, [_checkpoint(text) for text in checkpoints], output, engine=engine or section["engine"],
                weights=weights or loaded.local.get("merge_weights") or section["weights"],
                out_dtype=out_dtype or section["out_dtype"],
                exclude=tuple(exclude or ()), allow_missing=allow_missing, progress=stage.update,
            )  # fmt: skip
        _print(merge_summary(read_manifest(output)["stats"]))
        _print(
            f"The merged model is in {output}. Next: merit evaluate {output} --plan {plan} --output {output.parent}"
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
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What merit run made, a folder with a plan in plan/, or a plan.")
    ],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The page to write. Default: DIR/report.html.")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also write its figures as PNG, into DIR/figures.")
    ] = False,
    debug: Debug = False,
) -> None:
    """One HTML page of a run: what was planned, trained and merged, and how it went.

    It needs no network, and shows whatever is there: a plan alone, or all of a run.
    """
    with exit_on_error(debug):
        from merit_hf.report import save_run_figures, write_report

        page = write_report(folder, output)
        if figures:
            _print(*(f"Figure: {path}" for path in save_run_figures(folder)))
        _print(f"The report is in {page}. Open it in a browser; it is one file and loads nothing.")


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
    """All of it: plan, train every group, merge, evaluate, report."""
    with exit_on_error(debug):
        _quiet()
        from merit_hf.config import MeritConfig

        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.pipeline import run_all
        from merit_hf.summary import plan_summary, run_summary

        result = run_all(checked, output, joint, num_processes, accelerate_config)
        _print(*plan_summary(result.plan))
        _print(*run_summary(result, output))


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
