"""The house: imports point down the road, libraries have their rooms, modules stay small, recipes parse."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from merit_hf.config import MeritConfig, check_sft
from merit_hf.sft import build_args

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "merit_hf"
# A room imports rooms to its left only.
ROAD = [
    "errors",
    "fields",
    "overrides",
    "choices",
    "config",
    "text",
    "quiet",
    "versions",
    "entry",
    "progress",
    "workers",
    "sketch",
    "conflict",
    "partition",
    "projection",
    "reliability",
    "stability",
    "readouts",
    "trust",
    "checkpoint",
    "hub",
    "hub_write",
    "sharing.registry",
    "identity",
    "sharing.untrusted",
    "sharing.licences",
    "images",
    "vision",
    "adapters",
    "adapted",
    "sft",
    "data",
    "affinity",
    "oversized",
    "resolved",
    "ledger",
    "tables",
    "plan_files",
    "plan_identity",
    "plan",
    "parents",
    "card_evaluation",
    "trust_words",
    "cards",
    "figures",
    "manifest",
    "verification.sources",
    "verification.checks",
    "report.words",
    "report.charts",
    "report.run_folder",
    "report.blocks",
    "report.sections",
    "report.results",
    "report.diagnosed",
    "report.page",
    "mixture",
    "loss",
    "sharded",
    "gradients",
    "memory",
    "precondition",
    "embeddings",
    "verification.movement",
    "verification.behaviour",
    "verification.verify",
    "sharing.community",
    "sharing.accept",
    "sharing.publish",
    "sharing.publish_data",
    "measure",
    "groups",
    "split_inputs",
    "findings",
    "planner",
    "extension",
    "extend",
    "repartition",
    "estimate",
    "from_trainer",
    "callback",
    "training",
    "launch",
    "align",
    "average",
    "mergekit_engine",
    "merge",
    "adapter_merge",
    "merged_part",
    "group_merge",
    "evaluation.paired",
    "evaluation.metrics",
    "evaluation.held_out",
    "evaluation.generate",
    "evaluation.comparison",
    "evaluation.comparison_table",
    "evaluation.evaluator",
    "evaluation.evaluate",
    "sweep",
    "evaluation.lighteval_tasks",
    "evaluation.harness",
    "diagnosis.basin",
    "diagnosis.evidence",
    "diagnosis.verdict",
    "diagnosis.interpolate",
    "diagnosis.renamed",
    "diagnosis.losses",
    "diagnosis.analysis",
    "diagnosis.probe",
    "diagnosis.wording",
    "diagnosis.diagnose",
    "rounds",
    "pipeline",
    "summary",
    "evaluation.side_by_side",
    "sharing.status",
    "sharing.push",
    "cli_options",
    "cli_plan",
    "cli_hub",
    "cli",
]
# A plan is saved with its card and its figures, which are made of a plan.
UPHILL = {("plan", "cards"), ("plan", "figures"), ("plan", "sharing.publish"), ("planner", "from_trainer")}
# `merit --help`, CONFIG and a look at a plan need none of these rooms to wait for torch.
WITHOUT_TORCH = [
    "errors",
    "fields",
    "overrides",
    "choices",
    "config",
    "text",
    "quiet",
    "versions",
    "entry",
    "progress",
    "workers",
    "conflict",
    "partition",
    "projection",
    "reliability",
    "stability",
    "readouts",
    "trust",
    "checkpoint",
    "hub",
    "hub_write",
    "sharing.registry",
    "sharing.untrusted",
    "sharing.licences",
    "tables",
    "plan",
    "card_evaluation",
    "cards",
    "manifest",
    "report.page",
    "verification.sources",
    "verification.checks",
    "verification.verify",
    "sharing.community",
    "sharing.accept",
    "sharing.publish",
    "sharing.push",
    "sharing.status",
    "cli_options",
    "cli_plan",
    "cli_hub",
    "cli_plan",
    "cli",
]
HUB_NAMES = {
    "hub": None,
    "hub_write": None,
    "card_evaluation": {"EvalResult"},
    "cards": {"DatasetCardData", "ModelCardData"},
    "checkpoint": {"split_state_dict_into_shards_factory"},
}
MAX_LINES = 400
COMMANDS = (
    "plan",
    "split",
    "extend",
    "train",
    "merge",
    "evaluate",
    "diagnose",
    "report",
    "run",
    "verify",
    "push",
    "claim",
    "release",
    "contribute",
    "accept",
    "status",
)


MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`evaluation.metrics` of a file below the package, `__init__` of every package's own."""
    return "__init__" if path.stem == "__init__" else ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


