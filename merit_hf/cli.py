"""The `merit` command. Thin: every command checks its call, runs one function, and says what to do next."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from merit_hf import cli_hub, cli_plan, cli_train
from merit_hf.cli_options import (
    AccelerateConfig,
    AllowPartial,
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
    report_merge,
    say,
    without_jobs,
)
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


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The folder to make. Running again goes on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what time, memory, disk and GPU-hours it would take.")
    ] = False,
    teraflops: Annotated[
        float, typer.Option(min=0.001, help="For --dry-run: 10¹² operations a second that one GPU trains at.")
    ] = 400.0,
    debug: Debug = False,
) -> None:
    """Gradients → conflict matrix → groups. Writes a plan that can be trained here or anywhere.

    --dry-run reads the data, times a few batches of the model, prints an estimate and makes no plan. 400 TFLOP/s are
    an H100 at 40 % of its peak in bfloat16.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.config import MeritConfig

        if output is None and not dry_run:
            raise ConfigError("--output is missing: the folder to make. Or ask for --dry-run, which makes none.")
        # Before the libraries load: a mistake is told at once.
        checked = MeritConfig.from_yaml(config, overrides or [])
        if output is None or dry_run:
            from merit_hf.estimate import estimate_lines, estimate_plan

            say(*estimate_lines(estimate_plan(checked), teraflops))
            say(f"Nothing was written. Next: merit plan {config} --output DIR")
            return
        from merit_hf.planner import MeritPlanner
        from merit_hf.summary import plan_summary

        made = MeritPlanner(checked).plan(output)
        say(*plan_summary(made))
        say(
            f"Plan {made.sha256[:12]} is in {output}. Next: merit train {output} --group all --output "
            f"{output.parent}/groups"
        )


@app.command()
def merge(
    plan: PlanArgument,
    output: Output,
    checkpoints: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[CHECKPOINT]...",
            callback=without_jobs,
            help="Folders of group checkpoints, or Hub ids. Default: those accepted in the plan's Hub repo.",
        ),
    ] = None,
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
    interpolate_to_init: Annotated[
        Optional[float],
        typer.Option(
            metavar="ALPHA", help="Go so much of the way from base to mean: 0.5 is half of it, 1 (default) all."
        ),
    ] = None,
    with_merged: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="A merged model (folder or Hub id) that takes the place of the groups in it: add a branch to it.",
        ),
    ] = None,
    exclude: Annotated[Optional[list[int]], typer.Option(help="Leave a group out; may be given again.")] = None,
    soup: Annotated[
        bool, typer.Option("--soup", help="Add a group only where the mean held-out loss falls (greedy soup).")
    ] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Merge fewer groups than planned.")] = False,
    allow_partial: AllowPartial = False,
    adapters: Annotated[
        Optional[str], typer.Option(help="LoRA groups become: dense (a full model, default), concat or svd.")
    ] = None,
    svd_rank: Annotated[Optional[int], typer.Option(min=1, help="Rank of the merged adapter, for svd.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Verify the groups and average them, weighted by tokens."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.community import accepted_checkpoints

        loaded = PartitionPlan.from_pretrained(plan)
        if with_merged and (soup or len(weights or []) > 1):
            raise ConfigError(
                "--with-merged takes one --weights and no --soup: the merged model's groups cannot be weighed anew."
            )
        loaded.supply(dict(named_values(data, "--data")))
        section = loaded.config["merge"]
        weightings = weights or [loaded.local.get("merge_weights") or section["weights"]]
        form = adapters or section.get("adapters", "dense")
        if svd_rank is not None and form != "svd":
            raise ConfigError(
                f"--svd-rank is for adapters svd, and they are {form}. Add --adapters svd, or leave it out."
            )
        if soup and (len(weightings) > 1 or form != "dense"):
            raise ConfigError(
                "--soup takes one --weights, and makes a dense model. Make a soup of each in its own call."
            )
        if soup and allow_partial:
            raise ConfigError("--soup chooses among finished groups. Leave --allow-partial out.")
        chosen = checkpoints or accepted_checkpoints(loaded)
        from merit_hf.progress import Progress

        alpha = interpolate_to_init
        if alpha is None:
            alpha = 1.0 if method else section.get("interpolate_to_init", 1.0)
        given = {key: parse_value(text) for key, text in named_values(parameter, "--parameter").items()}
        options: dict[str, Any] = {
            "engine": engine or section["engine"], "out_dtype": out_dtype or section["out_dtype"], "device": device,
            "exclude": tuple(exclude or ()), "allow_missing": allow_missing,
            "method": method or section.get("method", "linear"),
            # Those of CONFIG, and its α, are of CONFIG's method.
            "parameters": given or ({} if method else section.get("parameters", {})),
            "interpolate_to_init": alpha,
        }  # fmt: skip
        if soup:
            from merit_hf.sweep import greedy_soup, soup_table

            made = greedy_soup(loaded, chosen, output, weights=weightings[0], progress=Progress(), **options)
            say(soup_table(made))
        else:
            from merit_hf.sweep import merge_sweep

            options["with_merged"] = with_merged
            if form != "dense":
                rank = svd_rank or (section.get("svd_rank") if form == "svd" else None)
                options |= {"adapters": form, "svd_rank": rank}
            options["allow_partial"] = allow_partial
            with Progress().stage("Merging", unit="tensors") as stage:
                merge_sweep(loaded, chosen, output, weightings, progress=stage.update, **options)
        report_merge(output, plan, len(weightings) > 1, soup)


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[LABEL=]MODEL...", help="Folders or Hub ids; the base comes first by itself."),
    ],
    plan: Annotated[str, typer.Option(help="Folder of the plan, or Hub id: its datasets' held-out rows are used.")],
    output: Output,
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many held-out rows a dataset.")] = 200,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Let the models answer, or measure losses only.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer.")] = 256,
    metric: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=METRIC", help="In place of a dataset's metric in the plan; may be given again."),
    ] = None,
    tokens_per_batch: Annotated[
        int, typer.Option(min=1, help="Padded tokens in a batch: more is faster and takes more memory.")
    ] = 4096,
    harness: Annotated[Optional[str], typer.Option(help="Also run benchmarks by name: lm-eval or lighteval.")] = None,
    tasks: Annotated[Optional[str], typer.Option(help="The harness's tasks, separated by commas.")] = None,
    include_path: Annotated[
        Optional[Path], typer.Option(help="Tasks of your own: a folder of YAMLs, or lighteval's Python file.")
    ] = None,
    num_fewshot: Annotated[Optional[int], typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="At most so many questions a task; to try it.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask the harness's questions in the plan's chat template.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the numbers into the merged model's card.")] = False,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Base and models side by side on every dataset: loss, score and length of their answers.

    Writes evaluation.json and predictions.jsonl; docs/evaluate.md says what they hold.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.evaluation.harness import HarnessCall
        from merit_hf.evaluation.side_by_side import evaluate_side_by_side
        from merit_hf.plan import PartitionPlan

        benchmarks = HarnessCall.of(
            harness, tasks, include_path,
            num_fewshot=num_fewshot, limit=limit, apply_chat_template=apply_chat_template,
        )  # fmt: skip
        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        evaluate_side_by_side(
            loaded, models, partial(checkpoint_folder, where="MODEL"), output, say,
            num_samples=num_samples, generate=generate,
            max_new_tokens=max_new_tokens, metrics=metric or (), tokens_per_batch=tokens_per_batch,
            benchmarks=benchmarks, card=card,
        )  # fmt: skip


