"""What MERIT adds to a training by TRL, and whether the losses are the same: `make bench-training` after `make demo`.

    python benchmarks/training_overhead.py runs/quickstart --output benchmarks/results/training.md

Both sides are SFTTrainer on the same rows in turns; one of them with what `merit train` hangs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from merit_hf import MeritCallback, MeritConfig, MeritPlanner, PartitionPlan, train_group
from merit_hf.alongside import ShowSteps, StopEarly, evaluate_aside
from merit_hf.progress import Progress
from merit_hf.quiet import quiet_libraries
from merit_hf.train_section import TrainSection
from merit_hf.versions import library_versions

QUIET = Progress(quiet=True)
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
SFT = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_length": 128, "logging_steps": 1, "bf16": False,
    "activation_checkpointing": False, "warmup_steps": 0.1, "save_strategy": "no", "seed": 0,
}  # fmt: skip
WARM = 2  # steps that are not timed
SECTIONS = ("Overhead: Llama, 5M", "Overhead: SmolLM2-135M", "Losses of plain TRL beside ours")
HEAD = """# Training: the cost beside plain TRL, and the losses

Written by `make bench-training` after `make demo`, section by section. No accelerator was at hand."""


class Clock(TrainerCallback):
    """The moments at which training began, its first step began, and each step ended."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.first = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.moments[WARM:], self.moments[WARM + 1 :], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="the folder that `make demo` made")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this again, and keep the rest")
    options = parser.parse_args()
    quiet_libraries()
    scratch = Path(tempfile.mkdtemp(prefix="training-"))
    small = small_base(options.quickstart / "base", scratch / "base")
    made = sections_of(options.output) if options.only else {}
    for name in options.only or SECTIONS:
        if name == "Losses of plain TRL beside ours":
            lines = losses_section(small, options.quickstart / "data", scratch)
        elif name == "Overhead: Llama, 5M":
            lines = overhead_section(name, small, 20, options.rounds, options.quickstart / "data", scratch)
        else:
            base = options.quickstart / "base"
            lines = overhead_section(name, base, 8, max(2, options.rounds // 2), options.quickstart / "data", scratch)
        made[name] = "\n".join([f"## {name}", "", *lines, "", conditions()])
    page = "\n\n".join([HEAD, *(made[name] for name in SECTIONS if name in made)]) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    print(page)


def sections_of(page: Path) -> dict[str, str]:
    """The sections of a page that was written before."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = [part.strip() for part in text.split("\n## ")[1:]]
    return {part.partition("\n")[0]: f"## {part}" for part in parts}


def small_base(quickstart: Path, folder: Path) -> Path:
    """Five million parameters, random, and a tokenizer of 2,048 tokens made of the quickstart's data."""
    files = sorted((quickstart.parent / "data").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(quickstart).train_new_from_iterator(lines, 2048)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training_files(data: Path) -> list[Path]:
    return sorted(file for file in data.glob("*.jsonl") if not file.stem.endswith("_eval"))


def make_plan(base: Path, files: Sequence[Path], folder: Path, num_steps: int, **peft: Any) -> PartitionPlan:
    content = {
        "base": {"model_name_or_path": str(base.resolve())},
        "datasets": [{"name": f.stem, "path": str(f.resolve()), "eval_fraction": 0.0} for f in files],
        "plan": {"split": "joint"},
        "sft": {**SFT, "max_steps": num_steps},
        **({"peft": peft} if peft else {}),
    }
    folder.mkdir(parents=True)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content))
    return MeritPlanner(MeritConfig.from_yaml(folder / "mixture.yaml"), QUIET).plan(folder / "plan")


def plain_trainer(
    plan: PartitionPlan, folder: Path, callbacks: Sequence[TrainerCallback] = (), peft: dict[str, Any] | None = None
) -> SFTTrainer:
    """TRL alone, on the rows of the plan's only group."""
    base = plan.base_folder()
    files = [plan.local["datasets"][name]["path"] for name in plan.names]
    rows = [datasets.load_dataset("json", data_files=file, split="train") for file in files]
    args = SFTConfig(
        output_dir=str(folder), use_cpu=not torch.accelerator.is_available(), report_to="none", disable_tqdm=True,
        **plan.config["sft"],
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=args,
        train_dataset=datasets.concatenate_datasets(rows), processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=list(callbacks), peft_config=LoraConfig(task_type="CAUSAL_LM", **peft) if peft else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


class Spent:
    """Seconds inside our own code while a training runs, by wrapping what the trainer calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def run(plan: PartitionPlan, folder: Path, ours: bool) -> tuple[list[float], float, float]:
    """Seconds of every step, seconds before the first one, and seconds of the steps inside our own code."""
    clock, spent = Clock(), Spent()
    callbacks: list[TrainerCallback] = []
    if ours:
        merit = MeritCallback(plan, 0)
        merit.ledger._count = spent.around(merit.ledger._count)  # type: ignore[method-assign]
        with QUIET.stage("training") as stage:
            callbacks = [StopEarly(TrainSection(), folder), merit, ShowSteps(stage)]
        for callback in callbacks:
            for event in ("on_step_begin", "on_step_end", "on_log"):
                setattr(callback, event, spent.around(getattr(callback, event)))
    trainer = plain_trainer(plan, folder, [*callbacks, clock])
    if ours:
        evaluate_aside(trainer)
    start = time.perf_counter()
    trainer.train()
    return clock.steps(), clock.first - start, spent.seconds / (clock.moments[-1] - clock.first)


def overhead_section(name: str, base: Path, num_steps: int, rounds: int, data: Path, scratch: Path) -> list[str]:
    plan = make_plan(base, training_files(data), scratch / name.split()[1].strip(","), num_steps)
    sides: dict[bool, list[tuple[list[float], float, float]]] = {False: [], True: []}
    for number in range(rounds):
        for ours in (False, True) if number % 2 == 0 else (True, False):
            sides[ours].append(run(plan, scratch / "trainer", ours))
    # Step by step the fastest of the rounds: the work of a step is the same in all of them.
    best = {side: sum(map(min, zip(*(steps for steps, _, _ in runs), strict=True))) for side, runs in sides.items()}
    ratios = [sum(b[0]) / sum(a[0]) for a, b in zip(sides[False], sides[True], strict=True)]
    within = [share for _, _, share in sides[True]]
    step = statistics.median(statistics.median(steps) for steps, _, _ in sides[False])
    begin = {side: statistics.median(before for _, before, _ in runs) for side, runs in sides.items()}
    return [
        f"The same {num_steps} steps by TRL alone and with what `merit train` adds to the trainer: plan checks, token "
        f"ledger, progress, stop requests; {rounds} rounds in turns.",
        "",
        "| with MERIT ÷ TRL alone | |",
        "|---|---|",
        f"| inside our hook and callbacks, timed call by call, of the time of the steps | "
        f"{100 * statistics.median(within):.3f} % ({100 * min(within):.3f} to {100 * max(within):.3f}) |",
        f"| time of the steps, each taken from its fastest round | {best[True] / best[False]:.4f} |",
        f"| time of the steps, round by round: median (lowest to highest) | {spread(ratios, 3)} |",
        f"| once, before the first step (weights hashed, all tokens compared with the plan), in steps of this model | "
        f"{(begin[True] - begin[False]) / step:.1f} |",
    ]


def losses_section(base: Path, data: Path, scratch: Path) -> list[str]:
    """Ours is `train_group`, theirs a script of TRL's."""
    talks = [json.loads(line) for file in training_files(data) for line in file.open(encoding="utf-8")]
    pairs = [(talk["prompt"][0]["content"], talk["completion"][0]["content"]) for talk in talks]
    forms: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "text": ([{"text": f"{prompt}\n{answer}"} for prompt, answer in pairs], {}),
        "prompt-completion": ([{"prompt": prompt, "completion": answer} for prompt, answer in pairs], {}),
        "conversations": (talks, {}),
        "LoRA on conversations": (talks, LORA),
    }
    columns, steps = [], (1, 2, 3, 10, 20)
    for name, (rows, peft) in forms.items():
        folder = scratch / name.replace(" ", "-")
        folder.mkdir()
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plan = make_plan(base, [file], folder / "made", 20, **peft)
        state = train_group(plan, 0, folder / "0", progress=QUIET) / "trainer_state.json"
        trainer = plain_trainer(plan, folder / "plain", peft=peft)
        trainer.train()
        logs = (trainer.state.log_history, json.loads(state.read_text())["log_history"])
        theirs, ours = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
        largest = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        cells = [f"{theirs[k - 1]:.6f} / {ours[k - 1]:.6f}" for k in steps]
        columns.append(f"| {name} | {' | '.join(cells)} | {largest:.1g} |")
    return [
        "The same rows and SFTConfig, by a script of TRL alone and by `merit train`: logged losses (TRL / ours) of "
        "a Llama of 5M parameters, and the largest difference over all 20 steps.",
        "",
        f"| data | {' | '.join(f'step {k}' for k in steps)} | largest difference |",
        "|---" * (len(steps) + 2) + "|",
        *columns,
    ]


def conditions() -> str:
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return (
        f"*{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, float32 on CPU; load "
        f"average of the last 15 minutes {os.getloadavg()[2]:.1f}; {versions}.*"
    )


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
