"""What the page does, without the page: requests become jobs, their results go into sessions."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from kaleido_jax import mesh
from kaleido_jax.errors import UserError
from kaleido_jax.generate import Pipeline, Progress
from kaleido_jax.latents import LatentDocument
from kaleido_jax.session_folder import Change, Picture, make_edit
from kaleido_jax.ui.bounds import BATCH, Request
from kaleido_jax.ui.sessions import Session, Sessions
from kaleido_jax.ui.worker import (
    ENDED,
    LEASE_SECONDS,
    MAX_WAITING,
    Job,
    Pool,
    Report,
    Stopped,
    Ticket,
    View,
)

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
POLL_SECONDS = 0.1
# A view is told again when it is this old: gradio notices at an answer that nobody is there.
REPEAT_SECONDS = 1.0
WRITING = Report("writing the latents")
WARM_CAPTION = "dawn: a red shape and a blue shape"


@dataclasses.dataclass(frozen=True)
class Engine:
    """The models on one device; the baseline may be missing."""

    kaleido: Pipeline
    baseline: Pipeline | None = None


@dataclasses.dataclass(frozen=True)
class Compared:
    """Pictures of one model at one guidance weight."""

    model: str
    weight: float
    images: UInt8[np.ndarray, "n height width 3"]


def open_engines(
    checkpoint: str | os.PathLike | None, baseline: str | os.PathLike | None
) -> list[Engine]:
    """The models, once on every device of this process.

    Args:
      checkpoint: workdir, checkpoint or export; None is the shapes model of the package.
      baseline: another to compare it with; without either the package's own.

    Raises:
      UserError: no whole model there, or the two draw pictures of different sizes.
    """
    if checkpoint is None:
        checkpoint = ASSETS / "shapes_kaleido"
        baseline = baseline or ASSETS / "shapes_baseline"
    engines = []
    for device in jax.local_devices():
        alone = mesh.make_mesh(devices=[device])
        kaleido = Pipeline.from_pretrained(checkpoint, alone)
        other = None if baseline is None else Pipeline.from_pretrained(baseline, alone)
        engines.append(Engine(kaleido, other))
    first = engines[0]
    if first.kaleido.config.data.channels != 3:
        raise UserError(f"{checkpoint}: this model does not draw pictures; the page needs one")
    if first.baseline and side(first.baseline) != side(first.kaleido):
        raise UserError(f"{baseline}: the baseline's pictures have another size than the model's")
    return engines


def side(pipe: Pipeline) -> int:
    """Pixels of a side of the pictures."""
    return pipe.config.data.image_size


class Studio:
    """Engines, their queue, and all sessions.

    Attributes:
      pool: workers and queue.
      sessions: by key.
      defaults: sampling settings of the model.
      names: the latents that it writes.
      size: side of its pictures.
      can_compare: whether there is a baseline.
      config, checkpoint: of the model, and its hash.
      unread: for a key, the next of the answers that nobody has read yet; None if there is none.
    """

    unread: Callable[[str], object | None] = staticmethod(lambda key: None)

    def __init__(self, engines: Sequence[Engine], *, warm: bool = True, waiting: int = MAX_WAITING):
        """Starts a worker for each engine; `warm` compiles the usual programs meanwhile."""
        first = engines[0].kaleido
        self.defaults, self.names, self.size = first.defaults, first.names, side(first)
        self.config, self.checkpoint = first.config, first.checkpoint_hash
        self.can_compare = engines[0].baseline is not None
        self.sessions = Sessions()
        self.pool: Pool[Engine] = Pool(engines, self._warm_jobs() if warm else (), waiting=waiting)

    def _warm_jobs(self) -> list[Job]:
        jobs = [draw_job(Request(WARM_CAPTION, number, 0, self.defaults)) for number in (BATCH, 1)]
        if self.names:
            jobs.append(_warm_redraw)
        if self.can_compare:
            request = Request(WARM_CAPTION, BATCH, 0, self.defaults)
            weights = (1.0, max(self.defaults.guidance_weight, 2.0))
            jobs.append(compare_job(request, weights))
        return jobs

    def draw(self, session: Session, request: Request) -> Ticket:
        """Queues a request; its result goes to `add_drawn`. Raises UserError if it is refused."""
        session.check_room(request.number, (self.size, self.size, 3))
        return self.pool.submit(draw_job(request), session.key)

    def edit(self, session: Session, parent: Picture, change: Change) -> Ticket:
        """Queues a change of a picture; its result goes to `Session.add_edited`."""
        session.check_room(1, parent.image.shape)
        return self.pool.submit(edit_job(parent.document, change), session.key)

    def compare(self, session: Session, request: Request, weights: Sequence[float]) -> Ticket:
        """Queues a comparison; its result is a list of `Compared`."""
        if not self.can_compare:
            raise UserError("there is no baseline to compare with; start with --baseline DIR")
        return self.pool.submit(compare_job(request, weights), session.key)


async def watch(
    ticket: Ticket, unread: Callable[[str], object | None] = Studio.unread
) -> AsyncIterator[View]:
    """A ticket's views until it has ended; if the watcher goes away, so does the job.

    Args:
      unread: as in `Studio`. An answer that stays unread for a lease means that nobody watches.

    Raises:
      Stopped: nobody watches.
    """
    last, told, first, since = None, 0.0, None, time.monotonic()
    try:
        while True:
            now, answer = time.monotonic(), unread(ticket.owner)
            if answer is None or answer is not first:
                first, since = answer, now
            elif now - since > LEASE_SECONDS:
                raise Stopped
            view = ticket.look()
            if view != last or now - told > REPEAT_SECONDS:
                told = now
                yield view
            if view.state in ENDED:
                return
            last = view
            await asyncio.sleep(POLL_SECONDS)
    finally:
        ticket.cancel()


class _Steps:
    """Hands a pipeline's progress on, over several calls of it and several batches in each."""

    def __init__(
        self,
        tell: Callable[[Report], None],
        words: str,
        count: int,
        batch: int,
        call: int = 0,
        calls: int = 1,
    ):
        """Of call number `call` of `calls`, each of `count` pictures in batches of `batch`."""
        self._tell, self._words, self._batch = tell, words, batch
        self._parts, self._call, self._calls = -(-count // batch), call, calls
        self._count, self._preview = count, None

    def __call__(self, progress: Progress) -> None:
        if self._preview is None:
            blank = (self._count, *progress.preview.shape[1:])
            self._preview = np.full(blank, 128, np.uint8)
        self._preview[progress.pictures] = progress.preview
        part = self._call * self._parts + progress.pictures[0] // self._batch
        steps = progress.num_steps
        total = self._calls * self._parts * steps
        self._tell(Report(self._words, part * steps + progress.step, total, self._preview.copy()))


def draw_job(request: Request) -> Job:
    """Draws latents, then pictures; the result is an `Output`."""

    def job(engine: Engine, tell: Callable[[Report], None]) -> object:
        documents = engine.kaleido.draw_latents(
            request.caption,
            request.number,
            seed=request.seed,
            batch_size=request.batch_size,
            on_draw=lambda: tell(WRITING),
            **request.options(),
        )
        steps = _Steps(tell, "drawing", request.number, request.batch_size)
        return engine.kaleido.render(documents, batch_size=request.batch_size, on_step=steps)

    return job


def edit_job(document: LatentDocument, change: Change) -> Job:
    """Changes a document and draws it again; the result is (image, document)."""

    def job(engine: Engine, tell: Callable[[Report], None]) -> object:
        steps = _Steps(tell, "drawing", 1, 1)
        return make_edit(engine.kaleido, document, change, steps, lambda: tell(WRITING))

    return job


def _warm_redraw(engine: Engine, tell: Callable[[Report], None]) -> None:
    def on_draw() -> None:
        tell(WRITING)

    (document,) = engine.kaleido.draw_latents(WARM_CAPTION, 1, batch_size=1, on_draw=on_draw)
    engine.kaleido.resample(document, engine.kaleido.names[:1], on_draw=on_draw)


def compare_job(request: Request, weights: Sequence[float]) -> Job:
    """The same caption and seeds by both models at several guidance weights (Figure 7)."""

    def job(engine: Engine, tell: Callable[[Report], None]) -> list[Compared]:
        batch = request.batch_size
        found: list[Compared] = []
        for name, pipe in (("baseline", engine.baseline), ("Kaleido", engine.kaleido)):
            beginning = Report(f"{name}: beginning")
            tell(beginning)  # a baseline may have no latents to draw
            documents = pipe.draw_latents(
                request.caption,
                request.number,
                seed=request.seed,
                batch_size=batch,
                on_draw=lambda report=beginning: tell(report),
                **request.options(),
            )
            for weight in weights:
                words, calls = f"{name} at guidance {weight:g}", 2 * len(weights)
                steps = _Steps(tell, words, request.number, batch, len(found), calls)
                output = pipe.render(
                    documents, batch_size=batch, on_step=steps, guidance_weight=weight
                )
                found.append(Compared(name, weight, output.images))
        return found

    return job
