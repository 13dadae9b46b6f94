"""Pictures of one subject on disk, part by part: what was made before a kill is kept.

RUN/plan.json            what shapes the pictures
RUN/part_000000.npz      pictures and documents of the first part, ...
RUN/NAME-HASH/000000.npy features of the part, ...
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kaleido_jax import beside, checkpoint
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.features import Feature
from kaleido_jax.evaluate.subjects import Drawn, Subject
from kaleido_jax.interop.sources import read_json
from kaleido_jax.latents import LatentDocument
from kaleido_jax.metrics.rows import Rows

PART = 100  # pictures of a part, about: whole batches
Tick = Callable[[int], None]


class Pictures:
    """`count` pictures of a subject in a folder."""

    def __init__(self, folder: pathlib.Path, subject: Subject, count: int, batch_size: int):
        """Makes the folder.

        Raises:
          UserError: it cannot be written, or holds other pictures.
        """
        self.folder, self._subject, self.count = folder, subject, count
        self._size = batch_size * max(1, -(-PART // batch_size))
        plan = {"identity": subject.identity, "part": self._size}
        plan = json.loads(json.dumps(plan))
        path = folder / "plan.json"
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                checkpoint.write_json(path, plan)
        if read_json(path) != plan:
            raise UserError(f"{folder} holds other pictures; name another --out")

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(-(-self.count // self._size))

    def _numbers(self, part: int) -> range:
        return range(part * self._size, min((part + 1) * self._size, self.count))

    def _path(self, part: int) -> pathlib.Path:
        return self.folder / f"part_{part:06d}.npz"

    def missing(self) -> list[int]:
        """Parts that are not there, too short or not whole."""
        return [part for part in self.parts if self._read(part) is None]

    def make(self, part: int) -> int:
        """Draws a part and writes it; returns its number of pictures."""
        numbers = self._numbers(part)
        images, documents = self._subject.draw(numbers)
        lines = "\n".join(document.to_json() for document in documents).encode()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images, documents=np.frombuffer(lines, np.uint8))
        with _writing(self.folder):
            beside.write_bytes(self._path(part), buffer.getvalue())
        return len(numbers)

    def _read(self, part: int) -> tuple[UInt8[np.ndarray, "n h w 3"], bytes] | None:
        """Pictures and JSON lines of a part as far as they count; None where it must be made."""
        try:
            with np.load(self._path(part), allow_pickle=False) as file:
                if file.zip.testzip() is not None:  # numpy may stop before the checksum
                    return None
                images, lines = file["images"], file["documents"].tobytes()
        except Exception:  # damage: numpy, zip and zlib each have their own
            return None
        wanted = len(self._numbers(part))
        return (images[:wanted], lines) if len(images) >= wanted else None

    def load(self, part: int) -> Drawn:
        """Pictures and documents of a part that is there."""
        images, lines = self._read(part)
        strings = lines.split(b"\n")[: len(images)]
        return images, [LatentDocument.from_json(string) for string in strings]

    def __iter__(self) -> Iterator[Drawn]:
        """All parts in order."""
        return (self.load(part) for part in self.parts)

    def features(self, feature: Feature, tick: Tick = lambda count: None) -> tuple[Rows, Rows]:
        """Features and logits of all pictures, made where they are missing.

        Args:
          tick: is told the number of pictures of each part.
        """
        folder = self.folder / f"{feature.name}-{feature.hash}"
        paths: tuple[list[Any], list[Any]] = ([], [])
        for part in self.parts:
            count = len(self._numbers(part))
            names = [folder / f"{part:06d}_{count}.npy", folder / f"{part:06d}_{count}.logits.npy"]
            wanted = names if feature.classes else names[:1]
            if not all(path.is_file() for path in wanted):
                values = feature.compute(self.load(part)[0])
                with _writing(folder):
                    for path, value in zip(wanted, values, strict=False):
                        write_array(path, value)
            for found, path in zip(paths, wanted, strict=False):
                found.append(path)
            tick(count)
        return Rows(paths[0]), Rows(paths[1])


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an .npy beside its place and renames it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    beside.write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise UserError(f"{folder} cannot be written: {reason}") from error
