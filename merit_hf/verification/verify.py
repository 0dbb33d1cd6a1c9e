"""Is this the checkpoint of that group of this plan? Cheap checks first; each level once the one before has passed.

    manifest     revision, manifest, files, tensor names and shapes: from listings and headers, no weights
    weights      checksums, finite values, config, tokenizer, and how the weights moved, against the other groups too
    behaviour    loss on the group's own datasets: it must beat the base

What no check can show stays a matter of trust: that the stated tokens were really trained on, and that nothing was
hidden in weights that behave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from merit_hf.config import ConfigError
from merit_hf.identity import Budget
from merit_hf.manifest import hash_files, read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.verification.checks import Check, failed, manifest_checks, structure_checks
from merit_hf.verification.sources import ADAPTER_NAME, FolderSource, Source, open_source

# The budget of a group's first steps: see [`~partial.Replays`].
Replay = Callable[[int, int], Budget]
LEVELS = ("manifest", "weights", "behaviour")


@dataclass(frozen=True)
class Verified:
    """A verification: its checks, the group it is about, and the checkpoint's folder where weights were looked at."""

    source: Source
    checks: list[Check]
    group: int | None
    folder: Path | None

    @property
    def ok(self) -> bool:
        return failed(self.checks) is None


def verify_checkpoint(
    plan: PartitionPlan,
    checkpoint: str | Path,
    level: str = "weights",
    others: Sequence[str | Path] = (),
    progress: Progress | None = None,
    allow_partial: bool = False,
) -> list[Check]:
    """Hold a group checkpoint against the plan.

    Args:
        plan ([`PartitionPlan`]): the plan.
        checkpoint (`str` or `Path`): a folder, or a Hub id `org/name[@revision]`.
        level (`str`, *optional*, defaults to `"weights"`): `manifest`, `weights` or `behaviour`; each includes those
            before it. Of a repo, weights are downloaded only once its manifest has passed.
        others (`Sequence`, *optional*): checkpoints of other groups, to compare movements with.
        progress ([`Progress`], *optional*): where to show it.
        allow_partial (`bool`, *optional*, defaults to `False`): let a training that was stopped pass, where its counts
            are those of its steps, replayed from the group's data.

    Raises:
        ConfigError: a folder without manifest, or no such repo. MeritError: it cannot be read, or the Hub failed.
    """
    replays = partial_replays(plan, progress) if allow_partial else None
    sources = [open_source(checkpoint), *map(open_source, others)]
    return verify_checkpoints(plan, sources, level, progress, 1, replays)[0].checks


def partial_replays(plan: PartitionPlan, progress: Progress | None = None) -> Replay:
    """What gives [`verify_checkpoints`] the tokens of a group's first steps; see [`~partial.Replays`]."""
    from merit_hf.verification.partial import Replays

    return Replays(plan, progress)


def verify_checkpoints(
    plan: PartitionPlan,
    sources: Sequence[Source],
    level: str = "weights",
    progress: Progress | None = None,
    num_asked: int | None = None,
    replays: Replay | None = None,
) -> list[Verified]:
    """[`verify_checkpoint`] for several at once: their weights are read once, and compared with each other.

    Args:
        num_asked: only the first so many are judged; the others are what they are compared with. Default: all.
        replays: from [`partial_replays`], where trainings that were stopped may pass.
    """
    if level not in LEVELS:
        raise ConfigError(f"level {level!r}: expected one of {', '.join(LEVELS)}.")
    results = [Verified(source, *manifest_checks(plan, source, replays), folder=None) for source in sources]
    if level == "manifest":
        return results
    count = len(results) if num_asked is None else num_asked
    if any(result.ok for result in results[:count]):
        results = _with_weights(plan, _fetched(plan, results), count)
    if level == "weights":
        return results
    return [
        _with_behaviour(plan, result, progress) if index < count else result for index, result in enumerate(results)
    ]


def _fetched(plan: PartitionPlan, results: Sequence[Verified]) -> list[Verified]:
    """With the files here, and their checksums against the manifest; checkpoints are hashed side by side."""
    folders = [result.source.fetch() if result.ok else None for result in results]
    with ThreadPoolExecutor() as pool:
        hashed = list(pool.map(lambda folder: None if folder is None else hash_files(folder), folders))
    return [
        result if folder is None or found is None else _checksums(plan, result, folder, found)
        for result, folder, found in zip(results, folders, hashed, strict=True)
    ]


def _checksums(plan: PartitionPlan, result: Verified, folder: Path, found: Mapping[str, str]) -> Verified:
    recorded = read_manifest(folder)["files"]
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    check = Check(
        "checksums",
        f"{len(recorded)} as hashed in the manifest",
        f"{', '.join(wrong[:3])} has changed" if wrong else "the same",
        not wrong,
    )
    checks = [*result.checks, check]
    if not isinstance(result.source, FolderSource):
        # Whoever can alter what a server sends can send one header to a range request and another to a download.
        checks += [check for check in structure_checks(plan, FolderSource(folder)) if not check.ok]
    return Verified(result.source, checks, result.group, folder)


def _with_weights(plan: PartitionPlan, results: Sequence[Verified], count: int) -> list[Verified]:
    from merit_hf.verification.behaviour import side_checks
    from merit_hf.verification.movement import measure_movement, movement_checks
    from merit_hf.vision import frozen_tensors, image_tensors

    sound = [result for result in results if result.ok and result.folder is not None and result.group is not None]
    if not sound:
        return list(results)
    base = plan.base_folder()
    folders = [result.folder for result in sound if result.folder is not None]
    file = ADAPTER_NAME if (folders[0] / ADAPTER_NAME).exists() else None
    freeze = plan.base.get("freeze", ())
    frozen = frozen_tensors(base, freeze) if freeze else ()
    movement = measure_movement(base, folders, file, frozen, image_tensors(base) if plan.has_images else ())
    numbers = [result.group for result in sound if result.group is not None]
    # As the manifest says, which has been checked; of a training that was stopped, those that it took.
    steps = [int(read_manifest(folder)["num_steps"]) for folder in folders]
    blind = [k for k, number in enumerate(numbers) if plan.has_images and not plan.sees_images(number)]
    asked = {id(result) for result in results[:count]}
    added: Mapping[int, list[Check]] = {
        id(result): side_checks(plan, folders[k], base)
        + movement_checks(movement, k, plan.group_sft(numbers[k]), steps, blind)
        for k, result in enumerate(sound)
        if id(result) in asked
    }
    return [
        Verified(result.source, [*result.checks, *added.get(id(result), [])], result.group, result.folder)
        for result in results
    ]


def _with_behaviour(plan: PartitionPlan, result: Verified, progress: Progress | None) -> Verified:
    from merit_hf.verification.behaviour import loss_check

    if not result.ok or result.folder is None or result.group is None:
        return result
    check = loss_check(plan, result.group, result.folder, progress=progress)
    return Verified(result.source, [*result.checks, check], result.group, result.folder)
