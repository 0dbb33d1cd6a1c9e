"""Checkpoints whose tensors transformers renames or fuses while loading, written out once under the model's own names.

Names change, experts are stacked, matrices are turned: all of that is linear, so a weighted sum of the rewritten
checkpoints is the rewritten weighted sum.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel
from trl import SFTConfig

from merit_hf.adapters import is_adapter
from merit_hf.align import FLOATS, Checkpoint
from merit_hf.checkpoint import SINGLE_NAME
from merit_hf.config import MeritError
from merit_hf.diagnosis.interpolate import holds_the_same_tensors
from merit_hf.progress import Progress
from merit_hf.sft import load_checkpoint


@contextmanager
def under_the_models_names(
    model: PreTrainedModel,
    sources: Mapping[str, Checkpoint],
    args: SFTConfig,
    scratch: Path,
    progress: Progress,
) -> Iterator[Mapping[str, Checkpoint]]:
    """`sources` as they are where the model calls their tensors the same, else rewritten into `scratch`.

    `scratch` takes a float32 copy of every checkpoint and is removed at the end; while one is rewritten, it is in
    memory beside `model`.

    Raises:
        MeritError: the loaded model does not hold the numbers that a checkpoint does.
    """
    if holds_the_same_tensors(model, sources["base"]):
        yield sources
        return
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        found = {}
        with progress.stage("Rewriting checkpoints under the model's names", total=len(sources)) as stage:
            for label, source in sources.items():
                stage.item(label)
                found[label] = _rewrite(source, sources["base"].folder, args, scratch / label)
                stage.advance()
        yield found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rewrite(source: Checkpoint, base: Path, args: SFTConfig, target: Path) -> Checkpoint:
    model = load_checkpoint(source.folder, base, args)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            # A tied one once.
            tensors.setdefault(tensor.data_ptr(), (name, tensor.to("cpu", torch.float32).contiguous()))
    if not is_adapter(source.folder):
        _check_numbers(source, [tensor for _, tensor in tensors.values()])
    target.mkdir(parents=True)
    save_file(dict(tensors.values()), target / SINGLE_NAME, {"format": "pt"})
    return Checkpoint(target)


def _check_numbers(source: Checkpoint, held: Iterable[torch.Tensor]) -> None:
    """No renaming changes how many numbers there are, nor the sum of their squares; a lost or fresh tensor does."""
    stored = [source.flat(name) for name, info in source.tensors.items() if info.dtype in FLOATS]
    (count, squares), (held_count, held_squares) = _totals(stored), _totals(held)
    if count != held_count or abs(squares - held_squares) > 1e-6 * squares:
        raise MeritError(
            f"{source.folder}: the model that transformers makes of it holds other numbers ({held_count:,} of "
            f"{count:,}, sum of squares {held_squares:.9g} for {squares:.9g}), so points between checkpoints cannot "
            "be measured: a head of its own, or an architecture that is not loaded as a language model."
        )


def _totals(tensors: Iterable[torch.Tensor]) -> tuple[int, float]:
    count, squares = 0, 0.0
    for tensor in tensors:
        count += tensor.numel()
        squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    return count, squares
