"""Records (made by `kaleido build`) by number, without TensorFlow.

A folder of records is what TFDS lays down: `dataset_info.json` and
`NAME-SPLIT.array_record-00000-of-00004` (or `.tfrecord-`), each record a tf.train.Example of key,
image, height, width, caption and one string per latent. Reading a record costs the same wherever it
lies; the files keep no state but their opened readers.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kaleido_jax.data import tf_example
from kaleido_jax.data.record_files import FileError, RecordFile, ShardName
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.transforms import (
    ImageError,
    decode_image,
    decode_plain_jpeg,
    square_picture,
)
from kaleido_jax.errors import UserError

_LOG = logging.getLogger(__name__)
INFO = "dataset_info.json"
LATENT_NAMES = ("text", "bbox", "blob", "voken")


class RecordSource:
    """Records as a Source.

    Args:
      path: the folder of the records, or one above it that holds no other (`ROOT/NAME`); of several
        versions the newest is taken.
      latents: the names to give with each example.
      size: side of the pictures; None gives them as they are stored. Another size than the stored
        one is made by resizing the stored picture.
      split: which of the data set's splits.
      max_bad_fraction: share of records in missing files that is borne. Their numbers stay, so
        that the order of the rest does not move; reading them raises RecordError.

    Attributes:
      folder: where the records lie.
      bad: file -> reason, for missing files.

    Raises:
      UserError: no such folder, several data sets in it, no such split or latent, too much missing.
    """

    def __init__(
        self,
        path: str,
        latents: Sequence[str] = LATENT_NAMES,
        size: int | None = None,
        split: str = "train",
        max_bad_fraction: float = 0.02,
    ):
        if size is not None and size < 1:
            raise UserError("records: size must be at least 1")
        self.folder = find_folder(path)
        self.latents, self.size, self.split = tuple(latents), size, split
        self.bad: dict[str, str] = {}
        self._files, counts = self._open(max_bad_fraction)
        self._ends = list(itertools.accumulate(counts))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"{self.folder}: split {split!r} holds no records")
        self._check_latents()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def paths(self) -> list[Path]:
        """The split's files in order, missing ones among them."""
        return [file.path for file in self._files]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example. Raises RecordError for a record that cannot be used."""
        return self.decode(self.encoded(index))

    def encoded(self, index: int) -> dict[str, Any]:
        """One record as it is stored: {key, image: bytes, height, width, caption, latents}.

        Raises:
          IndexError: a number that is not in the data set.
          RecordError: a record that cannot be read.
        """
        return self.parse(self.raw(index), index)

    def parse(self, raw: bytes, index: int) -> dict[str, Any]:
        """The record `encoded(index)` of what `raw(index)` gave. Raises RecordError."""
        where = self._place(index)
        try:
            features = tf_example.read(raw)
            where = f"{self._find(index)[0].path}: {_text(features, 'key')}"
            return {
                "key": _text(features, "key"),
                "image": _one(features, "image", bytes),
                "height": _one(features, "height", int),
                "width": _one(features, "width", int),
                "caption": _text(features, "caption"),
                "latents": {name: _text(features, name) for name in self.latents},
            }
        except (tf_example.ExampleError, UnicodeDecodeError) as error:
            raise RecordError(where, str(error)) from error

    def raw(self, index: int) -> bytes:
        """One record as the file holds it, a tf.train.Example. Raises as `encoded`."""
        file, within = self._find(index)
        try:
            return file.read(within)
        except FileError as error:
            raise RecordError(self._place(index), str(error)) from error

    def _place(self, index: int) -> str:
        file, within = self._find(index)
        return f"{file.path}: record {within}"

    def _find(self, index: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number within; raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        return self._files[place], index - (self._ends[place - 1] if place else 0)

    def decode(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The example of a record: its picture decoded, uint8 [size, size, 3].

        Raises:
          RecordError: a picture that cannot be read, or of another size than the record says.
        """
        try:
            image = decode_plain_jpeg(record["image"], record["width"], record["height"])
            if image is None:
                image, _ = decode_image(record["image"], least_side=1)
        except ImageError as error:
            raise RecordError(f"{self.folder}: {record['key']}", str(error)) from error
        if image.shape[:2] != (record["height"], record["width"]):
            raise RecordError(
                f"{self.folder}: {record['key']}",
                f"the picture is {image.shape[1]} x {image.shape[0]}, the record says "
                f"{record['width']} x {record['height']}",
            )
        if self.size is not None and image.shape[:2] != (self.size, self.size):
            image = square_picture(image, self.size)
        return {
            "key": record["key"],
            "image": image,
            "caption": record["caption"],
            "latents": dict(record["latents"]),
        }

    # ---- the files ------------------------------------------------------------------------

    def _open(self, max_bad_fraction: float) -> tuple[list[RecordFile], list[int]]:
        """The split's files in order, and how many records each has."""
        found = [name for path in self.folder.iterdir() if (name := ShardName.parse(path.name))]
        mine = sorted((n for n in found if n.split == self.split), key=lambda n: n.index)
        if not mine:
            splits = sorted({name.split for name in found})
            raise UserError(
                f"{self.folder} has no split {self.split!r}"
                + (f"; it has {', '.join(splits)}" if splits else " and no files of records")
            )
        first = mine[0]
        kinds = {(n.name, n.format, n.count) for n in mine}
        if len(kinds) > 1:
            raise UserError(f"{self.folder}: files of several data sets: {mine[0]}, {mine[-1]}")
        there = {name.index for name in mine}
        names = [
            ShardName(first.name, first.split, first.format, i, first.count)
            for i in range(first.count)
        ]
        files = [RecordFile(self.folder / str(name), name.format) for name in names]
        counts = _shard_lengths(self.folder, self.split)
        if counts is not None and len(counts) != len(files):
            raise UserError(
                f"{self.folder / INFO}: {len(counts)} files for the split {self.split!r}, the "
                f"files' names say {len(files)}"
            )
        for file, name in zip(files, names):
            if name.index not in there:
                self.bad[str(file.path)] = "the file is missing"
        if self.bad and counts is None:
            raise UserError(f"{next(iter(self.bad))} is missing, and there is no {INFO} beside it")
        if counts is None:
            try:
                counts = [len(file) for file in files]
            except FileError as error:
                raise UserError(f"{self.folder}: {error}") from error
        lost = sum(count for count, name in zip(counts, names) if name.index not in there)
        if lost > max_bad_fraction * sum(counts):
            raise UserError(
                f"{next(iter(self.bad))} is missing; {lost} of {sum(counts)} records are lost, "
                f"more than the share of {max_bad_fraction} allowed"
            )
        for place, reason in self.bad.items():
            _LOG.warning("left out %s: %s", place, reason)
        return files, counts

    def _check_latents(self) -> None:
        known = _features(self.folder)
        for name in self.latents:
            if name not in LATENT_NAMES or (known is not None and name not in known):
                have = [n for n in LATENT_NAMES if known is None or n in known]
                raise UserError(f"{self.folder}: no latent {name!r} (there are {', '.join(have)})")


