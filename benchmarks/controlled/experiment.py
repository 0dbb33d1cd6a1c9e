"""The one YAML of a controlled experiment, checked, and the cells (arm × seeds) that it asks for. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merit_hf.config import ConfigError

BASE = "base"
MEASURED_SPLITS = ("merit", "kmeans", "affinity")  # made of gradients
LARGE_MIXTURE = 48  # datasets from which eight groups (3D) are worth asking for


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Warmup(_Section):
    """A Llama of its own, with a tokenizer of its own, made by warmup.py.

    Args:
        tokens: that it is trained on, in all. tasks: whose examples stand beside Python's own source files.
        examples: a task at most; text_megabytes: of source files. batch_size: sequences of `length` tokens a step, of
        which `micro_batch_size` are worked on at once. bf16: products in bfloat16, weights in float32. compile: with
        torch.compile. save_steps: how much is lost at most by a kill.
    """

    tokens: int = Field(ge=1)
    tasks: list[str]
    examples: int = 20_000
    text_megabytes: float = 20.0
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 5
    num_heads: int = 4
    length: int = 256
    batch_size: int = 32
    micro_batch_size: int = 8
    bf16: bool = False
    compile: bool = False
    learning_rate: float = 1e-3
    save_steps: int = 200
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> Warmup:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not made of micro_batch_size {self.micro_batch_size}")
        return self


class Base(_Section):
    """θ0: `warmup`, or `model`: `smollm2` (the quickstart's, from its wheel), a Hub id, or a folder, seen from
    where the command is run.
    """

    model: str | None = None
    warmup: Warmup | None = None

    @model_validator(mode="after")
    def _one(self) -> Base:
        if (self.model is None) == (self.warmup is None):
            raise ValueError("give one of `model` and `warmup`")
        return self


class Data(_Section):
    """What is trained on and what is looked at.

    Args:
        datasets: the mixture. held_out: tasks that no arm trains on, which tell what is forgotten.
        train, val, test: examples a dataset; a dataset with fewer has a smaller training part.
        conflict: share of the prompts, in families whose members share their prompts, that do not say which of the
            members' answers is wanted: 0 asks for no contradiction, 1 asks contradictory answers to the same prompts.
        seed: which examples there are, and which of them are held out.
    """

    datasets: list[str] = Field(min_length=2)
    held_out: list[str] = Field(min_length=1)
    train: int = Field(ge=8)
    val: int = Field(ge=2)
    test: int = Field(ge=2)
    conflict: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0


class Arm(_Section):
    """One way to spend the budget.

    Args:
        kind: `joint`; `soup` (a uniform mean of `groups` joint runs over 1/`groups` of the budget each); `split`
            (datasets into groups by `split`); `by_example` (examples into groups at random).
        groups: K. batch: times the effective batch of `sft`. sft, plan, merge: over those of the experiment.
        affinity: `negative` splits by the debiased cosines below 0 alone.
        learning_rate: fixed; else the best of `tune` on validation data. tuned_as: takes that of another arm.
        layers: λs of which every layer of the merged model gets its best, on validation rows.
        rounds: of merging and going on from there, as `run.rounds`; replan: with gradients anew, as `run.replan`.
        diagnose: measure gains, ρ and barriers of the first so many cells.
        plan_seeds, order_seeds: in place of the experiment's.
    """

    name: str = Field(pattern=r"^[\w.+-]+$")
    kind: Literal["joint", "soup", "split", "by_example"]
    split: Literal["merit", "random", "kmeans", "by_tag", "affinity"] | None = None
    groups: int = Field(default=1, ge=1)
    batch: float = Field(default=1.0, gt=0)
    affinity: Literal["negative"] | None = None
    layers: list[float] = []
    rounds: int = Field(default=1, ge=1)
    replan: bool = False
    sft: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    merge: dict[str, Any] = {}
    learning_rate: float | None = None
    tuned_as: str | None = None
    diagnose: int = 0
    plan_seeds: list[int] | None = None
    order_seeds: list[int] | None = None


class Seeds(_Section):
    """plan: of samples, sketch, random splits. order: of the order of the examples. crossed: every plan seed with
    every order seed; else each plan seed with one order seed, in turn, so that no split is made twice.
    """

    plan: list[int] = [0]
    order: list[int] = [0]
    crossed: bool = True


class Tune(_Section):
    """Learning rates that every arm is tried with, at the first seeds; chosen by the mixture's validation loss."""

    learning_rates: list[float] = Field(min_length=1)


class Lines(_Section):
    """Points θ0 + λ (θ − θ0).

    Args:
        of: the arms whose lines are measured. lambdas: where. answers_at: where models also answer, on the
            lines of `outcome`.
    """

    of: list[str]
    lambdas: list[float] = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5]
    answers_at: list[float] = []


