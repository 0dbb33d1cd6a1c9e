"""A model moved between checkpoints: exact sums, tied tensors, noise, inner products, and bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merit_hf.align import Checkpoint, align
from merit_hf.config import MeritError
from merit_hf.diagnosis import basin
from merit_hf.diagnosis.basin import Draws, Point, Survey
from merit_hf.diagnosis.interpolate import Mover

WEIGHTS = {0: 0.2, 1: 0.3, 2: 0.5}


class Toy(torch.nn.Module):
    """A quadratic loss in float64 for each of a few rows, with two tensors that are coupled."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        roots = torch.randn(4, 10, 10, generator=generator, dtype=torch.float64)
        self.hessians = roots @ roots.mT
        self.slopes = torch.randn(4, 10, generator=generator, dtype=torch.float64)
        self.first = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def rows(self) -> torch.Tensor:
        place = torch.cat([self.first.reshape(-1), self.second])
        return 9 + self.slopes @ place + 0.5 * torch.einsum("i,rij,j->r", place, self.hessians, place)


def toy_sources(folder: Path) -> dict[str, Checkpoint]:
    sources = {}
    for number, label in enumerate(["base", *(f"group-{k}" for k in WEIGHTS)]):
        path = folder / label
        path.mkdir(parents=True)
        torch.manual_seed(number)
        tensors = {"first": torch.randn(2, 3).double(), "second": torch.randn(4).double()}
        save_file(tensors, path / "model.safetensors")
        sources[label] = Checkpoint(path)
    return sources


def test_rho_is_1_and_gradients_agree_on_a_quadratic_model_read_from_files(tmp_path: Path) -> None:
    toy, sources = Toy(), toy_sources(tmp_path)
    mover, survey = Mover(toy, sources), Survey(WEIGHTS, sigmas=())
    nats = []
    for point in survey.points():
        mover.move_to(point)
        nats.append(toy.rows().detach().numpy())
    losses = basin.resample(np.array(nats), np.ones(4), 100, 0)
    found = basin.gain(survey, Draws(survey.points(), losses))
    assert found["measured"]["value"] > 1
    for step in found["ladder"]:
        assert step["rho"]["value"] == pytest.approx(1.0, abs=1e-6)

    # A point for some tensors leaves the others where they are.
    mover.move_to(Point.of({"base": 1.0}))
    mover.move_to(Point.of({"group-0": 1.0}), ["second"])
    assert torch.equal(toy.first, sources["base"].flat("first").view(2, 3))
    assert torch.equal(toy.second, sources["group-0"].flat("second"))

    by_tensor = np.zeros(2)
    for group, weight in WEIGHTS.items():
        direction = {f"group-{k}": (k == group) - w for k, w in WEIGHTS.items()}
        dots = []
        for sign in (1, -1):
            mover.move_to(survey.around(group, sign * 0.25))
            toy.zero_grad()
            toy.rows().mean().backward()
            dots.append(mover.gradient_dots(direction))
        by_tensor += 0.5 * weight * (dots[0] - dots[1]) / 0.5
    assert by_tensor.sum() == pytest.approx(found["measured"]["value"], rel=1e-9)
    assert mover.names == ["first", "second"]
    # The split between tensors is that of d ∘ (H d), cross terms and all.
    places = {
        label: np.concatenate([s.flat("first").numpy(), s.flat("second").numpy()]) for label, s in sources.items()
    }
    mean = sum(w * places[f"group-{k}"] for k, w in WEIGHTS.items())
    hessian = toy.hessians.mean(dim=0).numpy()
    expected = sum(
        0.5 * w * (places[f"group-{k}"] - mean) * (hessian @ (places[f"group-{k}"] - mean)) for k, w in WEIGHTS.items()
    )
    assert by_tensor == pytest.approx([expected[:6].sum(), expected[6:].sum()])


@pytest.fixture(scope="module")
def llama(tiny_plan, tiny_groups: list[Path]) -> tuple[torch.nn.Module, dict[str, Checkpoint]]:  # type: ignore[no-untyped-def]
    base = tiny_plan.base_folder()
    aligned = align(base, tiny_groups)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model, dict(zip(("base", "group-0", "group-1"), aligned, strict=True))


