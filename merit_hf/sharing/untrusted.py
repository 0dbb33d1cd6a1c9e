"""What of a plan from the Hub is taken: nothing in it may name a file of this machine, or switch on foreign code.

A plan's author decides what is trained (the identity fields). Where and how it runs here is for who runs it: of the
author's placement only sizes and precisions are kept, so no plan reports to its author's account, pushes to a repo, or
reads a config file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merit_hf.choices import WEIGHTINGS
from merit_hf.config import MeritError
from merit_hf.identity import DERIVED_FIELDS, IDENTITY_FIELDS
from merit_hf.sharing.registry import is_commit, is_repo_id
from merit_hf.text import one_line

# Fields of SFTConfig that are placement and only say how much fits, or how often something is shown or saved.
SAFE_PLACEMENT = (
    "activation_offloading", "bf16", "dataloader_num_workers", "dataset_num_proc", "fp16",
    "gradient_accumulation_steps", "gradient_checkpointing", "logging_steps", "model_init_kwargs",
    "per_device_eval_batch_size", "per_device_train_batch_size", "save_steps", "save_strategy", "tf32",
    "use_liger_kernel",
)  # fmt: skip
# A name that ends so would be read as a file.
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_SAFE_MODEL_KWARGS = ("attn_implementation", "dtype", "torch_dtype")


def vet_plan(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """plan.json of a stranger without what is not theirs to decide.

    Args:
        content: plan.json as read.

    Raises:
        MeritError: base or a dataset is neither absent nor a repo pinned to a commit, or what the plan calls its
            identity is none of it, or what it freezes is no list of names.
    """
    config, base = content["config"], content["base"]
    _check_repo(base.get("repo_id"), base.get("revision"), f"{where}: base")
    # Which fields are identity is decided here: else a plan could declare that reporting or pushing is.
    strange = sorted(content["sft"].keys() - {*IDENTITY_FIELDS, *DERIVED_FIELDS})
    if strange:
        raise MeritError(
            f"{where}: plan.json counts sft.{one_line(strange[0], 60)} as its identity, which this release does not. "
            "Use the merit_hf release that wrote the plan, or plan again."
        )
    freeze = base.get("freeze", [])
    if not isinstance(freeze, list) or not all(isinstance(prefix, str) for prefix in freeze):
        raise MeritError(
            f"{where}: plan.json's base.freeze is {one_line(repr(freeze), 80)}, expected a list of names. Plan again."
        )
    entries = []
    for entry in config["datasets"]:
        name = one_line(entry["name"], 60)
        for key in ("path", "eval_path"):
            if entry.get(key) is not None and (
                not is_repo_id(entry[key]) or entry[key].lower().endswith(_FILE_SUFFIXES)
            ):
                raise MeritError(
                    f"{where}: dataset `{name}` has the {key} {one_line(repr(entry[key]), 80)}, which is no Hub id. A "
                    "plan from elsewhere may not name files of this machine."
                )
        entries.append(dict(entry))
    sft = {key: value for key, value in config["sft"].items() if key in (*IDENTITY_FIELDS, *SAFE_PLACEMENT)}
    if isinstance(sft.get("model_init_kwargs"), dict):
        sft["model_init_kwargs"] = {
            key: value
            for key, value in sft["model_init_kwargs"].items()
            if key in _SAFE_MODEL_KWARGS and isinstance(value, str)
        }
    else:
        sft.pop("model_init_kwargs", None)
    # Files of this machine are named by its user, never by a plan from elsewhere.
    section = {**config["plan"], "affinity": None, "optimizer_state": None}
    encoder = section.get("embedding_model")
    # A local encoder is published as "file".
    if encoder is not None and (encoder == "file" or not (isinstance(encoder, str) and is_repo_id(encoder))):
        section["embedding_model"] = None
    merge = config["merge"]
    if merge.get("weights") not in WEIGHTINGS:
        merge = {**merge, "weights": "tokens"}
    # What is shown, and when to stop, is for who trains.
    vetted = {**config, "train": {}, "plan": section, "datasets": entries, "sft": sft, "merge": merge}
    # How far to trust a plan is not for its author to say.
    return {**content, "config": vetted, "trust": {}}


def check_pinned(repo_id: str | None, revision: str | None, name: str, where: str) -> None:
    """Raises MeritError where a planned dataset is on the Hub but not at a commit."""
    _check_repo(repo_id, revision, f"{where}: dataset `{one_line(name, 60)}`")


def _check_repo(repo_id: object, revision: object, what: str) -> None:
    if repo_id is None and revision is None:
        return
    if not is_repo_id(repo_id) or not is_commit(revision):
        raise MeritError(
            f"{what} is {one_line(repr(repo_id), 80)} at {one_line(repr(revision), 60)}, expected a repo at a "
            "commit sha. Plan again with merit_hf, and push that."
        )
