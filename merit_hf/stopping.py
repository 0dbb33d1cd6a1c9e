"""Stop a training when the machine wants its place back: save at the end of the step, and end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class StopOnSigterm(TrainerCallback):
    """SIGTERM (a preemption, a time limit, `kill`) saves a checkpoint at the end of the step and stops the training.

    Of several processes each is told at another moment, and none may stop alone: there a signal ends them at once,
    and the training goes on from what `sft.save_steps` has saved.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal for as long as this lasts; nothing outside the main thread, where Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
