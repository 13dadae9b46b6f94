"""Set sampling: of many drawn latents the few that differ most (a determinantal point process).

The kernel L holds the similarities of the documents; a set whose submatrix has a large determinant
spans a large volume, that is, its members resemble each other little. The best set is found
greedily, which is the usual approximation of the maximum a posteriori (Chen et al. 2018, "Fast
greedy MAP inference for determinantal point process", algorithm 1).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from kaleido_jax.latents import LatentDocument, bbox, blob, latent_type
from kaleido_jax.latents.edit import objects

_BUCKETS = 512  # words are counted by their hash
_GRID = 8  # cells along a side, for where objects are
# Added to the diagonal: equal documents then make the determinant small, not zero.
_JITTER = 1e-3


def features(document: LatentDocument, names: Sequence[str]) -> Float[np.ndarray, "d"]:
    """What a document's latents say, as a vector; each of `names` weighs the same.

    Words are counted, objects spread over the cells that they cover, vokens compared by place.
    A latent that the document lacks is zeros.
    """
    parts = [np.zeros(0)]
    for name in names:
        string = document.latents.get(name, "")
        value = latent_type(name).parse(string) if string else ()
        if name in ("bbox", "blob"):
            words = [word for segment in value for word in segment.phrase.split()]
            layout = _layout(name, string) if string else np.zeros(_GRID**2)
            parts += [_unit(_words(words)), _unit(layout)]
        elif name == "voken":
            parts.append(_unit(_words(f"{place} {i}" for place, i in enumerate(value))))
        else:
            parts.append(_unit(_words(string.split())))
    return np.concatenate(parts)


def _unit(vector: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    return vector / max(np.linalg.norm(vector), 1e-12)


def _words(words: Iterable[str]) -> Float[np.ndarray, "buckets"]:
    vector = np.zeros(_BUCKETS)
    for word, count in Counter(words).items():
        # Not hash(): that differs from process to process.
        vector[zlib.crc32(word.lower().strip(".,;:!?").encode()) % _BUCKETS] += np.sqrt(count)
    return vector


def _layout(name: str, string: str) -> Float[np.ndarray, "cells"]:
    """How much of each cell every object covers, summed over objects of unit mass."""
    total = np.zeros((_GRID, _GRID))
    edges = np.arange(_GRID + 1) * 1000 / _GRID
    for _, shape in objects(name, string):
        if isinstance(shape, bbox.Box):
            across = _overlap(edges, shape.x1, shape.x2)
            cover = _overlap(edges, shape.y1, shape.y2)[:, None] * across
        else:
            cover = _cover(shape)
        total += cover / max(cover.sum(), 1e-12)
    return total.reshape(-1)


def _overlap(edges: Float[np.ndarray, "n_1"], low: float, high: float) -> Float[np.ndarray, "n"]:
    return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)


def _cover(shape: blob.Ellipse) -> Float[np.ndarray, "grid grid"]:
    fine = shape.mask((_GRID * 8, _GRID * 8)).astype(float)
    return fine.reshape(_GRID, 8, _GRID, 8).mean((1, 3))


def kernel(documents: Sequence[LatentDocument]) -> Float[np.ndarray, "n n"]:
    """Cosine similarities of the documents' features, 1 on the diagonal."""
    names = list(dict.fromkeys(name for document in documents for name in document.latents))
    matrix = np.stack([features(document, names) for document in documents])
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    similarities = matrix @ matrix.T
    np.fill_diagonal(similarities, 1.0)
    return similarities


def greedy_map(similarities: Float[np.ndarray, "n n"], count: int) -> list[int]:
    """Indices of `count` items, each the one that makes the determinant largest; ties: the first.

    Args:
      similarities: symmetric, positive semidefinite.
      count: 1..n.
    """
    items = len(similarities)
    gains = np.diag(similarities).astype(float) + _JITTER
    factors = np.zeros((count, items))
    chosen: list[int] = []
    for step in range(count):
        best = int(np.argmax(gains))
        chosen.append(best)
        # One row of the Cholesky factor for all items at once.
        row = similarities[best] + _JITTER * (np.arange(items) == best)
        row = row - factors[:step, best] @ factors[:step]
        factors[step] = row / np.sqrt(gains[best])
        gains = gains - factors[step] ** 2
        gains[chosen] = -np.inf
    return chosen


def most_diverse(documents: Sequence[LatentDocument], count: int) -> list[int]:
    """Which `count` of the documents differ most from each other, in their own order.

    The first of them, from which the search starts, is always among them.
    """
    return sorted(greedy_map(kernel(documents), count))
