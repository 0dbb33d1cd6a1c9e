"""The planner against a bare loop, its sketches against exact gradients: `make bench-planner`.

    python benchmarks/planner.py runs/quickstart --output benchmarks/results/planner.md
    python benchmarks/planner.py runs/quickstart --output benchmarks/results/planner.md --only Memory --only Speed

Needs the quickstart's base and data alone, and makes them where they are not there. A section takes a few minutes; a
run that was stopped goes on with the sections that are left (`OUTPUT.part` lists those that are done).

Bare loop: the backbone over a batch, the head over the positions that bear a loss, cross-entropy, backward; nothing
else. It sees the same batches. Every ratio is of two things measured in turns in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from planner_bergson import bergson_section
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from merit_hf.config import MeritConfig
from merit_hf.conflict import conflict_matrix
from merit_hf.data import load_rows
from merit_hf.gradients import GradientSettings, batches_of, dataset_gradient, trained_model, trained_parameters
from merit_hf.loss import loss_sum, trl_loss_sum
from merit_hf.mixture import PreparedDataset, prepare_dataset
from merit_hf.partition import split_by_conflict
from merit_hf.sft import build_args, collate, load_model, load_tokenizer, open_loss
from merit_hf.sketch import CountSketch, LayerSketch, Sketch, StrideSketch, layer_parts
from merit_hf.versions import library_versions

TOKENS_PER_BATCH = 512
NUM_SAMPLES = 200  # of `plan.num_samples`
NUM_TIMED = 40
SECTIONS = ("Speed", "bergson", "Memory", "Sketches", "Two processes")
HEAD = """# The planner: speed, sketches, memory, processes

Written by `make bench-planner`, section by section. No accelerator was at hand: bf16 is not measured."""
DIMS = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]
MEMORY = """
import contextlib, json, sys
from pathlib import Path
from planner import quickstart
from merit_hf.gradients import GradientSettings, batches_of, dataset_gradient, trained_parameters
from merit_hf.loss import loss_sum, recomputing
from merit_hf.memory import estimate_memory
from merit_hf.sft import collate, open_loss
from merit_hf.sketch import CountSketch
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
folder, how, checkpointing = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
model, tokenizer, args, mixture = quickstart(Path(folder), only=["sql"])
rows = mixture[0].train
settings = GradientSettings(1024, how == "low", checkpointing)
batches = batches_of([len(ids) for ids in rows["input_ids"]], "token_mean", 1024)
with open_loss(model, tokenizer, args, rows) as trainer:
    made = [collate(trainer, rows, indices) for indices in batches]
    largest = max(made, key=lambda batch: batch["input_ids"].numel())
    loss_tokens = int((largest["labels"][:, 1:] != -100).sum())
    predicted = estimate_memory(model, largest["input_ids"].numel(), loss_tokens, settings).total
    # Loading took more for a moment: the mark of the highest is set back.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = resident("VmRSS")
    if how == "bare":
        # The largest micro-batch alone, every gradient dropped as it comes: never more than one is there.
        for _, parameter in trained_parameters(model):
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        with recomputing(model) if checkpointing else contextlib.nullcontext():
            loss_sum(trainer, largest).backward()
    else:
        dataset_gradient(trainer, rows, CountSketch(65536, 0), settings=settings)
print(json.dumps([resident("VmHWM") - loaded, predicted]))
"""

# Passes of the model over one dataset, by a process of one thread, in the half minute after it is told to go.
PASSES = """
import sys, time
from pathlib import Path
from planner import quickstart
from merit_hf.gradients import GradientSettings, dataset_gradient
from merit_hf.sft import open_loss
from merit_hf.sketch import CountSketch
model, tokenizer, args, mixture = quickstart(Path(sys.argv[1]), only=["sql"])
with open_loss(model, tokenizer, args, mixture[0].train) as trainer:
    print("ready", flush=True)
    sys.stdin.readline()
    start, count = time.monotonic(), 0
    while time.monotonic() - start < 30:
        dataset_gradient(trainer, mixture[0].train, CountSketch(65536, 0), settings=GradientSettings(512))
        count += 1
    print(count / (time.monotonic() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="folder of the quickstart; base and data are made if missing")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--samples", type=int, default=6, help="examples a dataset of the plans by one and two processes"
    )
    parser.add_argument("--bergson", type=Path, help="folder with EleutherAI's bergson (see planner_bergson.py)")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="measure this section again and keep the others; repeatable"
    )
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    scale = options.output.with_name("planner_scale.md")
    scratch = Path(tempfile.mkdtemp(prefix="planner-"))
    prepare(options.quickstart)
    made, progress = sections_of(options.output), options.output.with_name(options.output.name + ".part")
    done = progress.read_text(encoding="utf-8").splitlines() if progress.exists() and not options.only else []
    try:
        for name in options.only or [name for name in SECTIONS if name not in done]:
            made[name] = measure(name, options, scratch) + f"\n\n{conditions()}"
            # What is measured stays, should a later section be stopped.
            parts = [HEAD, *(made[name] for name in SECTIONS if name in made)]
            parts += [scale.read_text(encoding="utf-8").strip()] if scale.exists() else []
            options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            if not options.only:
                done.append(name)
                progress.write_text("\n".join(done), encoding="utf-8")
        if not options.only:
            progress.unlink()
    finally:
        shutil.rmtree(scratch)


