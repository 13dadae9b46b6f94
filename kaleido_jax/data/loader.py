"""Batches from a source: an order that is a function of (seed, epoch, index) alone.

`batch(step)` depends on nothing but the settings and the step, so any step costs the same, a run
resumes by its number, and hosts, batch splits and restarts all read one stream of examples.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from kaleido_jax import tokens
from kaleido_jax.data.sources import RecordError, Source
from kaleido_jax.errors import UserError
from kaleido_jax.latents.errors import LatentError
from kaleido_jax.types import Batch

_LOG = logging.getLogger(__name__)
_LEAST_READS = 100  # fewer reads say little about the share of bad records
_STAND_INS = 50


def permute(
    index: Int64[np.ndarray, " n"], count: int, seed: int, epoch: int
) -> Int64[np.ndarray, " n"]:
    """Entries `index` of the random permutation of range(count) that (seed, epoch) names.

    A Feistel network on the next even power of two; what falls outside walks on until it is
    inside. Needs no memory and no other entry.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.frombuffer(
        hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=48).digest(), np.uint64
    )
    out = np.asarray(index).astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        value = out[todo]
        left, right = value >> bits, value & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        out[todo] = (left << bits) | right
        todo = out >= np.uint64(count)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser: every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def key_hash(key: str) -> int:
    """32 bits of a record's key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


class Loader:
    """Batches of a source.

    Examples follow one another in one endless stream: epoch after epoch, each epoch another
    permutation; a batch may reach over an epoch's end, so none is skipped or repeated.

    Args:
      source: the examples.
      vocabulary: makes ids of captions and latents.
      latents: names of the latents in z, in order; () is the baseline without z.
      caption_length, latent_length: tokens with EOS; longer ones are cut.
      image_size: side of the pictures (floating point toys pass as they are).
      batch_size: over all hosts.
      seed: of the order.
      shuffle: False reads the source in its own order.
      host_index, host_count: this host takes rows [i B / H, (i + 1) B / H) of each batch.
      max_bad_fraction: share of unreadable records above which reading stops.
      prefetch, workers: batches made ahead, and threads that make them.

    Raises:
      UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        source: Source,
        vocabulary: tokens.Vocabulary,
        *,
        latents: Sequence[str],
        caption_length: int,
        latent_length: int,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        host_index: int = 0,
        host_count: int = 1,
        max_bad_fraction: float = 0.02,
        prefetch: int = 4,
        workers: int = 1,
    ):
        if len(source) < 1:
            raise UserError("the data set has no examples")
        if batch_size < 1 or batch_size % host_count:
            raise UserError(
                f"batch size {batch_size} cannot be split over {host_count} hosts evenly"
            )
        if not 0 <= host_index < host_count:
            raise UserError(f"host index {host_index} is not in 0..{host_count - 1}")
        if caption_length < 1 or (latents and latent_length < 1):
            raise UserError("caption and latent lengths must be at least 1 (the end token)")
        for name in latents:
            vocabulary.section_id(name)
        self.source, self.vocabulary = source, vocabulary
        self.latents = tuple(latents)
        self.caption_length = caption_length
        self.latent_length = latent_length if latents else 0
        self.image_size, self.batch_size = image_size, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.host_index, self.host_count = host_index, host_count
        self.max_bad_fraction = max_bad_fraction
        self.prefetch, self.workers = max(1, prefetch), max(1, workers)
        self.bad: dict[str, str] = {}  # where -> why, of every record that could not be read
        self._reads = self._bad_reads = 0
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> float:
        """Batches that one pass over the source fills."""
        return len(self.source) / self.batch_size

    def indices(self, step: int) -> Int64[np.ndarray, " rows"]:
        """Numbers in the source of this host's rows of a step."""
        rows = self.batch_size // self.host_count
        first = step * self.batch_size + self.host_index * rows
        return self._order(np.arange(first, first + rows))

    def _order(self, position: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        count = len(self.source)
        epoch, index = np.divmod(position, count)
        if not self.shuffle:
            return index
        out = np.empty_like(index)
        for e in np.unique(epoch):
            out[epoch == e] = permute(index[epoch == e], count, self.seed, int(e))
        return out

    def batch(self, step: int) -> Batch:
        """This host's part of batch number `step`, from nothing but the number.

        A record that cannot be read is counted in `bad` and another one, fixed by its number,
        stands in.

        Raises:
          UserError: too many bad records, or a picture of another size.
        """
        return self._collate([self._read(int(i)) for i in self.indices(step)])

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on, without end, made ahead by threads."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="kaleido-loader")
        ahead: collections.deque = collections.deque()
        step = start
        try:
            while True:
                while len(ahead) < self.prefetch:
                    ahead.append(pool.submit(self.batch, step))
                    step += 1
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def evaluation_batches(self) -> Iterator[tuple[Batch, Float[np.ndarray, " rows"]]]:
        """Every readable example once in the source's order, with weights.

        The last batch is filled up with repetitions of weight 0; so are bad records.
        """
        count = len(self.source)
        rows = self.batch_size // self.host_count
        for step in range(-(-count // self.batch_size)):
            first = step * self.batch_size + self.host_index * rows
            position = np.arange(first, first + rows)
            examples, weights = [], (position < count).astype(np.float32)
            for row, index in enumerate(np.minimum(position, count - 1)):
                example = self._try(int(index), counted=True)
                if example is None:
                    weights[row] = 0
                    example = self._read((int(index) + 1) % count)
                examples.append(example)
            yield self._collate(examples), weights

    def _read(self, index: int) -> dict[str, Any]:
        example = self._try(index, counted=True)
        for attempt in range(1, _STAND_INS + 1):
            if example is not None:
                return example
            other = permute(np.array([index]), len(self.source), self.seed, -attempt)
            example = self._try(int(other[0]), counted=False)
        raise UserError(f"{_STAND_INS} records in a row cannot be read; the last: {self._last()}")

    def _try(self, index: int, counted: bool) -> dict[str, Any] | None:
        """The encoded example, or None for a bad record; stand-ins do not count for the share."""
        try:
            example = self._encode(self.source[index])
            error = None
        except (RecordError, LatentError) as caught:
            example, error = None, caught
        with self._lock:
            self._reads += counted
            if error is None:
                return example
            self._bad_reads += counted
            where = getattr(error, "where", None) or f"example {index}"
            if where not in self.bad:
                self.bad[where] = str(error)
                _LOG.warning("skipped %s: %s", where, error)
            if self._bad_reads > self.max_bad_fraction * max(self._reads, _LEAST_READS):
                raise UserError(
                    f"{self._bad_reads} of {self._reads} records could not be read, more than "
                    f"the share of {self.max_bad_fraction} allowed; the last: {self._last()}"
                )
        return None

    def _last(self) -> str:
        where, why = next(reversed(self.bad.items()))
        return f"{where}: {why}"

    def _encode(self, example: dict[str, Any]) -> dict[str, Any]:
        image = np.asarray(example["image"])
        if image.dtype == np.uint8 and image.shape[:2] != (self.image_size, self.image_size):
            raise UserError(
                f"record {example['key']}: the picture is {image.shape[0]} x {image.shape[1]}, the "
                f"config's data.image_size is {self.image_size}"
            )
        vocabulary = self.vocabulary
        caption = vocabulary.encode_caption(example["caption"], self.caption_length)
        latents: list[int] = []
        if self.latents:
            latents = vocabulary.encode_latents(
                example["latents"], self.latents, self.latent_length
            )
        return {
            "caption": tokens.pad(caption, self.caption_length),
            "latents": tokens.pad(latents, self.latent_length),
            "image": image,
            "hash": key_hash(example["key"]),
        }

    def _collate(self, examples: list[dict[str, Any]]) -> Batch:
        return Batch(
            caption_tokens=np.stack([e["caption"] for e in examples]),
            latent_tokens=np.stack([e["latents"] for e in examples]),
            image=np.stack([e["image"] for e in examples]),
            key_hash=np.array([e["hash"] for e in examples], np.uint32),
        )
