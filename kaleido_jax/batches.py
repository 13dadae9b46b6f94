"""Bounds of what may be asked for at once, and the parts in which it is done."""

from __future__ import annotations

import collections
import threading
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
    """Encoder states of the captions of some pictures, on the host."""

    def __init__(self, states: list[Conditioning], where: Int[np.ndarray, "n"]):
        """`states` of the distinct captions, without batch axis; `where` finds each picture's."""
        self._states, self._where = states, where

    def rows(self, part: Int[np.ndarray, "rows"]) -> Conditioning:
        """States of the captions of some pictures, as numpy arrays."""
        found = [self._states[i] for i in self._where[part]]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *found)


class Captions:
    """Remembers the states of the captions that were encoded last; may be shared by threads."""

    def __init__(self, room: int = 256):
        self._room = room
        self._states: collections.OrderedDict[bytes, Conditioning] = collections.OrderedDict()
        self._lock = threading.Lock()

    def encode(
        self,
        captions: Int[np.ndarray, "n lc"],
        encode: Callable[[Int[np.ndarray, "rows lc"]], Conditioning],
        size: int,
    ) -> Encoded:
        """States of captions, of which `encode` is asked for those not known, `size` at once."""
        distinct, where = np.unique(captions, axis=0, return_inverse=True)
        keys = [row.tobytes() for row in distinct]
        with self._lock:
            found = {key: self._states[key] for key in keys if key in self._states}
        missing = np.array([i for i, key in enumerate(keys) if key not in found], int)
        for part in batches(missing, size):
            states = encode(distinct[part])
            for row, i in enumerate(part):
                found[keys[i]] = jax.tree.map(lambda x, row=row: x[row].copy(), states)
        with self._lock:
            for key in keys:
                self._states[key] = found[key]
                self._states.move_to_end(key)
            while len(self._states) > self._room:
                self._states.popitem(last=False)
        return Encoded([found[key] for key in keys], where.reshape(-1))
