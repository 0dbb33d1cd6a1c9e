"""The datasets of a CONFIG or a plan, read and tokenised: what planner, trainer and evaluation work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.config import ConfigError, DatasetSection, MeritConfig, MeritError
from merit_hf.data import LoadedDataset, TokenCounts, count_tokens, format_digest, load_rows, weighted_rows
from merit_hf.plan import PartitionPlan, PlannedDataset
from merit_hf.progress import Progress
from merit_hf.sft import tokenize_rows


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset as SFT trains on it.

    Attributes:
        train: tokenised rows (`input_ids`, `labels`) of an epoch, not packed: with a `weight`, some of them several
            times or not at all. counts: their tokens.
        eval: tokenised held-out rows, or None.
        distinct: tokenised rows, each once, whatever the weight. kept: where each stood in the rows that were read.
        mix: which of `distinct` the rows of `train` are, int64.
    """

    name: str
    loaded: LoadedDataset
    train: datasets.Dataset
    counts: TokenCounts
    num_dropped: int
    num_truncated: int
    eval: datasets.Dataset | None
    distinct: datasets.Dataset
    kept: list[int]
    mix: np.ndarray


def read_mixture(
    specs: Sequence[DatasetSection],
    root: Path,
    args: SFTConfig,
    progress: Progress,
    takes_images: Callable[[], bool] = lambda: False,
) -> tuple[list[LoadedDataset], dict[str, str]]:
    """Read every dataset, sorted by name, before any model is loaded. `takes_images`: see [`load_rows`].

    Returns:
        The datasets that hold rows, and {name: reason} of those left out.

    Raises:
        ConfigError: see [`load_rows`]; `completion_only_loss: true` on data without completions, which TRL would train
            on in full; or no rows at all.
    """
    loaded, skipped = [], {}
    with progress.stage("Reading datasets", total=len(specs)) as stage:
        for number, spec in enumerate(sorted(specs, key=lambda spec: spec.name), 1):
            stage.item(f"{spec.name} ({number} of {len(specs)})")
            dataset = load_rows(spec, root, args.dataset_text_field, takes_images)
            stage.advance()
            if not len(dataset.train):
                skipped[spec.name] = "it has no rows"
                continue
            if args.completion_only_loss and "prompt-completion" not in dataset.format:
                raise ConfigError(
                    f"sft.completion_only_loss=true, but dataset `{spec.name}` is {dataset.format} data without a "
                    "completion: TRL would train on every token of it. Give it `prompt:` and `completion:`, use "
                    "sft.assistant_only_loss for chats, or leave sft.completion_only_loss out."
                )
            loaded.append(dataset)
    if not loaded:
        raise ConfigError("no dataset has any rows. Check `path` and `split` of the datasets.")
    return loaded, skipped


def name_images(config: MeritConfig, loaded: Sequence[LoadedDataset], args: SFTConfig) -> MeritConfig:
    """CONFIG with the columns in which images were found named, so that a plan of it says so; checks them too."""
    found = {dataset.name: dataset.images for dataset in loaded if dataset.images}
    if not found:
        return config
    check_images(loaded, args)
    entries = [spec.model_copy(update={"images": found.get(spec.name, spec.images)}) for spec in config.datasets]
    return config.model_copy(update={"datasets": entries})


def check_images(loaded: Sequence[LoadedDataset], args: SFTConfig) -> None:
    """What TRL's vision collator needs of settings and data, told before anything is tokenised.

    Raises:
        ConfigError: a setting that would cut or pack sequences with images; data that is no chat, or of two forms.
    """
    first = next(dataset for dataset in loaded if dataset.images)
    where = f"dataset `{first.name}` holds images (column `{first.images}`)"
    if args.max_length is not None:
        raise ConfigError(
            f"sft.max_length={args.max_length}, but {where}, and a cut would part an image from its tokens. Set "
            "sft.max_length=null (left out, it is TRL's 1024), and leave examples that are too long out of the data."
        )
    for field, value in {"packing": False, "padding_free": False, "pad_to_multiple_of": None}.items():
        if getattr(args, field) != value:
            raise ConfigError(
                f"sft.{field}={getattr(args, field)}, but {where}, and TRL cannot do that there. Leave it out."
            )
    for dataset in loaded:
        if not dataset.format.startswith("conversational"):
            raise ConfigError(
                f"dataset `{dataset.name}` is plain {dataset.format}, but {where}: TRL ends plain text with no end "
                f"token beside images. Set datasets.{dataset.name}.chat=true, or give messages."
            )
        if dataset.format != first.format:
            raise ConfigError(
                f"dataset `{dataset.name}` is {dataset.format}, but {where} and is {first.format}: TRL collates one "
                "form in a batch. Bring all datasets into one: prompt and completion, or messages."
            )
        extra = sorted({"tools", "chat_template_kwargs"} & set(dataset.train.column_names))
        if extra:
            raise ConfigError(
                f"dataset `{dataset.name}` has the column `{extra[0]}`, but {where}: TRL does not read it there. "
                "Leave it out."
            )


