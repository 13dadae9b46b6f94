"""Frechet distance of two sets of features: FID where these are Inception's (Heusel et al. 2017).

All sums and the matrix square root are in float64.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from kaleido_jax.metrics.rows import Rows, as_rows


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance (divided by n - 1) of `count` rows."""

    count: int
    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(
    features: Rows | Float[np.ndarray, "n d"], counts: Int[np.ndarray, " n"] | None = None
) -> Moments:
    """Moments of features, row i counted `counts[i]` times (once by default).

    Two passes in blocks, so memory does not grow with the number of rows.

    Raises:
      ValueError: fewer than two rows.
    """
    rows = as_rows(features)
    counts = np.ones(len(rows)) if counts is None else np.asarray(counts, np.float64)
    total = float(counts.sum())
    if total < 2:
        raise ValueError("moments need two rows at least")
    mean = np.zeros(rows.width)
    for start, block in rows.blocks():
        mean += counts[start : start + len(block)] @ block.astype(np.float64)
    mean /= total
    covariance = np.zeros((rows.width, rows.width))
    for start, block in rows.blocks():
        centred = block.astype(np.float64) - mean
        covariance += (centred * counts[start : start + len(block), None]).T @ centred
    return Moments(int(total), mean, covariance / (total - 1))


def square_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The root of a symmetric positive semidefinite matrix; rounding below zero counts as zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(
    a: Moments, b: Moments, root_of_a: Float[np.ndarray, "d d"] | None = None
) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of (C_a C_b)^(1/2) is that of (R C_b R)^(1/2), R the root of C_a: a symmetric matrix,
    whose eigenvalues are real and stable also where the covariances are singular.

    Args:
      root_of_a: `square_root(a.covariance)`, where several sets are held against one.
    """
    root = square_root(a.covariance) if root_of_a is None else root_of_a
    product = root @ b.covariance @ root
    values = np.linalg.eigvalsh((product + product.T) / 2)
    shift = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(shift @ shift + spread - 2 * np.sqrt(np.maximum(values, 0)).sum())
