"""Several planner processes that share the datasets through files, without talking to each other.

`accelerate launch` and `torchrun` tell each process its rank in the environment. A planner needs no collective
operations, so the process leaves the distributed world before torch joins it, takes one accelerator for itself, and
claims datasets one by one: unequal datasets spread themselves, and what a process claimed that has died is taken by
another. Only where the launcher shards models (FSDP, DeepSpeed) do the processes stay together, on one dataset at a
time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from merit_hf.config import ConfigError, MeritError

_Item = TypeVar("_Item")
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_SETTINGS = ("ACCELERATE_", "FSDP_")
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def check_processes(running: int, asked: int | None) -> None:
    """Raises MeritError where another number of processes runs than was asked for."""
    if asked is not None and running != asked:
        raise MeritError(
            f"{asked} processes were asked for, {running} are running. On CPU, accelerate needs a config with "
            "`distributed_type: MULTI_GPU` and `use_cpu: true`; see recipes/accelerate_configs/cpu_2.yaml."
        )


@dataclass(frozen=True)
class Worker:
    """This process among `world_size` planners.

    Attributes:
        run: names one launch, so that the claims of a killed launch do not bind the next.
        shards: the processes hold one model together.
    """

    rank: int = 0
    world_size: int = 1
    run: str = "single"
    shards: bool = False

    @classmethod
    def from_environment(cls) -> Worker:
        """Read and leave the distributed world. Call before anything asks accelerate for its state.

        Raises:
            ConfigError: the processes run on several machines, and do not shard a model between them.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"
        shards = any(os.environ.get(name) == "true" for name in _SHARDING)
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        machines = max(machines, -(-world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
        if machines > 1 and not shards:
            # A claim counts while its process runs, which only its own machine can see.
            raise ConfigError(
                f"planning spreads datasets over the processes of one machine, found {machines} machines. Launch it "
                "on one."
            )
        # The planner shards the model by itself, so a Trainer must not want to do it once more.
        # torchrun's own variables are how processes that stay together find each other.
        left = _SETTINGS if shards else (*_SETTINGS, *_DISTRIBUTED, "TORCHELASTIC_")
        for name in [name for name in os.environ if name.startswith(left)]:
            del os.environ[name]
        if shards:
            return cls(rank, world_size, run, shards=True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(device) for device in range(local_rank + 1)]
        if local_rank < len(devices):
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank]
        return cls(rank, world_size, run)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(
        self, folder: Path, items: Sequence[_Item], name: Callable[[_Item], str], is_done: Callable[[_Item], bool]
    ) -> Iterator[_Item]:
        """The items that this process is to do, one by one, until all are done or `folder` is gone.

        Args:
            folder: where the processes see each other's claims.
            name: of an item's claim.
            is_done: whether anybody has done it.
        """
        if self.world_size == 1 or self.shards:
            yield from items
            return

        def anything_new(open_items: list[_Item]) -> bool:
            return not folder.exists() or any(
                is_done(item) or self._abandoned_by(folder, name(item)) for item in open_items
            )

        while folder.exists() and (open_items := [item for item in items if not is_done(item)]):
            mine = next((item for item in open_items if self.claim(folder, name(item))), None)
            if mine is None:
                self.wait(until=partial(anything_new, open_items))
            else:
                yield mine

    def claim(self, folder: Path, item: str) -> bool:
        """True for exactly one of the living processes of this launch."""
        if self.world_size == 1 or self.shards:
            return True
        claims = folder / f"claims-{self.run}"
        try:
            claims.mkdir(exist_ok=True)
            dead = self._abandoned_by(folder, item)
            if dead is None:
                _write_new(claims / item)
            else:
                # Of several that see a dead process' claim, one makes this file and takes it over.
                _write_new(claims / f".{item}-of-{dead}")
                _write_new(claims / f".{item}-by-{os.getpid()}")
                os.replace(claims / f".{item}-by-{os.getpid()}", claims / item)
        except (FileExistsError, FileNotFoundError):
            # Taken, or all of it is done and the folder is gone.
            return False
        return True

    def _abandoned_by(self, folder: Path, item: str) -> int | None:
        """The process of this launch, so of this machine, that claimed `item` and runs no more."""
        try:
            pid = int((folder / f"claims-{self.run}" / item).read_text())
            os.kill(pid, 0)
        except ProcessLookupError:
            return pid
        except (FileNotFoundError, PermissionError, ValueError):
            pass
        return None

    def wait(
        self, until: Callable[[], bool], alive: Callable[[], float] = lambda: 0.0, patience: float = 3600.0
    ) -> None:
        """Poll until `until()`; `alive()` is a figure that changes while the others get on.

        Raises:
            MeritError: nothing has changed for `patience` seconds.
        """
        last, since = alive(), time.monotonic()
        while not until():
            time.sleep(0.2)
            if alive() != last:
                last, since = alive(), time.monotonic()
            if time.monotonic() - since > patience:
                raise MeritError(
                    f"no other planner process has finished anything for {patience:.0f} s. Stop all of them and run "
                    "the command again: it goes on with what is missing."
                )


def _write_new(path: Path) -> None:
    """This process' number in a new file; FileExistsError where there is one."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(file, str(os.getpid()).encode())
    os.close(file)
