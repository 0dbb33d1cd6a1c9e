"""Streamed datasets: a seeded sample, of which no more is read than is needed, and which is exact from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import as_chat, make_mixture, task_rows, write_jsonl
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import ConfigError, DatasetSection, MeritConfig
from merit_hf.data import LoadedDataset, load_rows
from merit_hf.estimate import estimate_lines, estimate_plan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.streams import RowCount, count_rows, shuffled
from merit_hf.training import train_group
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
# More than twice of what is read at a time of a file of lines (10 MB).
NUM_LONG = 25_000


def files_of(sizes: list[int], read: list[str] | None = None) -> datasets.IterableDataset:
    """A stream of one file a size, whose rows say where they come from; `read` is told each row that is read."""

    def rows(numbers: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
        for number, size in numbers:
            for place in range(size):
                if read is not None:
                    read.append(f"{number}-{place}")
                yield {"row": f"{number}-{place}"}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(enumerate(sizes))})


def order(sizes: list[int], seed: int, buffer_size: int) -> list[str]:
    return [row["row"] for row in shuffled(files_of(sizes), seed, buffer_size)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 99), st.integers(1, 30))
def test_every_row_comes_once_in_an_order_of_the_seed(sizes: list[int], seed: int, buffer_size: int) -> None:
    found = order(sizes, seed, buffer_size)
    assert sorted(found) == sorted(f"{n}-{i}" for n, size in enumerate(sizes) for i in range(size))
    assert found == order(sizes, seed, buffer_size)


def test_the_order_is_the_same_in_every_release() -> None:
    assert order([3, 0, 2], 7, 2) == ["2-0", "0-1", "2-1", "0-2", "0-0"]
    assert order([3, 0, 2], 8, 2) == ["2-0", "0-0", "2-1", "0-1", "0-2"]


def test_no_more_is_read_than_the_buffer_holds() -> None:
    read: list[str] = []
    taken = list(islice(shuffled(files_of([1000] * 40, read), 0, 50), 20))
    assert len(taken) == 20
    assert len(read) == 70
    assert len({row.partition("-")[0] for row in read}) == 8, "files are read side by side, and not all"


def spec(file: str, **values: Any) -> DatasetSection:
    return DatasetSection(**{"name": "web", "path": file, "streaming": True, "num_examples": 200, **values})


def write_long(folder: Path, suffix: str, count: int) -> Path:
    path = folder / f"rows{suffix}"
    noise = np.random.default_rng(0).bytes(500 * count).hex()
    rows = [{"prompt": f"{n}", "completion": noise[1000 * n : 1000 * (n + 1)]} for n in range(count)]
    if suffix == ".jsonl":
        return write_jsonl(path, rows)
    made = datasets.Dataset.from_list(rows)
    if suffix == ".parquet":
        made.to_parquet(path, batch_size=1000)
    else:
        made.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_large_file_is_read_from_its_beginning(suffix: str, tmp_path: Path) -> None:
    """The same file whose later rows cannot be read gives the same sample, and fails where all of it is read."""
    path = write_long(tmp_path, suffix, NUM_LONG)
    whole = load_rows(spec(path.name, shuffle_buffer=500), tmp_path)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        if suffix == ".parquet":
            # Pages in the middle; the index of the file is at its end.
            file.seek(size // 2)
            file.write(b"\0" * (size // 4))
        else:
            file.seek(int(size * 0.9))
            file.write(b'"\n{"' + b'\xff"' * 999)
    again = load_rows(spec(path.name, shuffle_buffer=500), tmp_path)
    assert again.fingerprint == whole.fingerprint
    assert len(again.train) == 190
    assert again.eval is not None
    assert not set(again.train["prompt"]) & set(again.eval["prompt"])
    drawn = sorted(map(int, [*again.train["prompt"], *again.eval["prompt"]]))
    assert len(set(drawn)) == 200
    assert drawn[-1] < 700
    assert drawn != list(range(200)), "not the first rows, but of them"
    with pytest.raises(ConfigError, match="not readable"):
        load_rows(spec(path.name, streaming=False, num_examples=None), tmp_path)


def test_rows_are_those_of_the_whole_file_in_another_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}", "completion": None if number < 50 else "a"} for number in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"held {number}", "completion": "b"} for number in range(30)])
    (tmp_path / "none.jsonl").write_text("")

    def load(file: str, **values: Any) -> LoadedDataset:
        return load_rows(spec(file, **values), tmp_path)

    plain = load("rows.jsonl", streaming=False, num_examples=None, eval_fraction=0.0)
    drawn = load("rows.jsonl", eval_fraction=0.0)
    assert sorted(map(str, drawn.train)) == sorted(map(str, plain.train))
    assert drawn.train.features == plain.train.features
    assert load("list.json", eval_fraction=0.0).fingerprint == drawn.fingerprint
    assert load("rows.jsonl", eval_fraction=0.0, name="other").fingerprint != drawn.fingerprint
    held = load("rows.jsonl", eval_path="held.jsonl", num_examples=20)
    assert len(held.train) == 20
    assert held.eval is not None
    assert len(held.eval) == 20
    assert all(prompt.startswith("held") for prompt in held.eval["prompt"])
    assert len(load("none.jsonl").train) == 0
    # What is kept is of the file as it is.
    write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    os.utime(tmp_path / "rows.jsonl", ns=(0, 0))
    assert load("rows.jsonl", eval_fraction=0.0).fingerprint != drawn.fingerprint


def test_the_rows_of_one_task_are_drawn_of_a_stream(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number}", "completion": "a", "task": "odd" if number % 2 else "even"} for number in range(90)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def load(**values: Any) -> LoadedDataset:
        return load_rows(spec("rows.jsonl", eval_fraction=0.0, shuffle_buffer=8, **values), tmp_path)

    drawn = [int(prompt) for prompt in load(where={"task": "odd"}, num_examples=30).train["prompt"]]
    assert len(set(drawn)) == 30, "as many as were asked for, not as many as are left of them"
    assert all(number % 2 for number in drawn)
    assert load(where={"task": "even"}, num_examples=30).fingerprint != load(num_examples=30).fingerprint
    with pytest.raises(ConfigError, match=r"where\.kind: no such column\. Found: prompt, completion, task"):
        load(where={"kind": "odd"}, num_examples=30)


def test_images_come_as_they_are(tmp_path: Path) -> None:
    contents = []
    for shade in range(12):
        Image.new("RGB", (4, 4), (shade * 20, 0, 0)).save(buffer := BytesIO(), "PNG")
        contents.append(buffer.getvalue())
    rows = [{"prompt": f"{n}", "completion": "c", "image": content} for n, content in enumerate(contents)]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "rows.parquet")
    loaded = load_rows(spec("rows.parquet", num_examples=8, eval_fraction=0.25), tmp_path, takes_images=lambda: True)
    assert loaded.images == "image"
    assert loaded.eval is not None
    for split in (loaded.train, loaded.eval):
        for row in split:
            (image,) = row["images"]
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(contents[int(row["prompt"])]))))


def test_a_plan_of_a_stream_is_exact_and_trains(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, ("copy", "count"), count=40, num_samples=4, sketch_dim=256)
    content = yaml.safe_load(config.read_text())
    for entry in content["datasets"]:
        entry |= {"streaming": True, "num_examples": 12, "shuffle_buffer": 5}
        del entry["eval_path"]
    config.write_text(yaml.safe_dump(content))
    plan = MeritPlanner(MeritConfig.from_yaml(config), QUIET).plan(tmp_path / "plan")
    assert [dataset.num_examples for dataset in plan.datasets] == [11, 11]
    again = MeritPlanner(MeritConfig.from_yaml(config, ["plan.seed=3"]), QUIET).plan(tmp_path / "again")
    assert [d.fingerprint for d in again.datasets] == [d.fingerprint for d in plan.datasets], "a seed draws no rows"
    group = train_group(plan, 0, tmp_path / "group", progress=QUIET)
    assert all(check.ok for check in verify_checkpoint(plan, group, level="weights"))


def test_without_a_number_there_is_an_estimate_and_no_plan(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, ("copy", "count"), count=40)
    write_jsonl(tmp_path / "data/copy.jsonl", [as_chat(row) for row in task_rows("copy", 3000)])
    streamed = ["datasets.copy.streaming=true", "datasets.copy.shuffle_buffer=300"]
    refused = CliRunner().invoke(app, ["plan", str(config), "--output", str(tmp_path / "plan"), *streamed])
    assert refused.exit_code == 2
    assert "datasets.copy.streaming=true without num_examples" in refused.output
    whole, estimate = (estimate_plan(MeritConfig.from_yaml(config, over), QUIET) for over in ([], streamed))
    assert estimate.num_examples == whole.num_examples == 3040
    assert whole.token_error > 0
    assert abs(estimate.num_input_tokens - whole.num_input_tokens) < 6 * estimate.token_error
    assert any("Streamed: `copy`, 3,000 rows by its files" in line for line in estimate_lines(estimate, 1.0))


def test_how_many_rows_there_are(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        found = count_rows([str(write_long(tmp_path, suffix, 5000))])
        assert found is not None
        assert found.exact == (suffix == ".parquet")
        assert found.number == pytest.approx(5000, rel=0.02)
    (tmp_path / "list.json").write_text("[1, 2]")
    assert count_rows([str(tmp_path / "list.json")]) is None
    assert count_rows([]) is None
    many = []
    for number in range(20):
        many.append(str(write_jsonl(tmp_path / f"{number}.jsonl", [{"text": f"{row:04d}"} for row in range(100)])))
    assert count_rows(many) == RowCount(2000, False, "11,900 of 34,000 bytes")
    assert count_rows(many, stated=7) == RowCount(7, True, "its card")


READ = """
import sys, json
from pathlib import Path
from merit_hf.config import DatasetSection
from merit_hf.data import load_rows
from merit_hf.reading import approximate_rows
out = []
for values in json.loads(sys.argv[1]):
    spec = DatasetSection(name="set", path="org/many", streaming=True, num_examples=30, shuffle_buffer=50, **values)
    try:
        loaded, count = load_rows(spec, Path()), approximate_rows(spec, Path())
        out.append([loaded.train["text"][:], loaded.eval["text"][:], loaded.revision, count.number])
    except Exception as error:
        out.append([type(error).__name__, str(error)])
