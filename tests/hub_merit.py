"""`merit` as an account of a loopback Hub: every command is a process of its own, with that account's token and cache.

    bob = Account(hub, "bob", folder)
    done = bob("claim", "org/plan", "--group", "0")          # done.code, done.out, done.err
    first, second = bob.start(…), alice.start(…)             # two at once; first.wait()

The client reads HF_ENDPOINT when it is imported, so it takes a process to speak to another Hub. Each account keeps one
that has imported everything, and every command is forked from it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent


class Command:
    """A command that runs, or has ended: its exit code (negative: the signal that ended it) and what it said."""

    def __init__(self, folder: Path, arguments: tuple[str, ...]) -> None:
        self.folder, self.arguments = folder, arguments

    def wait(self, seconds: float = 600.0) -> Self:
        deadline = time.monotonic() + seconds
        while not (self.folder / "code").exists():
            assert time.monotonic() < deadline, f"{self.arguments} still runs:\n{self.out}{self.err}"
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """SIGKILL."""
        while not (self.folder / "pid").exists():
            time.sleep(0.005)
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)
        self.wait()

    @property
    def code(self) -> int:
        return int(self.wait().folder.joinpath("code").read_text())

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8") if (self.folder / "out").exists() else ""

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8") if (self.folder / "err").exists() else ""

    @property
    def error(self) -> str:
        """The one line that a failed command ends with; there is nothing like a traceback besides."""
        assert self.code != 0, self.out + self.err
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("merit: error:")]
        return line

    def check(self) -> Self:
        assert self.code == 0, f"{self.arguments} ended with {self.code}:\n{self.out}{self.err}"
        return self


class Account:
    """One account in `folder`, where its commands run; further environment in `variables`."""

    def __init__(self, hub: HubServer, user: str | None, folder: Path, **variables: str) -> None:
        self.hub, self.user, self.folder = hub, user, folder
        self._jobs, self._count = folder.parent / f".jobs-{folder.name}", 0
        self.cache = folder.parent / f".cache-{folder.name}"
        for made in (folder, self._jobs, self.cache):
            made.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = hub.environ(
            user, HF_HOME=str(self.cache), HF_DATASETS_CACHE=str(self.cache / "datasets"), PYTHONPATH=path,
            TOKENIZERS_PARALLELISM="false", COLUMNS="200", **variables,
        )  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, cwd=folder, text=True
        )

    def start(self, *arguments: object, cwd: Path | None = None, user: str | None = None) -> Command:
        """`merit ARGUMENTS`, or `-c CODE ARGUMENTS`; `user`: with the token of somebody else, in the same cache."""
        self._count += 1
        job = self._jobs / str(self._count)
        job.mkdir()
        texts = [str(argument) for argument in arguments]
        assert self._process.stdin is not None
        variables = {"HF_TOKEN": self.hub.token(user)} if user else {}
        request = {"job": str(job), "cwd": str(cwd or self.folder), "arguments": texts, "variables": variables}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Command(job, tuple(texts))

    def __call__(self, *arguments: object, cwd: Path | None = None, user: str | None = None) -> Command:
        return self.start(*arguments, cwd=cwd, user=user).wait()

    def forget(self) -> None:
        """Empty the caches: what was downloaded before is downloaded again."""
        shutil.rmtree(self.cache)
        self.cache.mkdir()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<test>", "exec"), {"__name__": "__main__"})
    else:
        from merit_hf.cli import app

        app(args=arguments, prog_name="merit")


def _child(request: dict[str, Any]) -> int:
    job = Path(request["job"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    # The client asks for the token when it speaks, unlike its other settings.
    os.environ.update(request["variables"])
    try:
        _run(request["arguments"])
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    import jobs_preload  # noqa: F401

    running: dict[int, Path] = {}

    def reap(*_: object) -> None:
        for pid in list(running):
            try:
                done, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # reaped by a handler that came in between
                continue
            if done:
                job = running.pop(pid)
                (job / "code.part").write_text(str(os.waitstatus_to_exitcode(status)))
                os.rename(job / "code.part", job / "code")

    for line in sys.stdin:
        request = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(request))
        running[pid] = Path(request["job"])
        (running[pid] / "pid").write_text(str(pid))
        signal.signal(signal.SIGCHLD, reap)
        reap()


if __name__ == "__main__":
    _serve()
