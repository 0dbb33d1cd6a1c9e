"""Ten thousand datasets: how long a plan of stored sketches takes, in how much memory, and what one more costs.

    python benchmarks/planner_scale.py [--output benchmarks/results/planner_scale.md] [--scratch FOLDER]

Synthetic sketches (dim 8,192, memory-mapped, around forty directions) → matrix, axes, groups and a saved plan with its
tables, pictures and card, each size in a process of its own; then the extension's part that depends on T and m.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DIM = 8192
NUM_GROUPS = 8
# The budget that is set for T = 10,000 on two cores.
SECONDS, GIGABYTES = 60, 4
SIZES = (1_000, 10_000)
ADDED = (16, 64, 256, 1024)
BASE = {"repo_id": "org/base", "revision": "a" * 40, "weights_sha256": "b" * 64, "chat_template_sha256": "c" * 64}


def make_sketches(path: Path, count: int) -> None:
    """float32 [count, DIM] as .npy: one of forty directions each, plus noise of the same size."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((40, DIM), dtype=np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIM))
    for start in range(0, count, 500):
        stop = min(start + 500, count)
        noise = rng.standard_normal((stop - start, DIM), dtype=np.float32)
        out[start:stop] = directions[rng.integers(0, 40, stop - start)] + noise
    out.flush()


def make_plan(sketches: np.ndarray, folder: Path) -> dict[str, float]:
    """Seconds of each stage from sketches to a saved plan."""
    from merit_hf.conflict import axis_bounds, conflict_matrix, sketch_error, structure_p_value
    from merit_hf.partition import explained_shares, num_axes_for, principal_axes, split_by_conflict
    from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup, group_identity
    from merit_hf.readouts import SKETCHES_NAME, write_sketches

    seconds, last = {}, time.monotonic()

    def stage(name: str) -> None:
        nonlocal last
        seconds[name], last = time.monotonic() - last, time.monotonic()

    count = len(sketches)
    tokens = np.random.default_rng(1).integers(1_000, 100_000, count)
    matrix = conflict_matrix(sketches)
    stage("conflict matrix")
    num_axes = num_axes_for(NUM_GROUPS)
    coordinates, values = principal_axes(matrix, num_axes)
    explained = explained_shares(matrix, values, num_axes, "column")
    stage("axes")
    p_value = structure_p_value(matrix)
    bounds = axis_bounds(values, num_axes, sketch_error(count, DIM, "count_sketch"))
    stage("permutation test")
    groups = split_by_conflict(matrix, tokens, NUM_GROUPS, coordinates=coordinates)
    stage("groups")
    datasets = [
        PlannedDataset(
            name=f"org__dataset-{i:05d}", group=int(groups[i]), tag=None, format="text", fingerprint=f"{i:064x}",
            tokens_digest=f"{i:064x}", num_examples=100, num_input_tokens=int(tokens[i]),
            num_loss_tokens=int(tokens[i]) // 2, num_sampled=100, gradient_norm=1.0, base_loss=2.0,
            coordinates=coordinates[i].tolist(), repo_id=f"org/dataset-{i}", revision="d" * 40, split="train",
        )
        for i in range(count)
    ]  # fmt: skip
    planned = []
    for number in range(NUM_GROUPS):
        mine = [row for row in datasets if row.group == number]
        total = sum(row.num_input_tokens for row in mine)
        planned.append(
            PlannedGroup(number, [row.name for row in mine], 100 * len(mine), total,
                         sum(row.num_loss_tokens for row in mine), 10, total, total // 2, total / int(tokens.sum()),
                         group_identity(BASE, mine, {"max_steps": -1}))
        )  # fmt: skip
    section = {"split": "merit", "num_groups": NUM_GROUPS, "num_samples": 200, "sketch": "count_sketch",
               "sketch_dim": DIM, "stride": 5, "reduction": "token_mean", "center": "column", "balance": "tokens",
               "axes": "global", "tokens_per_batch": 2048, "seed": 0}  # fmt: skip
    plan = PartitionPlan(
        config={"plan": section, "datasets": [{"name": row.name} for row in datasets]}, base=BASE, datasets=datasets,
        groups=planned, sft={"max_steps": -1}, conflict_matrix=matrix, explained=explained,
        bounds=bounds | {"structure_p_value": p_value, "verdict": "structure" if p_value <= 0.05 else "noise"},
        cost={"gradient_seconds": 0.0, "tokens": 0}, versions={}, inputs_sha256="",
    )  # fmt: skip
    plan.save_pretrained(folder)
    stage("tables, pictures and card")
    write_sketches(folder / SKETCHES_NAME, sketches)
    stage("sketches")
    loaded = PartitionPlan.from_pretrained(folder)
    stage("load again")
    assert replace(loaded.groups[0]) == plan.groups[0]
    return seconds


