"""One data path: what is planned and trained on is what TRL's SFTTrainer makes of the same raw rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import as_chat, task_rows, write_jsonl
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, DatasetSection, MeritConfig
from merit_hf.data import (
    LoadedDataset,
    add_digests,
    count_tokens,
    fingerprint,
    format_digest,
    hold_out,
    load_rows,
    seed_of,
)
from merit_hf.mixture import PreparedDataset, prepare_dataset, read_mixture
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_model, load_tokenizer, training_rows

QUIET = Progress(quiet=True)
PAIRS = task_rows("copy", 12)
CHATS = [as_chat(row) for row in PAIRS]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in CHATS]
TEXTS = [{"text": f"{row['prompt']} {row['completion']}"} for row in PAIRS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["completion"]}]}
    for r in PAIRS
]
SYSTEM = [
    {"messages": [{"role": "system", "content": "brief"}, *row["messages"], *row["messages"]]} for row in MESSAGES
]

# rows, the format that TRL would call it
FORMATS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "language modeling": (TEXTS, "language modeling"),
    "conversational": (MESSAGES, "conversational language modeling"),
    "several turns": (SYSTEM, "conversational language modeling"),
    "conversations": (SHAREGPT, "conversational language modeling"),
    "prompt-completion": (PAIRS, "prompt-completion"),
    "conversational prompt-completion": (CHATS, "conversational prompt-completion"),
}


@pytest.fixture(scope="module")
def model(base_dir: Path) -> PreTrainedModel:
    return load_model(base_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_dir)


@pytest.fixture
def args(tmp_path: Path) -> SFTConfig:
    return build_args({"max_length": 64}, tmp_path / "trainer")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows as the file format that the suffix names."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def spec(path: Path, **values: Any) -> DatasetSection:
    return DatasetSection(name="set", path=str(path), **{"eval_fraction": 0.0, **values})


def load(path: Path, **values: Any) -> LoadedDataset:
    return load_rows(spec(path, **values), Path("/"))


def direct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Any, **sft: Any) -> Any:
    """What plain TRL trains on, without any of our code."""
    config = SFTConfig(str(folder / "direct"), report_to="none", use_cpu=True, bf16=False, **{"max_length": 64, **sft})
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    model.__dict__.pop("forward", None)
    return trainer.train_dataset


def tokens(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


@pytest.mark.parametrize("sft", [{}, {"max_length": 12}, {"max_length": None}], ids=["fits", "cut", "no limit"])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_labels_are_those_of_plain_trl(
    name: str, sft: dict[str, Any], tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, kind = FORMATS[name]
    loaded = load(write(tmp_path / "rows.jsonl", rows))
    assert loaded.format == kind
    args = build_args({"max_length": 64, **sft}, tmp_path / "ours")
    prepared = prepare_dataset(loaded, model, tokenizer, args)
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(rows), **sft)
    assert tokens(prepared.train) == tokens(expected)
    assert prepared.counts.num_examples == len(expected) > 0
    assert prepared.counts.num_input_tokens == sum(map(len, expected["input_ids"]))
    assert prepared.counts.num_loss_tokens == sum(
        label != -100 for labels in expected["labels"] for label in labels[1:]
    )
    if "prompt" in rows[0]:
        assert 0 < prepared.counts.num_loss_tokens < prepared.counts.num_input_tokens - len(expected)


def test_plain_columns_are_mapped(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`prompt:`, `completion:`, `messages:` and `text:` name columns; what else the file holds stays out."""
    args = build_args({"max_length": 64}, tmp_path / "ours")
    questions = [
        {"question": r["prompt"], "answer": r["completion"], "text": "noise", "id": i} for i, r in enumerate(PAIRS)
    ]
    loaded = load(write(tmp_path / "q.jsonl", questions), prompt="question", completion="answer")
    assert loaded.train.column_names == ["prompt", "completion"]
    assert loaded.fingerprint == load(write(tmp_path / "p.jsonl", PAIRS)).fingerprint
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(PAIRS))
    assert tokens(prepare_dataset(loaded, model, tokenizer, args).train) == tokens(expected)

    chats = load(write(tmp_path / "c.jsonl", [{"dialog": r["messages"]} for r in MESSAGES]), messages="dialog")
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(MESSAGES))
    assert tokens(prepare_dataset(chats, model, tokenizer, args).train) == tokens(expected)

    bodies = load(write(tmp_path / "t.jsonl", [{"body": r["text"], "prompt": "x"} for r in TEXTS]), text="body")
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(TEXTS))
    assert tokens(prepare_dataset(bodies, model, tokenizer, args).train) == tokens(expected)


