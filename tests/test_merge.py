"""The merge of checkpoints: exact arithmetic, refusals, completeness, atomicity, and parity with mergekit."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import (
    DTYPES,
    WEIGHTS,
    Tensors,
    assert_nearest,
    load,
    make_family,
    make_folder,
    mean64,
    rewrite,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import ConfigError, MeritError
from merit_hf.device_sums import round_once
from merit_hf.merge import merge_checkpoints


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Path]]]:
    return make_family(tmp_path_factory.mktemp("family"))


# Arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_groups_merge_to_themselves_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    generator = torch.Generator().manual_seed(0)
    # Every magnitude, signed zeros and subnormals, and more than one piece.
    bits = torch.randint(torch.iinfo(integers).min, torch.iinfo(integers).max, ((1 << 20) + 77,), generator=generator)
    values = bits.to(integers).view(dtype)
    values = torch.where(values.isfinite(), values, torch.tensor(-0.0, dtype=dtype))
    base = make_folder(tmp_path / "base", {"x": torch.ones_like(values)})
    groups = [make_folder(tmp_path / str(k), {"x": values}) for k in range(3)]
    merge_checkpoints(base, groups, [1, 1, 1], tmp_path / "thirds")
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "uneven")
    merge_checkpoints(base, groups[:1], [0.3], tmp_path / "one")
    for name in ("thirds", "uneven", "one"):
        assert torch.equal(load(tmp_path / name)["x"].view(integers), values.view(integers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_float64_mean(family: Callable, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    base, groups = family(dtype, tie_word_embeddings=tied)
    stats = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out")
    merged, exact = load(tmp_path / "out"), mean64(groups, WEIGHTS)
    assert merged.keys() == load(base).keys()
    assert ("lm_head.weight" in merged) == (not tied)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert_nearest(tensor, exact[name])
    origin = load(base)

    def norm(terms: Tensors) -> float:
        return torch.cat([term.double().flatten() for term in terms.values()]).norm().item()

    assert stats.num_tensors == len(merged)
    assert stats.num_parameters == sum(tensor.numel() for tensor in merged.values())
    assert stats.displacement == pytest.approx(norm({n: exact[n] - origin[n].double() for n in exact}), rel=1e-7)
    for group, found in zip(groups, stats.group_displacements, strict=True):
        tensors = load(group)
        expected = norm({n: tensors[n].double() - origin[n].double() for n in tensors})
        assert found == pytest.approx(expected, rel=1e-7)
    assert stats.cast_loss == pytest.approx(norm({n: merged[n].double() - exact[n] for n in exact}), rel=1e-6)
    assert stats.cast_share == stats.cast_loss / stats.displacement
    assert stats.out_dtype == str(dtype).removeprefix("torch.")


def test_16_bit_results_are_rounded_once() -> None:
    """float64 → float32 → bfloat16 lands on the middle of two neighbours first and then on the wrong one."""
    tiny = 2.0**-40
    above = torch.tensor([1 + 2**-8 + tiny, -1 - 2**-8 - tiny, 1 + 3 * 2**-8 - tiny], dtype=torch.float64)
    assert round_once(above, torch.bfloat16).tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-7]
    half = torch.tensor([1 + 2**-11 + tiny, 2**-25 + 2.0**-60, 2**-25], dtype=torch.float64)
    assert round_once(half, torch.float16).tolist() == [1 + 2**-10, 2**-24, 0.0]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, dtype=torch.float64, generator=generator)
    for dtype in DTYPES:
        assert_nearest(round_once(values, dtype), values)
    # A hair beside the middle of every two neighbours, subnormal ones too.
    for dtype in (torch.bfloat16, torch.float16):
        low = torch.arange(0, 0x7B00, dtype=torch.int16).view(dtype).double()
        high = torch.arange(1, 0x7B01, dtype=torch.int16).view(dtype).double()
        for hair, wanted in ((1 + 2.0**-45, high), (1 - 2.0**-45, low)):
            middle = (low + high) / 2 * hair
            assert torch.equal(round_once(middle, dtype).double(), wanted)
            assert torch.equal(round_once(-middle, dtype).double(), -wanted)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_mixed_dtypes_and_out_dtype(family: Callable, out_dtype: str, tmp_path: Path) -> None:
    base = family(torch.bfloat16)[0]
    groups = [family(dtype)[1][k] for k, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))]
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out", out_dtype=out_dtype)
    exact = mean64(groups, WEIGHTS)
    for name, tensor in load(tmp_path / "out").items():
        assert tensor.dtype == getattr(torch, out_dtype)
        assert_nearest(tensor, exact[name])
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == out_dtype
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "default")
    assert {tensor.dtype for tensor in load(tmp_path / "default").values()} == {torch.bfloat16}
    assert (tmp_path / "default/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_every_tensor_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    def tensors(seed: int) -> Tensors:
        torch.manual_seed(seed)
        position = torch.arange(6)
        return {
            "big": torch.randn(9, 9).bfloat16(),
            "norm": torch.randn(9),
            "position": position,
            "scalar": torch.rand(()),
        }

    base, *groups = [make_folder(tmp_path / str(seed), tensors(seed)) for seed in range(3)]
    stats = merge_checkpoints(base, groups, [1, 3], tmp_path / "out")
    merged, exact = load(tmp_path / "out"), mean64(groups, [1, 3])
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in tensors(0).items()}
    assert torch.equal(merged["position"], torch.arange(6))
    for name in ("big", "norm", "scalar"):
        assert_nearest(merged[name], exact[name])
    assert stats.out_dtype == "bfloat16"


def test_sharded_and_single_inputs_give_the_same_bytes(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.float32)
    pieces = []
    for k, folder in enumerate((base, *groups)):
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(
            tmp_path / f"sharded-{k}", max_shard_size=f"{10 + 7 * k}KB"
        )
        pieces.append(tmp_path / f"sharded-{k}")
        assert len(list(pieces[-1].glob("model-*.safetensors"))) > 1
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "single")
    merge_checkpoints(pieces[0], [groups[0], pieces[2], pieces[3]], WEIGHTS, tmp_path / "mixed")
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "split", max_shard_size="20KB")
    assert (tmp_path / "single/model.safetensors").read_bytes() == (tmp_path / "mixed/model.safetensors").read_bytes()
    assert weights_sha256(tmp_path / "split") == weights_sha256(tmp_path / "single")
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "split", dtype="auto")
    assert torch.equal(model.model.norm.weight, load(tmp_path / "single")["model.norm.weight"])


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_mean_is_convex_and_blind_to_order(
    weights: list[float], seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(weights))))
    generator = torch.Generator().manual_seed(seed)
    values = [(torch.randn(64, generator=generator) * 10).to(dtype) for _ in weights]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [make_folder(root / str(k), {"x": value}) for k, value in enumerate(values)]
        merge_checkpoints(folders[0], folders, weights, root / "out")
        shuffled = [folders[k] for k in order]
        merge_checkpoints(folders[0], shuffled, [weights[k] for k in order], root / "shuffled")
        merge_checkpoints(folders[0], folders, [3 * weight for weight in weights], root / "scaled")
        merged = load(root / "out")["x"]
        # Rounding is monotone: the bounds are values of the dtype themselves, so they hold exactly.
        assert bool((merged >= torch.stack(values).amin(0)).all())
        assert bool((merged <= torch.stack(values).amax(0)).all())
        for other in ("shuffled", "scaled"):
            assert torch.allclose(
                load(root / other)["x"].double(), merged.double(), rtol=torch.finfo(dtype).eps, atol=1e-12
            )


# Tied weights


def test_tied_head_that_some_checkpoints_store_is_dropped(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.float32, tie_word_embeddings=True)
    explicit = Path(shutil.copytree(groups[1], tmp_path / "explicit"))
    rewrite(explicit, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "plain")
    merge_checkpoints(base, [groups[0], explicit, groups[2]], WEIGHTS, tmp_path / "out")
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "plain")
    full_base = Path(shutil.copytree(base, tmp_path / "full_base"))
    rewrite(full_base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    merge_checkpoints(full_base, groups, WEIGHTS, tmp_path / "from_full")
    assert weights_sha256(tmp_path / "from_full") == weights_sha256(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tie_that_is_the_default_of_the_class(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
        config = json.loads((folders[-1] / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folders[-1] / "config.json").write_text(json.dumps(config))
    rewrite(folders[1], lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    merge_checkpoints(folders[0], folders[1:], [1, 1], tmp_path / "out")
    assert load(tmp_path / "out").keys() == load(folders[0]).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_extra_head_that_is_no_alias_is_refused(family: Callable, tied: bool, tmp_path: Path) -> None:
    base, groups = family(torch.float32, tie_word_embeddings=True)
    base, other = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (base, groups[1])]
    if tied:
        rewrite(other, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        rewrite(other, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with pytest.raises(MeritError, match=f"{other}: not the tensors of the base .*has in addition lm_head.weight"):
        merge_checkpoints(base, [groups[0], other], [1, 1], tmp_path / "out")


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b"), "not the tensors of the base .*: lacks b. Merge checkpoints"),
        (lambda t: t.update(d=torch.ones(1)), "not the tensors of the base .*: has in addition d. Merge checkpoints"),
        (lambda t: t.update(b=torch.ones(5)), r"other shapes than the base's: b \(5,\), in the base \(4,\)"),
        (lambda t: t.update(b=torch.ones(4, dtype=torch.int32)), "dtypes that do not merge: b I32, in the base F32"),
        (lambda t: t.update(c=torch.tensor([1, 2, 4])), r"tensor `c` \(I64\) differs from the base's"),
        (lambda t: t["a"][1].fill_(float("nan")), "tensor `a` is not finite .* at flat index 3"),
        (lambda t: t["b"][2].fill_(float("-inf")), "tensor `b` is not finite .* at flat index 2"),
        (lambda t: t.update(b=torch.ones(4).to(torch.float8_e4m3fn)), "b F8_E4M3, in the base F32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    change: Callable[[Tensors], object], message: str, tmp_path: Path
) -> None:
    def tensors() -> Tensors:
        return {"a": torch.rand(2, 3), "b": torch.rand(4), "c": torch.tensor([1, 2, 3])}

    base, good, bad = [make_folder(tmp_path / name, tensors()) for name in ("base", "good", "bad")]
    rewrite(bad, change)
    with pytest.raises(MeritError, match=f"^{bad}: .*({message})") as caught:
        merge_checkpoints(base, [good, bad], [1, 1], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "base", "good"]


def test_many_differences_are_cut_to_three(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", {f"t{k}": torch.ones(2) for k in range(9)})
    bad = make_folder(tmp_path / "bad", {"t0": torch.ones(2)})
    with pytest.raises(MeritError, match="lacks t1, t2, t3 and 5 more"):
        merge_checkpoints(base, [bad], [1], tmp_path / "out")


def test_non_finite_base_is_named(tmp_path: Path) -> None:
    values = torch.ones(1000, 300)
    good = make_folder(tmp_path / "good", {"x": values})
    values[900, 1] = float("inf")
    base = make_folder(tmp_path / "base", {"x": values})
    with pytest.raises(MeritError, match=f"^{base}: tensor `x` is not finite .* at flat index 270001"):
        merge_checkpoints(base, [good], [1], tmp_path / "out")


def test_values_beyond_the_output_dtype_are_refused(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / str(k), {"x": torch.tensor([1.0, 70000.0])}) for k in range(2)]
    with pytest.raises(MeritError, match=r"`x`: the merged values exceed the range of float16.*bfloat16"):
        merge_checkpoints(folders[0], folders[1:], [1], tmp_path / "out", out_dtype="float16")
    huge = [make_folder(tmp_path / f"f64-{k}", {"x": torch.tensor([1e200], dtype=torch.float64) * k}) for k in (1, 2)]
    merge_checkpoints(huge[0], huge, [1, 1], tmp_path / "huge")
    assert load(tmp_path / "huge")["x"].item() == 1.5e200


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", {"x": torch.ones(2)})
    bad = make_folder(tmp_path / "bad", {"x": torch.ones(2)}, quantization_config={"quant_method": "gptq"})
    with pytest.raises(MeritError, match=f"^{bad}: quantised weights \\(gptq\\)"):
        merge_checkpoints(base, [bad], [1], tmp_path / "out")


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_weights_must_be_positive_and_finite(family: Callable, bad: float, tmp_path: Path) -> None:
    base, groups = family()
    message = re.escape(f"{groups[1]}: weight {bad}: expected a positive, finite number")
    with pytest.raises(ConfigError, match=message):
        merge_checkpoints(base, groups, [1, bad, 1], tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_calls_that_make_no_sense(family: Callable, tmp_path: Path) -> None:
    base, groups = family()
    cases = [
        (([], []), {}, "no checkpoints to merge"),
        ((groups, [1, 2]), {}, "2 weights for 3 checkpoints"),
        (([groups[0], groups[0]], [1, 2]), {}, "listed twice. List it once"),
        ((groups, [1e308, 1e308, 1]), {}, "no finite sum"),
        ((groups, [1, 1, 1]), {"engine": "magic"}, "engine 'magic': expected one of safetensors, mergekit"),
        ((groups, [1, 1, 1]), {"out_dtype": "int8"}, "out_dtype 'int8': expected one of float32, bfloat16, float16"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            merge_checkpoints(base, *arguments, tmp_path / "out", **options)


def test_pickles_and_missing_shards_are_refused(family: Callable, tmp_path: Path) -> None:
    base, groups = family()
    pickled = Path(shutil.copytree(groups[0], tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(MeritError, match=f"{pickled}: weights only as pickle"):
        merge_checkpoints(base, [pickled], [1], tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(groups[0]).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lost = sorted((tmp_path / "shards").glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(MeritError, match=f"shards missing, first {lost.name}"):
        merge_checkpoints(base, [tmp_path / "shards"], [1], tmp_path / "out")


def test_the_first_of_several_wrong_values_is_named(tmp_path: Path) -> None:
    values = torch.ones(3_000_000)
    base = make_folder(tmp_path / "base", {"a": torch.ones(5), "x": values})
    values[[400_000, 1_700_000, 2_999_999]] = float("nan")
    bad = make_folder(tmp_path / "bad", {"a": torch.ones(5), "x": values})
    for _ in range(3):
        with pytest.raises(MeritError, match=f"^{bad}: tensor `x` is not finite .* at flat index 400000"):
            merge_checkpoints(base, [bad], [1], tmp_path / "out")
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nowhere"])
def test_a_device_that_cannot_add_is_refused(device: str, family: Callable, tmp_path: Path) -> None:
    base, groups = family()
    with pytest.raises(ConfigError, match=f"device '{device}': .*Expected cpu, or an accelerator with float64"):
        merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out", device=device)
    assert not any(tmp_path.iterdir())
