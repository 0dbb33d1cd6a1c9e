"""The memory of the gradients: estimated before the first pass, near what is measured, and refused with a cure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_base, make_mixture

from merit_hf import memory
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.gradients import GradientSettings
from merit_hf.memory import MemoryEstimate, estimate_memory, fitting_settings
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import load_model

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
# The highest memory of one pass over a batch, above what the loaded model takes, by the allocator's own count.
MEASURE = """
import itertools, json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from merit_hf.gradients import GradientSettings, _reading
from merit_hf.memory import estimate_memory
from merit_hf.sft import load_model
from merit_hf.sketch import CountSketch
model, ids = load_model(sys.argv[1]).eval(), torch.randint(5, 300, (4, 256))
for low_memory, checkpointing in itertools.product((False, True), repeat=2):
    settings = GradientSettings(1024, low_memory, checkpointing)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with _reading(model, CountSketch(256, 0), settings) as reader:
            # In the second batch the gradients of the first lie there already.
            for _ in range(2):
                logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
                torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="sum").backward()
                del logits
            reader.finish()
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    estimate = estimate_memory(model, ids.numel(), ids.numel(), settings).total
    print(json.dumps([low_memory, checkpointing, max(itertools.accumulate(sizes)), estimate]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("wide") / "base", **WIDE)


@pytest.mark.slow
def test_the_estimate_is_near_what_a_pass_takes(wide: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(wide)], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    measured = {(low_memory, checkpointing): highest for low_memory, checkpointing, highest, _ in lines}
    assert len(measured) == 4
    for *_, highest, estimate in lines:
        assert 0.6 < highest / estimate < 1.5, lines
    # Each saves what it is said to save.
    assert measured[True, False] < 0.9 * measured[False, False]
    assert measured[False, True] < 0.9 * measured[False, False]
    assert measured[True, True] < 0.9 * min(measured[True, False], measured[False, True])


def test_what_an_estimate_counts(wide: Path) -> None:
    model = load_model(wide)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    plain = estimate_memory(model, 1000, 100, GradientSettings())
    assert plain.gradients == sum(sizes) + max(sizes)
    assert plain.logits == 3 * 4 * 100 * model.config.vocab_size
    assert estimate_memory(model, 1000, 100, GradientSettings(), world_size=4).gradients == plain.gradients // 4
    assert estimate_memory(model, 1000, 100, GradientSettings(low_memory=True)).gradients == 2 * max(sizes)
    checkpointed = estimate_memory(model, 1000, 100, GradientSettings(gradient_checkpointing=True))
    assert checkpointed.activations < plain.activations / 3
    assert estimate_memory(model, 2000, 100, GradientSettings()).activations == 2 * plain.activations
    assert not MemoryEstimate(50, 30, 15, 100).fits
    assert MemoryEstimate(50, 30, 9, 100).fits


def test_low_memory_is_chosen_where_only_it_fits_and_what_never_fits_is_refused(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings, batches = load_model(wide), GradientSettings(), [(64, 10), (128, 20)]
    whole = estimate_memory(model, 128, 20, settings).total
    less = estimate_memory(model, 128, 20, GradientSettings(low_memory=True)).total

    def choose(available: float, low_memory: bool | None = None) -> GradientSettings:
        monkeypatch.setattr(memory, "available_memory", lambda device: int(available))
        return fitting_settings(model, batches, settings, low_memory)

    assert not choose(2 * whole).low_memory
    assert choose(2 * whole, low_memory=True).low_memory
    assert choose(1.2 * less).low_memory
    with pytest.raises(ConfigError, match=r"128 tokens.*plan.low_memory=true, set plan.gradient_checkpointing=true"):
        choose(1.2 * less, low_memory=False)
    with pytest.raises(ConfigError, match=r"Cure: set plan.gradient_checkpointing=true, lower plan.tokens_per_batch"):
        choose(0.5 * less)


def test_a_plan_that_cannot_fit_is_refused_before_its_first_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MeritConfig.from_yaml(make_mixture(tmp_path, ("copy", "count"), count=8))
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="the largest micro-batch"):
        MeritPlanner(config, Progress(quiet=True)).plan(tmp_path / "plan")
    assert not list((tmp_path / "plan.part" / "gradients").glob("*.npy"))
    monkeypatch.undo()
    MeritPlanner(config, Progress(quiet=True)).plan(tmp_path / "plan")
    assert torch.is_grad_enabled()
