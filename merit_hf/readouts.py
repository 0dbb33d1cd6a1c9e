"""Gradient read-outs on disk: a file a dataset while planning goes on, and one matrix in the finished plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SKETCHES_NAME = "sketches.safetensors"


@dataclass(frozen=True)
class GradientReadout:
    """What is kept of a dataset's gradient.

    Attributes:
        sketch: float32 [dim].
        norm: ‖g‖₂ of the whole mean gradient.
        loss: SFT's loss at the base on the sample, in the unit of the reduction (nats a token).
        num_samples, num_input_tokens, num_loss_tokens, num_batches: what it was measured on.
    """

    sketch: np.ndarray
    norm: float
    loss: float
    num_samples: int
    num_input_tokens: int
    num_loss_tokens: int
    num_batches: int


def readout_path(folder: Path, name: str) -> Path:
    """Where the read-out of dataset `name` lies; names are free text, so the file is called by their hash."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"


def save_readout(path: Path, key: str, readout: GradientReadout) -> None:
    """Write a read-out; complete once its .json stands beside it, which names the `key` it was made under."""
    facts = {
        field.name: getattr(readout, field.name) for field in dataclasses.fields(readout) if field.name != "sketch"
    }
    for target, write in (
        (path, lambda file: np.save(file, readout.sketch)),
        (path.with_suffix(".json"), lambda file: file.write(json.dumps({"key": key, **facts}).encode())),
    ):
        part = target.with_name(target.name + f".part{os.getpid()}")
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)


def load_readout(path: Path, key: str) -> GradientReadout | None:
    """The read-out at `path`, its sketch memory-mapped; None where there is none, or one made under another key."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if facts.pop("key") != key or not path.exists():
        return None
    return GradientReadout(sketch=np.load(path, mmap_mode="r"), **facts)


def write_sketches(path: Path, rows: Sequence[np.ndarray]) -> None:
    """One safetensors file with float32 "sketches" [T, dim], written row by row."""
    shape = [len(rows), len(rows[0])]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"sketches": tensor}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for row in rows:
            file.write(np.ascontiguousarray(row, dtype="<f4").data)


def open_sketches(path: Path) -> np.ndarray:
    """The matrix that `write_sketches` wrote, memory-mapped."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        shape = json.loads(file.read(size))["sketches"]["shape"]
    return np.memmap(path, dtype="<f4", mode="r", offset=8 + size, shape=tuple(shape))
