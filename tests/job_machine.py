"""What a loopback Hub lacks to run HF Jobs: a clean machine that runs a submitted command by the real `uv`.

    machine = JobMachine(folder, wheel)
    run = machine.start(hub.hub.jobs[0])        # run.kill(); run.wait()

Nothing of this checkout is in reach: an empty HOME, an empty folder, a bare Python. `uv` resolves what it is asked for
against an index of files that holds merit_hf's wheel and, for each library that it needs, a wheel with the name,
version, requirements and commands of the one installed here, which leads to it instead of copying it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from hub_server.jobs import Job
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Run:
    """A job's command as it runs; its output is the job's log."""

    def __init__(self, job: Job, process: subprocess.Popen[str]) -> None:
        self.job, self.process = job, process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.job.write(line.rstrip("\n"))

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when the machine is taken away."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 300.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join()
        self.job.stage = "ERROR" if code else "COMPLETED"
        self.job.message = f"exit code {code}" if code else None
        return code

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.job.log)


class JobMachine:
    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self._count = folder, 0
        self.index = folder / "index"
        self.index.mkdir(parents=True)
        shutil.copy(wheel, self.index)
        for library in _libraries("merit_hf"):
            _write_link(library, self.index)
        self.config = folder / "uv.toml"
        self.config.write_text(f'no-index = true\nfind-links = ["{self.index}"]\n')

    def start(self, job: Job) -> Run:
        import uv

        self._count += 1
        home, work = (self.folder / f"{name}-{self._count}" for name in ("home", "work"))
        home.mkdir()
        work.mkdir()
        python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
        environment = {
            "PATH": f"{Path(uv.find_uv_bin()).parent}:/usr/bin:/bin", "HOME": str(home), "UV_PYTHON": str(python),
            "UV_CONFIG_FILE": str(self.config), "UV_CACHE_DIR": str(self.folder / "cache"),
            "UV_PYTHON_DOWNLOADS": "never", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
            **job.body["environment"], **job.body["secrets"],
        }  # fmt: skip
        process = subprocess.Popen(
            [*job.body["command"], *job.body["arguments"]], cwd=work, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        job.stage = "RUNNING"
        return Run(job, process)


def _libraries(name: str) -> list[Distribution]:
    """What is installed here of all that a distribution requires, without its extras."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(text) for text in distribution(name).requires or []]
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and key not in found:
            found[key] = distribution(key)
            # With the extras that it is asked for with, or some would be missing; a few more than needed do no harm.
            todo += [
                Requirement(text.partition(";")[0])
                for text in found[key].requires or []
                if any(_holds(Requirement(text), extra) for extra in ("", *wanted.extras))
            ]
    return list(found.values())


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _write_link(library: Distribution, folder: Path) -> None:
    """A wheel that installs `library` by a path to where it lies here."""
    name = canonicalize_name(library.name).replace("-", "_")
    info = f"{name}-{library.version}.dist-info"
    files = {
        f"{name}-here.pth": f"{library.locate_file('')}\n",
        f"{info}/METADATA": library.read_text("METADATA") or "",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": library.read_text("entry_points.txt") or "",
    }
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for path, text in files.items()
    }
    record = [f"{path},sha256={digests[path]},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(folder / f"{name}-{library.version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
