"""Progress of the demo: one line at a time, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Progress:
    """Says what is done and how long the rest will take.

    Args:
      say: receives one line at a time.
      expected: seconds that each stage took on two CPU cores, in order. The time left is what
        these say of the stages to come, times how much slower this machine has been so far.
      clock: seconds from any start.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        expected: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._say, self._expected, self._clock = say, dict(expected), clock
        self._began = self._stage_began = clock()
        self._stage = ""
        self._done = 0.0  # expected seconds of the stages that are over
        self.seconds: dict[str, float] = {}

    def start(self, stage: str, text: str) -> None:
        """Opens a stage (and closes the one before). Raises KeyError for an unknown stage."""
        self.finish()
        self._expected[stage]
        self._stage, self._stage_began = stage, self._clock()
        self.note(text, 0.0)

    def finish(self) -> None:
        """Closes the stage that is open, if one is."""
        if self._stage:
            self.seconds[self._stage] = round(self._clock() - self._stage_began, 1)
            self._done += self._expected[self._stage]
            self._stage = ""

    def note(self, text: str, share: float) -> None:
        """One line; `share` of the stage is done."""
        left = clock_text(self.remaining(share))
        self._say(f"[{self._stage}] {text} · about {left} left" if self._stage else text)

    def remaining(self, share: float) -> float:
        """Seconds until everything is done, when `share` of the stage is."""
        total = sum(self._expected.values())
        done = self._done + self._expected.get(self._stage, 0.0) * share
        elapsed = self._clock() - self._began
        # One part in ten on trust: the first seconds say little about the machine's speed.
        pace = (elapsed + 0.1 * total) / (done + 0.1 * total)
        return max(0.0, total - done) * pace

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began


def clock_text(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
