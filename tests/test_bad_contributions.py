"""Checkpoints that somebody altered and hashed anew, each refused by the name of the check that has to see it.

Every one lies in a repo of its own on a Hub; one process verifies them all, as `merit accept` would, beside the honest
checkpoints of the other groups. What no check sees is at the end, so that nobody believes otherwise.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contributions import WEIGHTS, Shop, copy_of, publish
from hub_server import HubServer
from safetensors.torch import load_file
from tiny import make_base, make_mixture

from merit_hf.config import MeritConfig, MeritError
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.training import train_group
from merit_hf.verification.verify import verify_checkpoint

TASKS = ("copy", "reverse", "first", "upper")
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
QUIET = Progress(quiet=True)
RUN = """
import json, sys
from pathlib import Path
from merit_hf.plan import PartitionPlan
from merit_hf.verification.sources import open_source
from merit_hf.verification.verify import verify_checkpoints
jobs, plan = json.loads(Path(sys.argv[1]).read_text()), PartitionPlan.from_pretrained(sys.argv[2])
found = {}
for job in jobs:
    sources = [open_source(text) for text in [job["checkpoint"], *job["others"]]]
    try:
        first = verify_checkpoints(plan, sources, job["level"], num_asked=1)[0]
        found[job["checkpoint"]] = [[c.name, c.ok, c.expected, c.found] for c in first.checks]
    except Exception as error:
        found[job["checkpoint"]] = [[type(error).__name__, False, "", str(error)]]
