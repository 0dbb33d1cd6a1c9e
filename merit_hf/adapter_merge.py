"""LoRA adapters of one base → one adapter, Σ w_k s_k B_k A_k in low rank; never the mean of the As and of the Bs.

    stats = merge_adapters_into(part, base, [first, second], [3, 1], "svd", rank=16)

`concat` stacks the factors, so the sum is exact and the ranks add up; `svd` keeps the best approximation of a given
rank and says what it cuts. The dense sum, a full checkpoint, is `merge`'s.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merit_hf.adapted import Adapter, factor_names
from merit_hf.adapters import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from merit_hf.checkpoint import side_files
from merit_hf.config import ConfigError, MeritError
from merit_hf.merge import MergeStats, normalised_weights

# An adapter is used with its base's own; these would make it look like a whole model.
_NOT_BESIDE_ADAPTERS = ("config.json", "generation_config.json")
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AdapterMergeStats(MergeStats):
    """[`MergeStats`] of a merged adapter: distances are of what it adds to the base.

    Attributes:
        rank: of the merged adapter, the largest over its modules.
        relative_error: ‖Σ − kept‖ / ‖Σ‖ (Frobenius, over all modules) of what `svd` cuts off; 0 for `concat`.
    """

    rank: int = 0
    relative_error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rank": self.rank, "relative_error": float(f"{self.relative_error:.6g}")}


def merge_adapters_into(
    part: Path,
    base: Path,
    checkpoints: Sequence[str | Path],
    weights: Sequence[float],
    method: str,
    rank: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    interpolate_to_init: float = 1.0,
) -> AdapterMergeStats:
    """Write the merged adapter into the empty folder `part`, with the base's tokenizer beside it.

    Args:
        base (`Path`): folder of θ0, for its tokenizer and templates.
        checkpoints (`Sequence`): folders of LoRA adapters on it.
        weights (`Sequence[float]`): one an adapter, positive; normalised.
        method: `concat` or `svd`. rank: of the result, for `svd`.
        progress (`Callable`, *optional*): called after each module with modules done and in all.
        interpolate_to_init (`float`, *optional*, defaults to `1.0`): α, which scales what the adapter adds.

    Raises:
        ConfigError: a weight is not positive, an adapter is listed twice, or `rank` exceeds the adapters' own.
        MeritError: an adapter cannot be read, does not fit the others, or holds a non-finite value.
    """
    start = time.monotonic()
    folders = [Path(checkpoint).resolve() for checkpoint in checkpoints]
    fractions = normalised_weights(folders, weights)
    adapters = [Adapter(folder) for folder in folders]
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    tensors: dict[str, torch.Tensor] = {}
    squares = dict.fromkeys(("sum", "cut", "cast"), 0.0)
    group_squares = [0.0] * len(adapters)
    for done, module in enumerate(modules, start=1):
        parts = {k: adapter.factors(module) for k, adapter in enumerate(adapters) if module in adapter.modules}
        _check_parts(module, parts, folders)
        for k, (b, a) in parts.items():
            group_squares[k] += product_norm(b, a) ** 2
        exact = concatenate([(b * (interpolate_to_init * fractions[k]), a) for k, (b, a) in parts.items()])
        squares["sum"] += product_norm(*exact) ** 2
        kept, cut = (exact, 0.0) if rank is None or method == "concat" else truncate(exact, rank, module)
        squares["cut"] += cut**2
        written = tuple(factor.to(torch.float32).contiguous() for factor in kept)
        squares["cast"] += _distance((written[0].double(), written[1].double()), kept) ** 2
        tensors |= dict(zip(factor_names(module), (written[1], written[0]), strict=True))
        if progress is not None:
            progress(done, len(modules))
    ranks = {module: tensors[factor_names(module)[0]].shape[0] for module in modules}
    _write(part, base, folders[0], tensors, ranks, [adapter.modules for adapter in adapters])
    return AdapterMergeStats(
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        fractions=fractions,
        displacement=math.sqrt(squares["sum"]),
        group_displacements=[math.sqrt(square) for square in group_squares],
        cast_loss=math.sqrt(squares["cast"]),
        out_dtype="float32",
        seconds=time.monotonic() - start,
        rank=max(ranks.values()),
        relative_error=math.sqrt(squares["cut"] / squares["sum"]) if squares["sum"] else 0.0,
    )


def concatenate(parts: Sequence[Factors]) -> Factors:
    """(B [out, Σr], A [Σr, in]) with B·A = Σ B_k·A_k: columns of B and rows of A side by side."""
    return torch.cat([b for b, _ in parts], dim=1), torch.cat([a for _, a in parts], dim=0)


def truncate(factors: Factors, rank: int, module: str = "") -> tuple[Factors, float]:
    """The nearest product of `rank` to B·A (Eckart–Young), and the Frobenius norm of what is cut.

    By the singular values of the small core R_b·R_aᵀ of two QR decompositions: the product itself is never made. Their
    roots go to both factors alike.

    Raises:
        ConfigError: `rank` exceeds that of the factors, so that nothing would be cut.
    """
    b, a = factors
    if rank > b.shape[1]:
        raise ConfigError(
            f"svd_rank {rank} is more than the adapters' summed rank {b.shape[1]}{f' at `{module}`' * bool(module)}. "
            "Merge with adapters concat, which is exact, or lower it."
        )
    left, core_b = torch.linalg.qr(b)
    right, core_a = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(core_b @ core_a.T)
    roots = values[:rank].sqrt()
    new_b, new_a = left @ u[:, : len(roots)] * roots, (right @ v[: len(roots)].T * roots).T
    # A narrow layer has fewer singular values than ranks were asked for; every module gets the same rank.
    missing = rank - len(roots)
    new_b, new_a = (
        torch.nn.functional.pad(new_b, (0, missing)),
        torch.nn.functional.pad(new_a, (0, 0, 0, missing)),
    )
    return (new_b, new_a), float(torch.linalg.vector_norm(values[rank:]))


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """‖B·A‖ (Frobenius) without making the product."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T))


def _distance(one: Factors, other: Factors) -> float:
    return product_norm(*concatenate([one, (-other[0], other[1])]))


def _check_parts(module: str, parts: dict[int, Factors], folders: Sequence[Path]) -> None:
    shapes = {k: (b.shape[0], a.shape[1]) for k, (b, a) in parts.items()}
    first = next(iter(shapes))
    for k, (b, a) in parts.items():
        if shapes[k] != shapes[first]:
            raise MeritError(
                f"{folders[k]}: the adapter of `{module}` is for a weight of {shapes[k]}, that of {folders[first]} "
                f"for {shapes[first]}. Merge adapters of one base."
            )
        if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
            raise MeritError(
                f"{folders[k]}: the adapter of `{module}` is not finite (NaN or infinity). Make it again (a lower "
                "learning rate helps), or merge without it."
            )


def _write(
    part: Path,
    base: Path,
    donor: Path,
    tensors: dict[str, torch.Tensor],
    ranks: dict[str, int],
    adapted: Iterable[list[str]],
) -> None:
    """The tensors, and `donor`'s adapter_config.json with the ranks of now; alpha = rank, so that the scaling is 1."""
    save_file(dict(sorted(tensors.items())), part / ADAPTER_NAME, {"format": "pt"})
    config = json.loads((donor / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    config |= {
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False,
    }  # fmt: skip
    if any(modules != sorted(ranks) for modules in adapted):
        config |= {"target_modules": sorted(ranks), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    (part / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in side_files(base):
        if path.name not in _NOT_BESIDE_ADAPTERS:
            target = part / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
