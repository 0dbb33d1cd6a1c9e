"""The merge against the disk and against mergekit: `make bench-merge`.

    python benchmarks/merge_speed.py runs/quickstart --output benchmarks/results/merge.md

Where the quickstart has a base and no trained groups, copies of the base with a little noise take their place.

Floor: read the K checkpoints from end to end, write as many bytes as one has, fsync. In every round floor, ours and
mergekit run one after another, in turns, on the same files and with the same page cache (all of it, or none).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from merit_hf.checkpoint import read_tensor_index
from merit_hf.versions import library_versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

WEIGHTS = [123456789, 45678901, 7654321, 30000000]
OURS = """
import json, sys, time
from merit_hf.merge import merge_checkpoints
base, output, *groups = sys.argv[1:]
start = time.monotonic()
merge_checkpoints(base, groups, json.loads('WEIGHTS'), output)
print(json.dumps(time.monotonic() - start))
""".replace("WEIGHTS", json.dumps(WEIGHTS))
THEIRS = """
import json, os, sys, time
from pathlib import Path
from mergekit.scripts.run_yaml import main
start = time.monotonic()
main(sys.argv[1:] + ["--quiet"], standalone_mode=False)
for path in Path(sys.argv[2]).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
print(json.dumps(time.monotonic() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="the folder that `make demo` made")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; default: beside the quickstart")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="merge-", dir=options.scratch or options.quickstart))
    run = options.quickstart / "run"
    try:
        lines = []
        base = float32_base(options.quickstart / "base", scratch / "base")
        groups = [run / f"groups/{k}" for k in range(4)]
        name = "SmolLM2-135M, float32"
        if not all((group / "model.safetensors").exists() for group in groups):
            groups = [noisy(base, scratch / f"noisy-{k}", seed=k) for k in range(4)]
            name += " (base and noise)"
        lines += speed(name, [base, *groups], scratch, options.rounds)
        first = synthetic(scratch / "synthetic", seed=0)
        made = [noisy(first, scratch / f"synthetic-{k}", seed=k) for k in range(4)]
        lines += speed("synthetic Llama, bfloat16 (base and noise)", [first, *made], scratch, options.rounds)
        table = architectures(scratch)
    finally:
        shutil.rmtree(scratch)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(lines, table, options.rounds), encoding="utf-8")