def prepare(folder: Path) -> None:
    """The quickstart's base, data and CONFIG, where they are not there yet."""
    recipe, config = Path(__file__).parents[1] / "recipes" / "quickstart", folder / "quickstart.yaml"
    if not (folder / "base" / "config.json").exists() or not (folder / "data").exists():
        subprocess.run([sys.executable, str(recipe / "prepare.py"), "--output", str(folder)], check=True)
    if not config.exists():
        shutil.copyfile(recipe / "quickstart.yaml", config)


def measure(section: str, options: argparse.Namespace, scratch: Path) -> str:
    folder = options.quickstart
    if section == "bergson":
        return bergson_section(folder, options.bergson, scratch)
    if section == "Memory":
        return memory_section(folder)
    if section == "Two processes":
        return processes_section(folder, scratch, options.samples)
    model, tokenizer, args, mixture = quickstart(folder)
    if section == "Speed":
        return speed_section(model, tokenizer, args, mixture, options.rounds)
    return sketch_section(model, tokenizer, args, mixture, scratch)


def sections_of(page: Path) -> dict[str, str]:
    """{heading: text} of an earlier result."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part.strip()}" for part in parts if part.partition("\n")[0] in SECTIONS}


def conditions() -> str:
    """On what, and beside what, a section was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return (
        f"*{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, float32 on CPU; load "
        f"average of the last 15 minutes {os.getloadavg()[2]:.1f}; {versions}.*"
    )


