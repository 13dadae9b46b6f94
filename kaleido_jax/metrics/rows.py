"""Features of many pictures, kept on disk and read in blocks."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

BLOCK = 2048  # rows that are in memory at once


class Rows:
    """A matrix of rows that lies in one array or in the .npy files of its parts, in order.

    Memory holds what is asked for; files are mapped when they are read.
    """

    def __init__(self, parts: Sequence[np.ndarray | pathlib.Path], limit: int | None = None):
        """Takes arrays [n, ...] or .npy files of such; only the first `limit` rows count."""
        self._parts = list(parts)
        sizes = [len(self._open(i)) for i in range(len(self._parts))]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._count = int(self._starts[-1])
        if limit is not None:
            self._count = min(self._count, limit)
        self.width = int(np.prod(self._open(0).shape[1:])) if self._parts else 0

    def _open(self, part: int) -> np.ndarray:
        item = self._parts[part]
        if isinstance(item, np.ndarray):
            return item
        return np.load(item, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return self._count

    def take(self, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """The rows of ascending numbers."""
        numbers = np.asarray(numbers)
        if not numbers.size:
            return np.zeros((0, self.width))
        owners = np.searchsorted(self._starts, numbers, "right") - 1
        found = [
            self._open(part)[numbers[owners == part] - self._starts[part]]
            for part in np.unique(owners)
        ]
        return np.concatenate(found).reshape(len(numbers), -1)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Float[np.ndarray, "rows d"]]]:
        """(number of the first row, rows) of blocks of at most `size`."""
        for start in range(0, self._count, size):
            yield start, self.take(np.arange(start, min(start + size, self._count)))

    def head(self, count: int) -> Rows:
        """The first `count` rows."""
        return Rows(self._parts, min(count, self._count))


def as_rows(features: Rows | Float[np.ndarray, "n d"]) -> Rows:
    """An array as Rows; Rows as they are."""
    return features if isinstance(features, Rows) else Rows([np.asarray(features)])
