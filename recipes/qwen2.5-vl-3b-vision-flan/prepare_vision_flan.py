"""Vision-FLAN's annotations and pictures → one file a task, as mixture.yaml names them.

    python recipes/qwen2.5-vl-3b-vision-flan/prepare_vision_flan.py            # downloads 36 GB, unpacks, writes data/

The collection is one list of conversations in LLaVA's form for all tasks, and one archive of pictures. Here every row
becomes a question, an answer and the path of its picture.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

HERE = Path(__file__).resolve().parent
REPO = "Vision-Flan/vision-flan_191-task_1k"
ANNOTATIONS, ARCHIVE, UNPACKED = "annotation_191-task_1k.json", "image_191-task_1k.zip", "images_191task_1k"


def chat_row(item: dict[str, Any], image: str) -> dict[str, Any] | None:
    """A conversation of one question and one answer as TRL reads it; None for any other."""
    turns = [(turn["from"], turn["value"].replace("<image>", "").strip()) for turn in item["conversations"]]
    if [speaker for speaker, _ in turns] != ["human", "gpt"] or not all(text for _, text in turns):
        return None
    return {
        "prompt": [{"role": "user", "content": turns[0][1]}],
        "completion": [{"role": "assistant", "content": turns[1][1]}],
        "images": [image],
    }


def write_tasks(items: Iterable[dict[str, Any]], tasks: Sequence[str], images: Path, folder: Path) -> dict[str, int]:
    """`folder`/TASK.jsonl of each task, with paths relative to it.

    Returns:
        {task: number of rows}. Left out are rows whose picture is missing, and those that are no question with an
            answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = os.path.relpath(images, folder)
    rows: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item["task_name"] in tasks and (images / item["image"]).is_file():
            row = chat_row(item, f"{place}/{item['image']}")
            if row is not None:
                rows[item["task_name"]].append(json.dumps(row, ensure_ascii=False) + "\n")
    for task, lines in rows.items():
        part = folder / f"{task}.jsonl.part"
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, folder / f"{task}.jsonl")
    return {task: len(rows[task]) for task in tasks}


def advice(counts: dict[str, int], known: Iterable[str]) -> Iterator[str]:
    """A line for every task without rows."""
    names = sorted(known)
    for task in sorted(task for task, count in counts.items() if not count):
        near = difflib.get_close_matches(task, names, n=1)
        hint = f"; the collection has `{near[0]}`" if near and near[0] != task else ""
        yield f"`{task}` has no rows{hint}. Correct its line in mixture.yaml, or delete it."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE / "data", help="where to write (default: %(default)s)")
    parser.add_argument("--annotations", type=Path, help=f"{ANNOTATIONS}, if it is here already")
    parser.add_argument("--images", type=Path, help=f"the unpacked {UNPACKED}, if it is here already")
    options = parser.parse_args(argv)
    for given in filter(None, (options.annotations, options.images)):
        if not given.exists():
            parser.error(f"{given}: there is no such file or folder")
    annotations = options.annotations or Path(hf_hub_download(REPO, ANNOTATIONS, repo_type="dataset"))
    images = options.images or options.output / UNPACKED
    if options.images is None and not images.is_dir():
        options.output.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(hf_hub_download(REPO, ARCHIVE, repo_type="dataset")) as archive:
            archive.extractall(options.output / "unpacking")
        os.rename(options.output / "unpacking" / UNPACKED, images)
    items = json.loads(annotations.read_text(encoding="utf-8"))
    tasks = [entry["name"] for entry in yaml.safe_load((HERE / "mixture.yaml").read_text())["datasets"]]
    counts = write_tasks(items, tasks, images, options.output)
    print(f"{sum(counts.values()):,} rows of {sum(map(bool, counts.values()))} tasks are in {options.output}.")
    problems = list(advice(counts, {item["task_name"] for item in items}))
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"Next: merit plan {HERE / 'mixture.yaml'} --dry-run")


if __name__ == "__main__":
    main()
