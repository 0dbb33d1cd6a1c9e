"""The `merit` command. Thin: every command checks its call, runs one function, and says what to do next."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from merit_hf import cli_hub
from merit_hf.cli_options import (
    AccelerateConfig,
    ConfigArgument,
    Data,
    Debug,
    NumProcesses,
    Output,
    Overrides,
    PlanArgument,
    checkpoint_folder,
    named_values,
    quiet,
    say,
)
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


@app.command()
def plan(config: ConfigArgument, output: Output, overrides: Overrides = None, debug: Debug = False) -> None:
    """Gradients → conflict matrix → groups. Writes a plan that can be trained here or anywhere."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.config import MeritConfig

        # Before the libraries load: a mistake is told at once.
        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.planner import MeritPlanner
        from merit_hf.summary import plan_summary

        made = MeritPlanner(checked).plan(output)
        say(*plan_summary(made))
        say(
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
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Fine-tune one group, or all of them, from the base.

    TRL's SFTTrainer, one group after another; through accelerate launch where several processes are asked for.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.launch import train_groups
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        if group != "all" and not group.isdigit():
            raise ConfigError(f"--group {group}: expected a number from 0 to {loaded.num_groups - 1}, or `all`.")
        numbers = list(range(loaded.num_groups)) if group == "all" else [loaded.group(int(group)).group]
        outputs = [output / str(number) for number in numbers] if group == "all" else [output]
        train_groups(loaded, numbers, outputs, placement or [], num_processes, accelerate_config)
        done = " ".join(str(path) for path in outputs)
        then = f"merge {plan} {done} --output {output.parent}/merged" if group == "all" else f"verify {plan} {done}"
        say(f"Trained: {done}. Next: merit {then}")


@app.command()
def merge(
    plan: PlanArgument,
    output: Output,
    checkpoints: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[CHECKPOINT]...",
            help="Folders of group checkpoints, or Hub ids. Default: those accepted in the plan's Hub repo.",
        ),
    ] = None,
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
        quiet()
        from merit_hf.community import accepted_checkpoints
        from merit_hf.group_merge import merge_groups
        from merit_hf.manifest import read_manifest
        from merit_hf.plan import PartitionPlan
        from merit_hf.progress import Progress
        from merit_hf.summary import merge_summary

        loaded = PartitionPlan.from_pretrained(plan)
        chosen = checkpoints or accepted_checkpoints(loaded)
        section = loaded.config["merge"]
        with Progress().stage("Merging", unit="tensors") as stage:
            merge_groups(
                loaded, chosen, output, engine=engine or section["engine"],
                weights=weights or loaded.local.get("merge_weights") or section["weights"],
                out_dtype=out_dtype or section["out_dtype"],
                exclude=tuple(exclude or ()), allow_missing=allow_missing, progress=stage.update,
            )  # fmt: skip
        say(merge_summary(read_manifest(output)["stats"]))
        say(f"The merged model is in {output}. Next: merit evaluate {output} --plan {plan} --output {output.parent}")


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
        quiet()
        from merit_hf.evaluate import evaluate_models, evaluation_table, save_evaluation
        from merit_hf.plan import PartitionPlan
        from merit_hf.summary import label_models

        loaded = PartitionPlan.from_pretrained(plan)
        labelled = label_models({text: checkpoint_folder(text) for text in models})
        evaluation = evaluate_models(loaded, {"base": loaded.base_folder(), **labelled}, num_samples)
        path = save_evaluation(evaluation, output)
        say(evaluation_table(evaluation))
        say(f"The numbers are in {path}.")


@app.command()
def diagnose(
    plan: PlanArgument,
    output: Output,
    checkpoints: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[CHECKPOINT]...", help="The groups' checkpoints; none: is the base ready?"),
    ] = None,
    merged: Annotated[Optional[str], typer.Option(help="The merged model. Its weights are then used.")] = None,
    joint: Annotated[Optional[str], typer.Option(help="A model trained on everything, to compare with.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many rows a dataset.")] = 64,
    epsilon: Annotated[
        Optional[list[float]], typer.Option(help="Step of the curvature; may be repeated. Default: 0.25, 0.5 and 1.")
    ] = None,
    path_points: Annotated[int, typer.Option(min=1, help="Points inside every path between two models.")] = 1,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="No gradients: half the memory, no curvature of single layers.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say why the merged model is as it is: one basin or not, which group is at fault, and the remedy."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.diagnosis import diagnose
        from merit_hf.diagnosis_text import diagnosis_lines
        from merit_hf.plan import PartitionPlan

        content = diagnose(
            PartitionPlan.from_pretrained(plan), [checkpoint_folder(text) for text in checkpoints or ()], output,
            merged=checkpoint_folder(merged) if merged else None, joint=checkpoint_folder(joint) if joint else None,
            num_samples=num_samples, epsilons=epsilon or (0.25, 0.5, 1.0), path_points=path_points,
            forward_only=forward_only,
        )  # fmt: skip
        say(*diagnosis_lines(content))
        say(f"All numbers are in {output}/diagnosis.json, the verdict in {output}/README.md.")


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
        quiet()
        from merit_hf.config import MeritConfig

        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.pipeline import run_all
        from merit_hf.summary import plan_summary, run_summary

        result = run_all(checked, output, joint, num_processes, accelerate_config)
        say(*plan_summary(result.plan))
        say(*run_summary(result, output))


for command in cli_hub.COMMANDS:
    app.command()(command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
