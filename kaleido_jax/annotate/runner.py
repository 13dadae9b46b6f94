"""The Beam side of annotation: shards go to workers, each worker loads the engine once.

Imported only when there is work: Beam takes seconds to load.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
from apache_beam.runners.runner import PipelineState
from apache_beam.utils.shared import Shared

from kaleido_jax.annotate.inputs import Shard
from kaleido_jax.annotate.progress import progress_path
from kaleido_jax.annotate.protocols import Engine
from kaleido_jax.annotate.stages import AnnotationFailed, Plan, annotate_shard
from kaleido_jax.annotate.storage import Folder
from kaleido_jax.data import beam_runs
from kaleido_jax.errors import UserError

# The classes of one-line errors as Beam quotes them in the traceback of a worker.
_QUOTED = re.compile(r"^(?:[\w.]+\.)?(UserError|AnnotationFailed): (.*?)(?: \[while running .*)?$")
_TOLD_EVERY = 1.0  # seconds between two notes of progress


@dataclass
class _Loaded:
    """An engine with its model, shared by the threads of a process, which take turns."""

    engine: Engine
    lock: threading.Lock


class AnnotateShard(beam.DoFn):
    """(shard, again) -> the shard's name, once its sidecar is written.

    Args:
      plan: the stage; its engine travels without its model.
      out: folder of the sidecars.
    """

    def __init__(self, plan: Plan, out: str):
        self._plan, self._out = plan, out
        self._shared = Shared()

    def setup(self) -> None:
        """Loads the model, or takes the one that another thread of the process has loaded."""
        self._loaded = self._shared.acquire(self._load)

    def _load(self) -> _Loaded:
        self._plan.engine.setup()
        return _Loaded(self._plan.engine, threading.Lock())

    def process(self, element: tuple[Shard, bool]) -> Iterator[str]:
        """Annotates one shard."""
        shard, again = element
        folder = Folder(self._out)
        with _Teller(self._plan, shard, folder) as teller:
            annotate_shard(
                self._plan, self._loaded.engine, shard, folder, again, teller, self._loaded.lock
            )
        yield shard.name


class _Teller:
    """Leaves how far a shard is in a hidden file beside its sidecar, for whoever watches."""

    def __init__(self, plan: Plan, shard: Shard, folder: Folder):
        self._path: Path | None = None
        if not folder.remote:
            self._path = progress_path(Path(folder.place), plan, shard.name)
        self._told = 0.0

    def __enter__(self) -> _Teller:
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._path is not None and now - self._told > _TOLD_EVERY:
            self._told = now
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(f"{done} {total}", "utf-8")

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def run_stage(
    plan: Plan, todo: Sequence[tuple[Shard, bool]], out: str, flags: Sequence[str]
) -> None:
    """Annotates shards with one engine on a Beam runner, and waits.

    Args:
      plan: the stage.
      todo: (shard, whether to try its dead letters again).
      out: folder of the sidecars, which all workers must reach.
      flags: Beam's own, such as `--runner=FlinkRunner`; without a runner, or with DirectRunner,
        this machine works through Beam's in-process runner.

    Raises:
      UserError: flags that Beam does not take, or what a worker found to be the user's mistake.
      AnnotationFailed: the run went wrong as a whole, or the runner says that it failed.
    """
    options = beam_runs.read_options(flags)
    here = beam_runs.runner_of(options) in beam_runs.HERE
    try:
        with _quiet() if here else contextlib.nullcontext():
            pipeline = beam_runs.new_pipeline(options)
            _ = (
                pipeline
                | "shards" >> beam.Create(list(todo))
                | "spread" >> beam.Reshuffle()
                | plan.stage >> beam.ParDo(AnnotateShard(plan, out))
            )
            state = pipeline.run().wait_until_finish()
    except (UserError, AnnotationFailed) as error:
        raise type(error)(str(error).partition(" [while running ")[0]) from error
    except Exception as error:
        _raise_quoted(error)
        raise
    if state not in (None, PipelineState.DONE):
        raise AnnotationFailed(f"stage {plan.stage}: the runner ended in state {state}")


def _raise_quoted(error: Exception) -> None:
    """Raises the one-line error that a worker's traceback quotes, if it does."""
    for line in reversed(str(error).splitlines()):
        found = _QUOTED.match(line.strip())
        if found:
            kind = {"UserError": UserError, "AnnotationFailed": AnnotationFailed}[found[1]]
            raise kind(found[2]) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log of every failed bundle with its traceback: the error itself says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
