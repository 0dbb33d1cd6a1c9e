"""Small copies of the recipes, run as their READMEs say: the same YAML, a tiny base, a few rows of the same columns.

Bases and datasets lie on a loopback Hub under their real names and in their real layout, so that a copy differs from
its recipe in sizes alone, and in how many of its datasets it has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import datasets
import make_llava
import prepare_vision_flan
import torch
import yaml
from hub_merit import ROOT, Account
from hub_server import HubServer
from tiny import as_chat, make_base, make_tokenizer, task_rows, write_jsonl
from transformers import Qwen2Config, Qwen2ForCausalLM

from merit_hf.manifest import read_manifest
from merit_hf.overrides import read_mapping
from merit_hf.plan import PartitionPlan

RECIPES = ROOT / "recipes"
CPU_2 = RECIPES / "accelerate_configs" / "cpu_2.yaml"
ROWS = 16
# What a copy has in place of the recipe's own, where the recipe has it at all.
SMALLER = {
    "plan": {"num_groups": 2, "num_samples": 4, "sketch_dim": 512},
    "sft": {
        "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
    },
}  # fmt: skip
# Where and how often a training saves does not change what it is.
SAVES = ("sft.save_strategy=steps", "sft.save_steps=2")
TASKS = ("copy", "reverse", "repeat", "count", "first", "upper")
UPLOAD = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
api = HfApi()
for kind in ("model", "dataset"):
    for folder in sorted(Path(sys.argv[1], kind).glob("*")):
        api.create_repo(f"org/{folder.name}", repo_type=kind)
        api.upload_folder(folder_path=folder, repo_id=f"org/{folder.name}", repo_type=kind)
"""


