"""Who is drawn for when: one worker per device, one bounded queue, tickets that can be let go.

A job is a function of (engine, tell). It calls `tell` at every step; that call raises `Stopped`
once nobody wants the result any more, so a job ends within the steps between two calls (two
denoising steps, `runner.PREVIEW_EVERY`). Nobody wants it once the ticket was cancelled, or was not
looked at for `lease` seconds.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.errors import UserError

MAX_WAITING = 32
LEASE_SECONDS = 20.0
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
# How fast the estimate of a job's length follows what is measured.
_MEMORY = 0.7

Engine = TypeVar("Engine")


class Stopped(Exception):
    """Nobody waits for this job any more."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a job tells while it runs.

    Attributes:
      words: what it is doing.
      done, total: steps; 0 of 0 where they are not known.
      preview: the pictures as they look so far.
    """

    words: str
    done: int = 0
    total: int = 0
    preview: UInt8[np.ndarray, "n height width 3"] | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """A ticket as its owner sees it.

    Attributes:
      state: 'waiting', 'running', 'done', 'failed' or 'cancelled'.
      position: 1 for the next in the queue; 0 unless waiting.
      report: the last of a running job.
      seconds_left: an estimate in whole seconds; None where there is nothing to go by.
    """

    state: str
    position: int
    report: Report | None
    seconds_left: int | None


Job = Callable[[Any, Callable[[Report], None]], Any]


class Ticket:
    """One job in the queue; all access goes through its pool's lock."""

    def __init__(self, pool: Pool, job: Job, owner: str, seen: float):
        self._pool, self.job, self.owner, self.seen = pool, job, owner, seen
        self.state = WAITING
        self.unwanted = False
        self.report: Report | None = None
        self.begun = 0.0
        self.first_step: tuple[float, int] | None = None
        self.value: Any = None

    def look(self) -> View:
        """How the job stands; renews the lease."""
        return self._pool.look(self)

    def cancel(self) -> None:
        """Ends the job: at once while it waits, within two denoising steps while it runs."""
        self._pool.cancel(self)

    def result(self) -> Any:
        """What a finished job returned; raises what it raised, `Stopped` if it was cancelled."""
        return self._pool.result(self)


