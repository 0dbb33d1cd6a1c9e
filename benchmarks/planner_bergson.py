"""The same mean gradient by EleutherAI's bergson, an independent implementation.

bergson pins torchvision, whose PyPI build does not load beside the CPU build of torch, so it is put into a folder of
its own, without its dependencies' dependencies:

    pip install --no-deps --target .bergson -r benchmarks/requirements-bergson.txt
    python benchmarks/planner.py runs/quickstart --bergson .bergson --output benchmarks/results/planner.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NUM_EXAMPLES = 16
# bergson bears no loss on what ends an answer, so the same labels are taken off here.
OURS = """
import sys
from pathlib import Path
import numpy as np
from merit_hf.config import DatasetSection
from merit_hf.data import load_rows
from merit_hf.gradients import dataset_gradient, trained_parameters
from merit_hf.mixture import prepare_dataset
from merit_hf.sft import build_args, load_model, load_tokenizer, open_loss
from merit_hf.sketch import make_sketch
base, rows, output = map(Path, sys.argv[1:])
args = build_args({})
model, tokenizer = load_model(base, args), load_tokenizer(base)
loaded = load_rows(DatasetSection(name="set", path=str(rows), chat=True, eval_fraction=0.0), rows.parent)
train = prepare_dataset(loaded, model, tokenizer, args).train
end = tokenizer.convert_tokens_to_ids("<|im_end|>")
def mask(row):
    last = max(i for i, token in enumerate(row["input_ids"]) if token == end)
    return {"labels": [-100 if i >= last else label for i, label in enumerate(row["labels"])]}
train = train.map(mask)
parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
with open_loss(model, tokenizer, args, train) as trainer:
    readout = dataset_gradient(trainer, train, make_sketch("exact", parameters, 0, 1, 0))
np.save(output, readout.sketch * readout.num_loss_tokens)
"""


def bergson_section(quickstart: Path, libraries: Path | None, scratch: Path) -> str:
    title = "## bergson\n\n"
    if libraries is None or not libraries.exists():
        return title + "Not run: `--bergson` names no folder with it (benchmarks/planner_bergson.py says how)."
    rows = scratch / "rows.jsonl"
    rows.write_text(_plain_rows(quickstart / "data" / "sql.jsonl"), encoding="utf-8")
    ours, theirs = scratch / "ours.npy", scratch / "index"
    build = ["-m", "bergson", "build", theirs, "--model", quickstart / "base", "--dataset", rows, "--prompt_column",
             "prompt", "--completion_column", "completion", "--precision", "fp32", "--projection_dim", "0",
             "--aggregation", "sum", "--loss_reduction", "sum"]  # fmt: skip
    found = {
        "merit": _run(["-c", OURS, quickstart / "base", rows, ours], None),
        "bergson": _run(build, libraries),
    }
    cosine, ratio, num_layers, share = _agreement(np.load(ours), theirs, quickstart / "base")
    seconds, memory = (found["bergson"][k] / found["merit"][k] for k in (0, 1))
    count = len(rows.read_text(encoding="utf-8").splitlines())
    return title + (
        f"The summed gradient of {count} examples of the quickstart's `sql`, SmolLM2-135M, float32, the stop token "
        f"masked as bergson does. Over the {num_layers} linear layers that bergson reads ({share:.0%} of the "
        f"parameters; it leaves embeddings, norms and the head out), the cosine of the two gradients is "
        f"{cosine:.7f} and their norms' ratio {ratio:.7f}. As whole processes, imports and loading included, bergson "
        f"takes {seconds:.2f} times the time and {memory:.2f} times the memory; it makes the gradient of every "
        "example, which a plan does not need."
    )


def _plain_rows(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:NUM_EXAMPLES]]
    plain = [{key: row[key][0]["content"] for key in ("prompt", "completion")} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in plain)


def _run(arguments: list[Any], libraries: Path | None) -> tuple[float, int]:
    """Seconds and highest resident bytes of a Python process."""
    path = [str(libraries.resolve())] if libraries else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *sys.path])}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def _agreement(ours: np.ndarray, index: Path, base: Path) -> tuple[float, float, int, float]:
    """Cosine and ratio of norms over bergson's layers, their number, and their share of the parameters."""
    from merit_hf.gradients import trained_parameters
    from merit_hf.sft import load_model

    info = json.loads((index / "info.json").read_text())
    sizes: dict[str, int] = info["grad_sizes"]
    theirs = np.memmap(index / "gradients.bin", dtype=info.get("base_dtype", "float32"), mode="r")
    parts, start = {}, 0
    for name, parameter in sorted(trained_parameters(load_model(base))):
        parts[name.removesuffix(".weight")] = ours[start : start + parameter.numel()]
        start += parameter.numel()
    mine = np.concatenate([next(parts[name] for name in parts if name.endswith(layer)) for layer in sizes])
    other = np.asarray(theirs[: mine.size], dtype=np.float64)
    mine = mine.astype(np.float64)
    cosine = float(mine @ other / (np.linalg.norm(mine) * np.linalg.norm(other)))
    return cosine, float(np.linalg.norm(other) / np.linalg.norm(mine)), len(sizes), mine.size / ours.size