def extension(folder: Path, added: int) -> float:
    """Seconds, the least of three tries, for what depends on T and m: cosines, coordinates, cuts, table of pairs."""
    from merit_hf.conflict import cross_cosines
    from merit_hf.plan import PartitionPlan
    from merit_hf.projection import project_onto_axes, sides_of_cuts
    from merit_hf.tables import extend_pairs

    plan = PartitionPlan.from_pretrained(folder)
    pairs, rows = plan.conflict_pairs(), list(np.asarray(plan.load_sketches()))
    old = np.array([row.coordinates for row in plan.datasets])
    groups = np.array([row.group for row in plan.datasets])
    new = list(np.random.default_rng(2).standard_normal((added, DIM), dtype=np.float32))
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        cosines = cross_cosines(rows, new)
        placed = project_onto_axes(rows, old, cosines, "column")
        positions = partial(_positions, old, placed)
        sides_of_cuts(groups, NUM_GROUPS, added, positions)
        among = cross_cosines(new, new)
        extend_pairs(pairs, cosines, among, np.arange(len(rows)), len(rows) + np.arange(added))
        seconds.append(time.monotonic() - start)
    return min(seconds)


def _positions(old: np.ndarray, new: np.ndarray, members: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    return old[members, level], new[:, level]


def child(kind: str, folder: Path, argument: int) -> None:
    """One measurement in a process of its own, so that its peak memory is its own."""
    if kind == "plan":
        content: dict[str, Any] = make_plan(np.load(folder / "sketches.npy", mmap_mode="r"), folder / "plan")
    else:
        content = {"seconds": extension(folder / "plan", argument)}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"stages": content, "gigabytes": usage.ru_maxrss / 1e6, "cpu": usage.ru_utime + usage.ru_stime}))


def measure(kind: str, folder: Path, argument: int = 0) -> dict[str, Any]:
    call = [sys.executable, __file__, "--child", kind, "--scratch", str(folder), "--argument", str(argument)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def section_text(plans: dict[int, dict[str, Any]], extensions: dict[int, float]) -> str:
    import scipy

    seconds = {count: sum(made["stages"].values()) for count, made in plans.items()}
    largest = max(plans)
    lines = [
        "## Many datasets", "",
        f"`python benchmarks/planner_scale.py` on {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}. Sketches of dim {DIM:,}, "
        f"memory-mapped, to a saved plan of {NUM_GROUPS} groups with tables, pictures and card.", "",
        "| | " + " | ".join(f"T = {count:,}" for count in plans) + " |",
        "|---|" + "---:|" * len(plans),
    ]  # fmt: skip
    for name in plans[largest]["stages"]:
        shares = [f"{made['stages'][name] / seconds[count]:.0%}" for count, made in plans.items()]
        lines.append(f"| {name}, share of the time | " + " | ".join(shares) + " |")
    lines.append("| all, in seconds | " + " | ".join(f"{seconds[count]:.0f}" for count in plans) + " |")
    lines.append("| peak memory, GB | " + " | ".join(f"{made['gigabytes']:.1f}" for made in plans.values()) + " |")
    in_time, in_memory = seconds[largest] <= SECONDS, plans[largest]["gigabytes"] <= GIGABYTES
    first = extensions[min(extensions)]
    lines += [
        "",
        f"Budget for T = {largest:,} on two cores: at most {SECONDS} s: **{'pass' if in_time else 'fail'}**; at most "
        f"{GIGABYTES} GB: **{'pass' if in_memory else 'fail'}**.", "",
        f"What `merit extend --mode project` adds to the m gradients, at T = {largest:,} (cosines, coordinates, cuts, "
        f"table of pairs), as a multiple of the time for m = {min(extensions)}:", "",
        "| m | " + " | ".join(map(str, extensions)) + " |",
        "|---|" + "---:|" * len(extensions),
        "| time | " + " | ".join(f"{value / first:.2f}" for value in extensions.values()) + " |", "",
        f"Passes over the T stored sketches and over the table are paid whatever m is; m = {min(extensions)} "
        f"takes {first / seconds[largest]:.1%} of the time of the whole plan, m = {max(extensions)} "
        f"{extensions[max(extensions)] / seconds[largest]:.1%}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "planner_scale.md")
    parser.add_argument("--scratch", type=Path, help="where the sketches and plans are made; default: a temporary one")
    parser.add_argument("--child", choices=("plan", "extend"), help=argparse.SUPPRESS)
    parser.add_argument("--argument", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.scratch, options.argument)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        plans = {}
        for count in SIZES:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            make_sketches(folder / "sketches.npy", count)
            plans[count] = measure("plan", folder)
        extensions = {added: float(measure("extend", folder, added)["stages"]["seconds"]) for added in ADDED}
        if options.scratch:
            for name in ("conflict", "axes", "groups"):
                for count in SIZES:
                    source = Path(scratch) / str(count) / "plan" / "figures" / f"{name}.png"
                    (options.scratch / f"{count}_{name}.png").write_bytes(source.read_bytes())
    options.output.write_text(section_text(plans, extensions), encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