class Pool(Generic[Engine]):
    """Workers, one thread for each engine, and the queue before them.

    Attributes:
      capacity: tickets that may wait or run at once.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        warm: Sequence[Job] = (),
        *,
        waiting: int = MAX_WAITING,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the workers.

        Args:
          engines: what a job runs on; one thread each.
          warm: jobs that every worker runs while nobody waits, such as to compile programs.
          waiting: tickets that may wait at once.
          lease: seconds after which a ticket that nobody looks at is dropped.
          clock: seconds.
        """
        self._waiting, self._lease, self._clock = waiting, lease, clock
        self.capacity = waiting + len(engines)
        self._queue: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._job_seconds: float | None = None
        self._warming = len(engines) if warm else 0
        self._threads = [
            threading.Thread(target=self._work, args=(engine, deque(warm)), daemon=True)
            for engine in engines
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, owner: str) -> Ticket:
        """Puts a job at the end of the queue.

        Raises:
          UserError: the queue is full, or the owner has a job in it already.
        """
        with self._changed:
            self._drop_forgotten()
            for other in (*self._queue, *self._running):
                if other.owner == owner and not other.unwanted:
                    raise UserError("your last request is still running; wait or cancel it")
            if self._closed:
                raise UserError("the server is stopping")
            if len(self._queue) >= self._waiting:
                raise UserError(
                    f"{len(self._queue)} people are waiting already; please try again in a minute"
                )
            ticket = Ticket(self, job, owner, self._clock())
            self._queue.append(ticket)
            self._changed.notify()
            return ticket

    def close(self) -> None:
        """Lets no job begin, stops those that run, and waits for the workers."""
        with self._changed:
            self._closed = True
            for ticket in (*self._queue, *self._running):
                ticket.unwanted = True
            self._drop_forgotten()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def forget(self, owner: str) -> None:
        """Cancels whatever an owner has in the queue."""
        with self._changed:
            for ticket in (*self._queue, *self._running):
                if ticket.owner == owner:
                    ticket.unwanted = True
            self._drop_forgotten()

    def waiting(self) -> int:
        """Jobs that have not begun."""
        with self._changed:
            self._drop_forgotten()
            return len(self._queue)

    def is_warm(self) -> bool:
        """Whether every worker has run the jobs that warm it up."""
        with self._changed:
            return self._warming == 0

    # ---- of tickets -----------------------------------------------------------------------

    def look(self, ticket: Ticket) -> View:
        """As `Ticket.look`."""
        with self._changed:
            ticket.seen = self._clock()
            position = self._queue.index(ticket) + 1 if ticket.state == WAITING else 0
            left = self._seconds_left(ticket, position)
            # Whole seconds, so that a view is another one only where somebody would see it.
            left = None if left is None else math.ceil(left)
            return View(ticket.state, position, ticket.report, left)

    def cancel(self, ticket: Ticket) -> None:
        """As `Ticket.cancel`."""
        with self._changed:
            ticket.unwanted = True
            self._drop_forgotten()

    def result(self, ticket: Ticket) -> Any:
        """As `Ticket.result`."""
        with self._changed:
            state, value = ticket.state, ticket.value
        if state == CANCELLED:
            raise Stopped
        if state == FAILED:
            raise value
        if state != DONE:
            raise RuntimeError(f"the job is {state}")
        return value

    def _seconds_left(self, ticket: Ticket, position: int) -> float | None:
        if ticket.state == RUNNING:
            report, first = ticket.report, ticket.first_step
            if report is not None and first is not None and report.done > first[1]:
                each = (self._clock() - first[0]) / (report.done - first[1])
                return each * (report.total - report.done)
            if self._job_seconds is None:
                return None
            return max(self._job_seconds - (self._clock() - ticket.begun), 0.0)
        if ticket.state == WAITING and self._job_seconds is not None:
            # Those before it, its own, and half a job of whoever is running.
            rounds = (position - 1) / len(self._threads) + 1.5
            return rounds * self._job_seconds
        return None

    def _drop_forgotten(self) -> None:
        now = self._clock()
        for ticket in list(self._queue):
            if ticket.unwanted or now - ticket.seen > self._lease:
                self._queue.remove(ticket)
                ticket.state, ticket.unwanted = CANCELLED, True

    # ---- the workers ----------------------------------------------------------------------

    def _work(self, engine: Engine, warm: deque[Job]) -> None:
        while True:
            with self._changed:
                self._drop_forgotten()
                while not self._queue and not warm and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                ticket = self._queue.popleft() if self._queue else None
                if ticket is not None:
                    ticket.state, ticket.begun = RUNNING, self._clock()
                    self._running.add(ticket)
            if ticket is not None:
                self._run(engine, ticket)
                continue
            if self._warm_up(engine, warm[0]):
                warm.popleft()
            if not warm:
                with self._changed:
                    self._warming -= 1

    def _warm_up(self, engine: Engine, job: Job) -> bool:
        """Runs a job until somebody waits; whether it is over and done with."""

        def tell(report: Report) -> None:
            if self._closed or self._queue:
                raise Stopped

        try:
            job(engine, tell)
        except Stopped:
            return False  # what it compiled is kept, so the next try is short
        except Exception as error:  # whoever asks for the same will be told
            print(f"kaleido: warming up: {type(error).__name__}: {error}", file=sys.stderr)
        return True

    def _run(self, engine: Engine, ticket: Ticket) -> None:
        def tell(report: Report) -> None:
            with self._changed:
                now = self._clock()
                if ticket.unwanted or now - ticket.seen > self._lease:
                    raise Stopped
                ticket.report = report
                if report.done and ticket.first_step is None:
                    ticket.first_step = (now, report.done)

        try:
            value, state = ticket.job(engine, tell), DONE
        except Stopped:
            value, state = None, CANCELLED
        except Exception as error:  # the owner is told, the worker lives on
            value, state = error, FAILED
        with self._changed:
            self._running.discard(ticket)
            # The job may hold arrays, and the ticket may be kept.
            ticket.state, ticket.value, ticket.job = state, value, None
            ticket.report = None
            if state == DONE:
                took, known = self._clock() - ticket.begun, self._job_seconds
                self._job_seconds = (
                    took if known is None else _MEMORY * known + (1 - _MEMORY) * took
                )