print()
print(json.dumps(out))
"""


@pytest.mark.slow
def test_of_a_repo_few_files_are_read_and_its_commit_is_pinned(tmp_path: Path) -> None:
    for number in range(30):
        rows = [{"text": f"{number} {place}"} for place in range(20)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"many/data/train-{number:05d}.parquet")
    held = datasets.Dataset.from_list([{"text": f"held {number}"} for number in range(40)])
    held.to_parquet(tmp_path / "many/held.parquet")
    files = [{"split": "train", "path": "data/*.parquet"}]
    other = [{"split": "test", "path": "held.parquet"}]
    configs = [{"config_name": "default", "data_files": files}, {"config_name": "other", "data_files": other}]
    (tmp_path / "many/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    with HubServer() as hub:
        api = hub.api("alice")
        api.create_repo("org/many", repo_type="dataset")
        api.upload_folder(folder_path=tmp_path / "many", repo_id="org/many", repo_type="dataset")
        first = api.repo_info("org/many", repo_type="dataset").sha
        hub.exchanges.clear()

        def read(*cases: dict[str, Any]) -> list[Any]:
            done = hub.run(READ, json.dumps(cases))
            assert done.returncode == 0, done.stderr
            return list(json.loads(done.stdout.splitlines()[-1]))

        ((train, held_out, revision, count),) = read({})
        asked = {
            exchange.path for exchange in hub.exchanges if exchange.method == "GET" and "/resolve/" in exchange.path
        }
        assert 8 <= sum(".parquet" in path for path in asked) <= 18, "read: 8; looked at for their number of rows: 8"
        assert len({*train, *held_out}) == 30
        assert (revision, count) == (first, 600)
        api.delete_file("data/train-00000.parquet", "org/many", repo_type="dataset")
        again, pinned, sliced, absent, test = read(
            {}, {"revision": first}, {"split": "train[:9]"}, {"split": "dev"}, {"config": "other", "split": "test"}
        )
        assert again[0] != train
        assert again[3] == 580
        assert pinned == [train, held_out, first, 600]
        assert sliced[0] == absent[0] == "ConfigError"
        assert "split" in sliced[1]
        assert "dev" in absent[1]
        assert test[3] == 40, test
        assert all(text.startswith("held") for text in test[0])
