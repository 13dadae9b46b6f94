"""From a number in a source to what a batch holds; bad records are counted and replaced."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from kaleido_jax import tokens
from kaleido_jax.data.sources import RecordError, Source
from kaleido_jax.data.streams import Stream
from kaleido_jax.errors import UserError
from kaleido_jax.latents.errors import LatentError
from kaleido_jax.types import Batch

_LOG = logging.getLogger(__name__)
MAX_BAD_FRACTION = 0.02  # where nobody says otherwise
_LEAST_READS = 100  # fewer reads say little about the share of bad records
# Standard deviations by which chance may lift the share that was read above the true one.
_CHANCE = 4
_STAND_INS = 50

Example = Mapping[str, Any]


def key_hash(key: str) -> int:
    """32 bits of a record's key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


class Row(NamedTuple):
    """One example of a batch.

    Attributes:
      key: of the record.
      caption: ids, EOS included, without padding.
      latents: ids likewise; empty without latents.
      image: uint8 pixels, or floating point values of a toy.
    """

    key: str
    caption: list[int]
    latents: list[int]
    image: Shaped[np.ndarray, "h w c"]


class Encoder:
    """Examples to rows: captions and latents as ids of bounded length.

    Args:
      vocabulary: makes the ids.
      latents: names of the latents in z, in order; () is the baseline without z.
      caption_length, latent_length: tokens with EOS; longer ones are cut.
      image_size: side of the pictures (floating point toys pass as they are).

    Raises:
      UserError: a length under 1, or a latent without a section token.
    """

    def __init__(
        self,
        vocabulary: tokens.Vocabulary,
        latents: Sequence[str],
        caption_length: int,
        latent_length: int,
        image_size: int,
    ):
        if caption_length < 1 or (latents and latent_length < 1):
            raise UserError("caption and latent lengths must be at least 1 (the end token)")
        for name in latents:
            vocabulary.section_id(name)
        self.vocabulary, self.latents = vocabulary, tuple(latents)
        self.caption_length = caption_length
        self.latent_length = latent_length if latents else 0
        self.image_size = image_size

    def __call__(self, example: Example) -> Row:
        """The row of an example {key, image, caption, latents}.

        Raises:
          UserError: a picture of another size, or vokens beyond the vocabulary.
          LatentError: a latent that cannot be encoded.
        """
        image = np.asarray(example["image"])
        if image.dtype == np.uint8 and image.shape[:2] != (self.image_size, self.image_size):
            raise UserError(
                f"record {example['key']}: the picture is {image.shape[0]} x {image.shape[1]}, the "
                f"config's data.image_size is {self.image_size}"
            )
        caption = self.vocabulary.encode_caption(example["caption"], self.caption_length)
        latents: list[int] = []
        if self.latents:
            latents = self.vocabulary.encode_latents(
                example["latents"], self.latents, self.latent_length
            )
        return Row(example["key"], caption, latents, image)

    def collate(self, rows: Sequence[Row]) -> Batch:
        """The batch of some rows, ids padded to the lengths."""
        return Batch(
            caption_tokens=np.stack([tokens.pad(r.caption, self.caption_length) for r in rows]),
            latent_tokens=np.stack([tokens.pad(r.latents, self.latent_length) for r in rows]),
            image=np.stack([row.image for row in rows]),
            key_hash=np.array([key_hash(row.key) for row in rows], np.uint32),
        )


class Reader:
    """Rows of a source by number.

    Args:
      source: the examples.
      encode: makes rows of them.
      stream: the order; it names the stand-ins of bad records.
      max_bad_fraction: share of unreadable records above which reading stops.
      in_order: the source's own order is read, where bad records may lie side by side: their
        number is compared with the whole source's, not with what was read so far.

    Attributes:
      bad: where -> why, of every record that could not be read.

    Raises:
      UserError: a share that is not in 0..1.
    """

    def __init__(
        self,
        source: Source,
        encode: Encoder,
        stream: Stream,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        in_order: bool = False,
    ):
        if not isinstance(max_bad_fraction, int | float) or not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction is {max_bad_fraction!r}; it must be in 0..1")
        self.source, self.encode, self.stream = source, encode, stream
        self.max_bad_fraction, self.in_order = max_bad_fraction, in_order
        self.bad: dict[str, str] = {}
        self._reads = self._bad_reads = 0
        self._lock = threading.Lock()

    def read(self, index: int, load: Callable[[], Example] | None = None) -> Row:
        """Row `index`, or that of the stand-in that its number names.

        Args:
          load: gives example `index`; by default the source does.

        Raises:
          UserError: too many bad records.
        """
        row = self.try_read(index, load=load)
        for attempt in range(1, _STAND_INS + 1):
            if row is not None:
                return row
            row = self.try_read(self.stream.stand_in(index, attempt), counted=False)
        raise UserError(f"{_STAND_INS} records in a row cannot be read; the last: {self._last()}")

    def try_read(
        self, index: int, counted: bool = True, load: Callable[[], Example] | None = None
    ) -> Row | None:
        """Row `index`, or None for a bad record; stand-ins do not count for the share."""
        row, where, error = None, f"example {index}", None
        try:
            example = load() if load else self.source[index]
            where = example["key"]
            row = self.encode(example)
        except RecordError as caught:
            where, error = caught.where, caught
        except LatentError as caught:
            error = caught
        with self._lock:
            self._reads += counted
            if error is None:
                return row
            self._bad_reads += counted
            if where not in self.bad:
                self.bad[where] = str(error)
                _LOG.warning("skipped %s: %s", where, error)
            if self._bad_reads > self._most_bad():
                raise UserError(
                    f"{self._bad_reads} of {self._reads} records could not be read, more than "
                    f"the share of {self.max_bad_fraction} allowed; the last: {self._last()}"
                )
        return None

    def _most_bad(self) -> float:
        """How many of the reads so far may be bad."""
        share, count = self.max_bad_fraction, len(self.source)
        if self.in_order:
            return share * max(self._reads, count)
        reads = max(self._reads, _LEAST_READS)
        # A random part of a source with a bearable share may hold more; a whole epoch does not.
        return share * reads + _CHANCE * math.sqrt(share * min(reads, count))

    def _last(self) -> str:
        where, why = next(reversed(self.bad.items()))
        return f"{where}: {why}"