def prepare_dataset(
    loaded: LoadedDataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> PreparedDataset:
    """Tokenise by TRL and count."""
    try:
        train = tokenize_rows(model, tokenizer, args, loaded.train)
        held_out = tokenize_rows(model, tokenizer, args, loaded.eval) if loaded.eval is not None else None
    except ConfigError as error:
        raise ConfigError(f"dataset `{loaded.name}` ({loaded.format}): {error}") from error
    rows, counts, mix = train.rows, count_tokens(train.rows), np.arange(len(train.rows))
    if loaded.weight != 1 and len(rows):
        mix = weighted_rows(counts.input_tokens, loaded.weight, loaded.name)
        rows = train.rows.select(mix)
        counts = count_tokens(rows)
    return PreparedDataset(
        name=loaded.name,
        loaded=loaded,
        train=rows,
        counts=counts,
        num_dropped=train.num_dropped,
        num_truncated=train.num_truncated,
        eval=held_out.rows if held_out is not None and len(held_out.rows) else None,
        distinct=train.rows,
        kept=train.indices,
        mix=mix,
    )


def prepare_group(
    plan: PartitionPlan,
    group: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    progress: Progress,
) -> list[PreparedDataset]:
    """The datasets of a plan's group, in the order of names, each held against the plan.

    Raises:
        ConfigError: a dataset is not on this machine. MeritError: it is not the one that was planned.
    """
    specs, root = plan_specs(plan, plan.group(group).datasets)
    loaded, _ = read_mixture(specs, root, args, progress)
    found = []
    for dataset, planned in zip(loaded, plan.members(group), strict=True):
        prepared = prepare_dataset(dataset, model, tokenizer, args)
        check_against_plan(prepared, planned)
        found.append(prepared)
    return found


def plan_specs(plan: PartitionPlan, names: Sequence[str]) -> tuple[list[DatasetSection], Path]:
    """The dataset entries behind a plan's datasets on this machine, and the folder their paths refer to.

    Raises:
        ConfigError: a dataset is local to the machine that planned, and is not here.
    """
    entries = {entry["name"]: entry for entry in plan.config["datasets"]}
    local = plan.local.get("datasets", {})
    specs = []
    for name in names:
        entry = {**entries[name], **local.get(name, {})}
        pinned = next(dataset for dataset in plan.datasets if dataset.name == name)
        if pinned.revision is not None:
            entry["revision"] = pinned.revision
        if entry.get("path") is None:
            raise ConfigError(
                f"dataset `{name}` was a local file where the plan was made (fingerprint {pinned.fingerprint[:12]}); "
                f"it is not on this machine. Get the file from the plan's author and give it with --data {name}=PATH."
            )
        specs.append(DatasetSection(**entry))
    # Of a plan from the Hub nothing is looked up on this machine but what the user supplied, by absolute path.
    root = plan.folder if plan.repo_id is not None and plan.folder is not None else plan.local.get("root", ".")
    return specs, Path(root)


def check_against_plan(prepared: PreparedDataset, planned: PlannedDataset) -> None:
    """The data must be what was planned: rows first, then the tokens TRL made of them.

    Raises:
        MeritError: with the first difference.
    """
    pairs = (
        ("rows (fingerprint)", planned.fingerprint[:16], prepared.loaded.fingerprint[:16]),
        ("number of examples", planned.num_examples, prepared.counts.num_examples),
        ("input tokens", planned.num_input_tokens, prepared.counts.num_input_tokens),
        ("tokens (digest)", planned.tokens_digest[:16], format_digest(prepared.counts.digest)[:16]),
    )
    for what, expected, found in pairs:
        if expected != found:
            raise MeritError(
                f"dataset `{planned.name}`: {what} differ from the plan: planned {expected}, found {found}. "
                "Restore the data or the tokenizer that was planned with, or plan again."
            )


def prepare_mixture(
    loaded: Sequence[LoadedDataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    progress: Progress,
) -> tuple[list[PreparedDataset], dict[str, str]]:
    """Tokenise every dataset; returns those with a loss token, and {name: reason} of those left out."""
    prepared, dropped = [], {}
    with progress.stage("Tokenising", total=len(loaded)) as stage:
        for number, dataset in enumerate(loaded, 1):
            stage.item(f"{dataset.name} ({number} of {len(loaded)})")
            ready = prepare_dataset(dataset, model, tokenizer, args)
            stage.advance()
            if ready.counts.num_loss_tokens:
                prepared.append(ready)
            else:
                dropped[dataset.name] = f"none of its {len(dataset.train)} examples has a loss token"
    for name, reason in dropped.items():
        progress.note(f"left out `{name}`: {reason}")
    for ready in prepared:
        if ready.num_dropped or ready.num_truncated:
            progress.note(
                f"{ready.name}: {ready.num_truncated} examples cut to sft.max_length={args.max_length}, "
                f"{ready.num_dropped} dropped for want of a loss token"
            )
    return prepared, dropped