def test_at_a_checkpoint_the_model_is_that_checkpoint(llama, tiny_groups: list[Path]) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    mover = Mover(model, sources)
    mover.move_to(Point.of({"group-1": 1.0}))
    trained = load_file(tiny_groups[1] / "model.safetensors")
    assert mover.names == sorted(trained)
    assert "lm_head.weight" not in mover.names, "it is tied, and moves with the embeddings"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert torch.equal(model.lm_head.weight, trained["model.embed_tokens.weight"])


def test_a_sum_is_rounded_once_also_beyond_the_ends(llama, tiny_groups: list[Path]) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    Mover(model, sources).move_to(Point.of({"base": 0.7, "group-0": 1.1, "group-1": -0.8}))
    for name, parameter in model.named_parameters():
        base, first, second = (sources[label].flat(name).double() for label in ("base", "group-0", "group-1"))
        exact = (0.7 * base + 1.1 * first - 0.8 * second).float().reshape(parameter.shape)
        torch.testing.assert_close(parameter.detach(), exact, rtol=0, atol=1e-7)


def test_noise_has_the_size_asked_for_and_repeats(llama) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    mover = Mover(model, sources)

    def moved(sigma: float, seed: int) -> torch.Tensor:
        mover.move_to(Point.of({"base": 1.0}, (sigma, seed)))
        embedding = model.get_input_embeddings().weight.detach().clone()
        return embedding.reshape(-1) - sources["base"].flat("model.embed_tokens.weight").float()

    first = moved(0.05, 0)
    size = sources["base"].flat("model.embed_tokens.weight").float().norm()
    assert first.norm() / size == pytest.approx(0.05, rel=0.03)
    assert torch.equal(moved(0.05, 0), first)
    assert abs(torch.nn.functional.cosine_similarity(moved(0.05, 1), first, dim=0)) < 0.05
    torch.testing.assert_close(moved(0.1, 0), 2 * first, rtol=1e-3, atol=1e-6)


def test_inner_products_are_those_of_the_files(llama) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    mover = Mover(model, sources)
    grams, squares = mover.grams(["group-0", "group-1"])
    for index, name in enumerate(mover.names):
        base, first, second = (sources[label].flat(name).double() for label in ("base", "group-0", "group-1"))
        moved = torch.stack([first - base, second - base])
        np.testing.assert_allclose(grams[index], (moved @ moved.T).numpy(), rtol=1e-9)
        assert squares[index] == pytest.approx(float(base @ base))
    assert mover.sizes.sum() == sum(parameter.numel() for parameter in model.parameters())


def test_a_value_that_is_not_finite_is_named(llama, tiny_groups: list[Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    tensors = load_file(tiny_groups[1] / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    mover = Mover(model, {**sources, "group-1": Checkpoint(tmp_path)})
    with pytest.raises(MeritError, match=r"group-1: tensor `model.norm.weight` holds a value that is not finite"):
        mover.grams(["group-0", "group-1"])


def test_a_model_of_other_tensors_is_refused(llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, sources = llama
    tensors = {
        f"other.{name}": tensor for name, tensor in load_file(sources["base"].folder / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MeritError, match="cannot be set in place"):
        Mover(model, {"base": Checkpoint(tmp_path)})


SCRIPT = """
import json, sys, threading, time
import torch
from pathlib import Path
from merit_hf.align import Checkpoint
from merit_hf.diagnosis.basin import Point
from merit_hf.diagnosis.interpolate import Mover

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folders = sys.argv[1:]
model = torch.nn.Linear(4096, 4096, bias=False)
sources = {label: Checkpoint(Path(f)) for label, f in zip(["base", *(f"group-{k}" for k in range(9))], folders)}
mover = Mover(model, sources)
labels = list(sources)[1:]
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
mover.move_to(Point.of({label: 1 / len(labels) for label in labels}))
mover.grams(labels)
done = True
thread.join()
sys.stdout.write(json.dumps([before, peak]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_nine_checkpoints_take_no_more_memory_than_pieces_of_them(tmp_path: Path) -> None:
    folders = []
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"weight": torch.full((4096, 4096), float(number))}, folder / "model.safetensors")
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    # Pieces of 1 MB; the nine files together hold 604 MB.
    assert peak - before < 128 << 20