Path(sys.argv[3]).write_text(json.dumps(found))
"""


def set_json(**changes: Any) -> Callable[[Shop], None]:
    return lambda shop: shop.rewrite(**changes)


def within(key: str, **changes: Any) -> Callable[[Shop], None]:
    return lambda shop: shop.rewrite(**{key: {**shop.manifest()[key], **changes}})


def write(name: str, content: bytes | str, hashed: bool = True) -> Callable[[Shop], None]:
    def make(shop: Shop) -> None:
        (shop.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shop.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if hashed:
            shop.rehash()

    return make


def odd(**files: Any) -> Callable[[Shop], None]:
    return lambda shop: shop.odd.update(files)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Shop], None]:
    return lambda shop: shop.tensors(change)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Shop], None]:
    return tensors(lambda t: t.update({name: change(t[name])}))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Shop], None]:
    return lambda shop: shop.header(change)


def raw(change: Callable[[bytes], bytes]) -> Callable[[Shop], None]:
    return lambda shop: shop.raw(change)


def config(name: str = "config.json", **changes: Any) -> Callable[[Shop], None]:
    return lambda shop: shop.edit(name, lambda content: content.update(changes))


def weights_of(number: int) -> Callable[[Shop], None]:
    return tensors_from(lambda shop: shop.honest[number])


def tensors_from(where: Callable[[Shop], Path]) -> Callable[[Shop], None]:
    def make(shop: Shop) -> None:
        origin = load_file(where(shop) / WEIGHTS)
        shop.tensors(lambda t: t.update({name: origin[name].to(t[name].dtype) for name in t}))

    return make


def noise(scale: float) -> Callable[[Shop], None]:
    """The base, and noise on every tensor as long as `scale` of the move that it replaces."""

    def like(_: str, move: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(move.shape, generator=torch.Generator().manual_seed(0))
        # Of one size each, so that none is longer than a step.
        return drawn.sign() * move.norm() / move.numel() ** 0.5 * scale

    return lambda shop: shop.moves(like)


def of_another_base(shop: Shop) -> None:
    tensors_from(lambda _: make_base(shop.folder.parent / "other-base", seed=5))(shop)


def shuffle(tensor: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))
    return tensor.flatten()[order].reshape(tensor.shape)


def lie_about_shard(shop: Shop) -> None:
    shop.shard()
    shop.edit(
        "model.safetensors.index.json", lambda c: c["weight_map"].update({NORM: "model-00001-of-00009.safetensors"})
    )


def drop_shard(shop: Shop) -> None:
    shop.shard()
    sorted(shop.folder.glob("model-*.safetensors"))[0].unlink()
    shop.rehash()


def drop_index(shop: Shop) -> None:
    shop.shard()
    (shop.folder / "model.safetensors.index.json").unlink()
    shop.rehash()


def swap_two_tokens(shop: Shop) -> None:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    shop.edit("tokenizer.json", change)


def other_template(shop: Shop) -> None:
    path = shop.folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", " "))
    shop.rehash()


def other_lfs_hash(shop: Shop) -> None:
    """The listing tells that the weights are not those of the manifest."""
    shop.odd[WEIGHTS] = ("0" * 64, (shop.folder / WEIGHTS).stat().st_size)


def hide_swap(shop: Shop) -> None:
    """A file that no LFS hash gives away is swapped after it was hashed."""
    path = shop.folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"▁', '" ') + " ")


Make = Callable[[Shop], None]
# name → (check, make), in the order of the checks. None of these may cost a download of weights.
BEFORE_WEIGHTS: dict[str, tuple[str, Make]] = {
    "no manifest": ("merit.json", lambda s: (s.folder / "merit.json").unlink()),
    "huge manifest": ("merit.json", odd(**{"merit.json": ("1" * 64, 20 << 20)})),
    "manifest is no JSON": ("merit.json", write("merit.json", "{", hashed=False)),
    "manifest is no UTF-8": ("merit.json", write("merit.json", b"\xff\xfe\x00\x01", hashed=False)),
    "manifest is a list": ("merit.json", write("merit.json", "[]", hashed=False)),
    "manifest nested too deeply": ("merit.json", write("merit.json", "[" * 200_000, hashed=False)),
    "deep values": ("datasets", set_json(datasets=[json.loads('{"name":' + "[" * 900 + "]" * 900 + "}")])),
    "other schema": ("merit.json", set_json(schema_version=2)),
    "a merged model": ("kind", set_json(kind="merged")),
    "kind is a list": ("kind", set_json(kind=["group"])),
    "group 99": ("group", set_json(group=99)),
    "group -1": ("group", set_json(group=-1)),
    "group is a bool": ("group", set_json(group=True)),
    "group is a string": ("group", set_json(group="0")),
    "group is NaN": ("group", set_json(group=float("nan"))),
    "in training": ("status", set_json(status="training")),
    "no status": ("status", set_json(status=None)),
    "other plan": ("group_sha256", set_json(group_sha256="0" * 64)),
    "manifest of group 0 says 1": ("group_sha256", set_json(group=1)),
    "other base": ("base weights", within("base", weights_sha256="0" * 64)),
    "base is a string": ("base weights", set_json(base="the same")),
    "other template": ("chat template", within("base", chat_template_sha256="0" * 64)),
    "no datasets": ("datasets", set_json(datasets=[])),
    "datasets is a number": ("datasets", set_json(datasets=7)),
    "other data": ("datasets", lambda s: s.rewrite(datasets=[{**s.manifest()["datasets"][0],
        "fingerprint": "f" * 64}])),
    "more data": ("datasets", lambda s: s.rewrite(datasets=[*s.manifest()["datasets"], {"name": "x"}])),
    "other rate": ("SFT settings", within("sft", learning_rate=0.5)),
    "rate is NaN": ("SFT settings", within("sft", learning_rate=float("nan"))),
    "setting added": ("SFT settings", within("sft", deepspeed="zero.json")),
    "more steps": ("num_steps", set_json(num_steps=10**6)),
    "steps as a float": ("num_steps", lambda s: s.rewrite(num_steps=float(s.manifest()["num_steps"]))),
    "more tokens": ("num_input_tokens", lambda s: s.rewrite(num_input_tokens=s.manifest()["num_input_tokens"] + 1)),
    "fewer tokens": ("num_input_tokens", lambda s: s.rewrite(num_input_tokens=s.manifest()["num_input_tokens"] - 1)),
    "negative tokens": ("num_input_tokens", set_json(num_input_tokens=-5)),
    "tokens by many processes": ("num_input_tokens", set_json(num_input_tokens=10**9, num_processes=10**9)),
    "infinite tokens": ("num_loss_tokens", set_json(num_loss_tokens=float("inf"))),
    "loss tokens is a bool": ("num_loss_tokens", set_json(num_loss_tokens=True)),
    "path above": ("file names", odd(**{"../evil.json": b"{}"})),
    "path far above": ("file names", odd(**{"../../../evil.json": b"{}"})),
    "name with a blank": ("file names", odd(**{"a b.json": b"{}"})),
    "name with a newline": ("file names", odd(**{"a\nb.json": b"{}"})),
    "name that turns around": ("file names", odd(**{"\u202egpj.json": b"{}"})),
    "name that is a glob": ("file names", odd(**{"*": b"{}"})),
    "dot file": ("file names", odd(**{".netrc": b"machine"})),
    "two folders deep": ("file names", odd(**{"a/b/config.json": b"{}"})),
    "pickle": ("no pickled weights", odd(**{"pytorch_model.bin": b"\x80\x04."})),
    "pickle in capitals": ("no pickled weights", odd(**{"OPTIMIZER.PT": b"\x80\x04."})),
    "trainer state": ("no pickled weights", odd(**{"optimizer.pt": b"\x80\x04."})),
    "code": ("known files", write("modeling_llama.py", "import os")),
    "more weights": ("known files", write("extra.safetensors", b"\x00" * 8)),
    "weights in a subfolder": ("known files", odd(**{"original/model.safetensors": b"\x00" * 8})),
    "script in the templates' folder": ("known files", write("additional_chat_templates/x.py", "import os")),
    "too many files": ("number of files", lambda s: s.odd.update({f"f{i}.json": b"{}" for i in range(1001)})),
    "1 TB": ("size", odd(**{"vocab.json": ("2" * 64, 1 << 40)})),
    "no hashes": ("files", set_json(files={})),
    "hashes are a list": ("files", set_json(files=["model.safetensors"])),
    "file not in the manifest": ("files", write("vocab.txt", "a", hashed=False)),
    "file in the manifest alone": ("files", lambda s: (s.folder / "generation_config.json").unlink()),
    "other hash in the listing": ("files", other_lfs_hash),
    "tensor missing": ("tensors", tensors(lambda t: t.pop(NORM))),
    "tensor added": ("tensors", tensors(lambda t: t.update(bias=torch.zeros(2)))),
    "tensor renamed": ("tensors", tensors(lambda t: t.update({NORM + "2": t.pop(NORM)}))),
    "tensor flattened": ("tensors", tensor(DOWN, lambda t: t.flatten())),
    "tensor transposed": ("tensors", tensor(DOWN, lambda t: t.T)),
    "tensor of integers": ("tensors", tensor(NORM, lambda t: t.to(torch.int32))),
    "no tensors": ("tensors", tensors(lambda t: t.clear())),
    "header is no JSON": ("tensors", raw(lambda b: b[:8] + b"x" + b[9:])),
    "header longer than the file": ("tensors", raw(lambda b: (1 << 40).to_bytes(8, "little") + b[8:])),
    "header of wrong types": ("tensors", header(lambda h: h[NORM].update(shape=["a", "b"]))),
    "header of three offsets": ("tensors", header(lambda h: h[NORM].update(data_offsets=[0, 1, 2]))),
    "dtype is a list": ("tensors", header(lambda h: h[NORM].update(dtype=["F32"]))),
    "empty file": ("tensors", raw(lambda b: b"")),
    "half a file": ("tensors", raw(lambda b: b[: len(b) // 2])),
    "tensor in two shards": ("tensors", lambda s: write("model-00001-of-00001.safetensors",
        (s.folder / WEIGHTS).read_bytes())(s)),
    "a shard missing": ("tensors", drop_shard),
    "index missing": ("tensors", drop_index),
    "index disagrees": ("tensors", lie_about_shard),
    "index is no JSON": ("tensors", write("model.safetensors.index.json", "{")),
}  # fmt: skip
WITH_WEIGHTS: dict[str, tuple[str, Make]] = {
    "file swapped after hashing": ("checksums", hide_swap),
    "last bytes missing": ("tensors", raw(lambda b: b[:-16])),
    "overlapping tensors": ("tensors", header(lambda h: h["model.layers.0.input_layernorm.weight"].update(
        data_offsets=h["model.layers.1.input_layernorm.weight"]["data_offsets"]))),
    "other rope_theta": ("model config", config(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})),
    "other heads": ("model config", config(num_attention_heads=2)),
    "custom code": ("model config", config(auto_map={"AutoConfig": "modeling_evil.EvilConfig"})),
    "unknown model with custom code": ("model config", config(
        model_type="evil", auto_map={"AutoConfig": "bob/evil--modeling_evil.EvilConfig"})),
    "config is a list": ("model config", write("config.json", "[1]")),
    "config of nonsense": ("model config", config(hidden_size="wide")),
    "two tokens swapped": ("tokenizer", swap_two_tokens),
    "a merge less": ("tokenizer", lambda s: s.edit("tokenizer.json", lambda c: c["model"]["merges"].pop())),
    "tokenizer is a list": ("tokenizer", write("tokenizer.json", "[1]")),
    "chat template in the files": ("chat template in the files", other_template),
    "NaN": ("finite weights", tensor(DOWN, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))),
    "one infinite weight": ("finite weights", tensor(NORM, lambda t: t.index_fill(0, torch.tensor([0]),
        float("inf")))),
    "the base": ("trained", tensors_from(lambda s: s.base)),
    "one layer trained": ("trained", lambda s: s.moves(lambda n, move: move * ("layers.1.mlp" in n))),
    "scaled by 10": ("largest move", tensor(DOWN, lambda t: t * 10)),
    "permuted": ("largest move", tensor(DOWN, shuffle)),
    "zeroed": ("largest move", tensor(DOWN, torch.zeros_like)),
    "one tensor of noise": ("largest move", tensor(DOWN, lambda t: shuffle(torch.randn_like(t)))),
    "all of noise": ("largest move", tensors(lambda t: t.update({n: torch.randn_like(t[n]) for n in t}))),
    "another base": ("largest move", of_another_base),
    "too far": ("largest move", lambda s: s.moves(lambda _, move: move * 20)),
    "base and tiny noise": ("displacement", noise(0.02)),
    "one move left out": ("displacement by tensor", lambda s: s.moves(lambda n, m: m * (n != DOWN))),
    "one move a tenth": ("displacement by tensor", lambda s: s.moves(lambda n, m: m * (0.1 if n == NORM else 1))),
    "group 1's weights": ("own weights", weights_of(1)),
    "group 2's weights, disguised": ("own weights", lambda s: (weights_of(2)(s), s.moves(lambda _, m: m * 0.9))),
}  # fmt: skip
BAD = BEFORE_WEIGHTS | WITH_WEIGHTS
HONEST: dict[str, Make] = {
    "as trained": lambda s: None,
    "in shards": lambda s: s.shard("40KB"),
    "in two shards": lambda s: s.shard("80KB"),
    "saved in bfloat16": tensors(lambda t: t.update({n: t[n].bfloat16() for n in t})),
    "another card": write("README.md", "---\nlicense: mit\n---\n<b>mine</b>", hashed=False),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> PartitionPlan:
    """Four groups of one task each."""
    folder = tmp_path_factory.mktemp("bad")
    path = make_mixture(folder, TASKS, count=32, split="by_tag", num_groups=None)
    return MeritPlanner(MeritConfig.from_yaml(path, ["sft.num_train_epochs=2", "sft.save_strategy='no'"]), QUIET).plan(
        folder / "plan"
    )


@pytest.fixture(scope="module")
def honest(plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("honest")
    return [train_group(plan, k, folder / str(k), progress=QUIET) for k in range(plan.num_groups)]


Seen = dict[str, tuple[list[list[Any]], list[str]]]


def downloads(hub: HubServer, repos: dict[str, str]) -> dict[str, list[str]]:
    """name → what was fetched whole from the storage behind its repo: the jobs run one after the other."""
    found: dict[str, list[str]] = {repo: [] for repo in repos.values()}
    current = ""
    for exchange in hub.exchanges:
        asked = re.search(r"/(bob/try-\d+)(?=/|$)", exchange.path)
        if asked:
            current = asked[1]
        elif exchange.method == "GET" and exchange.path.startswith("/lfs/") and not exchange.range:
            found[current].append(exchange.path)
    return {name: found[repo] for name, repo in repos.items()}


@pytest.fixture(scope="module")
def seen(plan: PartitionPlan, honest: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """name → (its checks, the downloads of weights it cost)."""
    folder, repos = tmp_path_factory.mktemp("shop"), {}
    with HubServer() as hub:
        for number, (name, make) in enumerate({**{n: m for n, (_, m) in BAD.items()}, **HONEST}.items()):
            shop = copy_of(honest, plan.base_folder(), folder / str(number))
            make(shop)
            repos[name] = f"bob/try-{number}"
            publish(hub, repos[name], shop)
            shutil.rmtree(shop.folder)
        others = [str(path) for path in honest[1:]]
        jobs = [
            {"checkpoint": repo, "others": [] if name in BEFORE_WEIGHTS else others, "level": "weights"}
            for name, repo in repos.items()
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder / "jobs.json"), str(plan.folder), str(folder / "found.json")],
            env=hub.environ("alice"), cwd=folder, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((folder / "found.json").read_text())
        whole = downloads(hub, repos)
    assert not list(folder.parent.rglob("evil*"))
    return {name: (found[repo], whole[name]) for name, repo in repos.items()}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_contribution_is_refused_by_name(name: str, seen: Seen) -> None:
    checks, _ = seen[name]
    first = next((check for check in checks if not check[1]), None)
    assert first is not None, f"{name}: every check passed"
    assert first[0] == BAD[name][0], first
    assert first[2] != first[3]
    assert "\n" not in first[3]
    assert len(first[3]) < 500


@pytest.mark.parametrize("name", BEFORE_WEIGHTS)
def test_it_is_refused_before_weights_are_downloaded(name: str, seen: Seen) -> None:
    assert seen[name][1] == []


def test_there_are_many_over_many_checks() -> None:
    assert len(BAD) >= 45
    assert len({check for check, _ in BAD.values()}) >= 16


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_one_passes(name: str, seen: Seen) -> None:
    checks, downloads = seen[name]
    assert [check for check in checks if not check[1]] == []
    assert {"own weights", "displacement by tensor"} <= {check[0] for check in checks}
    # This also shows that the list of downloads would have told.
    assert downloads


@pytest.mark.parametrize("name", [
    "more data", "one move a tenth", "more tokens", "pickle in capitals", "code",
    "tensor missing", "header of wrong types",
    "dtype is a list", "empty file", "overlapping tensors", "half a file", "file swapped after hashing", "custom code",
    "two tokens swapped", "NaN", "the base", "permuted", "group 1's weights",
])  # fmt: skip
def test_in_a_folder_too(name: str, plan: PartitionPlan, honest: list[Path], tmp_path: Path) -> None:
    shop = copy_of(honest, plan.base_folder(), tmp_path / "bad")
    BAD[name][1](shop)
    for path, content in shop.odd.items():
        assert isinstance(content, bytes)
        (shop.folder / path).write_bytes(content)
    checks = verify_checkpoint(plan, shop.folder, others=honest[1:])
    assert next(check for check in checks if not check.ok).name == BAD[name][0]


def test_a_manifest_that_cannot_be_read_in_a_folder_is_an_error(
    plan: PartitionPlan, honest: list[Path], tmp_path: Path
) -> None:
    shop = copy_of(honest, plan.base_folder(), tmp_path / "bad")
    (shop.folder / "merit.json").write_text("[" * 200_000)
    with pytest.raises(MeritError, match="not valid JSON"):
        verify_checkpoint(plan, shop.folder)
