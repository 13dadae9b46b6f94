"""How varied pictures are: Inception score, Vendi score, similarity within a caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from kaleido_jax.metrics.rows import Rows, as_rows


def inception_score(
    logits: Rows | Float[np.ndarray, "n classes"],
    splits: int = 10,
    counts: Int[np.ndarray, " n"] | None = None,
) -> float:
    """exp(mean KL(p(y | x) || p(y))), averaged over `splits` runs of pictures (Salimans 2016).

    Args:
      logits: of a classifier, Inception's without its biases.
      splits: at most the number of rows.
      counts: how often each row counts; once by default.

    Raises:
      ValueError: fewer rows than splits.
    """
    rows = as_rows(logits)
    if not 1 <= splits <= len(rows):
        raise ValueError(f"{len(rows)} rows cannot be split in {splits}")
    counts = np.ones(len(rows)) if counts is None else np.asarray(counts, np.float64)
    edges = [len(rows) * i // splits for i in range(splits + 1)]
    owner = np.searchsorted(edges, np.arange(len(rows)), "right") - 1
    entropy, totals = np.zeros(splits), np.zeros(splits)
    marginal = np.zeros((splits, rows.width))
    for start, block in rows.blocks():
        log_p = block.astype(np.float64)
        log_p -= log_p.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        p, here = np.exp(log_p), slice(start, start + len(block))
        np.add.at(entropy, owner[here], counts[here] * (p * log_p).sum(1))
        np.add.at(marginal, owner[here], counts[here, None] * p)
        np.add.at(totals, owner[here], counts[here])
    kept = totals > 0  # a resample may leave a small split empty
    entropy, totals = entropy[kept], totals[kept]
    marginal = marginal[kept] / totals[:, None]
    spread = -(marginal * np.log(np.where(marginal > 0, marginal, 1))).sum(1)
    return float(np.exp(entropy / totals + spread).mean())


def vendi_score(
    features: Rows | Float[np.ndarray, "n d"], counts: Int[np.ndarray, " n"] | None = None
) -> float:
    """exp(entropy of the eigenvalues of K / n), K the cosines of features (Friedman & Dieng 2023).

    The effective number of different pictures. The n x n matrix K has the eigenvalues of the d x d
    matrix of the same rows, which is what is made.
    """
    rows = as_rows(features)
    counts = np.ones(len(rows)) if counts is None else np.asarray(counts, np.float64)
    matrix = np.zeros((rows.width, rows.width))
    for start, block in rows.blocks():
        block = unit(block)
        matrix += (block * counts[start : start + len(block), None]).T @ block
    values = np.linalg.eigvalsh(matrix / counts.sum())
    values = values[values > 1e-12]
    values /= values.sum()
    return float(np.exp(-(values * np.log(values)).sum()))


def unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length one, in float64; rows of zeros stay."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def similarity_within(
    features: Rows | Float[np.ndarray, "n d"],
    captions: Sequence[str],
    latents: Sequence[str] | None = None,
) -> tuple[Float[np.ndarray, "a"], Float[np.ndarray, "b"], Float[np.ndarray, "c"]]:
    """Mean cosine of the pairs of one caption, for each caption that has such pairs.

    Args:
      captions: of the rows.
      latents: z of the rows, as text.

    Returns:
      Of all pairs; of pairs of one z; of pairs of different z. The latter two are empty without
      latents, and where no caption has such pairs.
    """
    rows = as_rows(features)
    groups: dict[str, dict[str, list[int]]] = {}
    for number, caption in enumerate(captions):
        latent = "" if latents is None else latents[number]
        groups.setdefault(caption, {}).setdefault(latent, []).append(number)
    found: tuple[list[float], ...] = ([], [], [])
    for own in groups.values():
        count = sum(map(len, own.values()))
        if count < 2:
            continue
        together, same = np.zeros(rows.width), 0.0
        for numbers in own.values():
            total = _total(rows, numbers)
            together += total
            same += total @ total
        # Sums of cosines of ordered pairs; the row with itself, 1, is none.
        pairs = together @ together - count, count * (count - 1)
        alike = same - count, sum(len(n) * (len(n) - 1) for n in own.values())
        kinds = pairs, alike, (pairs[0] - alike[0], pairs[1] - alike[1])
        for place, (cosines, number) in enumerate(kinds):
            if number and (place == 0 or latents is not None):
                found[place].append(cosines / number)
    return tuple(map(np.array, found))


def _total(rows: Rows, numbers: Sequence[int]) -> Float[np.ndarray, " d"]:
    """The sum of the unit vectors of some rows."""
    total = np.zeros(rows.width)
    for start in range(0, len(numbers), 1024):
        total += unit(rows.take(np.array(numbers[start : start + 1024]))).sum(0)
    return total
