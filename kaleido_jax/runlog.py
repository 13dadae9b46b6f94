"""What a run writes for people and tools: one JSON line per log step, TensorBoard, progress."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from kaleido_jax.beside import write_bytes

# Metrics that count updates which kaleido_jax.guards dropped.
_COUNTS = frozenset({"bad", "spike"})
# A gradient so many times longer than the median is told.
_LEAP = 10.0


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    names = ("kaleido_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def tensorboard_writer(
    workdir: pathlib.Path, say: Callable[[str], None], run: str = ""
) -> Any | None:
    """clu's writer of TensorBoard events, or None (said once) where clu is not installed.

    Args:
      run: folder under WORKDIR/tensorboard, which TensorBoard shows as a run of its own.
    """
    try:
        from clu import metric_writers
    except ImportError:
        say("TensorBoard events are off: install the extra 'data' to write them")
        return None
    return metric_writers.AsyncWriter(
        metric_writers.SummaryWriter(str(workdir / "tensorboard" / run))
    )


class RunLog:
    """Collects metrics of steps and writes their means at log steps; a context manager.

    WORKDIR/metrics.jsonl keeps one line per log step; going on from a checkpoint first drops
    the lines of later steps and takes up the rows that were not written yet, so that a killed run
    leaves the same file as an unbroken one.

    Args:
      start: the step to go on from.
      before: `state()` at that step.

    Attributes:
      dropped: updates in a row, up to the last step fetched, that the guards dropped.
      most_dropped: the longest such run since this log was opened.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        config: ConfigDict,
        say: Callable[[str], None],
        before: Mapping[str, Any] | None = None,
    ):
        self.path = workdir / "metrics.jsonl"
        self.samples = workdir / "samples"
        self._train, self._clip = config.train, config.optim.clip_norm
        self._say, self._main = say, jax.process_index() == 0
        self._pending: list[Mapping[str, Float[Array, ""]]] = []
        before = before or {}
        self._rows = [
            {name: np.float32(value) for name, value in row.items()}
            for row in before.get("rows", ())
        ]
        self._old_rows = len(self._rows)
        self.dropped = self.most_dropped = int(before.get("dropped", 0))
        self._first = start
        self._began = self._since = time.monotonic()
        self._excluded = self._excluded_total = 0.0
        self._writer = None
        if self._main:
            self._drop_later_lines(start)
            self._writer = tensorboard_writer(workdir, say)

    def _drop_later_lines(self, start: int) -> None:
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= start]
            write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception:
                if kind is None:  # what ended the run tells more than what follows from it
                    raise

    def add(self, metrics: Mapping[str, Float[Array, ""]]) -> None:
        """Takes one step's metrics without waiting for them."""
        self._pending.append(metrics)

    def exclude(self, seconds: float) -> None:
        """Leaves time spent on checkpoints and samples out of the speed of training."""
        self._excluded += seconds
        self._excluded_total += seconds

    def fetch(self) -> None:
        """Waits for the metrics added so far and counts dropped updates."""
        for row in jax.device_get(self._pending):
            self._rows.append(row)
            self.dropped = 0 if _kept(row) else self.dropped + 1
            self.most_dropped = max(self.most_dropped, self.dropped)
        self._pending = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the steps since the last line, fit for JSON."""
        self.fetch()
        rows = [{name: _plain(value) for name, value in row.items()} for row in self._rows]
        return {"rows": rows, "dropped": self.dropped}

    def write(self, step: int) -> dict[str, float]:
        """Writes the means since the last line; waits for the device.

        Means are over the updates that were kept; `bad` and `spike` count those that were dropped,
        `clipped` those whose gradient was clipped.
        """
        self.fetch()
        rows, kept = self._rows, [row for row in self._rows if _kept(row)]
        means = {}
        for name in rows[-1]:  # rows from before a changed config may have others
            values = [row[name] for row in kept if name in row]
            means[name] = float(np.mean(values)) if values else math.nan
        for name in _COUNTS & rows[-1].keys():
            means[name] = float(sum(row.get(name, 0) for row in rows))
        norms = [float(row["grad_norm"]) for row in rows if math.isfinite(row["grad_norm"])]
        means["grad_norm_max"] = max(norms, default=math.nan)
        means["clipped"] = float(sum(row["grad_norm"] > self._clip for row in kept))
        now = time.monotonic()
        seconds = max(now - self._since - self._excluded, 1e-9)
        made = len(rows) - self._old_rows
        means["images_per_second"] = made * self._train.batch_size / seconds
        elapsed = now - self._began - self._excluded_total
        remaining = elapsed / (step - self._first) * (self._train.num_steps - step)
        self._rows, self._old_rows, self._since, self._excluded = [], 0, now, 0.0
        if self._main:
            line = {name: _plain(value) for name, value in means.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | line) + "\n")
            if self._writer is not None:
                self._writer.write_scalars(step, means)
            self._say(progress_line(step, self._train.num_steps, means, remaining))
            for warning in warnings_of(means, norms, self._clip):
                self._say(f"step {step:,}: {warning}")
        return means

    def image(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a sample grid as PNG and into TensorBoard."""
        if not self._main:
            return
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        write_bytes(self.samples / f"step_{step:08d}.png", file.getvalue())
        if self._writer is not None:
            self._writer.write_images(step, {"samples": image[None]})


def _kept(row: Mapping[str, Any]) -> bool:
    return not any(row.get(name, 0) for name in _COUNTS)


def _plain(value: float) -> float | None:
    """A number fit for JSON, which has no NaN; exact for float32."""
    return float(value) if math.isfinite(value) else None


def warnings_of(means: Mapping[str, float], norms: Sequence[float], clip: float) -> list[str]:
    """What people should know of the steps of one line: dropped updates, leaping gradients.

    Args:
      means: as written.
      norms: of the gradients of those steps, those that are finite.
      clip: the norm to which they are clipped.
    """
    found = []
    if means["bad"]:
        found.append(f"{means['bad']:.0f} updates with a non-finite loss or gradient dropped")
    if means.get("spike"):
        found.append(f"{means['spike']:.0f} updates with a spike of the gradient dropped")
    elif norms and max(norms) > max(_LEAP * float(np.median(norms)), clip):
        usual = float(np.median(norms))
        found.append(
            f"a gradient of norm {max(norms):.4g}, usually {usual:.4g}, clipped to {clip:g}"
        )
    return found


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def progress_line(step: int, total: int, means: Mapping[str, float], remaining: float) -> str:
    """One line for people: step, losses, speed and time left."""
    losses = "  ".join(
        f"{name.removeprefix('loss_') if name != 'loss' else name} {means[name]:.4f}"
        for name in ("loss", "loss_dm", "loss_ar", "ar_accuracy")
        if name in means
    )
    minutes, seconds = divmod(round(remaining), 60)
    hours, minutes = divmod(minutes, 60)
    speed = f"{means['images_per_second']:.1f} images/s"
    return f"step {step:,}/{total:,}  {losses}  {speed}  ETA {hours}:{minutes:02}:{seconds:02}"