def tiny_qwen(tied: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@dataclass(frozen=True)
class Recipe:
    """How a recipe is made small.

    Attributes:
        base: makes the tiny base. stands_for: where that is of another architecture than the recipe's, which and why.
        config: of accelerate_configs, as the README names it; on a CPU, cpu_2 runs in place of those for several GPUs.
        datasets: those of the copy; all where it is empty.
        freeze: in place of the recipe's, where the tiny base calls its modules otherwise.
    """

    base: Callable[[Path], Path]
    config: str
    datasets: tuple[str, ...] = ()
    stands_for: str = ""
    freeze: tuple[str, ...] = ()


_SMOL = ("everyday", "rewrite", "metamath", "gsm8k", "dolly-open-qa", "dolly-brainstorming")
COPIES = {
    "smollm2-135m": Recipe(make_base, "single_gpu", _SMOL),
    "smollm2-lora": Recipe(make_base, "single_gpu", _SMOL),
    "qwen2.5-3b-flan": Recipe(tiny_qwen(True), "ddp", ("aeslc", "anli_r1", "squad_v1", "wsc")),
    "qwen2.5-7b-mixture": Recipe(
        tiny_qwen(False), "fsdp2",
        ("smoltalk-apigen-80k", "smoltalk-everyday-conversations", "tulu-coconot", "tulu-aya", "flan-aeslc_1_0_0",
         "flan-anli_r1_0_1_0", "flan-wiqa_effect_with_label_answer", "flan-trec_1_0_0"),
    ),
    "qwen2.5-vl-3b-vision-flan": Recipe(
        make_llava.make_base, "ddp", ("GQA", "VQAv2", "ITM", "VQA_color"),
        "a tiny LLaVA: Qwen2.5-VL's processor needs torchvision", ("model.vision_tower",),
    ),
    "llava-tiny": Recipe(make_llava.make_base, "single_gpu"),
    "quickstart": Recipe(make_base, "single_gpu", ("calendar_arithmetic", "syllogism", "emoji", "chat_en")),
}  # fmt: skip


@dataclass
class Outcome:
    """What a copy's run showed. Tokens are exact where every group's ledger is the plan's; a resume is exact where the
    weights of a training that was killed and went on are, byte for byte, those of one that was not."""

    num_datasets: int
    tokens: bool
    killed: bool
    resume: bool
    wrapper: str | None
    num_processes: int
    merged: bool


class Kitchen:
    """A loopback Hub that holds what the recipes name, and a user of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hub = folder, HubServer()

    def __enter__(self) -> Self:
        self.hub.__enter__()
        self.user = Account(self.hub, "alice", self.folder / "alice", OMP_NUM_THREADS="1")
        self._publish()
        return self

    def __exit__(self, *_: object) -> None:
        self.user.close()
        self.hub.__exit__()

    def config(self, name: str) -> Path:
        """The copy of a recipe, with the local files that it names."""
        copy, folder = COPIES[name], self.user.folder / name
        content = scaled(name)
        if content["base"]["model_name_or_path"] == "base":
            copy.base(folder / "base")
        if name == "quickstart":
            for entry, task in zip(content["datasets"], TASKS, strict=False):
                for key, seed in (("path", 0), ("eval_path", 1)):
                    write_jsonl(folder / entry[key], [as_chat(row) for row in task_rows(task, ROWS, seed)])
        elif name == "llava-tiny":
            for task in make_llava.TASKS:
                make_llava.write_task(task, ROWS, folder / "data")
                make_llava.write_task(task, 4, folder / "data", seed=1, suffix="_eval")
        elif copy.freeze:
            images, items = vision_flan_items(folder / "images_191task_1k", copy.datasets)
            prepare_vision_flan.write_tasks(items, copy.datasets, images, folder / "data")
        folder.mkdir(exist_ok=True)
        path = folder / "mixture.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run(self, name: str) -> Outcome:
        """Plan, train one group alone and killed, the other by two processes where the recipe has several, merge."""
        config, folder = self.config(name), self.user.folder / name / "run"
        plan_folder, groups = folder / "plan", folder / "groups"
        self.user("plan", config, "--output", plan_folder).check()
        plan = PartitionPlan.from_pretrained(plan_folder)
        self.user("train", plan_folder, *SAVES, "--group", 0, "--output", groups / "0").check()
        killed = self._kill_and_resume(plan_folder, folder / "resumed")
        if COPIES[name].config == "single_gpu":
            self.user("train", plan_folder, "--group", 1, "--output", groups / "1").check()
        else:
            self._launch(plan_folder, 1, groups / "1")
        checkpoints = [groups / str(number) for number in range(plan.num_groups)]
        self.user("verify", plan_folder, *checkpoints).check()
        self.user("merge", plan_folder, *checkpoints, "--output", folder / "merged").check()
        manifests = [read_manifest(checkpoint) for checkpoint in checkpoints]
        return Outcome(
            num_datasets=len(plan.names),
            tokens=all(
                (found["num_input_tokens"], found["num_loss_tokens"])
                == (planned.train_input_tokens, planned.train_loss_tokens)
                for found, planned in zip(manifests, plan.groups, strict=True)
            ),
            killed=killed,
            resume=weights(folder / "resumed") == weights(groups / "0"),
            wrapper=manifests[1]["wrapper"],
            num_processes=manifests[1]["num_processes"],
            merged=read_manifest(folder / "merged")["kind"] == "merged",
        )

    def _kill_and_resume(self, plan: Path, output: Path) -> bool:
        """Train group 0, SIGKILL once it has saved, and again; False where it always ended before the kill came."""
        part = output.with_name(output.name + ".part")
        arguments = ("train", plan, *SAVES, "--group", 0, "--output", output)
        for _ in range(5):
            command = self.user.start(*arguments)
            ended = command.folder / "code"
            while not ended.exists() and not list(part.glob("checkpoint-*/trainer_state.json")):
                time.sleep(0.002)
            if not ended.exists():
                command.kill()
            if not output.exists():
                self.user(*arguments).check()
                return True
            shutil.rmtree(output)
        return False

    def _launch(self, plan: Path, group: int, output: Path) -> None:
        """As the README says, but for the config: `accelerate launch` with two processes on the CPU."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
        command += [CPU_2, RECIPES / "train_group.py", plan, "--group", group, "--output", output]
        environment = self.hub.environ("alice", HF_HOME=str(self.user.cache), PYTHONPATH=str(ROOT))
        environment["HF_DATASETS_CACHE"] = str(self.user.cache / "datasets")
        done = subprocess.run(
            [*map(str, command), "--num-processes", "2", "sft.per_device_train_batch_size=1"],
            env=environment, cwd=self.user.folder, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def _publish(self) -> None:
        names = dict[str, tuple[str, str]]()
        for name, copy in COPIES.items():
            base = read_recipe(name)["base"]["model_name_or_path"]
            if "/" in base and base not in names and not copy.freeze:
                names[base] = ("model", base.replace("/", "_"))
                copy.base(self.folder / "hub" / "model" / names[base][1])
        entries = [entry for name in COPIES for entry in scaled(name)["datasets"] if not is_file(entry)]
        for repo in sorted({entry["path"] for entry in entries}):
            names[repo] = ("dataset", repo.replace("/", "_"))
            write_repo(self.folder / "hub" / "dataset" / names[repo][1], [e for e in entries if e["path"] == repo])
        self.user("-c", UPLOAD, self.folder / "hub").check()
        repos = self.hub.hub.repos
        for real, (kind, name) in names.items():
            repo = repos.pop((kind, f"org/{name}"))
            repo.id = real
            repos[kind, real] = repo


def read_recipe(name: str) -> dict[str, Any]:
    """The YAML of a recipe as written."""
    (path,) = (RECIPES / name).glob("*.yaml")
    return read_mapping(path)


def scaled(name: str) -> dict[str, Any]:
    """A recipe's YAML with fewer datasets, and smaller numbers where it has numbers; everything else as it stands."""
    content, copy = read_recipe(name), COPIES[name]
    content["datasets"] = [
        entry for entry in content["datasets"] if not copy.datasets or entry["name"] in copy.datasets
    ]
    for section, values in SMALLER.items():
        own = content[section]
        own |= {key: value for key, value in values.items() if own.get(key) is not None}
    if copy.freeze:
        content["base"] |= {"freeze": list(copy.freeze), "model_name_or_path": "base"}
    return content


def is_file(entry: dict[str, Any]) -> bool:
    return Path(entry["path"]).suffix in (".jsonl", ".parquet")


def pairs(number: int) -> list[dict[str, str]]:
    return task_rows(TASKS[number % len(TASKS)], ROWS, number)


def columns(repo: str, entry: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Rows with the columns that the real dataset has."""
    rows = pairs(number)
    asked = [{"role": "user", "content": row["prompt"]} for row in rows]
    answered = [{"role": "assistant", "content": row["completion"]} for row in rows]
    chats = [[ask, answer] for ask, answer in zip(asked, answered, strict=True)]
    made: dict[str, Callable[[int], dict[str, Any]]] = {
        "HuggingFaceTB/smoltalk": lambda i: {"messages": chats[i]},
        "openai/gsm8k": lambda i: {"question": rows[i]["prompt"], "answer": rows[i]["completion"]},
        "databricks/databricks-dolly-15k": lambda i: {
            "instruction": rows[i]["prompt"], "context": "", "response": rows[i]["completion"], **entry["where"]
        },
        "Muennighoff/flan": lambda i: {
            "inputs": rows[i]["prompt"], "targets": rows[i]["completion"], "task": entry["name"]
        },
        "allenai/tulu-3-sft-mixture": lambda i: {"id": f"{number}-{i}", "messages": chats[i], **entry["where"]},
        "sordonia/flan-10k-flat": lambda i: {
            "source": rows[i]["prompt"], "target": rows[i]["completion"], "task_source": "Flan2021",
            "template_type": "zs_noopt", "split": "train", **entry["where"],
        },
    }  # fmt: skip
    return [made[repo](i) for i in range(ROWS)]


def write_repo(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """A dataset repo with all that some entries ask of it: configs, files, or one table of several tasks."""
    repo, tables = entries[0]["path"], defaultdict[tuple[str, str], list[dict[str, Any]]](list)
    seen = set()
    for number, entry in enumerate(entries):
        if (asked := json.dumps({**entry, "name": None, "tag": None}, sort_keys=True)) in seen:
            continue
        seen.add(asked)
        rows = columns(repo, entry, number)
        if "data_files" in entry:
            for file in entry["data_files"].values():
                write_jsonl(folder / file, rows)
            continue
        config = entry.get("config", "default")
        tables[config, entry.get("split", "train")] += rows
        if "eval_split" in entry:
            tables[config, entry["eval_split"]] += rows[:4]
    configs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for (config, split), rows in tables.items():
        file = folder / config / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
        configs[config].append({"split": split, "path": f"{config}/{split}.parquet"})
    metadata = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata) if configs else 'license: mit'}\n---\n")


def vision_flan_items(images: Path, tasks: Sequence[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Annotations as the collection has them, and their pictures in a folder."""
    images.mkdir(parents=True)
    items = []
    for task in tasks:
        for number, row in enumerate(make_llava.colour_rows(f"{task}?", "{}", ROWS + 1)):
            name = f"{task}_{number}.png"
            (images / name).write_bytes(row["images"][0])
            turns = [("human", f"<image>\n{row['prompt'][0]['content']}"), ("gpt", row["completion"][0]["content"])]
            items.append(
                {
                    "id": f"{task}_{number}", "image": name, "task_name": task,
                    "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
                }
            )  # fmt: skip
    return images, items


def weights(checkpoint: Path) -> bytes:
    """The bytes of a checkpoint's weights, whole or an adapter's."""
    (file,) = checkpoint.glob("*model.safetensors")
    return file.read_bytes()
