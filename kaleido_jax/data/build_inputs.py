"""What records are built from: shards of webdataset, of a TFDS split, or of the embedded shapes.

A unit is one input shard. It becomes one file of records, is the work of one worker, and is what a
build that was stopped does not do again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kaleido_jax.data.shard_index import index_shard, list_shards
from kaleido_jax.data.sources import RecordError, ShapesSource
from kaleido_jax.data.tfds_shards import TfdsSplit
from kaleido_jax.data.webdataset import record_key, stored_record
from kaleido_jax.errors import UserError

_TFDS, _SHAPES = "tfds:", "shapes:"
_SHAPES_PER_UNIT = 1000


@dataclass(frozen=True)
class Unit:
    """One input shard.

    Attributes:
      split: of the records.
      name: unique in the split; the annotation's sidecars bear it.
      place: the .tar, `tfds:NAME/SPLIT`, or `shapes:COUNT:SEED`.
      part: number of the shard in the place, -1 for a .tar.
      data_dir: TFDS's folder, "" for its default.
      source: what tells the shard from another of its name: {"bytes": n} or {"records": n}.
    """

    split: str
    name: str
    place: str
    part: int
    data_dir: str
    source: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stored:
    """One example: encoded bytes, or pixels where there is no file, uint8 [size, size, 3]."""

    key: str
    image: bytes | np.ndarray
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    latents: Mapping[str, str] | None = None


class Skipped(NamedTuple):
    """An example that cannot be used, or with key "" and kind "shard" the rest of a shard.

    `kind` is one of KINDS for an example.
    """

    key: str
    kind: str
    reason: str


# What is wrong: what the shard's headers say of the key; its texts; its picture; a latent.
KINDS = ("index", "record", "picture", "latent")


@dataclass(frozen=True)
class Content:
    """A unit opened.

    Attributes:
      keys: of the examples that can be listed.
      lost: what cannot.
      whole: whether the shard could be listed to its end.
      examples: each of `keys` in order, read when it is asked for.
    """

    keys: list[str]
    lost: list[Skipped]
    whole: bool
    examples: Iterator[Stored | Skipped]


def find_units(images: str, split: str, data_dir: str = "") -> list[Unit]:
    """The units that `--images` names, in order.

    Args:
      images: shards as `list_shards` takes them, `tfds:NAME/SPLIT`, or `shapes:COUNT[:SEED]`.
      split: of the records.
      data_dir: TFDS's folder.

    Raises:
      UserError: nothing there.
    """
    if images.startswith(_TFDS):
        tfds = _tfds_split(images, data_dir)
        if not tfds.shard_names:
            raise UserError(f"{images} is empty")
        return [
            Unit(split, name, images, part, data_dir, (("records", count),))
            for part, (name, count) in enumerate(zip(tfds.shard_names, tfds.shard_lengths))
        ]
    if images.startswith(_SHAPES):
        count, seed = _shapes(images)
        place = f"{_SHAPES}{count}:{seed}"
        return [
            Unit(
                split,
                f"shapes-{seed}-{part:05d}",
                place,
                part,
                "",
                (("records", min(_SHAPES_PER_UNIT, count - part * _SHAPES_PER_UNIT)),),
            )
            for part in range(-(-count // _SHAPES_PER_UNIT))
        ]
    return [
        Unit(split, shard.stem, str(shard), -1, "", (("bytes", _size(shard)),))
        for shard in list_shards(images)
    ]


def open_unit(unit: Unit, size: int) -> Content:
    """A unit's examples. `size` is the side at which shapes are drawn.

    Raises:
      UserError: links or outside names in a .tar, a TFDS data set that is gone.
    """
    if unit.place.startswith(_SHAPES):
        return _open_shapes(unit, size)
    if unit.place.startswith(_TFDS):
        return _open_tfds(unit)
    return _open_tar(unit)


def _open_tar(unit: Unit) -> Content:
    index = index_shard(Path(unit.place))
    lost = [
        Skipped(f"{unit.name}/{key}", "index", reason) if key else Skipped("", "shard", reason)
        for key, reason in index.lost
    ]

    def examples() -> Iterator[Stored | Skipped]:
        for record in index.records:
            try:
                item = stored_record(record)
                yield Stored(item["key"], item["image"], item["caption"], item["metadata"])
            except RecordError as error:
                yield Skipped(record_key(record), "record", str(error))

    return Content([record_key(record) for record in index.records], lost, index.whole, examples())


def _open_tfds(unit: Unit) -> Content:
    try:
        items = _tfds_split(unit.place, unit.data_dir).read(unit.part)
    except RecordError as error:
        return Content([], [Skipped("", "shard", str(error))], False, iter(()))
    examples = (
        Stored(item["key"], item["image"], item["caption"], item["metadata"]) for item in items
    )
    return Content([item["key"] for item in items], [], True, examples)


def _open_shapes(unit: Unit, size: int) -> Content:
    count, seed = _shapes(unit.place)
    first = unit.part * _SHAPES_PER_UNIT
    numbers = range(first, min(count, first + _SHAPES_PER_UNIT))
    source = ShapesSource(count, seed, size, latents=("text", "bbox", "blob", "voken"))

    def examples() -> Iterator[Stored]:
        for i in numbers:
            item = source[i]
            yield Stored(item["key"], item["image"], item["caption"], {}, item["latents"])

    return Content([f"shapes-{seed}-{i}" for i in numbers], [], True, examples())


def _shapes(images: str) -> tuple[int, int]:
    words = images.removeprefix(_SHAPES).split(":")
    if len(words) > 2 or not all(word.isdecimal() and len(word) < 13 for word in words):
        raise UserError(f"{images}: write shapes:COUNT or shapes:COUNT:SEED")
    count, seed = int(words[0]), int(words[1]) if len(words) > 1 else 0
    if count < 1:
        raise UserError(f"{images}: at least one example is needed")
    return count, seed


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        return -1


@functools.lru_cache(maxsize=4)
def _tfds_split(images: str, data_dir: str) -> TfdsSplit:
    return TfdsSplit(images.removeprefix(_TFDS), data_dir)
