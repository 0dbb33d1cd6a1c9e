"""From an installed wheel alone, in an empty folder: plan → train → merge, and the cards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_mixture

from merit_hf.cards import validate_card


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content; the libraries underneath come from this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True
    )
    return target


def test_the_road_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    config = make_mixture(tmp_path / "mixture", tasks=("copy", "count"), count=8, num_samples=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert call("-c", "import merit_hf; print(merit_hf.__file__)").strip().startswith(str(installed))
    call("-m", "merit_hf.cli", "plan", str(config), "--output", "plan")
    call("-m", "merit_hf.cli", "train", "plan", "--group", "all", "--output", "groups")
    call("-m", "merit_hf.cli", "merge", "plan", "groups/0", "groups/1", "--output", "merged")
    for folder in ("plan", "groups/0", "merged"):
        card = (empty / folder / "README.md").read_text(encoding="utf-8")
        validate_card(card)
        assert str(tmp_path) not in card
    assert (empty / "plan/figures/conflict.png").read_bytes().startswith(b"\x89PNG")