class Evaluation(_Section):
    """val_samples, test_samples: rows a dataset at most. answers: let models answer on test rows, up to
    `max_new_tokens`. groups: also the groups by themselves.
    """

    val_samples: int = 64
    test_samples: int = 64
    answers: bool = True
    max_new_tokens: int = 96
    tokens_per_batch: int = 4096
    groups: bool = False


class Diagnosis(_Section):
    num_samples: int = 8
    epsilons: list[float] = [0.25, 0.5, 1.0]


class Gates(_Section):
    """What a mixture must show before seeds are spent on it; see gates.py."""

    split_half: float = 0.9
    plan_agreement: float = 0.8
    joint_gain: float = 0.3
    exact_match: float = 0.2
    rho: tuple[float, float] = (0.8, 1.2)
    more_epochs: float = 2.0
    joint: str = "joint"
    merit: str = "merit-4"


class Outcome(_Section):
    """Fixed before the runs. The primary outcome of an arm is its excess over `lines` on test rows of the mixture, at
    equal displacement and at equal forgetting; `compare`: pairs whose difference of it is tested.
    """

    lines: list[str]
    compare: list[tuple[str, str]] = []


class Experiment(_Section):
    """`claims`: false for a run that only shows that the chain works, whose numbers nobody is to conclude from."""

    name: str
    question: str
    claims: bool = True
    base: Base
    data: Data
    plan: dict[str, Any] = {}
    sft: dict[str, Any] = {}
    seeds: Seeds = Seeds()
    arms: list[Arm]
    tune: Tune
    lines: Lines
    evaluation: Evaluation = Evaluation()
    diagnosis: Diagnosis = Diagnosis()
    gates: Gates = Gates()
    outcome: Outcome
    conditions: dict[str, dict[str, Any]] = {}

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def rate_from(self, arm: Arm) -> Arm:
        """The arm whose tuned learning rate this one takes: itself, or the end of its chain of `tuned_as`."""
        return arm if arm.tuned_as is None else self.rate_from(self.arm(arm.tuned_as))


@dataclass(frozen=True)
class Cell:
    """One arm at one pair of seeds; `plan_seed` is None where nothing is planned."""

    arm: str
    plan_seed: int | None
    order_seed: int
    learning_rate: float
    phase: str = "run"

    @property
    def name(self) -> str:
        """Names the cell in results: a run's by arm and seeds, another phase's by what it trains."""
        return self._place if self.phase == "run" else f"{self.phase}/{self.work}"

    @property
    def work(self) -> str:
        """Names what the cell trains: what one phase has trained is there for the next."""
        return f"{self._place}-lr{self.learning_rate:g}"

    @property
    def _place(self) -> str:
        plan = "" if self.plan_seed is None else f"-p{self.plan_seed}"
        return f"{self.arm}{plan}-o{self.order_seed}"


def seed_pairs(experiment: Experiment, arm: Arm) -> list[tuple[int | None, int]]:
    """(plan seed, order seed) of an arm's cells; nothing is drawn or planned for joint runs and their soups."""
    orders = experiment.seeds.order if arm.order_seeds is None else arm.order_seeds
    if arm.kind in ("joint", "soup"):
        return [(None, order) for order in orders]
    plans = experiment.seeds.plan if arm.plan_seeds is None else arm.plan_seeds
    if experiment.seeds.crossed:
        return list(itertools.product(plans, orders))
    return [(plan, orders[turn % len(orders)]) for turn, plan in enumerate(plans)]


def cells(experiment: Experiment, rates: Mapping[str, float]) -> Iterator[Cell]:
    """Every cell of the matrix, seed by seed, so that what a stopped run has is balanced over the arms.

    Args:
        rates: {arm: learning rate}.
    """
    pairs = {arm.name: seed_pairs(experiment, arm) for arm in experiment.arms}
    for turn in range(max(len(found) for found in pairs.values())):
        for arm in experiment.arms:
            for plan_seed, order_seed in pairs[arm.name][turn : turn + 1]:
                yield Cell(arm.name, plan_seed, order_seed, rates[arm.name])


def tuning_cells(experiment: Experiment) -> list[Cell]:
    """Every arm with a rate of its own, at its first seeds, at every learning rate of the grid."""
    found = []
    for arm in experiment.arms:
        if arm.learning_rate is None and arm.tuned_as is None:
            plan_seed, order_seed = seed_pairs(experiment, arm)[0]
            found += [Cell(arm.name, plan_seed, order_seed, r, "tune") for r in experiment.tune.learning_rates]
    return found


