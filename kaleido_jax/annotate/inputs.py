"""What is annotated: shards of webdataset or of a TFDS split, each read alone and in order."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kaleido_jax.annotate import storage
from kaleido_jax.annotate.protocols import Example
from kaleido_jax.data import oracle
from kaleido_jax.data.datasets import imagenet_class_names
from kaleido_jax.data.shard_index import index_shard, list_shards
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.tfds_shards import TfdsSplit
from kaleido_jax.data.transforms import Frame, decode_image, orient, square_picture
from kaleido_jax.data.webdataset import record_key, stored_record
from kaleido_jax.errors import UserError

_TFDS = "tfds:"
_WORDNET = re.compile(r"n\d{8}")  # how TFDS labels ImageNet
IMAGE_SIZE = 512  # side at which engines see pictures, at most, unless told otherwise


@dataclass(frozen=True)
class Shard:
    """One unit of work.

    Attributes:
      name: unique in the run; the sidecars bear it.
      place: a .tar, or `tfds:NAME/SPLIT`.
      part: number of the shard in the TFDS split, -1 for a .tar.
      data_dir: TFDS's folder, "" for its default.
    """

    name: str
    place: str
    part: int = -1
    data_dir: str = ""


class OpenShard(Protocol):
    """The examples of a shard by number.

    Attributes:
      lost: (key or shard, reason) of what could not even be listed.
      whole: whether the shard could be listed to its end.
    """

    lost: list[tuple[str, str]]
    whole: bool

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def stored(self, index: int) -> dict[str, Any]:
        """{key, image: bytes, caption, metadata}. Raises RecordError."""


def find_shards(data: str, data_dir: str = "") -> list[Shard]:
    """The shards that `--data` names, in order.

    Args:
      data: a folder, a .tar, a pattern or a range of them, several separated by commas, also on a
        file system that Beam knows (`gs://...`); or `tfds:NAME/SPLIT`.
      data_dir: TFDS's folder, "" for its default.

    Raises:
      UserError: there are none, or two have the same name.
    """
    if data.startswith(_TFDS):
        split = _split(data, data_dir)
        return [Shard(name, data, i, data_dir) for i, name in enumerate(split.shard_names)]
    places = []
    for part in data.split(","):
        places += storage.list_remote(part) if storage.is_remote(part) else list_shards(part)
    shards = [Shard(storage.stem(str(place)), str(place)) for place in places]
    name, count = Counter(shard.name for shard in shards).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} shards are called {name}.tar; keys begin with the shard's name, so it must "
            "be unique"
        )
    return shards


def fingerprint(shard: Shard) -> dict[str, Any]:
    """What tells a shard from another of its name: {"bytes": size or -1} or {"records": n}."""
    if shard.part >= 0:
        return {"records": _split(shard.place, shard.data_dir).shard_lengths[shard.part]}
    return {"bytes": storage.size(shard.place)}


def open_shard(shard: Shard, folder: str) -> OpenShard:
    """A shard's examples.

    Args:
      shard: which.
      folder: where a copy may lie if the shard is on another machine.

    Raises:
      UserError: links or names that lead out of a .tar.
    """
    if shard.part >= 0:
        return _TfdsShard(shard)
    return _TarShard(shard.name, storage.fetch(shard.place, folder))


def read_example(stored: dict[str, Any], most: int, bbox: str | None = None) -> Example:
    """The picture as engines see it: upright, the centred square, at most `most` pixels a side.

    Raises:
      ImageError: bytes that are no picture we can use.
    """
    pixels, orientation = decode_image(stored["image"])
    size = (pixels.shape[1], pixels.shape[0])
    pixels = orient(pixels, orientation)
    height, width = pixels.shape[:2]
    frame = Frame.oriented(orientation).then(Frame.square_crop(width, height))
    image = square_picture(pixels, min(most, height, width))
    return Example(
        stored["key"], image, stored["caption"], stored["metadata"], frame, size, bbox or None
    )


class _TarShard:
    def __init__(self, name: str, path: str):
        index = index_shard(Path(path))
        self._records, self.whole = index.records, index.whole
        self.lost = [(f"{name}/{key}" if key else name, reason) for key, reason in index.lost]

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        return record_key(self._records[index])

    def stored(self, index: int) -> dict[str, Any]:
        return stored_record(self._records[index])


class _TfdsShard:
    def __init__(self, shard: Shard):
        self._examples: list[dict[str, Any]] = []
        self.lost: list[tuple[str, str]] = []
        try:
            self._examples = _split(shard.place, shard.data_dir).read(shard.part)
        except RecordError as error:
            self.lost.append((shard.name, str(error)))
        self.whole = not self.lost
        labels = {example["metadata"].get("label", "") for example in self._examples}
        if any(_WORDNET.fullmatch(label) for label in labels):
            self._examples = [_named(example) for example in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        return self._examples[index]["key"]

    def stored(self, index: int) -> dict[str, Any]:
        return self._examples[index]


def _named(example: dict[str, Any]) -> dict[str, Any]:
    """An example of ImageNet with the name of its class in place of its WordNet number."""
    label = _class_names().get(example["metadata"]["label"])
    if label is None:
        return example
    metadata = {**example["metadata"], "label": label}
    return {**example, "metadata": metadata, "caption": oracle.caption(metadata)}


@functools.cache
def _class_names() -> dict[str, str]:
    return imagenet_class_names()


@functools.lru_cache(maxsize=4)
def _split(data: str, data_dir: str) -> TfdsSplit:
    return TfdsSplit(data.removeprefix(_TFDS), data_dir)
