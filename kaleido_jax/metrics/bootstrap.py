"""Intervals by resampling (Efron): how much a number would move with other pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95


def resamples(
    count: int, draws: int, seed: int, each: int = 1
) -> Iterator[Int[np.ndarray, " count"]]:
    """How often each of `count` items is drawn, for each of `draws` resamples.

    Items that share something, as pictures of one caption do, lie beside each other, `each` of
    them, and are drawn together. Of fewer than two such runs nothing is drawn, since they cannot
    say how much a run moves.
    """
    groups = -(-count // each)
    of = np.arange(count) // each
    for draw in range(draws if groups > 1 else 0):
        generator = np.random.default_rng([seed, draw])
        yield np.bincount(generator.integers(0, groups, groups), minlength=groups)[of]


def interval(value: float, found: Float[np.ndarray, " draws"] | list[float]) -> tuple[float, float]:
    """The spread of resampled values, put around `value`.

    A resample holds some items twice, which adds to FID, and takes from Vendi, what too few
    pictures add and take; their mean is taken off, so that only the spread is left. Resamples in
    which there was nothing to measure (NaN) are left out; if they are half of all or more, the
    interval is NaN.
    """
    found = np.asarray(found, np.float64)
    finite = found[np.isfinite(found)]
    if 2 * len(finite) <= len(found):
        return float("nan"), float("nan")
    found = finite
    low, high = np.quantile(found - found.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(value + low), float(value + high)


def of_mean(
    values: Float[np.ndarray, " n"],
    draws: int,
    seed: int,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> tuple[float, tuple[float, float]]:
    """The mean of values and its interval; NaN without any.

    Values of one of the `groups` are drawn together; by default each alone.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), (float("nan"), float("nan"))
    sums, sizes = values, np.ones(len(values))
    if groups is not None:
        of = np.unique(groups, return_inverse=True)[1]
        sums, sizes = np.bincount(of, values), np.bincount(of)
    found = [float(c @ sums) / float(c @ sizes) for c in resamples(len(sums), draws, seed)]
    return float(values.mean()), interval(values.mean(), found)


def of_statistic(
    statistic: Callable[[Int[np.ndarray, " n"]], float],
    count: int,
    draws: int,
    seed: int,
    each: int = 1,
) -> tuple[float, tuple[float, float]]:
    """`statistic(counts)` with every item once, and its interval; `each` as in `resamples`."""
    value = statistic(np.ones(count, int))
    found = [statistic(counts) for counts in resamples(count, draws, seed, each)]
    return float(value), interval(value, found)
