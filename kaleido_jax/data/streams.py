"""The order of examples: a function of (seed, epoch, index) alone, for one source or a mixture.

A stream is endless; its position p names one example of the source. Nothing is remembered between
positions, so any of them costs the same, and hosts, batch splits and restarts read one stream.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64

from kaleido_jax.data.sources import Source
from kaleido_jax.errors import UserError

LEAST_BLOCK, LARGEST_BLOCK = 64, 10_000
_BLOCKS_KEPT = 8


def permute(
    index: Int64[np.ndarray, " n"], count: int, seed: int | str, epoch: int
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


class Mixture:
    """Several sources mixed at fixed rates; as a Source, one after the other.

    A mixture across latent types mixes sources of the same records that give different latents.

    Args:
      sources: name -> source. Names are part of the order: another name, another order.
      rates: name -> share of the stream, relative to the others; decimals are taken exactly.

    Attributes:
      names: in order.
      counts: examples of each.
      quotas: examples of each in every block of sum(quotas) positions of the stream.

    Raises:
      UserError: no source, an unknown name, a rate that is not positive, rates whose smallest
        common block is over LARGEST_BLOCK.
    """

    def __init__(self, sources: Mapping[str, Source], rates: Mapping[str, float]):
        if not sources or set(sources) != set(rates):
            raise UserError(
                f"a mixture needs a rate for each source: sources {', '.join(sources) or 'none'}; "
                f"rates {', '.join(rates) or 'none'}"
            )
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.counts = tuple(map(len, self.sources))
        for name, count in zip(self.names, self.counts, strict=True):
            if count < 1:
                raise UserError(f"mixture: {name} has no examples")
        self.quotas = quotas({name: rates[name] for name in self.names})
        self._starts = np.cumsum((0, *self.counts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def part_of(self, index: int) -> tuple[int, int]:
        """(which source, number in it) of a number in the whole; raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, number = self.part_of(index)
        return self.sources[part][number]


