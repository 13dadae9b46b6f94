"""Bounds of what may be asked for at once, and the parts in which it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kaleido_jax.errors import UserError
from kaleido_jax.types import Conditioning

MAX_PICTURES = 10_000
MAX_SEED = 2**32 - 1
MAX_INDEX = 2**31 - 1


def batches(rows: Int[np.ndarray, "n"], size: int) -> Iterator[Int[np.ndarray, "rows"]]:
    """`rows` in parts of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def check_range(name: str, value: Any, low: int, high: int) -> None:
    """Raises UserError unless `value` is a whole number in low..high."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; it must be a whole number between {low} and {high}")


def check_count(count: int, what: str) -> None:
    """Raises UserError unless there are 1..MAX_PICTURES of something."""
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(f"{count} {what} asked for; between 1 and {MAX_PICTURES} in all")


class Encoded:
    """Encoder states of the distinct captions, computed once and kept on the host."""

    def __init__(
        self,
        encode: Callable[[Int[np.ndarray, "rows lc"]], Conditioning],
        caption_tokens: Int[np.ndarray, "n lc"],
        size: int,
    ):
        """Runs `encode` on at most `size` captions at once; it may add rows at the end."""
        distinct, where = np.unique(caption_tokens, axis=0, return_inverse=True)
        self._where = where.reshape(-1)
        parts = []
        for part in batches(np.arange(len(distinct)), size):
            states = jax.tree.map(np.asarray, encode(distinct[part]))
            parts.append(jax.tree.map(lambda x, count=part.size: x[:count], states))
        self._states = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def rows(self, part: Int[np.ndarray, "rows"]) -> Conditioning:
        """States of the captions of some pictures, as numpy arrays."""
        return jax.tree.map(lambda x: x[self._where[part]], self._states)
