"""A watchdog for training: where no step finishes in time, all stacks are written and it ends.

A hung loader, a hung device and a process that waits for another one that is gone look alike here:
the loop does not come round. Only ending the process lets whoever started it start it again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from kaleido_jax.errors import HUNG


class Watchdog:
    """Ends the process with status HUNG unless `beat` is called often enough; a context manager.

    Args:
      seconds: between two beats at most; 0 switches it off.
      patience: the limit until the first beat and in `patient` blocks: compilation, sampling, and
        saving take longer than a step.
      path: gets the stacks of all threads, as stderr does.
    """

    def __init__(self, seconds: float, patience: float, path: pathlib.Path):
        self.seconds, self.patience, self.path = seconds, max(seconds, patience), path
        self._limit = self.patience
        self._last = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kaleido-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.seconds:
            self._end.set()
            self._thread.join()

    def beat(self) -> None:
        """Tells that a step finished."""
        self._last, self._limit = time.monotonic(), self.seconds

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Within the block the limit is `patience`; its end counts as a beat."""
        self._last, self._limit = time.monotonic(), self.patience
        yield
        self.beat()

    def _watch(self) -> None:
        try:
            while (rest := self._last + self._limit - time.monotonic()) > 0:
                # Where something holds the interpreter this thread cannot run: a second watchdog,
                # in C, then writes the stacks and exits with status 1.
                later = rest + self.seconds + 60
                faulthandler.dump_traceback_later(later, exit=True, file=2)
                # Not all of the rest: a beat that ends the patience makes it shorter.
                if self._end.wait(min(rest, self.seconds / 4)):
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._bark()

    def _bark(self) -> NoReturn:
        try:
            line = f"kaleido: no step finished in {self._limit:g} seconds; stacks: {self.path}\n"
            os.write(2, line.encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
            with open(self.path, "w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:
            # Nothing that hangs would let an orderly exit come to its end.
            os._exit(HUNG)
