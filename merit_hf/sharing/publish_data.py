"""`merit push PLAN --with-data`: the plan's local datasets as dataset repos, exactly the rows that were planned."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import datasets
import yaml

from merit_hf.config import MeritError
from merit_hf.data import LoadedDataset, fingerprint, load_rows
from merit_hf.hub_write import folder_files, push_files
from merit_hf.images import IMAGES, embedded
from merit_hf.mixture import plan_specs
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.tables import PlannedDataset
from merit_hf.text import escape_markdown

TRAIN_NAME, HELD_OUT_NAME = "train", "heldout"


def publish_data(
    plan: PartitionPlan, repo_id: str, private: bool | None = None, progress: Progress | None = None
) -> PartitionPlan:
    """Upload every local dataset of the plan and return the plan with their repos, pinned; its identity stays.

    A dataset becomes `REPO_ID-NAME`: the rows and columns that TRL is given, split into what is trained on and what is
    held out, so that it needs no column mapping.

    Raises:
        ConfigError: a file is not on this machine. MeritError: its rows are not the planned ones, or an upload failed.
    """
    progress = progress or Progress()
    missing = [dataset for dataset in plan.datasets if dataset.repo_id is None]
    specs, root = plan_specs(plan, [dataset.name for dataset in missing])
    placed: dict[str, PlannedDataset] = {}
    entries = {entry["name"]: dict(entry) for entry in plan.config["datasets"]}
    with progress.stage("Uploading data", total=len(missing)) as stage:
        for dataset, spec in zip(missing, specs, strict=True):
            stage.item(f"{dataset.name} ({len(placed) + 1} of {len(missing)})")
            loaded = load_rows(spec, root, plan.config["sft"].get("dataset_text_field", "text"))
            name = f"{repo_id}-{_slug(dataset)}"[:96]
            revision = _upload(plan, loaded, dataset, name, private)
            placed[dataset.name] = dataclasses.replace(
                dataset, repo_id=name, revision=revision, config=None, split=TRAIN_NAME
            )
            entries[dataset.name] |= {
                "path": name, "revision": revision, "config": None, "split": TRAIN_NAME, "chat": False,
                "eval_path": None, "eval_split": None if loaded.eval is None else HELD_OUT_NAME, "eval_fraction": 0.0,
                "part": None, "where": None, "prompt": None, "completion": None, "messages": None, "text": None,
                "images": IMAGES if loaded.images else None, "streaming": False, "num_examples": None,
                "shuffle_buffer": None,
            }  # fmt: skip
            stage.advance()
    return plan.with_data(
        [placed.get(dataset.name, dataset) for dataset in plan.datasets],
        [entries[entry["name"]] for entry in plan.config["datasets"]],
    )


def _upload(
    plan: PartitionPlan, loaded: LoadedDataset, planned: PlannedDataset, name: str, private: bool | None
) -> str:
    if loaded.fingerprint != planned.fingerprint:
        raise MeritError(
            f"dataset `{planned.name}`: its rows have changed since they were planned (fingerprint "
            f"{loaded.fingerprint[:12]}, planned {planned.fingerprint[:12]}). Restore the file, or plan again."
        )
    splits = {TRAIN_NAME: loaded.train, **({HELD_OUT_NAME: loaded.eval} if loaded.eval is not None else {})}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "data").mkdir()
        for split, rows in splits.items():
            embedded(rows).to_parquet(folder / "data" / f"{split}.parquet")
        again = datasets.Dataset.from_parquet(str(folder / "data" / f"{TRAIN_NAME}.parquet"), cache_dir=scratch)
        if fingerprint(again) != planned.fingerprint:
            raise MeritError(
                f"dataset `{planned.name}`: its rows do not survive being written as parquet, so others could not "
                "train on the same ones. Convert the file to parquet, and plan from that."
            )
        files = [{"split": split, "path": f"data/{split}.parquet"} for split in splits]
        metadata = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["merit"]}
        card = (
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {escape_markdown(planned.name)}\n\nThe rows of "
            f"this dataset that the MERIT plan `{plan.sha256[:12]}` trains on (`{TRAIN_NAME}`)"
            + (f", and those it holds out (`{HELD_OUT_NAME}`)" if loaded.eval is not None else "")
            + f". Fingerprint: `{planned.fingerprint}`.\n"
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        paths = {"README.md", *(item["path"] for item in files)}
        chosen = {path: file for path, file in folder_files(folder).items() if path in paths}
        return push_files(chosen, name, "dataset", private, f"Upload {planned.fingerprint[:12]}").revision


def _slug(dataset: PlannedDataset) -> str:
    """Its name as a repo's, with a piece of the fingerprint, since two names may differ in signs alone."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", dataset.name).strip("-").lower()[:40]
    return f"{plain or 'data'}-{dataset.fingerprint[:6]}"