def find_folder(path: str) -> Path:
    """The folder of records at a path or below it.

    Raises:
      UserError: nothing there, or several data sets or configurations to choose from.
    """
    if not path:
        raise UserError("config key 'data.source.path' is empty; it must name a folder of records")
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"no such folder of records: {root}")
    if _holds_records(root):
        return root
    found: list[Path] = []
    for depth in (1, 2, 3):  # VERSION, CONFIG/VERSION, NAME/CONFIG/VERSION
        found = found or sorted(p.parent for p in root.glob("*/" * depth + INFO))
        found = [folder for folder in found if not folder.name.startswith("incomplete.")]
    if not found:
        raise UserError(f"{root} holds no records; `kaleido build` makes them")
    if len({folder.parent for folder in found}) > 1 or not all(map(_version, found)):
        names = ", ".join(str(folder) for folder in found[:4])
        raise UserError(f"{root} holds several data sets; name one of {names}")
    return max(found, key=_version)


def split_names(path: str) -> list[str]:
    """The splits that the records at a path have, by name. Raises UserError."""
    found = (ShardName.parse(entry.name) for entry in find_folder(path).iterdir())
    return sorted({name.split for name in found if name})


def _holds_records(folder: Path) -> bool:
    return (folder / INFO).is_file() or any(ShardName.parse(path.name) for path in folder.iterdir())


def _version(folder: Path) -> tuple[int, ...]:
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def _shard_lengths(folder: Path, split: str) -> list[int] | None:
    """Records per file, by TFDS' metadata; None where there is none."""
    path = folder / INFO
    if not path.is_file():
        return None
    try:
        for entry in json.loads(path.read_text("utf-8"))["splits"]:
            if entry["name"] == split:
                return [int(count) for count in entry["shardLengths"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error
    raise UserError(f"{path} has no split {split!r}")


def _features(folder: Path) -> set[str] | None:
    """Names of the features, by TFDS' metadata; None where there is none."""
    path = folder / "features.json"
    if not path.is_file():
        return None
    try:
        return set(json.loads(path.read_text("utf-8"))["featuresDict"]["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def _one(features: Mapping[str, tf_example.Value], name: str, kind: type) -> Any:
    values = features.get(name)
    if values is None or len(values) != 1 or not isinstance(values[0], kind):
        raise tf_example.ExampleError(f"no single {kind.__name__} in {name!r}")
    return values[0]


def _text(features: Mapping[str, tf_example.Value], name: str) -> str:
    return _one(features, name, bytes).decode("utf-8")
