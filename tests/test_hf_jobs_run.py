"""Groups on HF Jobs: `merit` submits to a loopback Hub, and a clean machine runs what came in by the real `uv`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_state import everything, look
from hub_world import PLAN, World
from job_machine import JobMachine

pytestmark = pytest.mark.slow
GROUP_0, WHEELS = "alice/plan-group-0", "org/wheels"
LAUNCH = ("train", PLAN, "--launcher", "hf-jobs", "--flavor", "t4-small", "--secrets", "WANDB_API_KEY")
SAVED = ("sft.save_steps=2", "sft.logging_steps=1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "wandb-secret-of-alice")
        with World(tmp_path_factory.mktemp("world")) as world:
            world.publish_base_and_data()
            world.publish_plan()
            world.save("planned")
            yield world


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    shared.back_to("planned")
    shared.fresh(shared.alice, "jobs")
    return shared


def requests_in(shown: str) -> list[dict[str, Any]]:
    """The bodies in the output of --dry-run."""
    parts = shown.split("POST ")[1:]
    return [json.loads(part[part.index("{") : part.rindex("}") + 1]) for part in parts]


def pushed_files(world: World) -> set[str]:
    repo = look(world.hub).get(f"model {GROUP_0}")
    return set(repo.files) if repo else set()


def test_what_the_dry_run_shows_is_what_is_sent_once(world: World) -> None:
    alice, hub, jobs = world.alice, world.hub, world.hub.hub.jobs
    shown = alice(*LAUNCH, "--group", "all", "--output", "jobs", "--dry-run", *SAVED).check().out
    assert jobs == []
    assert not (alice.folder / "jobs").exists()
    assert f"POST {hub.endpoint}/api/jobs/alice" in shown
    alice(*LAUNCH, "--group", "all", "--output", "jobs", "--no-wait", *SAVED).check()
    values = {"HF_TOKEN": hub.token("alice"), "WANDB_API_KEY": "wandb-secret-of-alice"}
    named = {name: f"<{name} of this machine>" for name in values}
    assert [job.body["secrets"] for job in jobs] == [values, values]
    assert requests_in(shown) == [{**job.body, "secrets": named} for job in jobs]
    revision = hub.api("alice").repo_info(PLAN, repo_type="dataset").sha
    label = json.loads((alice.folder / "plan/plan.json").read_text())["sha256"][:12]
    assert jobs[1].body == {
        "command": [
            "uv", "run", "--with", "merit_hf==0.1.0", "accelerate", "launch", "--quiet", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "1", "--main_process_port", "0",
            "-m", "merit_hf.training", f"{PLAN}@{revision}", "sft.push_to_hub=true", "sft.hub_strategy=checkpoint",
            *SAVED, "sft.hub_model_id=alice/plan-group-1", "--group", "1", "--output", "group-1",
            "--num-processes", "1",
        ],
        "arguments": [],
        "environment": {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_ENDPOINT": hub.endpoint},
        "flavor": "t4-small",
        "secrets": values,
        "timeoutSeconds": 6 * 3600,
        "labels": {"name": f"merit-{label}-group-1", "merit-plan": label, "merit-group": "1"},
        "dockerImage": "ghcr.io/astral-sh/uv:python3.12-bookworm",
    }  # fmt: skip
    # Neither here nor from another folder, as from another machine, is a second one started.
    said = alice(*LAUNCH, "--group", "all", "--output", "jobs", "--no-wait").check()
    assert jobs[0].id in said.out + said.err
    alice(*LAUNCH, "--group", "all", "--output", "jobs-elsewhere", "--no-wait").check()
    assert len(jobs) == 2
    assert requests_in(alice(*LAUNCH, "--group", "0", "--output", "jobs/0", "--dry-run").check().out) == []
    # One that ended without its checkpoint is missing, and is the only one.
    jobs[0].stage, jobs[1].stage = "ERROR", "RUNNING"
    alice(*LAUNCH, "--group", "all", "--output", "jobs", "--no-wait").check()
    assert [job.body["labels"]["merit-group"] for job in jobs] == ["0", "1", "0"]


def test_what_the_hub_refuses(world: World) -> None:
    alice, bob, jobs = world.alice, world.bob, world.hub.hub.jobs
    start = ("train", PLAN, "--launcher", "hf-jobs", "--group", "0", "--no-wait", "--output", "jobs/0", "--flavor")
    refused = alice(*start, "t5-small")
    assert refused.code == 2
    assert '"flavor" must be one of' in refused.error
    assert bob(*start, "t4-small", "--namespace", "org").code == 2
    (body,) = requests_in(alice(*start, "a10g-largex4", "--dry-run").check().out)
    assert body["command"][body["command"].index("--num_processes") + 1] == "4"
    # A private plan's groups are private.
    world.hub.hub.repos["dataset", PLAN].private = True
    try:
        assert "sft.hub_private_repo=true" in alice(*start, "t4-small", "--dry-run").check().out
    finally:
        world.hub.hub.repos["dataset", PLAN].private = False
    # An answer that was lost: the job is there, and is found by its labels.
    world.hub.fail("lose_response", "/api/jobs/alice", "POST")
    lost = alice(*start, "t4-small")
    assert lost.code == 1
    assert len(jobs) == 1
    assert jobs[0].id in (done := alice(*start, "t4-small").check()).out + done.err
    assert len(jobs) == 1


def test_a_job_on_a_clean_machine(world: World, wheel: Path, tmp_path: Path) -> None:
    """Killed while it trains, told so, started again: it goes on, and what it pushes verifies and is offered."""
    alice, hub, jobs = world.alice, world.hub, world.hub.hub.jobs
    machine = JobMachine(tmp_path / "machine", wheel)
    said = [alice(*LAUNCH, "--group", "0", "--output", "jobs/0", "--no-wait", *SAVED).check()]
    hub.fail("slow", f"{GROUP_0}/commit", "POST", times=99, seconds=5.0)
    run = machine.start(jobs[0])
    while "last-checkpoint/trainer_state.json" not in pushed_files(world):
        assert run.process.poll() is None, run.output
        time.sleep(0.05)
    run.kill()
    hub.heal()
    said.append(alice("status", PLAN).check())
    assert "failed: ended as ERROR (exit code -9)" in said[-1].out
    assert "step 2 of" in said[-1].out
    assert "--launcher hf-jobs --flavor t4-small --secrets WANDB_API_KEY" in said[-1].out
    said.append(alice(*LAUNCH, "--group", "0", "--output", "jobs/0", "--dry-run", *SAVED).check())
    # Now with the wheel by its address, as from a branch that is not on PyPI.
    hub.api("alice").create_repo(WHEELS)
    hub.api("alice").upload_file(path_or_fileobj=wheel, path_in_repo=wheel.name, repo_id=WHEELS)
    address = f"{hub.endpoint}/{WHEELS}/resolve/main/{wheel.name}"
    again = (*LAUNCH, "--group", "0", "--output", "jobs/0", "--contribute", "--hf-from", address, *SAVED)
    waiting = alice.start(*again)
    while len(jobs) < 2:
        assert not (waiting.folder / "code").exists(), waiting.out + waiting.err
        time.sleep(0.05)
    run = machine.start(jobs[1])
    assert run.wait() == 0, run.output
    assert "took step" in run.output
    assert "Contributed" in run.output
    said.append(waiting.check())
    assert f"Trained: {GROUP_0}" in waiting.out
    verified = alice("verify", PLAN, GROUP_0).check()
    assert "1 of 1 checkpoints verify" in verified.out
    (request,) = hub.hub.repos["dataset", PLAN].discussions
    assert request.title == "Contribute group 0"
    # Once more: finished, so nothing is submitted.
    said.append(alice(*again).check())
    assert len(jobs) == 2
    assert "finished (hf-jobs" in alice("status", PLAN).check().out
    # The values of secrets went to the Hub's jobs API, and nowhere else.
    kept = [*((" ".join(command.arguments), (command.out + command.err).encode()) for command in said)]
    kept += [(str(path), path.read_bytes()) for path in alice.folder.rglob("*") if path.is_file()]
    kept += [(path.name, path.read_bytes()) for path in alice.cache.rglob("*.json")]
    kept += [("the Hub", everything(hub)), ("log", "\n".join(line for job in jobs for _, line in job.log).encode())]
    assert any("jobs/0.json" in where for where, _ in kept)
    for where, content in kept:
        for secret in (hub.token("alice"), "wandb-secret-of-alice"):
            assert secret.encode() not in content, f"a secret is in {where}"
