"""What a run writes for people and tools: one JSON line per log step, TensorBoard, progress."""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image


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


def tensorboard_writer(workdir: pathlib.Path, say: Callable[[str], None]) -> Any | None:
    """clu's writer of TensorBoard events, or None (said once) where clu is not installed."""
    try:
        from clu import metric_writers
    except ImportError:
        say("TensorBoard events are off: install the extra 'data' to write them")
        return None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))


class RunLog:
    """Collects metrics of steps and writes their means at log steps; a context manager.

    WORKDIR/metrics.jsonl keeps one line per log step; going on from a checkpoint first drops
    the lines of later steps, so that a killed run leaves the same file as an unbroken one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        train: ConfigDict,
        say: Callable[[str], None],
    ):
        self.path = workdir / "metrics.jsonl"
        self.samples = workdir / "samples"
        self._train, self._say = train, say
        self._pending: list[Mapping[str, Float[Array, ""]]] = []
        self._first = start
        self._began = self._since = time.monotonic()
        self._excluded = self._excluded_total = 0.0
        self._drop_later_lines(start)
        self._writer = tensorboard_writer(workdir, say) if jax.process_index() == 0 else None

    def _drop_later_lines(self, start: int) -> None:
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= start]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, metrics: Mapping[str, Float[Array, ""]]) -> None:
        """Takes one step's metrics without waiting for them."""
        self._pending.append(metrics)

    def exclude(self, seconds: float) -> None:
        """Leaves time spent on checkpoints and samples out of the speed of training."""
        self._excluded += seconds
        self._excluded_total += seconds

    def write(self, step: int) -> dict[str, float]:
        """Writes the means since the last call; waits for the device."""
        rows = jax.device_get(self._pending)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        now = time.monotonic()
        seconds = max(now - self._since - self._excluded, 1e-9)
        means["images_per_second"] = len(rows) * self._train.batch_size / seconds
        elapsed = now - self._began - self._excluded_total
        remaining = elapsed / (step - self._first) * (self._train.num_steps - step)
        self._pending, self._since, self._excluded = [], now, 0.0
        if jax.process_index() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | means) + "\n")
            if self._writer is not None:
                self._writer.write_scalars(step, means)
            self._say(progress_line(step, self._train.num_steps, means, remaining))
        return means

    def image(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a sample grid as PNG and into TensorBoard."""
        self.samples.mkdir(exist_ok=True)
        Image.fromarray(image).save(self.samples / f"step_{step:08d}.png")
        if self._writer is not None:
            self._writer.write_images(step, {"samples": image[None]})


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