ROOMS = {name_of(path) for path in MODULES} - {"__init__"}


class Import(NamedTuple):
    room: str
    module: str
    name: str | None
    line: int
    lazy: bool


def imports() -> list[Import]:
    found = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            lazy = node not in tree.body
            if isinstance(node, ast.Import):
                found += [Import(name_of(path), alias.name, None, node.lineno, lazy) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
                found += [Import(name_of(path), str(node.module), a.name, node.lineno, lazy) for a in node.names]
    return found


IMPORTS = imports()


def room_of(item: Import) -> str | None:
    """Which of our rooms an import names."""
    if item.module.partition(".")[0] != "merit_hf":
        return None
    room = item.module.partition(".")[2]
    whole = f"{room}.{item.name}" if room else str(item.name)
    return next((name for name in (whole, room) if name in ROOMS), "__init__")


OURS = [(item, target) for item in IMPORTS if (target := room_of(item)) is not None and item.room != "__init__"]


def test_every_room_is_on_the_road() -> None:
    assert sorted(ROAD) == sorted(ROOMS)


def test_imports_point_down_the_road() -> None:
    uphill = [
        f"{item.room}.py:{item.line} imports {target}"
        for item, target in OURS
        if (item.room, target) not in UPHILL and (target not in ROAD or ROAD.index(target) >= ROAD.index(item.room))
    ]
    assert uphill == []
    assert all(item.lazy for item, target in OURS if (item.room, target) in UPHILL)


def test_config_imports_next_to_nothing_of_ours_and_nothing_imports_the_command_line() -> None:
    assert {target for item, target in OURS if item.room == "config"} == {"errors", "fields", "overrides", "choices"}
    assert [item.room for item, target in OURS if target == "cli" and item.room != "cli"] == []


def test_conflict_and_partition_are_pure_arrays() -> None:
    rooms = {"conflict", "partition", "projection"}
    pure = {f"merit_hf.{room}" for room in rooms}
    for room in rooms:
        modules = {item.module for item in IMPORTS if item.room == room} - pure
        outside = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert outside <= {"numpy", "scipy", "sklearn"}, room


def test_every_library_has_its_room() -> None:
    assert {item.room for item in IMPORTS if item.module.split(".")[0] == "mergekit"} <= {"mergekit_engine"}
    assert {item.room for item in IMPORTS if item.module.split(".")[0] == "lm_eval"} == {"evaluation.harness"}
    lighteval = {item.room for item in IMPORTS if item.module.split(".")[0] == "lighteval"}
    assert lighteval == {"evaluation.lighteval_tasks"}
    for item in IMPORTS:
        if item.module.split(".")[0] == "huggingface_hub":
            assert item.room in HUB_NAMES, f"{item.room}.py:{item.line}"
            allowed = HUB_NAMES[item.room]
            assert allowed is None or item.name in allowed, f"{item.room}.py:{item.line}: {item.name}"
    users = {
        library: {i.room for i in IMPORTS if i.module.split(".")[0] == library} for library in ("typer", "pydantic")
    }
    assert users == {"typer": {"cli", "cli_hub", "cli_options", "cli_plan"}, "pydantic": {"config"}}


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [
        text for extra in project["optional-dependencies"].values() for text in extra
    ]
    names = {re.split(r"[<>=\[ ;]", text)[0].lower().replace("-", "_") for text in declared}
    renamed = {"yaml": "pyyaml", "sklearn": "scikit_learn"}
    used = {item.module.split(".")[0] for item in IMPORTS} - set(sys.stdlib_module_names) - {"merit_hf"}
    assert {renamed.get(module, module) for module in used} - names == set()


def test_rooms_that_need_no_torch_do_not_load_it() -> None:
    script = (
        "import importlib, json, sys\n"
        "bad = []\n"
        "for room in sys.argv[1:]:\n"
        "    importlib.import_module(f'merit_hf.{room}')\n"
        "    bad += [room] if 'torch' in sys.modules or 'transformers' in sys.modules else []\n"
        "sys.stdout.write(json.dumps(bad))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *WITHOUT_TORCH], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_modules_are_small_and_nothing_prints() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_LINES, path.name
        for node in ast.walk(ast.parse(text)):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert name not in ("print", "breakpoint", "input"), f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            assert not bare, f"{path.name}:{node.lineno}: a bare except"  # type: ignore[attr-defined]


def test_public_names_are_there() -> None:
    import merit_hf

    for name in merit_hf.__all__:
        assert getattr(merit_hf, name).__name__ == name
    promised = "MeritConfig MeritPlanner PartitionPlan MeritCallback train_group merge_groups verify_checkpoint"
    assert {*promised.split(), "diagnose"} <= set(merit_hf.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        merit_hf.nothing_such  # noqa: B018


def test_help_of_every_command_works_and_loads_no_torch() -> None:
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from merit_hf.cli import app\n"
        "out = {}\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, [*command, '--help'])\n"
        "    out[' '.join(command)] = [done.exit_code, done.output]\n"
        "heavy = [m for m in ('torch', 'transformers', 'trl', 'datasets', 'numpy') if m in sys.modules]\n"
        "sys.stdout.write(json.dumps([out, heavy]))\n"
    )
    commands = json.dumps([[], *([command] for command in COMMANDS)])
    done = subprocess.run([sys.executable, "-c", script, commands], capture_output=True, text=True, check=True)
    pages, heavy = json.loads(done.stdout)
    assert heavy == []
    assert [code for code, _ in pages.values()] == [0] * len(pages)
    listed = re.findall(r"^  ([a-z-]+)  ", pages[""][1].partition("Commands:")[2], flags=re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS), "every command has its case here"
    for command in COMMANDS:
        assert "--debug" in pages[command][1]
        assert f"merit {command}" in pages[command][1].replace("root", "merit")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-such"], "nothing-such"),
        (["plan"], "CONFIG"),
        (["train", "x", "--output", "y"], "--group"),
        (["run", "x"], "--output"),
    ],
)
def test_a_wrong_call_exits_2_without_a_traceback(arguments: list[str], said: str) -> None:
    from typer.testing import CliRunner

    from merit_hf.cli import app

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml")) + sorted((ROOT / "recipes").rglob("*.yml"))
ACCELERATE = [path for path in RECIPES if path.parent.name == "accelerate_configs"]
CONFIGS = [path for path in RECIPES if path not in ACCELERATE]