def test_the_text_column_follows_sft(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    args = build_args({"max_length": 64, "dataset_text_field": "body"}, tmp_path / "ours")
    path = write(tmp_path / "t.jsonl", [{"body": row["text"]} for row in TEXTS])
    loaded, _ = read_mixture([spec(path)], Path("/"), args, QUIET)
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(TEXTS))
    assert tokens(prepare_dataset(loaded[0], model, tokenizer, args).train) == tokens(expected)


def test_chat_wraps_plain_pairs_in_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", PAIRS)
    wrapped = load(path, chat=True)
    assert wrapped.format == "conversational prompt-completion"
    assert wrapped.train[0] == CHATS[0]
    assert wrapped.fingerprint == load(write(tmp_path / "c.jsonl", CHATS)).fingerprint != load(path).fingerprint
    # Rows that are chats already stay as they are.
    assert load(tmp_path / "c.jsonl", chat=True).train[0] == CHATS[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_format(suffix: str, tmp_path: Path) -> None:
    loaded = load(write(tmp_path / f"rows{suffix}", PAIRS))
    assert list(loaded.train) == PAIRS
    assert (loaded.repo_id, loaded.revision, loaded.eval) == (None, None, None)


def swapped(value: Any) -> Any:
    """The same row with the keys of all its mappings in the opposite order."""
    if isinstance(value, list):
        return [swapped(item) for item in value]
    return {key: swapped(item) for key, item in reversed(value.items())} if isinstance(value, dict) else value


def test_the_fingerprint_is_of_the_rows_not_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for rows in (PAIRS, CHATS, MESSAGES, TEXTS):
        suffixes = [".json", ".jsonl", ".parquet"] + ([".csv"] if rows in (PAIRS, TEXTS) else [])
        places = [
            write(tmp_path / where / f"{len(str(rows))}{s}", rows) for s in suffixes for where in ("", "elsewhere")
        ]
        assert len({load(path).fingerprint for path in places}) == 1
        columns_swapped = [swapped(row) for row in rows]
        assert load(write(tmp_path / "swapped.jsonl", columns_swapped)).fingerprint == load(places[0]).fingerprint
        assert load(write(tmp_path / "fewer.jsonl", rows[1:])).fingerprint != load(places[0]).fingerprint


def test_the_fingerprint_sees_every_value_and_the_order() -> None:
    rows = datasets.Dataset.from_list(PAIRS)
    other = [*PAIRS[:5], {**PAIRS[5], "completion": PAIRS[5]["completion"] + " "}, *PAIRS[6:]]
    prints = {fingerprint(datasets.Dataset.from_list(r)) for r in (PAIRS, PAIRS[::-1], PAIRS[:-1], other)}
    assert len(prints) == 4
    assert fingerprint(rows) in prints
    unicode = [{"text": "é 漢 \u2028 😀"}]
    assert len(fingerprint(datasets.Dataset.from_list(unicode))) == 64


def test_the_digest_is_of_the_sequences_whatever_their_order(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> None:
    def digest(rows: list[dict[str, Any]]) -> int:
        loaded = load(write(tmp_path / "rows.parquet", rows))
        return prepare_dataset(loaded, model, tokenizer, args).counts.digest

    whole = digest(CHATS)
    assert digest(CHATS[::-1]) == whole
    assert digest(CHATS[:-1]) != whole
    assert digest([*CHATS, CHATS[0]]) != whole
    assert digest(MESSAGES) != whole, "the same tokens under other labels are other data"
    parts = [format_digest(digest(CHATS[:5])), format_digest(digest(CHATS[5:]))]
    assert add_digests(parts) == add_digests(parts[::-1]) == format_digest(whole)
    assert len(format_digest(3)) == 64


def test_packed_rows_count_and_digest_as_their_sequences(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    args = build_args({"max_length": 64, "packing": True}, tmp_path / "ours")
    prepared = prepare_dataset(load(write(tmp_path / "rows.jsonl", CHATS)), model, tokenizer, args)
    packed = training_rows(model, tokenizer, args, prepared.train)
    assert len(packed) < len(prepared.train) == len(CHATS)
    counts = count_tokens(packed)
    assert counts.num_input_tokens == prepared.counts.num_input_tokens
    assert counts.num_loss_tokens == prepared.counts.num_loss_tokens
    assert counts.digest == prepared.counts.digest


def test_the_first_token_of_a_sequence_bears_no_loss() -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}])
    counts = count_tokens(rows)
    assert (counts.num_examples, counts.num_input_tokens, counts.num_loss_tokens) == (1, 3, 1)


