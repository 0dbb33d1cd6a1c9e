"""Fixtures that several test files share: a tiny base, plan and groups, and a cache that is thrown away."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan

# Before `datasets` is imported: what an earlier run cached must not hide what this one gets wrong.
_CACHE = tempfile.TemporaryDirectory(prefix="merit-datasets-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
# Where the launched jobs of a plan are remembered, among others.
os.environ["HF_HOME"] = os.path.join(_CACHE.name, "home")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Else every file that is read is reported to the Hub, and where there is no network that waits for a name.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and sums must not depend on how many cores there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples everywhere, so that what a change is told is about the change. `HYPOTHESIS_PROFILE=search` draws
# new ones, to find what these do not show: a failure it prints becomes an `@example`.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base checkpoint. Read only."""
    from tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG of four tasks of 11 rows for two groups: the last batch of an epoch is half full. Read only."""
    from tiny import make_mixture

    return make_mixture(tmp_path_factory.mktemp("mixture"), count=11)


@pytest.fixture(scope="session")
def make_plan(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PartitionPlan]:
    """`make_plan("sft.max_steps=9", …)`: the plan of `tiny_config` with these overrides, made once. Read only."""
    from merit_hf.config import MeritConfig
    from merit_hf.planner import MeritPlanner
    from merit_hf.progress import Progress

    made: dict[tuple[str, ...], PartitionPlan] = {}

    def make(*overrides: str) -> PartitionPlan:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("plan") / "plan"
            made[overrides] = MeritPlanner(MeritConfig.from_yaml(tiny_config, overrides), Progress(quiet=True)).plan(
                folder
            )
        return made[overrides]

    return make


@pytest.fixture(scope="session")
def tiny_plan(make_plan: Callable[..., PartitionPlan]) -> PartitionPlan:
    """The plan of `tiny_config`: two groups of two tasks, 6 steps each. Read only."""
    return make_plan()


@pytest.fixture(scope="session")
def tiny_groups(tiny_plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The trained groups of `tiny_plan`. Read only: copy a folder to change it."""
    from merit_hf.progress import Progress
    from merit_hf.training import train_group

    folder = tmp_path_factory.mktemp("groups")
    return [train_group(tiny_plan, k, folder / str(k), progress=Progress(quiet=True)) for k in range(2)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package as a wheel. Read only."""
    folder, root = tmp_path_factory.mktemp("wheel"), Path(__file__).resolve().parent.parent
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 500 datasets in eight groups, with its report.html. Read only."""
    import runs

    from merit_hf.report.page import write_report

    folder = tmp_path_factory.mktemp("large") / "run"
    runs.make_run(folder, [f"org__a-dataset-with-a-long-name-{number:03d}" for number in range(500)], 8)
    write_report(folder)
    return folder
