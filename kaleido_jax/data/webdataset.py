"""Webdataset shards (.tar of KEY.jpg, KEY.txt, KEY.json) with random access.

The shards' headers are read once; afterwards a record costs one read per member at its offset.
Only regular files are ever read: a shard with links or names that lead out of it is refused.
`oracle` latents come from the JSON: `objects: [{label, bbox_xyxy, polygon}]` in thousandths of the
stored picture, x first, become `bbox`, `blob` and `text` in the frame of the training crop.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kaleido_jax.data import oracle
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.transforms import ImageError, training_picture
from kaleido_jax.errors import UserError
from kaleido_jax.models.voken_tokenizer import PatchTokenizer

_LOG = logging.getLogger(__name__)
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 8 * 2**20
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class _Record:
    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension: offset, size


class NoRecordsError(UserError):
    """The shards hold no record that can be used."""


class WebDatasetSource:
    """Shards as a Source; the record's key is `SHARD/KEY`.

    Args:
      path: a folder of .tar files, one .tar, or names with a range such as
        `data/{00000..00004}.tar`; several separated by commas.
      size: side of the training pictures.
      latents: names to make, of text, bbox, blob (from the JSON; "" where a record gives nothing)
        and voken (from the picture).
      vokens: codebook file of the patch tokenizer (data/train_vokens.py); "" is the shipped one.
      max_objects: the largest objects that a latent names.
      max_bad_fraction: share of records lost in missing or truncated shards that is borne.

    Attributes:
      bad: place -> reason, for shards and records that the index had to leave out.

    Raises:
      UserError: no such folder, no shards, links or outside names in a tar, too much lost.
    """

    def __init__(
        self,
        path: str,
        size: int = 64,
        latents: tuple[str, ...] = ("text", "bbox", "blob"),
        max_objects: int = 6,
        max_bad_fraction: float = 0.02,
        vokens: str = "",
    ):
        for name in latents:
            if name not in oracle.WRITERS and name != "voken":
                raise UserError(
                    f"webdataset: no latent {name!r} in shards "
                    f"(there are {', '.join(oracle.WRITERS)}, voken)"
                )
        self._tokenizer = None
        if "voken" in latents:
            tokenizer = PatchTokenizer
            self._tokenizer = tokenizer.load(vokens) if vokens else tokenizer.default()
        if size < 1 or max_objects < 1:
            raise UserError("webdataset: size and max_objects must be at least 1")
        self.size, self.latents, self.max_objects = size, tuple(latents), max_objects
        self.bad: dict[str, str] = {}
        self._records: list[_Record] = []
        self._index(list_shards(path), max_bad_fraction)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example. Raises RecordError for a record that cannot be used."""
        record = self._records[index]
        with _naming(record):
            stored = self._stored(record)
            image, frame, size = training_picture(stored["image"], self.size)
            objects = oracle.read_objects(stored["metadata"], frame, size)[: self.max_objects]
            latents = {
                name: self._tokenizer.encode_string(image)
                if name == "voken"
                else oracle.WRITERS[name](objects)
                for name in self.latents
            }
            return {
                "key": stored["key"],
                "image": image,
                "caption": stored["caption"],
                "latents": latents,
            }

    def key(self, index: int) -> str:
        """The key of an example, from the index alone."""
        return self._key(self._records[index])

    def encoded(self, index: int) -> dict[str, Any]:
        """An example as it is stored: {key, image: bytes, caption, metadata: the JSON object}.

        Raises:
          RecordError: a record whose members or texts cannot be read; the picture is not decoded.
        """
        record = self._records[index]
        with _naming(record):
            return self._stored(record)

    def _stored(self, record: _Record) -> dict[str, Any]:
        extension = next(name for name in _IMAGES if name in record.members)
        image = self._member(record, extension)
        metadata = oracle.read_metadata(
            self._member(record, "json") if "json" in record.members else b"{}"
        )
        if "txt" in record.members:
            caption = self._member(record, "txt").decode("utf-8").strip()
        else:
            caption = oracle.caption(metadata)
        return {
            "key": self._key(record),
            "image": image,
            "caption": caption,
            "metadata": metadata,
        }

    def _key(self, record: _Record) -> str:
        return f"{record.shard.stem}/{record.key}"

    def _member(self, record: _Record, extension: str) -> bytes:
        offset, size = record.members[extension]
        with open(record.shard, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ImageError(f"the shard ends within .{extension}")
        return data

    # ---- the index ------------------------------------------------------------------------

    def _index(self, shards: list[Path], max_bad_fraction: float) -> None:
        counts, broken, lost = [], [], 0
        for shard in shards:
            try:
                records, reason = _read_headers(shard)
            except OSError as error:
                records, reason = [], error.strerror or str(error)
            whole = []
            for record in records:
                problem = _problem(record)
                if problem is None:
                    whole.append(record)
                else:
                    lost += 1
                    self._leave_out(f"{shard}: {record.key}", problem)
            self._records += whole
            if reason is None:
                counts.append(len(whole))
            else:
                broken.append(len(whole))
                self._leave_out(str(shard), reason)
        if not self._records:
            first = next(iter(self.bad.items()), None)
            raise NoRecordsError(
                "no whole record in the shards" + (f"; {first[0]}: {first[1]}" if first else "")
            )
        # What a broken shard would have held is judged by the whole ones.
        usual = sum(counts) / len(counts) if counts else 0
        lost += sum(max(1, round(usual) - found) for found in broken)
        if lost > max_bad_fraction * (lost + len(self._records)):
            place, reason = next(reversed(self.bad.items()))
            raise UserError(
                f"about {lost} of {lost + len(self._records)} records are lost, more than the "
                f"share of {max_bad_fraction} allowed; the last: {place}: {reason}"
            )

    def _leave_out(self, place: str, reason: str) -> None:
        self.bad[place] = reason
        _LOG.warning("left out %s: %s", place, reason)


@contextlib.contextmanager
def _naming(record: _Record) -> Iterator[None]:
    """Errors of a record become RecordErrors that name it."""
    try:
        yield
    except (ImageError, oracle.AnnotationError, OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{record.shard}: {record.key}", str(error)) from error


def list_shards(path: str) -> list[Path]:
    """The shards that a path names, in order; those of a range whether they exist or not.

    Args:
      path: as WebDatasetSource's; also a pattern such as `data/*.tar`.

    Raises:
      UserError: nothing of that name, an empty folder or pattern, a range that is none.
    """
    if not path:
        raise UserError("config key 'data.source.path' is empty; it must name a folder of shards")
    shards: list[Path] = []
    for part in path.split(","):
        match = _RANGE.search(part)
        if match:
            first, last = match[1], match[2]
            if int(last) < int(first) or int(last) - int(first) > 10**6:
                raise UserError(f"{part}: the range must rise, by at most a million")
            shards += [
                Path(part[: match.start()] + str(n).zfill(len(first)) + part[match.end() :])
                for n in range(int(first), int(last) + 1)
            ]
        elif Path(part).is_dir():
            found = sorted(Path(part).glob("*.tar"))
            if not found:
                raise UserError(f"the folder {part} holds no .tar shards")
            shards += found
        elif Path(part).is_file():
            shards.append(Path(part))
        elif glob.has_magic(part):
            found = sorted(Path(name) for name in glob.glob(part))
            if not found:
                raise UserError(f"no shard matches {part}")
            shards += found
        else:
            raise UserError(f"no such folder or shard: {part}")
    return shards


def _read_headers(shard: Path) -> tuple[list[_Record], str | None]:
    """A shard's records in order, and what is wrong with its end, if anything.

    Raises:
      UserError: links, devices, sparse files or names that lead out of the shard.
      OSError: the file cannot be read.
    """
    records: dict[str, _Record] = {}
    length = shard.stat().st_size
    reason, end = None, 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                if not member.isreg() or member.issparse():
                    raise UserError(f"{shard}: {member.name!r} is not a regular file; refused")
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{shard}: {member.name!r} leads out of the shard; refused")
                stem, _, extension = name.name.partition(".")
                extension = extension.lower()
                if extension not in _IMAGES + _TEXTS or not stem:
                    continue
                key = str(name.parent / stem)
                record = records.setdefault(key, _Record(shard, key))
                record.members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        reason = f"not a whole tar file: {error}"
    if reason is None:
        # tarfile takes a broken header for the end; a whole shard ends with a block of zeros.
        with open(shard, "rb") as file:
            mark = os.pread(file.fileno(), 512, end)
        if mark != bytes(512):
            reason = f"truncated or broken after {end} of {length} bytes"
    return list(records.values()), reason


def _problem(record: _Record) -> str | None:
    """Why a record cannot be used, as far as its headers tell."""
    length = record.shard.stat().st_size
    if not any(name in record.members for name in _IMAGES):
        return f"no picture ({', '.join('.' + name for name in _IMAGES)})"
    for extension, (offset, size) in record.members.items():
        limit = MAX_TEXT_BYTES if extension in _TEXTS else MAX_IMAGE_BYTES
        if size > limit:
            return f".{extension} has {size} bytes, more than {limit}"
        if offset + size > length:
            return f"the shard ends within .{extension}"
    return None