def prepare(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **sft: Any) -> PreparedDataset:
    return prepare_dataset(load(path), model, tokenizer, build_args(sft, path.parent / "ours"))


def test_examples_longer_than_max_length_are_cut_counted_and_dropped_without_loss(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long_answer = {"prompt": "copy: red", "completion": "red " * 200}
    long_prompt = {"prompt": "copy: " + "red " * 150, "completion": "red"}
    rows = [as_chat(row) for row in (*PAIRS[:4], long_answer, long_prompt)]
    prepared = prepare(write(tmp_path / "rows.jsonl", rows), model, tokenizer, max_length=32)
    assert (prepared.num_truncated, prepared.num_dropped, prepared.counts.num_examples) == (1, 1, 5)
    assert prepared.counts.input_tokens.tolist()[4] == 32
    expected = direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(rows), max_length=32)
    assert tokens(prepared.train) == tokens(expected)
    longest = max(prepare(tmp_path / "rows.jsonl", model, tokenizer, max_length=None).counts.input_tokens.tolist())
    assert prepare(tmp_path / "rows.jsonl", model, tokenizer, max_length=longest).num_truncated == 0, "exactly as long"
    assert prepare(tmp_path / "rows.jsonl", model, tokenizer, max_length=longest - 1).num_truncated == 1
    whole = prepare(tmp_path / "rows.jsonl", model, tokenizer, max_length=None)
    assert (whole.num_truncated, whole.num_dropped, whole.counts.num_examples) == (0, 0, 6)


def test_no_loss_token_left_anywhere(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [as_chat({"prompt": "copy: " + "red " * 50, "completion": "red"})] * 3
    prepared = prepare(write(tmp_path / "rows.jsonl", rows), model, tokenizer, max_length=16)
    assert (prepared.counts.num_examples, prepared.counts.num_loss_tokens, prepared.num_dropped) == (0, 0, 3)
    assert len(direct(model, tokenizer, tmp_path, datasets.Dataset.from_list(rows), max_length=16)) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.jsonl", ""), ("e.json", "[]"), ("e.csv", ""), ("h.csv", "prompt,completion\n"), ("e.parquet", None)],
)
def test_an_empty_dataset_is_left_out_and_said_so(
    name: str, content: str | None, tmp_path: Path, args: SFTConfig
) -> None:
    path = tmp_path / name
    if content is None:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}), path)
    else:
        path.write_text(content)
    full = DatasetSection(name="full", path=str(write(tmp_path / "full.jsonl", PAIRS)))
    loaded, skipped = read_mixture([spec(path), full], Path("/"), args, QUIET)
    assert [dataset.name for dataset in loaded] == ["full"]
    assert skipped == {"set": "it has no rows"}
    with pytest.raises(ConfigError, match="no dataset has any rows"):
        read_mixture([spec(path)], Path("/"), args, QUIET)


