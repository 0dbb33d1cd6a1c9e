"""Two numbers of a finished quickstart, from its own files: `make bench-quickstart`.

    python benchmarks/quickstart_checks.py runs/quickstart --output benchmarks/results/quickstart.md

1. The largest difference between the merged weights and a float64 mean of the groups, and in spacings of the output.
2. The largest error of a cosine of the plan's count sketch against exact gradients (a second planning, same samples).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from merit_hf.checkpoint import read_tensor_index
from merit_hf.config import MeritConfig
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.versions import library_versions


def merge_error(run: Path) -> dict[str, float]:
    """Merged against the float64 weighted mean, tensor by tensor."""
    manifest = json.loads((run / "merged" / "merit.json").read_text(encoding="utf-8"))
    weights = [entry["weight"] for entry in manifest["groups"]]
    folders = [run / "groups" / str(entry["group"]) for entry in manifest["groups"]]
    indices = [read_tensor_index(folder) for folder in folders]
    largest, largest_ulps, values = 0.0, 0.0, 0
    for name, info in read_tensor_index(run / "merged").items():
        mean = sum(
            weight * load(folder, index[name].file, name).double()
            for weight, folder, index in zip(weights, folders, indices, strict=True)
        )
        merged = load(run / "merged", info.file, name)
        difference = (merged.double() - mean).abs()
        spacing = torch.finfo(merged.dtype).eps * torch.exp2(torch.floor(torch.log2(mean.abs().clamp(min=1e-30))))
        largest = max(largest, float(difference.max()))
        largest_ulps = max(largest_ulps, float((difference / spacing).max()))
        values += merged.numel()
    return {"values": values, "largest_difference": largest, "in_spacings": largest_ulps}


def load(folder: Path, file: str, name: str) -> torch.Tensor:
    with safe_open(folder / file, framework="pt") as shard:
        return shard.get_tensor(name)


def sketch_error(config: Path, run: Path, scratch: Path) -> dict[str, float]:
    """The plan's matrix against the one of full gradients."""
    exact = MeritPlanner(MeritConfig.from_yaml(config, ["plan.sketch=exact"])).plan(scratch / "exact").conflict_matrix
    plan = PartitionPlan.from_pretrained(run / "plan")
    sketched = plan.conflict_matrix
    assert exact is not None
    assert sketched is not None
    pairs = np.triu_indices(len(exact), 1)
    error = np.abs(sketched - exact)[pairs]
    return {
        "datasets": len(exact),
        "sketch_dim": plan.config["plan"]["sketch_dim"],
        "largest_error": float(error.max()),
        "mean_error": float(error.mean()),
        "lowest_cosine": float(exact[pairs].min()),
        "highest_cosine": float(exact[pairs].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="the folder that `make demo` made")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args()
    run, scratch = options.quickstart / "run", options.quickstart / "bench"
    sketch = sketch_error(options.quickstart / "quickstart.yaml", run, scratch)
    merge = merge_error(run)
    shutil.rmtree(scratch)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        "# Quickstart checks\n\nWritten by `make bench-quickstart`.\n\n"
        f"Hardware: {platform.machine()}, {torch.get_num_threads()} threads. Versions: {versions}.\n\n"
        "| what | value |\n|---|---|\n"
        f"| merged weights compared with a float64 weighted mean | {merge['values']:,} |\n"
        f"| largest difference | {merge['largest_difference']:.3g} |\n"
        f"| the same in spacings of the output dtype (½: correctly rounded) | {merge['in_spacings']:.4f} |\n"
        f"| datasets; count sketch length | {sketch['datasets']}; {sketch['sketch_dim']:,} |\n"
        f"| cosines of the exact gradients | {sketch['lowest_cosine']:.3f} to {sketch['highest_cosine']:.3f} |\n"
        f"| largest error of a sketched cosine | {sketch['largest_error']:.4f} |\n"
        f"| mean error of a sketched cosine | {sketch['mean_error']:.4f} |\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
