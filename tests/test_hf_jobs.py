"""`merit train --launcher hf-jobs`: the request as the unmodified client makes it, and what it refuses to ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub_jobs import JobCall, job_request, submit_job
from merit_hf.launchers.hf_jobs import HfJobsOptions, script
from merit_hf.launchers.request import Request
from merit_hf.plan import PartitionPlan

CALL = JobCall(
    namespace="alice", command="accelerate",
    arguments=["launch", "-m", "merit_hf.training", "org/plan@0", "--group", "0"],
    dependencies=["merit_hf==1.0", "trackio"], flavor="a10g-large", timeout="90m",
    secrets=["HF_TOKEN", "WANDB_API_KEY"], labels={"name": "merit-0", "merit-group": "0"},
)  # fmt: skip


def test_the_request_is_the_clients_own_and_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "w-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    url, body = job_request(CALL)
    assert url.endswith("/api/jobs/alice")
    environment = body.pop("environment")
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert not any("TOKEN" in name for name in environment)
    assert body == {
        "command": ["uv", "run", "--with", "merit_hf==1.0", "--with", "trackio", "accelerate", "launch", "-m",
                    "merit_hf.training", "org/plan@0", "--group", "0"],
        "arguments": [],
        "flavor": "a10g-large",
        "timeoutSeconds": 5400,
        "secrets": {"HF_TOKEN": "<HF_TOKEN of this machine>", "WANDB_API_KEY": "<WANDB_API_KEY of this machine>"},
        "labels": {"name": "merit-0", "merit-group": "0"},
        "dockerImage": "ghcr.io/astral-sh/uv:python3.12-bookworm",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["launch", "0", "accelerate"])
def test_no_file_of_this_machine_is_uploaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job_request(CALL)
    Path(name).write_text("mine")
    with pytest.raises(ConfigError, match=f"`{name}` is also the name of a file"):
        job_request(CALL)


def test_a_secret_without_a_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(MeritError, match="WANDB_API_KEY has no value") as caught:
        submit_job(CALL)
    assert "hf_secret" not in str(caught.value)


def test_a_plan_in_a_folder_is_told_to_be_pushed(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    request = Request(tiny_plan, [0], [tmp_path / "0"])
    with pytest.raises(ConfigError, match=r"merit push .* --with-data"):
        script(request, HfJobsOptions(flavor="t4-small"))


@pytest.fixture
def published(make_plan: Any) -> PartitionPlan:
    """`tiny_plan` as if its parts were on the Hub: what is refused here is refused before the Hub is asked."""
    import copy
    import dataclasses

    plan = copy.copy(make_plan())
    plan.repo_id, plan.revision = "org/plan", "0" * 40
    plan.base = {**plan.base, "repo_id": "org/base", "revision": "1" * 40}
    plan.datasets = [
        dataclasses.replace(dataset, repo_id=f"org/{dataset.name}", revision="2" * 40) for dataset in plan.datasets
    ]
    return plan


@pytest.mark.parametrize(
    ("placement", "options", "said"),
    [
        ([], {"flavor": None}, "--flavor is missing"),
        ([], {"timeout": "6 hours"}, "--timeout 6 hours"),
        ([], {"secrets": ["WANDB_API_KEY=w-secret"]}, "--secrets WANDB_API_KEY…"),
        ([], {"hf_from": "dist/merit_hf-0.1.0-py3-none-any.whl"}, "URL that a job can reach"),
        ([], {"hf_from": "git+https://me:w-secret@example.com/merit"}, "a job's command is not secret"),
        (["sft.learning_rate=1.0"], {}, "part of the plan's identity"),
        (["sft.hub_token=w-secret"], {}, "no secret belongs there"),
        (["sft.push_to_hub=false"], {}, "must be pushed"),
        (["sft.hub_model_id=alice/x"], {}, "names one repo, and 2 groups"),
    ],
)
def test_a_wrong_call_is_refused_before_the_hub_is_asked(
    published: PartitionPlan, placement: list[str], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    request = Request(published, [0, 1], [tmp_path / "0", tmp_path / "1"], placement)
    with pytest.raises(ConfigError, match=said) as caught:
        script(request, HfJobsOptions(**{"flavor": "t4-small", **options}))
    assert "w-secret" not in str(caught.value)


def test_data_and_base_of_another_machine_are_refused(published: PartitionPlan, tmp_path: Path) -> None:
    import dataclasses

    request = Request(published, [0], [tmp_path / "0"])
    first = published.group(0).datasets[0]
    whole = published.datasets
    published.datasets = [
        dataclasses.replace(dataset, repo_id=None) if dataset.name == first else dataset for dataset in whole
    ]
    with pytest.raises(ConfigError, match=rf"the data of {first} are files of another machine.*--with-data"):
        script(request, HfJobsOptions(flavor="t4-small"))
    published.datasets, published.base = whole, {**published.base, "repo_id": None}
    with pytest.raises(ConfigError, match="its base was a folder"):
        script(request, HfJobsOptions(flavor="t4-small"))