@pytest.mark.parametrize("rows", [MESSAGES, TEXTS, SHAREGPT], ids=["messages", "text", "conversations"])
def test_completion_only_loss_is_refused_without_completions(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """TRL would train on every token of it without a word."""
    path = write(tmp_path / "rows.jsonl", rows)
    for value in (True, False, None):
        args = build_args({"completion_only_loss": value}, tmp_path / "ours")
        if value:
            with pytest.raises(ConfigError, match=r"completion_only_loss.*`set`"):
                read_mixture([spec(path)], Path("/"), args, QUIET)
        else:
            assert len(read_mixture([spec(path)], Path("/"), args, QUIET)[0]) == 1


def test_every_token_bears_loss_where_completion_only_loss_is_false(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", CHATS)
    prepared = prepare(path, model, tokenizer, completion_only_loss=False, max_length=64)
    assert prepared.counts.num_loss_tokens == prepared.counts.num_input_tokens - len(CHATS)


def test_a_template_that_cannot_mask_is_refused_in_one_line(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", MESSAGES)
    with pytest.raises(ConfigError, match="dataset `set`") as caught:
        prepare(path, model, tokenizer, assistant_only_loss=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"prompt": "questoin", "completion": "answer"},
            ["datasets.set.prompt", "'questoin'", "question, answer", "`question`"],
        ),
        ({"prompt": "question"}, ["datasets.set", "`completion` is not given", "question, answer"]),
        ({"messages": "chat"}, ["datasets.set.messages", "'chat'", "question, answer"]),
        ({}, ["datasets.set", "no column", "question, answer", "`prompt:`"]),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_the_nearest(values: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ConfigError) as caught:
        load(path, **values)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", PAIRS)
    with pytest.raises(ConfigError, match=r"datasets.set.path=.*chatt.jsonl.*Did you mean `chat.jsonl`"):
        load(tmp_path / "chatt.jsonl")
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"expected one of .json, .jsonl, .csv, .parquet, found `.txt`"):
        load(tmp_path / "rows.txt")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", \n')
    (tmp_path / "bad.parquet").write_text("not parquet")
    for name in ("bad.jsonl", "bad.parquet"):
        with pytest.raises(ConfigError, match=f"{name}.*not readable as") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def held_out_and_kept(rows: list[dict[str, Any]], fraction: float, name: str = "set") -> tuple[list[int], list[int]]:
    train, held_out = hold_out(datasets.Dataset.from_list(rows), fraction, name)
    return [row["i"] for row in train], [row["i"] for row in held_out] if held_out is not None else []


def test_held_out_rows_are_disjoint_stable_and_in_order() -> None:
    rows = [{"i": i} for i in range(100)]
    train, held_out = held_out_and_kept(rows, 0.2)
    assert len(held_out) == 20
    assert sorted(train + held_out) == list(range(100))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert (train, held_out) == held_out_and_kept(rows, 0.2)
    assert held_out_and_kept(rows, 0.2, "other")[1] != held_out
    # Asking for more keeps what was held out before out of training.
    assert set(held_out) < set(held_out_and_kept(rows, 0.4)[1])
    assert held_out_and_kept(rows, 0.0) == (list(range(100)), [])
    assert [len(part) for part in held_out_and_kept(rows[:1], 0.9)] == [1, 0]
    assert [len(part) for part in held_out_and_kept(rows[:2], 0.9)] == [1, 1]


def test_seeds_are_the_same_everywhere() -> None:
    assert seed_of("hold-out", "gsm8k") == 12981668533152086101
    assert seed_of(0, "ab") != seed_of(0, "a", "b")


def test_eval_rows_come_from_the_file_or_from_a_fraction(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "t.jsonl", PAIRS), write(tmp_path / "e.jsonl", task_rows("reverse", 3))
    with_file = load(train, eval_path=str(held_out), eval_fraction=0.5)
    assert list(with_file.train) == PAIRS
    assert list(with_file.eval) == task_rows("reverse", 3)
    by_fraction = load(train, eval_fraction=0.25)
    assert len(by_fraction.train) == 9
    assert len(by_fraction.eval) == 3
    assert not {str(row) for row in by_fraction.train} & {str(row) for row in by_fraction.eval}
    assert by_fraction.fingerprint != with_file.fingerprint
    mapped = write(tmp_path / "m.jsonl", [{"q": r["prompt"], "a": r["completion"]} for r in PAIRS])
    renamed = load(mapped, eval_path=str(mapped), prompt="q", completion="a")
    assert list(renamed.eval) == PAIRS


def test_csv_cells_are_text(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> None:
    """Answers that look like numbers, booleans or missing values are still answers."""
    rows = [
        {"prompt": "count: red", "completion": "007"},
        {"prompt": "2", "completion": "1.50"},
        {"prompt": "is it?", "completion": "None"},
        {"prompt": "country of Windhoek", "completion": "NA"},
        {"prompt": "true?", "completion": "True"},
    ]
    loaded = load(write(tmp_path / "rows.csv", rows))
    assert list(loaded.train) == rows
    numbers = [{"prompt": f"count: {'red ' * n}", "completion": str(n)} for n in range(1, 6)]
    same = load(write(tmp_path / "numbers.csv", numbers))
    assert same.fingerprint == load(write(tmp_path / "numbers.jsonl", numbers)).fingerprint
    assert prepare_dataset(same, model, tokenizer, args).counts.num_examples == 5


def test_datasets_are_read_in_the_order_of_names(tmp_path: Path, args: SFTConfig) -> None:
    path = str(write(tmp_path / "rows.jsonl", PAIRS))
    specs = [DatasetSection(name=name, path=path) for name in ("b", "c", "a")]
    assert [dataset.name for dataset in read_mixture(specs, Path("/"), args, QUIET)[0]] == ["a", "b", "c"]


@pytest.fixture(autouse=True)
def unpatched(model: PreTrainedModel) -> Iterator[None]:
    """TRL wraps `model.forward`; what is prepared here must leave the shared model as it was."""
    yield
    assert "forward" not in model.__dict__


def test_counts_are_whole_numbers(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    counts = prepare(write(tmp_path / "rows.jsonl", CHATS), model, tokenizer, max_length=64).counts
    assert counts.input_tokens.dtype == counts.loss_tokens.dtype == np.int64
    assert type(counts.num_input_tokens) is int
    assert type(counts.num_loss_tokens) is int


KINDS = [{"text": f"{kind} {i}", "kind": kind, "number": i} for i in range(4) for kind in ("ask", "tell", "sing")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_where_takes_the_rows_that_hold_the_values(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"rows{suffix}", KINDS)
    # Of a csv all cells are text.
    number = str if suffix == ".csv" else int

    def texts(**where: Any) -> list[str]:
        return list(load(file, where=where).train["text"])

    assert texts(kind="tell") == [f"tell {i}" for i in range(4)]
    assert texts(kind=["sing", "ask"], number=number(2)) == ["ask 2", "sing 2"]
    whole, half = load(file), load(file, where={"kind": "tell"}, eval_fraction=0.5)
    assert len(half.train) == len(half.eval or []) == 2
    assert all(text.startswith("tell") for text in (half.eval or {})["text"])
    alone = write(tmp_path / f"alone{suffix}", [row for row in KINDS if row["kind"] == "tell"])
    assert load(file, where={"kind": "tell"}).fingerprint == load(alone).fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"knd": "ask"}, "where.knd: no such column. Found: text, kind, number. Did you mean `kind`?"),
        ({"kind": "sung"}, "where.kind='sung': no row holds that. Of the 3 values found, 'sing' is the nearest."),
        ({"kind": "ask", "text": "tell 1"}, "no row holds all of that"),
        ({"number": "2"}, "where.number='2': no row holds that. Of the 4 values found, 2 is the nearest."),
        ({"kind": None}, "where.kind=None: expected a text, a number"),
        ({"kind": []}, "where.kind=[]: expected a text, a number"),
        ({}, "where={}: expected {column: value"),
        ("kind", "where='kind': expected {column: value"),
    ],
)
def test_a_where_that_finds_nothing_is_told(where: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "rows.jsonl", KINDS), where=where)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "files", ["/etc/passwd", "~/a.json", "../a.json", "https://x/a.json", 3, "", {"train": ["/a"]}]
)
def test_data_files_are_files_of_the_repo(files: Any, tmp_path: Path) -> None:
    """A plan from elsewhere names them too."""
    with pytest.raises(ConfigError, match=r"data_files=.*: expected a file of the Hub repo"):
        load_rows(DatasetSection(name="set", path="org/rows", data_files=files), tmp_path)
    with pytest.raises(ConfigError, match=r"data_files=.*: expected a file of the Hub repo"):
        MeritConfig.from_dict(
            {"base": {"model_name_or_path": "b"}, "datasets": [{"name": "a", "path": "b/c", "data_files": files}]}
        )
    with pytest.raises(ConfigError, match=r"set\.data_files are files of a Hub repo, and path=.* is a file here"):
        load(write(tmp_path / "rows.jsonl", KINDS), data_files="rows.jsonl")
