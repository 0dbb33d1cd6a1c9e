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

from merit_hf.errors import MeritError

SKETCHES_NAME = "sketches.safetensors"


@dataclass(frozen=True)
class GradientReadout:
    """What is kept of a dataset's gradient.

    Attributes:
        sketch: float32 [dim].
        norm: ‖g‖₂ of the whole mean gradient.
        loss: SFT's loss at the base on the sample, in the unit of the reduction (nats a token).
        num_samples, num_input_tokens, num_loss_tokens, num_batches: what it was measured on.
        first_half: float32 [dim], the read-out of the first half of the sample alone.
        first_share: its weight in the whole: sketch = first_share · first + (1 − first_share) · second. 1 where the
            sample is a single example, which has no second half.
        split_half_cosine, reliability: as [`~merit_hf.reliability.split_half`] gives them; None without a second half.
    """

    sketch: np.ndarray
    norm: float
    loss: float
    num_samples: int
    num_input_tokens: int
    num_loss_tokens: int
    num_batches: int
    first_half: np.ndarray | None = None
    first_share: float = 1.0
    split_half_cosine: float | None = None
    reliability: float | None = None


_ARRAYS = ("sketch", "first_half")


def readout_path(folder: Path, name: str) -> Path:
    """Where the read-out of dataset `name` lies; names are free text, so the file is called by their hash."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"


def save_readout(path: Path, key: str, readout: GradientReadout) -> None:
    """Write a read-out; complete once its .json stands beside it, which names the `key` it was made under."""
    facts = {
        field.name: getattr(readout, field.name) for field in dataclasses.fields(readout) if field.name not in _ARRAYS
    }
    arrays = [readout.sketch] if readout.first_half is None else [readout.sketch, readout.first_half]
    for target, write in (
        (path, lambda file: np.save(file, np.stack(arrays))),
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
    arrays = np.load(path, mmap_mode="r")
    return GradientReadout(sketch=arrays[0], first_half=arrays[1] if len(arrays) > 1 else None, **facts)


def write_sketches(path: Path, rows: Sequence[np.ndarray], first_halves: Sequence[np.ndarray] = ()) -> None:
    """One safetensors file, written row by row: float32 "sketches" [T, dim], and "first_half" likewise where given."""
    tensors = {"sketches": rows, **({"first_half": first_halves} if len(first_halves) else {})}
    header, end = {}, 0
    for name, values in tensors.items():
        start, end = end, end + 4 * len(values) * len(values[0])
        header[name] = {"dtype": "F32", "shape": [len(values), len(values[0])], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in tensors.values():
            for row in values:
                file.write(np.ascontiguousarray(row, dtype="<f4").data)


def open_sketches(path: Path, name: str = "sketches") -> np.ndarray | None:
    """A matrix that `write_sketches` wrote, memory-mapped; None where the file has none of that name.

    Raises:
        MeritError: the file is cut short.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size))
        except ValueError:
            header = {}
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if not header or path.stat().st_size < 8 + size + end:
        raise MeritError(f"{path}: the plan's sketches are cut short. Restore {path.name}.")
    tensor = header.get(name)
    if tensor is None:
        return None
    offset = 8 + size + tensor["data_offsets"][0]
    return np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=tuple(tensor["shape"]))
