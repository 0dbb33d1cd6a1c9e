"""A Slurm cluster of one node on this machine: the real munged, slurmctld and slurmd, on free ports, in a folder.

with SlurmCluster(folder, cpus=2) as cluster: subprocess.run(["squeue"], env={**os.environ, **cluster.environment})
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

DAEMONS = ("munged", "slurmctld", "slurmd")
# `low` gives way to `high`; a job of it has `GraceTime` seconds to save.
CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=2
SlurmctldPort={ctld}
SlurmdPort={d}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
MinJobAge=3600
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP GraceTime=60
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What is not installed of it; being root is part of it, since slurmd asks for that."""
    absent = [name for name in DAEMONS if shutil.which(name, path=f"/usr/sbin:{os.environ['PATH']}") is None]
    return absent + ([] if os.geteuid() == 0 else ["root"])


class SlurmCluster:
    """`environment` points Slurm's commands at it."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(
            host=host, user="root", folder=self.folder, ctld=_free_port(), d=_free_port(), cpus=self.cpus
        )
        (self.folder / "slurm.conf").write_text(text)
        self._start_munge()
        self._start("slurmctld", "-D", "-c", "-f", self.folder / "slurm.conf")
        self._start("slurmd", "-D", "-c", "-f", self.folder / "slurm.conf", "-N", host)
        self.until(lambda: self("sinfo", "--noheader", "--format=%T").startswith("idle"), "an idle node")
        return self

    def __exit__(self, *_: object) -> None:
        self("scancel", "--state=PENDING", "--user=root")
        self("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def __call__(self, *command: object) -> str:
        """What a command of Slurm's says on stdout."""
        done = subprocess.run(
            list(map(str, command)), env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        return done.stdout

    def state(self, job: str) -> str:
        """`PENDING`, `RUNNING`, … of a job, such as `3_0`."""
        return self("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def until(self, ready: Callable[[], object], what: str, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self.until((self.folder / "munge.socket").exists, "munge socket")

    def _start(self, *command: object) -> None:
        path = shutil.which(str(command[0]), path=f"/usr/sbin:{os.environ['PATH']}")
        with (self.folder / f"{command[0]}.out.log").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [str(path), *map(str, command[1:])], env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
