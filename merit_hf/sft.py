"""The one room that speaks to TRL: its arguments, its data preparation, its loss.

Planner, trainer and evaluation all build their `SFTTrainer` here, so that the gradient that is planned with is the
gradient of the loss that is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import integration_utils
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from merit_hf import vision
from merit_hf.adapters import add_adapter, is_adapter, load_adapter
from merit_hf.checkpoint import INDEX_NAME, SINGLE_NAME, read_tensor_index, repo_of_snapshot
from merit_hf.config import ConfigError, MeritError
from merit_hf.identity import BATCH_FIELDS as BATCH_FIELDS
from merit_hf.identity import IDENTITY_FIELDS as IDENTITY_FIELDS
from merit_hf.images import IMAGES
from merit_hf.placement import refuse_fields

_FLOATS = tuple(
    f.name for f in dataclasses.fields(SFTConfig) if f.name in IDENTITY_FIELDS and f.type in (float, "float")
)
_UNPACKED = {"packing": False, "padding_free": False, "shuffle_dataset": False}
_QUANTIZATION = "sft.model_init_kwargs.quantization_config"


def build_args(sft: Mapping[str, Any], output_dir: str | Path | None = None, **overrides: Any) -> SFTConfig:
    """TRL's arguments from the `sft:` block. Without `output_dir`, for what saves nothing.

    Where the block is silent: no reporting integration, and on a machine without an accelerator plain float32.

    Raises:
        ConfigError: a field that MERIT sets itself, or a combination that SFTConfig refuses.
    """
    refuse_fields(sft)
    values: dict[str, Any] = {"report_to": "none", **sft, **overrides}
    # A Trainer makes its output folder even if it never saves.
    values["output_dir"] = str(output_dir or Path(tempfile.gettempdir(), "merit-unused"))
    if not torch.accelerator.is_available():
        values["use_cpu"] = True
        values.setdefault("bf16", False)
        values.setdefault("dataloader_pin_memory", False)
    # transformers falls back on torch's global seed for the order of the examples; the plan pins it.
    values.setdefault("data_seed", values.get("seed", SFTConfig.seed))
    try:
        args = SFTConfig(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"sft: {_one_line(error)}") from error
    if args.padding_free and not args.packing and args.max_length is not None:
        # TRL refuses this too, but only when the training starts.
        raise ConfigError(
            f"sft.padding_free=true without sft.packing does not enforce sft.max_length={args.max_length}. Set "
            "sft.packing=true, or sft.max_length=null."
        )
    return args


def check_reporting(args: TrainingArguments) -> None:
    """Raises ConfigError where `report_to` names what transformers does not know, or what is not installed."""
    available = integration_utils.get_available_reporting_integrations()
    for name in cast(list[str], args.report_to):
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"sft.report_to={name}: transformers knows {known}.")
        if name not in available:
            raise ConfigError(f"sft.report_to={name}: it is not installed here. Install {name}, or leave it out.")


def identity_fields(args: TrainingArguments, num_processes: int = 1) -> dict[str, Any]:
    """The fields of `args` that decide the trained weights, as plain JSON values; all of them of an SFTConfig."""
    fields = {name: _plain(getattr(args, name)) for name in IDENTITY_FIELDS if hasattr(args, name)}
    # `1` and `1.0` are the same setting and must be the same JSON.
    fields |= {name: float(fields[name]) for name in _FLOATS}
    # Without a data seed of its own, the order of the examples comes from the seed.
    fields["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    per_device, accumulation = (getattr(args, name) for name in BATCH_FIELDS)
    fields["effective_batch_size"] = per_device * accumulation * num_processes
    if args.dataloader_drop_last:
        # The rows that an epoch drops are those that do not fill one batch of all devices.
        fields["device_batch_size"] = per_device * num_processes
    return fields


@contextlib.contextmanager
def group_steps(args: SFTConfig, max_steps: int) -> Iterator[None]:
    """`args` with a group's share of `max_steps`."""
    with _replaced(args, max_steps=max_steps):
        yield


def take_chat_template(sft: Mapping[str, Any], root: Path) -> tuple[dict[str, Any], str | None]:
    """`sft` without `chat_template_path`, and the text of the template it names (relative to CONFIG)."""
    rest = dict(sft)
    path = rest.pop("chat_template_path", None)
    if path is None:
        return rest, None
    file = root / path
    if not file.is_file():
        raise ConfigError(f"sft.chat_template_path={path!r}: no such file (looked for {file}). Give a .jinja file.")
    return rest, file.read_text(encoding="utf-8")


