"""Batches from a source: an order that is a function of (seed, epoch, index) alone.

`batch(step)` depends on nothing but the settings and the step, so any step costs the same, a run
resumes by its number, and hosts, batch splits and restarts all read one stream of examples.
Records are drawn by number and only then read and decoded: no picture waits in a shuffle buffer.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from kaleido_jax import tokens
from kaleido_jax.data.reader import MAX_BAD_FRACTION, Encoder, Reader, key_hash
from kaleido_jax.data.sources import RecordError, Source
from kaleido_jax.data.streams import make_stream, permute
from kaleido_jax.errors import UserError
from kaleido_jax.types import Batch

__all__ = ["Loader", "key_hash", "permute"]

_MOST_WORKERS = 16


class Loader:
    """Batches of a source or a mixture.

    Examples follow one another in one endless stream: epoch after epoch, each epoch another
    permutation; a batch may reach over an epoch's end, so none is skipped or repeated.

    Args:
      source: the examples; a `streams.Mixture` is read at its rates.
      vocabulary: makes ids of captions and latents.
      latents: names of the latents in z, in order; () is the baseline without z.
      caption_length, latent_length: tokens with EOS; longer ones are cut.
      image_size: side of the pictures (floating point toys pass as they are).
      batch_size: over all hosts.
      seed: of the order.
      shuffle: False reads the source in its own order.
      drop_remainder: every epoch has whole batches only; the last examples of its permutation,
        fewer than a batch, are left out of it.
      host_index, host_count: this host takes rows [i B / H, (i + 1) B / H) of each batch.
      rows: this host takes these rows of each batch, whatever host_index and host_count say.
      max_bad_fraction: share of unreadable records above which reading stops.
      prefetch: batches made ahead, at least one for each thread.
      workers: threads that make them (0: one for each core).

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
        drop_remainder: bool = False,
        host_index: int = 0,
        host_count: int = 1,
        rows: Sequence[int] | Int64[np.ndarray, " rows"] | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        prefetch: int = 4,
        workers: int = 0,
    ):
        if len(source) < 1:
            raise UserError("the data set has no examples")
        check_hosts(batch_size, host_index, host_count)
        epoch_length = None
        if drop_remainder:
            epoch_length = len(source) // batch_size * batch_size
            if not epoch_length:
                raise UserError(
                    f"the data set has {len(source)} examples, less than a batch of {batch_size}; "
                    "with drop_remainder nothing is left"
                )
        self.source, self.batch_size = source, batch_size
        share = batch_size // host_count
        own = host_index * share + np.arange(share) if rows is None else rows
        self.rows = np.asarray(own, np.int64)
        self.encode = Encoder(vocabulary, latents, caption_length, latent_length, image_size)
        self.stream = make_stream(source, seed, shuffle, epoch_length)
        self.reader = Reader(source, self.encode, self.stream, max_bad_fraction, not shuffle)
        self.workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        self.prefetch = max(prefetch, self.workers)

    @property
    def bad(self) -> dict[str, str]:
        """Where -> why, of every record that could not be read."""
        return self.reader.bad

    @property
    def steps_per_epoch(self) -> float:
        """Batches that one pass fills; of a mixture, until the first of its sources ends."""
        return self.stream.length(1) / self.batch_size

    def indices(self, step: int) -> Int64[np.ndarray, " rows"]:
        """Numbers in the source of this host's rows of a step."""
        return self.stream.indices(self._positions(step))

    def _positions(self, step: int) -> Int64[np.ndarray, " rows"]:
        return step * self.batch_size + self.rows

    def batch(self, step: int) -> Batch:
        """This host's part of batch number `step`, from nothing but the number.

        A record that cannot be read is counted in `bad` and another one, fixed by its number,
        stands in.

        Raises:
          UserError: too many bad records, or a picture of another size.
        """
        return self.encode.collate([self.reader.read(int(i)) for i in self.indices(step)])

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on, without end, made ahead by threads.

        The threads end with the iterator: when it is closed or forgotten.
        """
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
            pool.shutdown(cancel_futures=True)

    def position(self, step: int) -> dict[str, Any]:
        """Where the stream stands after `step` batches: all that resuming needs, fit for JSON."""
        return {
            "step": step,
            "batch_size": self.batch_size,
            **self.stream.state(),
            "data": self._sample,
        }

    @functools.cached_property
    def _sample(self) -> str:
        """A hash of three examples: records that were made anew may be as many as before."""
        digest = hashlib.blake2b(digest_size=8)
        for index in (0, len(self.source) // 2, len(self.source) - 1):
            try:
                example = self.source[index]
                said = [example["key"], example["caption"]]
                said += [example["latents"].get(name, "") for name in self.encode.latents]
            except RecordError:
                said = []
            digest.update(json.dumps(said).encode())
        return digest.hexdigest()

    def resume(self, position: Mapping[str, Any]) -> int:
        """The step to go on with, from what `position` gave.

        Any number of hosts may go on.

        Raises:
          UserError: another data set, seed or batch size: going on would not be the same stream.
        """
        now = self.position(int(position.get("step", 0)))
        if "data" not in position:  # as in earlier checkpoints
            del now["data"]
        for name in (*now, *(key for key in position if key not in now)):
            if now.get(name) != position.get(name):
                raise UserError(
                    f"the data are others than before, so they cannot go on: {name} was "
                    f"{position.get(name)!r}, now it is {now.get(name)!r}; use a new workdir"
                )
        return now["step"]

    def evaluation_batches(self) -> Iterator[tuple[Batch, Float[np.ndarray, " rows"]]]:
        """Every readable example once in the source's order, with weights.

        Repetitions of weight 0 stand in for bad records and fill the last batch.

        Raises:
          UserError: too many bad records, or a picture of another size.
        """
        count = len(self.source)
        reader = Reader(
            self.source, self.encode, self.stream, self.reader.max_bad_fraction, in_order=True
        )
        reader.bad = self.bad  # told once, however often is evaluated
        filler = None
        for step in range(-(-count // self.batch_size)):
            position = self._positions(step)
            rows = [reader.try_read(int(i)) if i < count else None for i in position]
            filler = next((row for row in rows if row is not None), filler)
            if filler is None:
                filler = reader.read(0)
            weights = np.array([row is not None for row in rows], np.float32)
            yield self.encode.collate([row or filler for row in rows]), weights


def check_hosts(batch_size: int, host_index: int, host_count: int) -> None:
    """Raises UserError unless host_count hosts can share a batch, and host_index is one of them."""
    if host_count < 1 or not 0 <= host_index < host_count:
        raise UserError(f"host index {host_index} is not in 0..{host_count - 1}")
    if batch_size < 1 or batch_size % host_count:
        raise UserError(f"batch size {batch_size} cannot be split over {host_count} hosts evenly")