def quotas(rates: Mapping[str, float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the rates, LEAST_BLOCK or more in sum.

    Raises:
      UserError: a rate that is not a positive number, rates whose smallest common block is over
        LARGEST_BLOCK.
    """
    exact = []
    for name, rate in rates.items():
        try:
            # By its decimals: 0.1 is one tenth here, not the binary number next to it.
            exact.append(Fraction(str(rate)))
        except (ValueError, ZeroDivisionError):
            exact.append(Fraction(0))
        if exact[-1] <= 0:
            raise UserError(f"mixture: the rate of {name} is {rate}; it must be positive")
    scale = math.lcm(*(rate.denominator for rate in exact))
    whole = [int(rate * scale) for rate in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if sum(whole) > LARGEST_BLOCK:
        raise UserError(
            f"mixture: the rates {', '.join(map(str, rates.values()))} only come out even over "
            f"{sum(whole)} examples (at most {LARGEST_BLOCK}); use rounder rates"
        )
    times = -(-LEAST_BLOCK // sum(whole))
    return tuple(number * times for number in whole)


class Stream(Protocol):
    """An order over a source."""

    def indices(self, position: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Numbers in the source of these positions of the stream."""
        ...

    def stand_in(self, index: int, attempt: int) -> int:
        """The example that stands in for one that cannot be read, at the first, second, .. try."""
        ...

    def length(self, epochs: int) -> int:
        """Positions until the first of the sources has been seen `epochs` times."""
        ...

    def state(self) -> dict[str, Any]:
        """What the order depends on, for comparison: small, and fit for JSON."""
        ...


class EpochStream:
    """Epoch after epoch of one source, each another permutation.

    Args:
      count: examples of the source.
      seed: of the permutations.
      shuffle: False keeps the source's own order.
      epoch_length: positions of an epoch, if less than `count`: each epoch leaves out the last
        ones of its own permutation.
    """

    def __init__(
        self, count: int, seed: int | str, shuffle: bool = True, epoch_length: int | None = None
    ):
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.epoch_length = count if epoch_length is None else epoch_length

    def indices(self, position: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """See Stream."""
        epoch, index = np.divmod(position, self.epoch_length)
        if not self.shuffle:
            return index
        out = np.empty_like(index)
        for e in np.unique(epoch):
            out[epoch == e] = permute(index[epoch == e], self.count, self.seed, int(e))
        return out

    def stand_in(self, index: int, attempt: int) -> int:
        """See Stream."""
        return int(permute(np.array([index]), self.count, self.seed, -attempt)[0])

    def length(self, epochs: int) -> int:
        """See Stream."""
        return epochs * self.epoch_length

    def state(self) -> dict[str, Any]:
        """See Stream."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "examples": self.count,
            "epoch": self.epoch_length,
        }


class MixedStream:
    """The streams of a mixture's sources, interleaved exactly.

    The stream is cut into blocks of sum(quotas) positions; in each, every source has exactly its
    quota, at places that (seed, block) draws. Each source's own stream is read in its own order,
    without a gap, and runs through its epochs by itself.
    """

    def __init__(self, mixture: Mixture, seed: int, shuffle: bool = True):
        self.mixture, self.seed, self.shuffle = mixture, seed, shuffle
        self._parts = [
            EpochStream(count, f"{seed}/{name}", shuffle)
            for name, count in zip(mixture.names, mixture.counts, strict=True)
        ]
        self._starts = np.cumsum((0, *mixture.counts))[:-1]
        self._block = sum(mixture.quotas)
        self._layout = functools.lru_cache(_BLOCKS_KEPT)(self._draw_layout)

    def _draw_layout(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a block: which source, and how many of its before in the block."""
        quotas = self.mixture.quotas
        labels = np.repeat(np.arange(len(quotas)), quotas)
        part = labels[permute(np.arange(self._block), self._block, f"{self.seed}/mixture", block)]
        rank = np.empty_like(part)
        for number, quota in enumerate(quotas):
            rank[part == number] = np.arange(quota)
        return part, rank

    def parts(
        self, position: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(which source, position in its own stream) of positions of the mixture."""
        block, place = np.divmod(position, self._block)
        part, rank = np.empty_like(block), np.empty_like(block)
        for b in np.unique(block):
            here = block == b
            layout = self._layout(int(b))
            part[here], rank[here] = layout[0][place[here]], layout[1][place[here]]
        return part, block * np.array(self.mixture.quotas)[part] + rank

    def indices(self, position: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """See Stream; numbers in the mixture as a Source."""
        part, inner = self.parts(np.asarray(position))
        out = np.empty_like(inner)
        for number, stream in enumerate(self._parts):
            here = part == number
            if here.any():
                out[here] = self._starts[number] + stream.indices(inner[here])
        return out

    def stand_in(self, index: int, attempt: int) -> int:
        """See Stream; of the same source."""
        part, number = self.mixture.part_of(index)
        return int(self._starts[part]) + self._parts[part].stand_in(number, attempt)

    def length(self, epochs: int) -> int:
        """See Stream."""
        limits = [epochs * count for count in self.mixture.counts]
        block = min(
            limit // quota for limit, quota in zip(limits, self.mixture.quotas, strict=True)
        )
        part, inner = self.parts(np.arange(block * self._block, (block + 1) * self._block))
        over = np.flatnonzero(inner >= np.array(limits)[part])
        # With quotas that divide the limit evenly the block after the last whole one is all over.
        return int(block * self._block + over[0])

    def state(self) -> dict[str, Any]:
        """See Stream."""
        m = self.mixture
        parts = f"{list(zip(m.names, m.counts, m.quotas, strict=True))}".encode()
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "examples": len(m),
            "mixture": hashlib.blake2b(parts, digest_size=8).hexdigest(),
        }


def make_stream(
    source: Source, seed: int, shuffle: bool = True, epoch_length: int | None = None
) -> Stream:
    """The stream over a source or a mixture.

    Raises:
      UserError: a mixture with an epoch length: its sources have epochs of their own.
    """
    if not isinstance(source, Mixture):
        return EpochStream(len(source), seed, shuffle, epoch_length)
    if epoch_length is not None:
        raise UserError("a mixture has no epochs of its own; drop_remainder cannot apply to it")
    return MixedStream(source, seed, shuffle)