def load_tokenizer(
    folder: str | Path, chat_template: str | None = None, images: bool = False
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with `chat_template` in place of its own where one is given.

    Where the mixture holds `images`, its processor, which TRL takes in the tokenizer's place.
    """
    try:
        tokenizer = (
            vision.load_processor(folder)
            if images
            else AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise MeritError(f"{folder}: no tokenizer can be loaded from the base: {_one_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    folder: str | Path,
    args: SFTConfig | None = None,
    peft: Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
) -> PreTrainedModel:
    """The base as a causal language model, or one that also reads images where it is one; its weights in float32
    unless `sft.model_init_kwargs` says otherwise.

    With `peft`, a `PeftModel` of it with a fresh adapter drawn from `sft.seed`; only the adapter trains then. The
    modules at the prefixes in `freeze` do not train.

    Raises:
        ConfigError: `peft` or `freeze` does not fit the model.
        MeritError: it cannot be loaded, or not quantised as asked on this machine.
    """
    kwargs = _init_kwargs(args)
    kwargs.setdefault("dtype", torch.float32)
    # Left open, transformers would ask on the terminal.
    kwargs["trust_remote_code"] = _trusts(Path(folder), kwargs.get("trust_remote_code"))
    load = _load_quantized if kwargs.get("quantization_config") is not None else _load
    model = load(folder, kwargs)
    if freeze:
        vision.freeze_modules(model, freeze)
    return model if peft is None else add_adapter(model, peft, SFTConfig.seed if args is None else args.seed)


def load_checkpoint(folder: str | Path, base: str | Path, args: SFTConfig) -> PreTrainedModel:
    """The model in `folder`; where that holds an adapter, the base with it.

    Not quantised, whatever `args` say: adapters are compared on what they are merged into.
    """
    kwargs = {key: value for key, value in _init_kwargs(args).items() if key != "quantization_config"}
    with _replaced(args, model_init_kwargs=kwargs):
        return load_adapter(load_model(base, args), folder) if is_adapter(folder) else load_model(folder, args)


def restore_renamed(model: PreTrainedModel, checkpoint: Path, args: SFTConfig) -> None:
    """Bring `model` to the weights in a Trainer's checkpoint, where the Trainer would not.

    It matches tensors by their names in the model and passes over all others without an error: of an architecture that
    transformers renames while loading, a resumed training would go on from the base.
    """
    whole = (checkpoint / SINGLE_NAME).is_file() or (checkpoint / INDEX_NAME).is_file()
    # Code from elsewhere is not renamed.
    if not whole or is_adapter(checkpoint) or _init_kwargs(args).get("trust_remote_code"):
        return
    if not read_tensor_index(checkpoint).keys() <= model.state_dict().keys():
        model.load_state_dict(load_model(checkpoint, args).state_dict())


def check_trainable(args: SFTConfig, peft: Mapping[str, Any] | None) -> None:
    """Raises ConfigError where a quantised base is to be trained itself."""
    if peft is None and _init_kwargs(args).get("quantization_config") is not None:
        raise ConfigError(f"{_QUANTIZATION}: quantised weights cannot be trained. Add `peft:` to train an adapter.")


def _trusts(folder: Path, named: object) -> bool:
    """`trust_remote_code` names the repo or folder whose code may run: a bare `true` would hold for anybody's."""
    if named in (None, False):
        return False
    found = repo_of_snapshot(folder.resolve())
    place = found[0] if found else str(folder)
    if named == place or (found is None and isinstance(named, str) and Path(named).resolve() == folder.resolve()):
        return True
    raise ConfigError(
        f"sft.model_init_kwargs.trust_remote_code={named!r}: name whose code may run, after you have read it: "
        f"trust_remote_code: {place}."
    )


def _init_kwargs(args: SFTConfig | None) -> dict[str, Any]:
    return dict(getattr(args, "model_init_kwargs", None) or {})


def _load(folder: str | Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        return vision.auto_class(folder).from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise MeritError(f"{folder}: the model cannot be loaded: {_one_line(error)}") from error


def _load_quantized(folder: str | Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Quantised as asked or not at all: never a silent step back to full weights."""
    cure = "Install what it needs (`pip install 'merit_hf[qlora]'`), run where it can, or leave it out."
    try:
        model = vision.auto_class(folder).from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        raise MeritError(f"{_QUANTIZATION}: {folder} cannot be quantised here: {_one_line(error)} {cure}") from error
    if getattr(model, "hf_quantizer", None) is None:
        raise MeritError(f"{_QUANTIZATION}: {folder} was loaded without being quantised. {cure}")
    return model


@contextlib.contextmanager
def open_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    train_dataset: datasets.Dataset,
    **kwargs: Any,
) -> Iterator[SFTTrainer]:
    """An `SFTTrainer` whose patch of `model.forward` is taken off at the end.

    Each SFTTrainer wraps the forward of the one before it, so that hundreds of them on one model would recurse.
    """
    # Tokenised rows carry their labels; TRL would look for the chat they came from. Rows with images still have it.
    tokenised = "input_ids" in train_dataset.column_names and IMAGES not in train_dataset.column_names
    replaced: dict[str, Any] = {"assistant_only_loss": False} if tokenised else {}
    if not kwargs.get("eval_dataset"):
        # Only a group's training evaluates.
        replaced |= {"eval_strategy": IntervalStrategy.NO, "eval_on_start": False}
    if "callbacks" not in kwargs:
        # Nothing to report of a Trainer that does not train.
        replaced["report_to"] = []
    try:
        with _replaced(args, **replaced):
            trainer = SFTTrainer(model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(f"TRL refuses the data: {_one_line(error)}") from error
    try:
        yield trainer
    finally:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        plain.__dict__.pop("forward", None)
        if plain is not model:
            # TRL's hook for an adapter under gradient checkpointing would be added once more each time.
            plain.disable_input_require_grads()


@contextlib.contextmanager
def open_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, rows: datasets.Dataset
) -> Iterator[SFTTrainer]:
    """A trainer that only computes losses: tokenised `rows` as they are, one sequence a row, model in eval mode."""
    was_training = model.training
    with _replaced(args, **_UNPACKED, max_length=None), open_trainer(model, tokenizer, args, rows) as trainer:
        model.eval()
        try:
            yield trainer
        finally:
            model.train(was_training)


@dataclass(frozen=True)
class TokenizedRows:
    """The examples SFT trains on, in order.

    Attributes:
        rows: columns `input_ids` and `labels` (-100 where a token bears no loss); beside them, in a mixture with
            images, those that TRL's vision collator reads.
        num_dropped: examples that TRL left out because truncation left no loss token.
        num_truncated: kept examples that lost tokens to `max_length`.
        indices: where in the rows that were given each kept one stood.
    """

    rows: datasets.Dataset
    num_dropped: int
    num_truncated: int
    indices: list[int]


def tokenize_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, rows: datasets.Dataset
) -> TokenizedRows:
    """Let TRL prepare `rows`: template, tokens, labels, truncation, dropped examples. Not packed: see `training_rows`.

    `model` is only what SFTTrainer's constructor asks for; its weights are not used.
    """
    if vision.is_processor(tokenizer):
        ready = vision.vision_rows(rows, tokenizer)
        # SFTTrainer's constructor reads it too, and says nothing of where it stands.
        vision.read_row(ready, 0)
        with open_trainer(model, tokenizer, args, ready) as trainer:
            ready = vision.collated_tokens(trainer.data_collator, ready)
        return TokenizedRows(ready, 0, 0, list(range(len(ready))))
    whole = _prepared(model, tokenizer, args, rows, max_length=None)
    # Strategies that split long sequences over rows keep every token, so there is nothing to truncate.
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return TokenizedRows(whole.select_columns(["input_ids", "labels"]), 0, 0, list(range(len(whole))))
    whole = whole.add_column("num_tokens", [len(ids) for ids in whole["input_ids"]])
    whole = whole.add_column("row", list(range(len(whole))))
    kept = _prepared(model, tokenizer, args, whole, max_length=args.max_length)
    num_truncated = sum(length > args.max_length for length in kept["num_tokens"])
    columns = kept.select_columns(["input_ids", "labels"])
    return TokenizedRows(columns, len(whole) - len(kept), num_truncated, list(kept["row"]))


def training_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, rows: datasets.Dataset
) -> datasets.Dataset:
    """`rows` (tokenised) as the training loop will hold them: packed and shuffled where `args` say so."""
    if not (args.packing or args.shuffle_dataset):
        return rows
    with open_trainer(model, tokenizer, args, rows) as trainer:
        return trainer.train_dataset


def collate(trainer: SFTTrainer, rows: datasets.Dataset, indices: list[int]) -> dict[str, torch.Tensor]:
    """The rows at `indices` as the batch that TRL's collator makes of them, on the model's device."""
    # Every read makes new objects, so what TRL's vision collator changes in them is not kept anywhere.
    batch = trainer.data_collator([rows[index] for index in indices])
    return {key: send_to_device(value, trainer.args.device) for key, value in batch.items()}


def _prepared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    rows: datasets.Dataset,
    max_length: int | None,
) -> datasets.Dataset:
    with _replaced(args, **_UNPACKED, max_length=max_length), open_trainer(model, tokenizer, args, rows) as trainer:
        return trainer.train_dataset


@contextlib.contextmanager
def _replaced(args: SFTConfig, **values: Any) -> Iterator[None]:
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template's text; of the empty string where there is none."""
    return hashlib.sha256((tokenizer.chat_template or "").encode("utf-8")).hexdigest()