def read_experiment(path: Path) -> dict[str, Experiment]:
    """The experiment of each condition; one, under the empty name, where there are none.

    A condition's keys go over the experiment's, section by section.

    Raises:
        ConfigError: not a mapping, an unknown key, or names that do not fit together.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}. Give an experiment's YAML.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, found a {type(content).__name__}.")
    conditions = content.pop("conditions", None) or {"": {}}
    return {name: _checked(_over(content, changes), path, name) for name, changes in conditions.items()}


def _over(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _checked(content: dict[str, Any], path: Path, condition: str) -> Experiment:
    where = f"{path}: condition {condition}" if condition else f"{path}"
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {key}={str(first['input'])[:60]!r}: {first['msg'].lower()}.") from None
    names = [arm.name for arm in experiment.arms]
    repeated = [name for name in names if names.count(name) > 1 or name == BASE]
    if repeated:
        raise ConfigError(f"{where}: two arms are called `{repeated[0]}` (`base` is one already). Rename one.")
    asked = [("lines.of", name) for name in experiment.lines.of]
    asked += [("outcome.lines", name) for name in experiment.outcome.lines]
    asked += [("outcome.compare", name) for pair in experiment.outcome.compare for name in pair]
    asked += [("gates", experiment.gates.joint), ("gates", experiment.gates.merit)]
    asked += [(f"arms.{arm.name}.tuned_as", arm.tuned_as) for arm in experiment.arms if arm.tuned_as]
    for key, name in asked:
        if name not in names:
            raise ConfigError(f"{where}: {key}: there is no arm `{name}`. The arms are {', '.join(names)}.")
    _check_arms(experiment, where)
    return experiment


def _check_arms(experiment: Experiment, where: str) -> None:
    missing = sorted(set(experiment.outcome.lines) - set(experiment.lines.of))
    if missing:
        raise ConfigError(f"{where}: outcome.lines names `{missing[0]}`, whose line is not measured. Add it to lines.")
    if 1.0 not in experiment.lines.lambdas:
        raise ConfigError(f"{where}: lines.lambdas={experiment.lines.lambdas} has no 1, the arm itself. Add it.")
    both = sorted(set(experiment.data.datasets) & set(experiment.data.held_out))
    if both:
        raise ConfigError(f"{where}: `{both[0]}` is in the mixture and held out of it. Take it out of one.")
    count = len(experiment.data.datasets)
    samples = experiment.plan.get("num_samples")
    for arm in experiment.arms:
        drawn = {seeds[0] for seeds in seed_pairs(experiment, arm)}
        whole = samples is None or (samples != "auto" and samples >= experiment.data.train)
        if arm.split in MEASURED_SPLITS and len(drawn) > 1 and whole:
            raise ConfigError(
                f"{where}: arm `{arm.name}`: {len(drawn)} plan seeds draw the same samples, since plan.num_samples is "
                f"{samples} and data.train {experiment.data.train}. Ask for fewer samples."
            )
        if (arm.kind == "split") != (arm.split is not None):
            raise ConfigError(f"{where}: arm `{arm.name}`: `split` belongs to kind split, and kind split needs one.")
        if (arm.split == "affinity") != (arm.affinity is not None):
            raise ConfigError(f"{where}: arm `{arm.name}`: `affinity` belongs to split affinity, which needs it.")
        if arm.rounds > 1 and (arm.kind != "split" or arm.diagnose):
            raise ConfigError(f"{where}: arm `{arm.name}`: rounds are of kind split, and are not diagnosed.")
        if arm.layers and (arm.kind == "joint" or arm.diagnose):
            raise ConfigError(
                f"{where}: arm `{arm.name}`: `layers` are of merged models, which are not diagnosed then."
            )
        if arm.kind == "joint" and arm.groups != 1:
            raise ConfigError(f"{where}: arm `{arm.name}`: a joint run has one group, not {arm.groups}.")
        if arm.kind != "joint" and arm.groups < 2:
            raise ConfigError(f"{where}: arm `{arm.name}`: {arm.kind} needs `groups` of 2 or more.")
        if arm.kind == "split" and arm.groups > count:
            raise ConfigError(f"{where}: arm `{arm.name}`: {arm.groups} groups of {count} datasets.")
        if arm.split == "merit" and arm.groups >= 8 and count < LARGE_MIXTURE:
            raise ConfigError(
                f"{where}: arm `{arm.name}`: eight groups need {LARGE_MIXTURE} datasets or more, there are {count}."
            )