def test_recipes_are_there() -> None:
    assert CONFIGS
    assert len(ACCELERATE) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_recipe_parses_against_todays_classes(path: Path, tmp_path: Path) -> None:
    config = MeritConfig.from_yaml(path)
    build_args(config.sft, tmp_path)
    assert "{" in path.read_text()
    assert not any(Path(d.path).is_absolute() for d in config.datasets)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_an_accelerate_config_parses_against_todays_classes(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert loaded.num_processes == written["num_processes"]
    assert str(loaded.distributed_type.value) == written["distributed_type"]
    if loaded.use_cpu and written["num_processes"] > 1:
        assert written["distributed_type"] == "MULTI_GPU", "anything else silently runs one process on CPU"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("README.md"))]


def test_configs_shown_in_the_documentation_parse() -> None:
    shown = 0
    for path in documents():
        for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            content = yaml.safe_load(block)
            if isinstance(content, dict) and {"base", "datasets"} <= set(content):
                MeritConfig.from_dict(content, source=path.name)
                check_sft(content.get("sft", {}), path.name)
                shown += 1
    assert shown, "the README shows a CONFIG"


def test_every_config_key_is_documented() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    from test_config_keys import KEYS

    missing = [key for key in sorted(KEYS) if not re.search(rf"[.]{key.partition('.')[2]}`", text)]
    assert missing == []


def shipped() -> list[Path]:
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".json", ".sh", ""}
    places = [
        ROOT / name for name in ("merit_hf", "tests", "recipes", "cards", "docs", "benchmarks", ".github", ".ci")
    ]
    files = [path for place in places if place.exists() for path in place.rglob("*") if path.suffix in kinds]
    files += [path for path in ROOT.iterdir() if path.suffix in kinds]
    made = {"__pycache__", "base", "data", "results"}

    def is_source(path: Path) -> bool:
        parts = set(path.relative_to(ROOT).parts)
        return not made & parts and not any(part.startswith(".") and part not in (".github", ".ci") for part in parts)

    return sorted(path for path in files if path.is_file() and is_source(path))


def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    # In pieces, since this file is searched too.
    machine = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + r"tmp/w\b", "/" + r"home/[a-z]+/\."]))
    unfinished = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3 + r"\b"]))
    for path in shipped():
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not machine.search(text), f"{path}: {machine.search(text)}"
        if path.suffix == ".py":
            assert not unfinished.search(text), f"{path}: {unfinished.search(text)}"
