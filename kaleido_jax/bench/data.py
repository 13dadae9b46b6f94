"""How fast the loader is: pictures a second, and how soon it starts or goes on."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32

import kaleido_jax
from kaleido_jax.data import Loader, RecordSource, ShapesSource, Source, task_table, tf_example
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import Vocabulary

RESUME_STEPS = (10, 10**4, 10**7)
LATENTS, LATENT_LENGTH = task_table.LATENT_SETS["combined"]
_PHOTOGRAPHS = 32  # different ones; more would measure nothing else
_REPEATS = 5  # of each time; the median counts


@dataclass(frozen=True)
class Settings:
    """What to measure with: seconds for the rate, rows of a batch, threads (0: one a core)."""

    seconds: float = 5.0
    batch_size: int = 64
    workers: int = 0


def drawn(size: int, records: int, vocabulary: Vocabulary, settings: Settings) -> dict[str, Any]:
    """Measures records that it draws into a temporary folder.

    Pictures of `size` pixels that cost what photographs cost to decode (28 KB as JPEG at 256
    pixels), a description, boxes and vokens.

    Raises:
      UserError: array_record is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture_bytes = write_records(Path(folder), size, records)
        result = measure(
            lambda: RecordSource(folder, LATENTS, size),
            vocabulary,
            LATENTS,
            LATENT_LENGTH,
            size,
            settings,
        )
    return {"bench": "data", "data": "drawn", "picture_bytes": round(picture_bytes), **result}


def task(
    name: str, data_dir: str, split: str, vocabulary: Vocabulary, settings: Settings
) -> dict[str, Any]:
    """Measures the records of a task or mixture.

    Raises:
      UserError: no such task, no such records.
    """
    spec = task_table.find(name)
    result = measure(
        lambda: task_table.task_source(name, data_dir, split),
        vocabulary,
        spec.latents,
        spec.latent_length,
        spec.size,
        settings,
    )
    return {"bench": "data", "data": name, **result}


def measure(
    make_source: Callable[[], Source],
    vocabulary: Vocabulary,
    latents: tuple[str, ...],
    latent_length: int,
    size: int,
    settings: Settings,
) -> dict[str, Any]:
    """The figures of a loader over a source.

    Args:
      make_source: opens the source anew, as a starting run does.

    Returns:
      images_per_second: over wall time. images_per_cpu_second: over the time that all cores spent,
      so what one core does. first_batch_seconds: from opening the files. resume_seconds: the same,
      beginning at each of RESUME_STEPS. position_bytes: what a checkpoint keeps of the stream.
    """

    def make() -> Loader:
        return Loader(
            make_source(),
            vocabulary,
            latents=latents,
            caption_length=task_table.CAPTION_LENGTH,
            latent_length=latent_length,
            image_size=size,
            batch_size=settings.batch_size,
            workers=settings.workers,
        )

    def time_to(step: int) -> float:
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            batches = make().batches(step)
            next(batches)
            times.append(time.perf_counter() - start)
            batches.close()
        return round(statistics.median(times), 4)

    loader = make()
    first = time_to(0)
    resume = {str(step): time_to(step) for step in RESUME_STEPS}
    images, wall, cpu = _rate(loader, settings.seconds)
    return {
        "size": size,
        "records": len(loader.source),
        "batch_size": settings.batch_size,
        "workers": loader.workers,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "images_per_second": round(images / wall, 1),
        "images_per_cpu_second": round(images / cpu, 1),
        "first_batch_seconds": first,
        "resume_seconds": resume,
        "position_bytes": len(json.dumps(loader.position(RESUME_STEPS[-1]))),
        "version": kaleido_jax.__version__,
    }


def _rate(loader: Loader, seconds: float) -> tuple[int, float, float]:
    """(images, wall seconds, seconds of all cores) once the threads are under way."""
    batches = loader.batches()
    rows = sum(len(next(batches).image) for _ in range(2))
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        images += rows // 2
        next(batches)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    batches.close()
    return images, wall, cpu


def write_records(folder: Path, size: int, count: int) -> float:
    """Writes an ArrayRecord file of drawn records; returns the mean bytes of a picture."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError("bench data needs the extra: pip install 'kaleido_jax[data]'") from error
    pictures = [photograph(size, seed) for seed in range(min(count, _PHOTOGRAPHS))]
    words = ShapesSource(count, size=32, latents=LATENTS)
    path = folder / "drawn-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for index, picture in zip(range(count), itertools.cycle(pictures), strict=False):
        said = words[index]
        texts = {"key": said["key"], "caption": said["caption"], "blob": "", **said["latents"]}
        writer.write(
            tf_example.write(
                {
                    "image": [picture],
                    "height": [size],
                    "width": [size],
                    **{name: [text.encode("utf-8")] for name, text in texts.items()},
                }
            )
        )
    writer.close()
    return statistics.mean(map(len, pictures))


def photograph(size: int, seed: int) -> bytes:
    """A JPEG as large as a photograph of that size: noise of all scales, as much as fits."""
    noise = np.random.default_rng(seed)
    layers = np.zeros((size, size, 3), np.float32)
    side = 4
    while side <= size:
        layer = noise.normal(0, 1, (side, side, 3)).astype(np.float32) * (4 / side) ** 0.5
        layers += cv2.resize(layer, (size, size), interpolation=cv2.INTER_CUBIC)
        side *= 2
    return _encode(layers, size)


def _encode(layers: Float32[np.ndarray, "size size 3"], size: int) -> bytes:
    """The noise at the contrast that brings the JPEG next to its size in bytes."""
    target = 28_000 * (size / 256) ** 1.6  # measured on photographs: 3 KB at 64 pixels
    best = b""
    for contrast in np.geomspace(0.5, 64, 24):
        pixels = np.clip(128 + contrast * layers, 0, 255).astype(np.uint8)
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        if not best or abs(len(data) - target) < abs(len(best) - target):
            best = data
    return best
