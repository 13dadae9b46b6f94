"""SIGTERM and SIGINT in training: finish the step, save a checkpoint, end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Asked after every step if the run shall stop there; a context manager.

    One process notes the signal itself. Several processes must stop at the same step: SIGTERM is
    left to jax, whose coordinator names a step that none has passed yet, and SIGINT is passed on to
    it. A second signal ends the process at once, with 128 and its number as exit status.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        # Elsewhere than in the main thread Python takes no signals; training then runs without.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS[1:] if self._several else _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None:
            # As kill -9 would: nothing that is left half written is ever used.
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of another print.
        os.write(2, f"kaleido: {self.name}: saving after this step; again ends at once\n".encode())
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process must ask after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.name is not None