@app.command()
def diagnose(
    plan: PlanArgument,
    output: Output,
    checkpoints: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[CHECKPOINT]...",
            callback=without_jobs,
            help="The groups' checkpoints; none: is the base ready?",
        ),
    ] = None,
    merged: Annotated[Optional[str], typer.Option(help="The merged model. Its weights are then used.")] = None,
    joint: Annotated[Optional[str], typer.Option(help="A model trained on everything, to compare with.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many rows a dataset.")] = 64,
    epsilon: Annotated[
        Optional[list[float]], typer.Option(help="Step of the curvature; may be repeated. Default: 0.25, 0.5 and 1.")
    ] = None,
    path_points: Annotated[
        int, typer.Option(min=1, help="Points inside every path between two models; an odd number.")
    ] = 1,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="No gradients: half the memory, no curvature of single layers.")
    ] = False,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Say why the merged model is as it is: one basin or not, which group is at fault, and the remedy."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.diagnosis.diagnose import diagnose
        from merit_hf.diagnosis.wording import diagnosis_lines
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        content = diagnose(
            loaded, [checkpoint_folder(text) for text in checkpoints or ()], output,
            merged=checkpoint_folder(merged, "--merged") if merged else None,
            joint=checkpoint_folder(joint, "--joint") if joint else None,
            num_samples=num_samples, epsilons=epsilon or (0.25, 0.5, 1.0), path_points=path_points,
            forward_only=forward_only,
        )  # fmt: skip
        say(*diagnosis_lines(content))
        say(f"All numbers are in {output}/diagnosis.json, the verdict in {output}/README.md.")


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
        from merit_hf.report.page import save_run_figures, write_report

        page = write_report(folder, output)
        if figures:
            say(*(f"Figure: {path}" for path in save_run_figures(folder)))
        say(f"The report is in {page}. Open it in a browser; it is one file and loads nothing.")


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
    """All of it: plan, train every group, merge, evaluate, report.

    With run.rounds=2, it merges and goes on from there: each round trains on its own half of the rows.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.config import MeritConfig

        checked = MeritConfig.from_yaml(config, overrides or [])
        from merit_hf.pipeline import run_all
        from merit_hf.summary import plan_summary, run_summary

        result = run_all(checked, output, joint, num_processes, accelerate_config)
        say(*plan_summary(result.plan))
        say(*run_summary(result, output))


for command in (*cli_plan.COMMANDS, *cli_train.COMMANDS, *cli_hub.COMMANDS):
    app.command()(command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