def quickstart(
    folder: Path, only: Sequence[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any, list[PreparedDataset]]:
    """SmolLM2-135M and the quickstart's datasets, as planner and trainer see them."""
    config = MeritConfig.from_yaml(folder / "quickstart.yaml")
    args, base = build_args(config.sft), config.root / config.base.model_name_or_path
    tokenizer, model = load_tokenizer(base), load_model(base, args)
    specs = [spec for spec in config.datasets if only is None or spec.name in only]
    loaded = [load_rows(spec, config.root) for spec in sorted(specs, key=lambda spec: spec.name)]
    return model, tokenizer, args, [prepare_dataset(dataset, model, tokenizer, args) for dataset in loaded]


def small_llama(vocabulary: int) -> PreTrainedModel:
    """Five million parameters beside an embedding of 8,192 tokens; the quickstart's tokens are folded into it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    )


def speed_section(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any, mixture: list[PreparedDataset], rounds: int
) -> str:
    every = datasets.concatenate_datasets([dataset.train for dataset in mixture])
    rows = every.shuffle(seed=0).select(range(NUM_TIMED))
    lines = []
    for name, candidate in (("SmolLM2-135M", model), ("Llama, 5M", small_llama(len(tokenizer)))):
        with open_loss(candidate, tokenizer, args, rows) as trainer:
            found = rates(trainer, rows, rounds)
        ours, trl = ([taken["bare"] / taken[side] for taken in found] for side in ("ours", "trl"))
        sketch = [taken["sketch"] / taken["bare"] * len(rows) / NUM_SAMPLES for taken in found]
        lines.append(f"| {name} | {spread(ours)} | {spread(trl)} | {spread(sketch, 3)} |")
    return "\n".join(
        [
            "## Speed",
            "",
            "Tokens a second of `dataset_gradient` (batching, loss, backward, norm; all but the sketch) as a share of "
            f"a bare loop's, medians of {rounds} rounds with the lowest and highest, on {len(rows)} examples of all "
            f"its datasets ({sum(map(len, rows['input_ids']))} tokens). *TRL's loss*: the same loop over "
            f"`SFTTrainer.compute_loss`. *Sketch*: one count sketch of 65,536 numbers, as a share of the bare loop "
            f"over {NUM_SAMPLES} such examples, which is what a dataset's gradient is made of by "
            "default; a plan takes two, one of each half.",
            "",
            "| model | ours / bare loop | TRL's loss / bare loop | sketch / bare loop |",
            "|---|---|---|---|",
            *lines,
        ]
    )


def rates(trainer: SFTTrainer, rows: Any, rounds: int) -> list[dict[str, float]]:
    """Seconds of a pass over `rows`, by way of doing it, each round in another order."""
    model = trained_model(trainer)
    lengths = [len(ids) for ids in rows["input_ids"]]
    batches = batches_of(lengths, "token_mean", TOKENS_PER_BATCH)
    settings = GradientSettings(TOKENS_PER_BATCH)
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    next_to_nothing = StrideSketch(parameters, 1_000_003)

    def bare(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        targets = batch["labels"][:, 1:]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.get_output_embeddings()(hidden[targets != -100])
        return torch.nn.functional.cross_entropy(logits, targets[targets != -100], reduction="sum")

    def loop(loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        for indices in batches:
            loss_of(collate(trainer, rows, indices)).backward()

    def sketch_only() -> None:
        vector, sketch = torch.zeros(65536), CountSketch(65536, 0)
        for name, parameter in trained_parameters(model):
            sketch.add(vector, name, parameter)

    sides: dict[str, Callable[[], object]] = {
        "bare": lambda: loop(bare),
        "ours": lambda: dataset_gradient(trainer, rows, next_to_nothing, settings=settings),
        "trl": lambda: loop(lambda batch: trl_loss_sum(trainer, batch)),
        "sketch": sketch_only,
    }
    found = []
    with torch.no_grad():
        one = collate(trainer, rows, batches[0])
        assert abs(float(bare(one)) / float(loss_sum(trainer, one)) - 1) < 1e-5
    for number in range(rounds + 1):
        order = list(sides)[number % 4 :] + list(sides)[: number % 4]
        taken = {side: seconds(sides[side]) for side in order}
        if number:
            found.append(taken)
            print("speed", {side: f"{value:.2f}" for side, value in taken.items()}, flush=True)
    model.zero_grad(set_to_none=True)
    return found


def sketch_section(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    mixture: list[PreparedDataset],
    scratch: Path,
) -> str:
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    names = [name for name, _ in parameters]
    sketches: dict[str, Sketch] = {f"count_sketch, {dim:,}": CountSketch(dim, 0) for dim in DIMS}
    sketches["count_sketch, 262,144, by layer"] = LayerSketch(layer_parts(names, 2**18), 0)
    sketches["stride 5 (the paper's)"] = StrideSketch(parameters, 5)
    exact = StrideSketch(parameters, 1)
    gradients, rows, cost, passes = [], {name: [] for name in sketches}, dict.fromkeys(sketches, 0.0), 0.0
    for dataset in mixture:
        with open_loss(model, tokenizer, args, dataset.train) as trainer:
            start = time.perf_counter()
            readout = dataset_gradient(trainer, dataset.train, exact, settings=GradientSettings(TOKENS_PER_BATCH))
            passes += time.perf_counter() - start
        np.save(scratch / f"{dataset.name}.npy", readout.sketch)
        gradients.append(np.load(scratch / f"{dataset.name}.npy", mmap_mode="r"))
        whole = torch.from_numpy(readout.sketch)
        pieces = list(
            zip(sorted(parameters), torch.split(whole, [size for _, size in sorted(parameters)]), strict=True)
        )
        for name, sketch in sketches.items():
            start = time.perf_counter()
            vector = torch.zeros(sketch.dim)
            for (parameter, _), piece in pieces:
                sketch.add(vector, parameter, piece)
            cost[name] += time.perf_counter() - start
            rows[name].append(vector.numpy())
        print("sketch", dataset.name, flush=True)
    truth = conflict_matrix(gradients)
    sizes = [dataset.counts.num_input_tokens for dataset in mixture]
    groups = split_by_conflict(truth, sizes, 4)
    upper = np.triu_indices(len(truth), 1)
    lines = []
    for name, sketch in sketches.items():
        matrix = conflict_matrix(rows[name])
        errors = np.abs(matrix - truth)[upper]
        same = "same" if np.array_equal(split_by_conflict(matrix, sizes, 4), groups) else "other"
        lines.append(
            f"| {name} | {4 * sketch.dim / 1e6:,.2f} MB | {errors.max():.4f} | {errors.mean():.4f} | "
            f"{np.corrcoef(matrix[upper], truth[upper])[0, 1]:.4f} | {same} | "
            f"{cost[name] / passes:.1%} |"
        )
    tokens = sum(dataset.counts.num_input_tokens for dataset in mixture) // len(mixture)
    return "\n".join(
        [
            "## Sketches",
            "",
            f"SmolLM2-135M on the quickstart's {len(mixture)} datasets ({tokens} tokens each on average), cosines "
            f"{truth[upper].min():.3f} to {truth[upper].max():.3f}, against exact gradients ({len(gradients[0]):,} "
            "numbers each). *Correlation*: of its cosines with the exact ones. *Cost*: its time over that of the "
            "passes on these few tokens; with 200 examples the passes are longer and it is not.",
            "",
            "| read-out | a dataset | largest error | mean error | correlation | 4 groups | cost |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def memory_section(folder: Path) -> str:
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for how, checkpointing in itertools.product(("all", "low", "bare"), (0, 1)):
        command = [sys.executable, "-c", MEMORY, str(folder), how, str(checkpointing)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[how, checkpointing] = tuple(json.loads(done.stdout.splitlines()[-1]))
        print("memory", how, checkpointing, found[how, checkpointing], flush=True)
    plain = found["all", 0][0]
    lines = []
    for how, checkpointing in itertools.product(("all", "low"), (0, 1)):
        size, predicted = found[how, checkpointing]
        lines.append(
            f"| {how == 'low'} | {bool(checkpointing)} | {size / 1e9:.2f} GB | {size / plain:.2f} | "
            f"{size / found['bare', checkpointing][0]:.2f} | {predicted / size:.2f} |"
        )
    return "\n".join(
        [
            "## Memory",
            "",
            "Highest resident memory of a process that makes one dataset's gradient (SmolLM2-135M, micro-batches of "
            "1,024 tokens), above what it had with the model loaded. All gradients are as large as the weights, 0.54 "
            "GB; the largest parameter's is 0.11 GB. *Bare*: forward and backward of the largest micro-batch alone, "
            "every gradient dropped as it comes: what `low_memory` is to take, one parameter's gradient being part of "
            "it. *Predicted*: what `merit plan` and its `--dry-run` expect, by rule of thumb.",
            "",
            "| `plan.low_memory` | `plan.gradient_checkpointing` | above the loaded model | share | ÷ bare "
            "| predicted ÷ measured |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )


def processes_section(folder: Path, scratch: Path, samples: int) -> str:
    """`merit plan` of the quickstart with few samples by one process of one thread, and by two."""
    config = scratch / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        'num_processes: 2\nmixed_precision: "no"\n'
    )
    found = []
    for count in (1, 2):
        launch = ["--config_file", str(config)] if count == 2 else ["--cpu", "--num_processes", "1"]
        output = scratch / f"plan-{len(found)}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *launch,
                   "-m", "merit_hf.planner", str(folder / "quickstart.yaml"), f"plan.num_samples={samples}",
                   "--output", str(output)]  # fmt: skip
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        content = json.loads((output / "plan.json").read_text())
        found.append((count, content["cost"]["gradient_seconds"], content["sha256"]))
        print("processes", found[-1], flush=True)
    alone = sum(taken for count, taken, _ in found if count == 1)
    pair = sum(taken for count, taken, _ in found if count == 2)
    ceiling = sum(passes(folder, 2)) / sum(passes(folder, 1))
    same = "the same plan" if len({sha for *_, sha in found}) == 1 else "**different plans**"
    return "\n".join(
        [
            "## Two processes",
            "",
            f"Gradients of the quickstart ({samples} examples a dataset) by `accelerate launch -m merit_hf.planner`, "
            f"one thread a process: two processes are {alone / pair:.2f} times as fast as one, and make {same}. What "
            "the hardware allows: two processes that have nothing to do with each other, each with a model of its "
            f"own, make {ceiling:.2f} "
            "times the passes that one makes alone, since the cores share caches and memory. The rest: datasets are "
            "handed out one by one, and the last one is finished by one process alone.",
        ]
    )


def passes(folder: Path, count: int) -> list[float]:
    """Passes a second that each of `count` processes makes beside the others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", PASSES, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workers = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(count)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    ended = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        ended.append(float(worker.communicate()[0]))
    print("passes", ended, flush=True)
    return ended


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
