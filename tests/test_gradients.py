"""Dataset gradients: of SFT's own loss, whatever the batching and padding, and exactly what one SGD step follows."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tiny import as_chat, make_base, task_rows, write_jsonl
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from merit_hf import loss
from merit_hf.config import DatasetSection, MeritError
from merit_hf.conflict import conflict_matrix
from merit_hf.data import load_rows
from merit_hf.gradients import (
    GradientReadout,
    GradientSettings,
    batch_by_tokens,
    dataset_gradient,
    sample_indices,
    trained_parameters,
)
from merit_hf.loss import trl_loss_sum
from merit_hf.mixture import prepare_dataset
from merit_hf.sft import build_args, collate, load_model, load_tokenizer, open_loss, open_trainer
from merit_hf.sketch import CountSketch, make_sketch


@pytest.fixture(scope="module")
def model(base_dir: Path) -> PreTrainedModel:
    return load_model(base_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Tokenised examples of very different lengths; one has no token that bears a loss."""
    folder = tmp_path_factory.mktemp("rows")
    examples = [as_chat(row) for task in ("repeat", "count", "upper") for row in task_rows(task, 6)]
    path = write_jsonl(folder / "rows.jsonl", examples)
    loaded = load_rows(DatasetSection(name="set", path=str(path), eval_fraction=0.0), folder)
    prepared = prepare_dataset(loaded, model, tokenizer, build_args({"max_length": None}, folder / "trainer"))
    silent = {"input_ids": list(range(40, 60)), "labels": [-100] * 20}
    # TRL drops it; a data collator of another kind might not, and it must not count.
    return datasets.Dataset.from_list([*prepared.train, silent])


def gradient(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    folder: Path,
    reduction: str = "token_mean",
    tokens_per_batch: int = 2048,
    low_memory: bool = False,
    gradient_checkpointing: bool = False,
    **sft: object,
) -> GradientReadout:
    """The whole gradient, entry for entry."""
    sketch = make_sketch("exact", [(n, p.numel()) for n, p in trained_parameters(model)], dim=0, stride=1, seed=0)
    settings = GradientSettings(tokens_per_batch, low_memory, gradient_checkpointing)
    with open_loss(model, tokenizer, build_args(sft, folder / "trainer"), rows) as trainer:
        return dataset_gradient(trainer, rows, sketch, reduction, settings)


def by_hand(base_dir: Path, rows: datasets.Dataset, reduction: str) -> tuple[np.ndarray, float]:
    """Mean gradient and loss by a plain loop in float64: one example at a time, its own cross-entropy, no TRL."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).double().eval()
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        log_probabilities = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses = [
            -log_probabilities[at - 1, labels[at]] for at in range(1, len(ids)) if labels[at] != -100
        ]  # fmt: skip
        if losses:
            mean = reduction == "example_mean"
            total = total + sum(losses) / (len(losses) if mean else 1)
            terms += 1 if mean else len(losses)
    (total / terms).backward()
    parts = [parameter.grad.flatten() for _, parameter in sorted(model.named_parameters())]
    return torch.cat(parts).numpy(), float(total.detach()) / terms


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_the_mean_gradient_is_that_of_a_plain_float64_loop(
    reduction: str, base_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset,
    tmp_path: Path,
) -> None:  # fmt: skip
    expected, loss = by_hand(base_dir, rows, reduction)
    found = gradient(model, tokenizer, rows, tmp_path, reduction)
    assert relative(found.sketch, expected) < 1e-5
    assert found.norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.num_samples == len(rows)
    assert found.num_input_tokens == sum(map(len, rows["input_ids"]))
    assert found.num_loss_tokens == sum(label != -100 for labels in rows["labels"] for label in labels[1:])


def test_the_two_reductions_differ(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    by_token = gradient(model, tokenizer, rows, tmp_path)
    by_example = gradient(model, tokenizer, rows, tmp_path, "example_mean")
    assert relative(by_example.sketch, by_token.sketch) > 0.05


@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_batches_and_padding_do_not_matter(
    reduction: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """`loss.mean()` of each batch would weigh a short batch's tokens more."""
    expected = gradient(model, tokenizer, rows, tmp_path, reduction, tokens_per_batch=1)
    assert expected.num_batches == len(rows)
    for tokens_per_batch in (60, 150, 100_000):
        found = gradient(model, tokenizer, rows, tmp_path, reduction, tokens_per_batch)
        assert relative(found.sketch, expected.sketch) < 2e-6
        assert (found.num_batches < len(rows)) == (reduction == "token_mean")
    padded = gradient(model, tokenizer, rows, tmp_path, reduction, 150, pad_to_multiple_of=64)
    assert relative(padded.sketch, expected.sketch) < 2e-6
    reordered = gradient(model, tokenizer, rows.select(range(len(rows) - 1, -1, -1)), tmp_path, reduction, 150)
    assert relative(reordered.sketch, expected.sketch) < 2e-6


