"""Webdataset shards (.tar of KEY.jpg, KEY.txt, KEY.json) with random access.

The shards' headers are read once (shard_index.py); afterwards a record costs one read per member
at its offset.
`oracle` latents come from the JSON: `objects: [{label, bbox_xyxy, polygon}]` in thousandths of the
stored picture, x first, become `bbox`, `blob` and `text` in the frame of the training crop.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kaleido_jax.data import oracle
from kaleido_jax.data.shard_index import IMAGES, ShardRecord, index_shard, list_shards
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.transforms import ImageError, training_picture
from kaleido_jax.errors import UserError
from kaleido_jax.models.voken_tokenizer import PatchTokenizer

_LOG = logging.getLogger(__name__)


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
        self._records: list[ShardRecord] = []
        self._index(list_shards(path), max_bad_fraction)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example. Raises RecordError for a record that cannot be used."""
        record = self._records[index]
        with _naming(record):
            stored = _stored(record)
            image, frame, size = training_picture(stored["image"], self.size)
            objects = oracle.read_objects(stored["metadata"], frame, size)[: self.max_objects]
            latents = {
                name: self._tokenizer.encode_string(image)
                if name == "voken"
                else oracle.write(name, objects)
                for name in self.latents
            }
            return {
                "key": stored["key"],
                "image": image,
                "caption": stored["caption"],
                "latents": latents,
            }

    # ---- the index ------------------------------------------------------------------------

    def _index(self, shards: list[Path], max_bad_fraction: float) -> None:
        counts, broken, lost = [], [], 0
        for shard in shards:
            index = index_shard(shard)
            for key, reason in index.lost:
                lost += bool(key)
                self._leave_out(f"{shard}: {key}" if key else str(shard), reason)
            self._records += index.records
            (counts if index.whole else broken).append(len(index.records))
        if not self._records:
            first = next(iter(self.bad.items()), None)
            raise UserError(
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


def record_key(record: ShardRecord) -> str:
    """The key of a record among all shards: `SHARD/KEY`."""
    return f"{record.shard.stem}/{record.key}"


def stored_record(record: ShardRecord) -> dict[str, Any]:
    """A record as it is stored: {key, image: bytes, caption, metadata: the JSON object}.

    Raises:
      RecordError: members or texts that cannot be read; the picture is not decoded.
    """
    with _naming(record):
        return _stored(record)


def _stored(record: ShardRecord) -> dict[str, Any]:
    extension = next(name for name in IMAGES if name in record.members)
    image = _member(record, extension)
    metadata = oracle.read_metadata(_member(record, "json") if "json" in record.members else b"{}")
    if "txt" in record.members:
        caption = _member(record, "txt").decode("utf-8").strip()
    else:
        caption = oracle.caption(metadata)
    return {"key": record_key(record), "image": image, "caption": caption, "metadata": metadata}


def _member(record: ShardRecord, extension: str) -> bytes:
    offset, size = record.members[extension]
    with open(record.shard, "rb") as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ImageError(f"the shard ends within .{extension}")
    return data


@contextlib.contextmanager
def _naming(record: ShardRecord) -> Iterator[None]:
    """Errors of a record become RecordErrors that name it."""
    try:
        yield
    except (ImageError, oracle.AnnotationError, OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{record.shard}: {record.key}", str(error)) from error
