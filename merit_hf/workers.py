"""Several planner processes that share the datasets through files, without talking to each other.

`accelerate launch` and `torchrun` tell each process its rank in the environment. A planner needs no collective
operations, so the process leaves the distributed world before torch joins it, takes one accelerator for itself, and
claims datasets one by one: unequal datasets spread themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merit_hf.config import MeritError

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
    """

    rank: int = 0
    world_size: int = 1
    run: str = "single"

    @classmethod
    def from_environment(cls) -> Worker:
        """Read and leave the distributed world. Call before anything asks accelerate for its state."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"
        for name in [
            *_DISTRIBUTED,
            *(name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_", "FSDP_"))),
        ]:
            os.environ.pop(name, None)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(device) for device in range(local_rank + 1)]
        if local_rank < len(devices):
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank]
        return cls(rank, world_size, run)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def claim(self, folder: Path, item: str) -> bool:
        """True for exactly one of the processes of this launch."""
        if self.world_size == 1:
            return True
        claims = folder / f"claims-{self.run}"
        try:
            claims.mkdir(exist_ok=True)
            os.close(os.open(claims / item, os.O_CREAT | os.O_EXCL))
        except (FileExistsError, FileNotFoundError):
            # Taken, or all of it is done and the folder is gone.
            return False
        return True

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