def float32_base(base: Path, folder: Path) -> Path:
    """The base in the dtype of the groups, so that all of the files are as large."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    return folder


def synthetic(folder: Path, seed: int) -> Path:
    """A Llama of 0.6 billion random parameters in bfloat16, without a tokenizer."""
    from transformers import LlamaConfig

    hidden, inner, layers, vocabulary = 1024, 4096, 32, 65536
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden // 2, hidden) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def noisy(base: Path, folder: Path, seed: int) -> Path:
    """A copy that has moved as far as fine-tuning moves a model: by some hundredth of each tensor's size."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator).mul_(0.01 * tensor.float().std(unbiased=False))
        tensor.add_(noise.to(tensor.dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def speed(name: str, folders: list[Path], scratch: Path, rounds: int) -> list[str]:
    """Two lines of the table: everything cached, nothing cached."""
    base, *groups = folders
    recipe = scratch / "recipe.yml"
    recipe.write_text(linear_recipe(groups), encoding="utf-8")
    files = [folder / "model.safetensors" for folder in folders]
    size = files[1].stat().st_size
    index = read_tensor_index(groups[0])
    allowed = 2 * max(info.num_bytes for info in index.values()) * len(groups) / 1e6 + 200
    python = sys.executable
    out = scratch / "out"
    sides: dict[str, Callable[[], tuple[float, float, float]]] = {
        "floor": lambda: (floor(files[1:], scratch / "floor", size), 0.0, 0.0),
        "ours": lambda: child([python, "-c", OURS, str(base), str(out), *map(str, groups)]),
        "mergekit": lambda: child([python, "-c", THEIRS, str(recipe), str(out)]),
    }
    lines = []
    for cache in ("cached", "not cached"):
        found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            for side in order:
                prepare(files, cache == "cached")
                result = sides[side]()
                shutil.rmtree(out, ignore_errors=True)
                if number:  # the first round loads programs into the cache
                    found[side].append(result)
            print(
                name, cache, number, {side: f"{rows[-1][0]:.2f}" for side, rows in found.items() if rows}, flush=True
            )
        call, process = ({side: [row[k] for row in rows] for side, rows in found.items()} for k in (0, 1))
        against = [
            ratio(call["ours"], call["floor"]),
            ratio(process["mergekit"], process["ours"]),
            ratio(call["mergekit"], call["ours"]),
            ratio(process["mergekit"], call["floor"]),
        ]
        memory = [max(r[2] for r in found[side]) for side in ("ours", "mergekit")]
        lines.append(
            f"| {name}, {len(groups)} × {size / 1e9:.2f} GB | {cache} | {' | '.join(against)} | {memory[0]:.0f} MB "
            f"(allowed: {allowed:.0f}) | {memory[1]:.0f} MB |"
        )
    return lines


def linear_recipe(groups: list[Path]) -> str:
    total = sum(WEIGHTS)
    models = [
        {"model": str(group.resolve()), "parameters": {"weight": weight / total}}
        for group, weight in zip(groups, WEIGHTS, strict=True)
    ]
    dtype = json.loads((groups[0] / "config.json").read_text())["dtype"]
    return yaml.safe_dump(
        {"merge_method": "linear", "models": models, "base_model": models[0]["model"],
         "parameters": {"normalize": True}, "dtype": "float32", "out_dtype": dtype}
    )  # fmt: skip


def ratio(above: list[float], below: list[float]) -> str:
    """Median and range of the rounds' ratios."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def prepare(files: list[Path], cached: bool) -> None:
    os.sync()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cached:
                read(file.fileno())
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(descriptor: int) -> None:
    buffer = bytearray(1 << 22)
    while os.readv(descriptor, [buffer]):
        pass


def floor(inputs: list[Path], output: Path, size: int) -> float:
    noise = os.urandom(1 << 22)
    start = time.monotonic()
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            read(file.fileno())
    with output.open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(noise[: min(left, len(noise))])
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    output.unlink()
    return seconds


def child(command: list[str]) -> tuple[float, float, float]:
    """Seconds of the call inside (where it prints them), of the process, and its highest anonymous memory in MB."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    highest = 0
    while process.poll() is None:
        highest = max(highest, anonymous(process.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - start
    printed, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[:2]}: {errors[-2000:]}")
    last = printed.strip().splitlines()[-1:] or [""]
    return float(last[0]) if last[0].replace(".", "").isdigit() else seconds, seconds, highest / 1e3


def anonymous(pid: int) -> int:
    """KB of a process and all below it; memory that they share counts in each."""
    found = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            found += int(line.split()[1]) if line.startswith(("RssAnon:", "RssShmem:")) else 0
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += sum(anonymous(int(child)) for child in path.read_text().split())
    return found


def architectures(scratch: Path) -> list[str]:
    """A line an architecture, by the tests' tiny models: two checkpoints, merged by both."""
    from architectures import compare
    from tiny_models import MODELS

    lines = []
    for number, name in enumerate(MODELS):
        ours, theirs = compare(name, scratch / f"architecture-{number}")
        lines.append(f"| {name} | {ours} | {theirs} |")
        print(lines[-1], flush=True)
    return lines


def report(lines: list[str], table: list[str], rounds: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    speed_lines, table_lines = "\n".join(lines), "\n".join(table)
    return f"""# Merging: speed, memory, architectures

Written by `make bench-merge`. Hardware: {platform.machine()}, {os.cpu_count()} cores, torch on CPU;
load average of the last 15 minutes {os.getloadavg()[2]:.1f}. Versions: {versions}.

## Speed and memory

Medians of {rounds} rounds, in brackets the lowest and highest. *Floor*: read the K checkpoints, write one with fsync.
Ours reads the base too, compares all headers, checks every value, measures distances, and flushes its output; mergekit
does not flush, so its files are flushed within its time. *Processes*: a Python process from start to exit, imports
included, that calls `merge_checkpoints`, or what `mergekit-yaml` calls. *Calls*: these alone. `mergekit-yaml` / floor
is what a merge could be faster at most, if it started in no time and did nothing but read and write. Memory is the
highest anonymous memory (RssAnon + RssShmem) of the process and those it started, sampled every 20 ms; allowed is 2 ×
the largest tensor × K + 200 MB. *Base and noise*: copies of the base, each moved by a hundredth of a tensor's size.

| checkpoints | page cache | ours / floor (calls) | `mergekit-yaml` / ours (processes) | mergekit / ours (calls) \
| `mergekit-yaml` (process) / floor | memory, ours | memory, mergekit |
|---|---|---|---|---|---|---|---|
{speed_lines}

`merit merge` adds verification (hashes of every file of every group), which is not in these numbers.

## Architectures

Tiny random models of {len(table)} kinds, two bfloat16 checkpoints of each, weights 3 : 1. *Right*: every tensor of the
inputs is there, under its name, within one rounding of the float64 mean, and `from_pretrained` finds no key missing or
unexpected. For mergekit the error of a float32 sum is allowed on top, and names may differ where `from_pretrained`
reads them the same.

| model | ours | mergekit |
|---|---|---|
{table_lines}
"""


if __name__ == "__main__":
    main()