def test_low_memory_and_checkpointing_do_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    expected = gradient(model, tokenizer, rows, tmp_path, tokens_per_batch=150)
    for low_memory, checkpointing in ((True, False), (False, True), (True, True)):
        found = gradient(model, tokenizer, rows, tmp_path, "token_mean", 150, low_memory, checkpointing)
        assert relative(found.sketch, expected.sketch) < 2e-6
        assert found.norm == pytest.approx(expected.norm, rel=1e-5)
        assert found.loss == pytest.approx(expected.loss, rel=1e-7)
    assert not any(
        parameter.grad is not None or parameter._post_accumulate_grad_hooks for parameter in model.parameters()
    )
    assert not any(module.training or getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_low_memory_holds_one_gradient_at_a_time(base_dir: Path, rows: datasets.Dataset, tmp_path: Path) -> None:
    model, tokenizer, held = load_model(base_dir), load_tokenizer(base_dir), []

    class Watching(CountSketch):
        def add(self, out: torch.Tensor, name: str, gradient: torch.Tensor, offset: int = 0) -> None:
            held.append(sum(parameter.grad is not None for parameter in model.parameters()))
            super().add(out, name, gradient, offset)

    for low_memory in (True, False):
        held.clear()
        with open_loss(model, tokenizer, build_args({}, tmp_path / "trainer"), rows) as trainer:
            dataset_gradient(trainer, rows, Watching(64, 0), settings=GradientSettings(150, low_memory))
        # The whole gradient lies there when the first of it is read out at the end.
        assert max(held) == (1 if low_memory else len(trained_parameters(model)))


def test_checkpointing_runs_layers_twice_and_leaves_dropout_off(
    tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    model = load_model(make_base(tmp_path / "dropout", attention_dropout=0.5))
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = gradient(model, tokenizer, rows, tmp_path, tokens_per_batch=150)
    once = len(calls)
    again = gradient(model, tokenizer, rows, tmp_path, tokens_per_batch=150, gradient_checkpointing=True)
    assert len(calls) == 3 * once
    assert relative(again.sketch, plain.sketch) < 2e-6


def test_logits_are_made_of_loss_tokens_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    found = gradient(model, tokenizer, rows, tmp_path)
    handle.remove()
    assert sum(shape[0] for shape in shapes) == found.num_loss_tokens < found.num_input_tokens


@pytest.mark.parametrize("sft", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_the_fast_loss_is_trls(
    sft: dict[str, object], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset,
    tmp_path: Path,
) -> None:  # fmt: skip
    with open_loss(model, tokenizer, build_args(sft, tmp_path / "trainer"), rows) as trainer:
        batch = collate(trainer, rows, list(range(8)))
        assert float(loss.loss_sum(trainer, batch)) == pytest.approx(float(trl_loss_sum(trainer, batch)), rel=1e-6)


def test_training_settings_of_the_batch_do_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    expected = gradient(model, tokenizer, rows, tmp_path)
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1,
        "packing": True, "max_length": 16, "learning_rate": 0.1, "neftune_noise_alpha": 5.0,
    }  # fmt: skip
    for name, value in settings.items():
        found = gradient(model, tokenizer, rows, tmp_path, **{name: value})
        assert np.array_equal(found.sketch, expected.sketch), name


def test_one_sgd_step_of_the_trainer_follows_minus_the_gradient(
    base_dir: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """The planned gradient is the one that trainer.train() takes in its own loop, over four accumulated batches."""
    rows, rate = rows.select(range(16)), 0.5
    model = load_model(base_dir)
    names = [name for name, _ in sorted(trained_parameters(model))]
    planned = gradient(model, tokenizer, rows, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model)}
    args = build_args(
        {
            "optim": "sgd", "learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "weight_decay": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False,
        },
        tmp_path / "training",
    )  # fmt: skip
    with open_trainer(model, tokenizer, args, rows) as trainer:
        trainer.train()
        logged = trainer.state.log_history[0]
    after = dict(trained_parameters(model))
    step = torch.cat([(after[name].detach() - before[name]).flatten() for name in names]).numpy()
    assert relative(step, -rate * planned.sketch) < 1e-4
    assert logged["loss"] == pytest.approx(planned.loss, rel=1e-4)
    assert logged["grad_norm"] == pytest.approx(planned.norm, rel=1e-4)


def test_an_sft_trainer_of_anybodys_sees_the_same_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    args = build_args({"per_device_eval_batch_size": 64, "max_length": None}, tmp_path / "trainer")
    trainer = SFTTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    loss = trainer.evaluate()["eval_loss"]
    model.__dict__.pop("forward")
    assert loss == pytest.approx(gradient(model, tokenizer, rows, tmp_path).loss, rel=1e-5)


def test_identical_data_have_cosine_one_and_a_count_sketch_reads_the_same_gradient(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    halves = [rows.select(range(6)), rows.select(range(6, 12)), rows.select(range(6)), rows]
    exact, sketched = [], []
    sketch = CountSketch(8192, seed=0)
    for part in halves:
        exact.append(gradient(model, tokenizer, part, tmp_path).sketch)
        with open_loss(model, tokenizer, build_args({}, tmp_path / "trainer"), part) as trainer:
            sketched.append(dataset_gradient(trainer, part, sketch).sketch)
    cosines = conflict_matrix(exact)
    assert cosines[0, 2] == pytest.approx(1, abs=1e-12)
    assert cosines[0, 1] < 0.99
    assert np.abs(conflict_matrix(sketched) - cosines).max() < 4 / 8192**0.5


def test_repeated_examples_leave_the_mean_gradient_as_it_is(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    twice = datasets.concatenate_datasets([rows, rows])
    for reduction in ("token_mean", "example_mean"):
        once = gradient(model, tokenizer, rows, tmp_path, reduction)
        assert relative(gradient(model, tokenizer, twice, tmp_path, reduction).sketch, once.sketch) < 2e-6


def test_what_is_not_trained_has_no_part_in_it(
    base_dir: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    model = load_model(base_dir)
    whole = gradient(model, tokenizer, rows, tmp_path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    part = gradient(model, tokenizer, rows, tmp_path)
    assert part.sketch.size == sum(p.numel() for n, p in model.named_parameters() if "mlp" in n) < whole.sketch.size
    assert 0 < part.norm < whole.norm
    assert np.linalg.norm(part.sketch) == pytest.approx(part.norm, rel=1e-5)


def test_the_model_is_left_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradient(model, tokenizer, rows, tmp_path)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in model.__dict__


def test_dropout_is_off(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset) -> None:
    """The trainer seeds the dropout, so that it would be the same every time; it must not be there at all."""
    found = []
    for rate in (0.0, 0.5):
        model = load_model(make_base(tmp_path / str(rate), attention_dropout=rate))
        model.train()
        found.append(gradient(model, tokenizer, rows, tmp_path).sketch)
    assert np.array_equal(*found)


def test_no_loss_token_and_a_gradient_that_is_not_finite_are_refused(
    base_dir: Path, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    model = load_model(base_dir)
    with pytest.raises(MeritError, match="loss token"):
        gradient(model, tokenizer, rows.select([len(rows) - 1]), tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(MeritError, match="not finite"):
        gradient(model, tokenizer, rows, tmp_path)


def test_batches_hold_the_budget_with_every_row_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 200).tolist()
    for budget in (1, 100, 1000, 10**6):
        batches = batch_by_tokens(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(200))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert len(batch_by_tokens(lengths, 10**6)) == 1
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batch_by_tokens(lengths, 3000))
    assert padded < 1.1 * sum(lengths)
    assert batch_by_tokens([], 10) == []


def test_samples_are_distinct_sorted_and_seeded() -> None:
    chosen = sample_indices(100, 20, seed=1)
    assert len(set(chosen.tolist())) == 20
    assert chosen.tolist() == sorted(chosen.tolist())
    assert np.array_equal(chosen, sample_indices(100, 20, seed=1))
    assert not np.array_equal(chosen, sample_indices(100, 20, seed=2))
    assert sample_indices(5, 20, seed=1).tolist() == [0, 1, 2, 3, 4]
    # A larger sample holds the smaller one, so more samples only refine.
    assert set(chosen.tolist()) < set(sample_indices(100, 50, seed=1).tolist())


def test_a_router_counts_by_its_batches_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """Mixture of experts: the balance of the router is part of what SFT minimises, once a batch."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **sizes)
    model = MixtralForCausalLM(config)
    with open_loss(model, tokenizer, build_args({"router_aux_loss_coef": 0.5}, tmp_path / "trainer"), rows) as trainer:
        batch = collate(trainer, rows, list(range(6)))
        num_tokens = int((batch["labels"][:, 1:] != -100).sum())
        outputs = model(**batch, use_cache=False, fused_lm_head=True, output_router_logits=True)
        expected = -outputs.log_probs.sum() + num_tokens * 0.5 * outputs.aux_loss
        assert float(loss.loss_sum(trainer, dict(batch))) == pytest.approx(float(expected), rel=1e-5)
    found = gradient(model, tokenizer, rows, tmp_path, router_aux_loss_coef=0.5)
    plain = gradient(model, tokenizer, rows, tmp_path, router_aux_loss_coef=0.0)
    assert found.loss > plain.loss + 0.1
    assert relative(found.sketch, plain.sketch) > 1e-3
