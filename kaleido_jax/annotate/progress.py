"""How far a stage is, read from what lies in its folder: it works for any Beam runner."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kaleido_jax import sidecars
from kaleido_jax.annotate.stages import Plan
from kaleido_jax.annotate.storage import Folder

_LOOK_EVERY = 2.0  # seconds
_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def watch(plan: Plan, shards: Sequence[str], folder: Folder) -> Iterator[None]:
    """Shows a stage's progress on stderr, with an estimate, while the block runs."""
    if not shards:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(plan, shards, folder, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def done_share(plan: Plan, shards: Sequence[str], folder: Folder) -> float:
    """How many of the shards are done; those under way count by their share."""
    there = folder.names(plan.stage, ".done.json")
    total = 0.0
    for shard in shards:
        name = sidecars.file_names(plan.stage, shard, plan.config_hash)[-1].rpartition("/")[2]
        if name in there:
            total += 1
        elif not folder.remote:
            total += _share(progress_path(Path(folder.place), plan, shard))
    return total


def progress_path(folder: Path, plan: Plan, shard: str) -> Path:
    """The hidden file with "DONE TOTAL" of a shard that is being annotated."""
    done = folder / sidecars.file_names(plan.stage, shard, plan.config_hash)[-1]
    return done.with_name(f".{done.name.removesuffix('.done.json')}.progress.tmp")


def _share(path: Path) -> float:
    try:
        done, total = path.read_text("utf-8").split()
        return int(done) / max(1, int(total))
    except (OSError, ValueError):  # not there, or being written
        return 0.0


def _follow(plan: Plan, shards: Sequence[str], folder: Folder, stop: threading.Event) -> None:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("annotate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    began = told = time.monotonic()
    with bar:
        task = bar.add_task(plan.stage, total=len(shards))
        while not stop.wait(_LOOK_EVERY):
            share = done_share(plan, shards, folder)
            bar.update(task, completed=share)
            now = time.monotonic()
            if not console.is_terminal and now - told >= _LINE_EVERY:
                told = now
                left = (now - began) * (len(shards) - share) / share if share else None
                estimate = f", about {left / 60:.0f} min left" if left is not None else ""
                console.print(
                    f"annotate {plan.stage}: {share:.1f} of {len(shards)} shards{estimate}",
                    highlight=False,
                )
        bar.update(task, completed=done_share(plan, shards, folder))
