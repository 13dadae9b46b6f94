"""Precision, recall, density and coverage by exact nearest neighbours, in blocks on the device.

Precision and recall: Kynkaanniemi et al. 2019; density and coverage: Naeem et al. 2020. Host and
device hold one block of rows and one of columns at a time, never all distances.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kaleido_jax.metrics.rows import Rows, as_rows

BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Manifolds:
    """What each picture contributes, for one k; means of these are the metrics.

    Attributes:
      precision: [fakes] whether a fake lies in some real ball.
      density: [fakes] real balls around a fake, over k.
      recall: [reals] whether a real lies in some fake ball.
      coverage: [reals] whether the ball of a real holds a fake.
    """

    precision: Bool[np.ndarray, " fakes"]
    density: Float[np.ndarray, " fakes"]
    recall: Bool[np.ndarray, " reals"]
    coverage: Bool[np.ndarray, " reals"]


def _squares(rows: Float[Array, "r d"], columns: Float[Array, "c d"]) -> Float[Array, "r c"]:
    """Squared distances; features are centred beforehand, so little is lost in the difference."""
    products = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    both = (rows**2).sum(1)[:, None] + (columns**2).sum(1)[None, :]
    return jnp.maximum(both - 2 * products, 0.0)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    rows: Float[Array, "r d"],
    row_ids: Int[Array, " r"],
    columns: Float[Array, "c d"],
    column_ids: Int[Array, " c"],
    best: Float[Array, "r k"],
    k: int,
) -> Float[Array, "r k"]:
    """The k smallest of `best` and the distances to these columns; a row is not its own."""
    apart = _squares(rows, columns)
    out = (column_ids < 0)[None, :] | (row_ids[:, None] == column_ids[None, :])
    both = jnp.concatenate([best, jnp.where(out, jnp.inf, apart)], axis=1)
    return -jax.lax.top_k(-both, k)[0]


@jax.jit
def _compare(
    fakes: Float[Array, "f d"],
    fake_radii: Float[Array, "ks f"],
    reals: Float[Array, "r d"],
    real_radii: Float[Array, "ks r"],
) -> tuple[Int[Array, "ks f"], Bool[Array, "ks r"], Float[Array, " r"]]:
    """Real balls around each fake, whether each real is in a fake ball, its nearest fake.

    Rows that only fill a block have radius -1: no distance is below it.
    """
    apart = _squares(fakes, reals)
    around = (apart < real_radii[:, None, :]).sum(2)
    inside = (apart < fake_radii[:, :, None]).any(1)
    nearest = jnp.where(fake_radii[0][:, None] < 0, jnp.inf, apart).min(0)
    return around, inside, nearest


def _blocks(
    rows: Rows, centre: Float[np.ndarray, " d"], size: int
) -> Iterator[tuple[int, int, Float[np.ndarray, "size d"]]]:
    """(first row, rows, the rows less the centre, filled up with zeros to `size`)."""
    for start, block in rows.blocks(size):
        padded = np.zeros((size, rows.width), np.float32)
        padded[: len(block)] = block.astype(np.float64) - centre
        yield start, len(block), padded


def radii(
    features: Rows,
    centre: Float[np.ndarray, " d"],
    ks: Sequence[int],
    size: int = BLOCK,
) -> Float[np.ndarray, "ks n"]:
    """Squared distance of each row to its k-th nearest other row, for each k, in float32.

    Args:
      ks: each under the number of rows.
      size: rows and columns of a block.

    Raises:
      ValueError: too few rows.
    """
    if len(features) <= max(ks):
        raise ValueError(f"{len(features)} rows have no {max(ks)} nearest others")
    found = np.zeros((len(ks), len(features)), np.float32)
    places = np.array(ks) - 1
    for start, count, rows in _blocks(features, centre, size):
        rows, row_ids = jnp.asarray(rows), jnp.arange(start, start + size)
        best = jnp.full((size, max(ks)), jnp.inf)
        for other, width, columns in _blocks(features, centre, size):
            ids = np.where(np.arange(size) < width, other + np.arange(size), -1)
            best = _nearest(rows, row_ids, columns, ids, best, max(ks))
        found[:, start : start + count] = np.asarray(best)[:count, places].T
    return found


def manifolds(
    real: Rows | Float[np.ndarray, "reals d"],
    fake: Rows | Float[np.ndarray, "fakes d"],
    ks: Sequence[int] = (3, 5),
    size: int = BLOCK,
) -> dict[int, Manifolds]:
    """What every picture contributes to precision, recall, density and coverage, for each k.

    Balls are open and reach to the k-th nearest other row of their own set.

    Args:
      real, fake: features of both sets, more than max(ks) rows each.
      size: rows and columns of a block; changes memory and speed only.

    Raises:
      ValueError: too few rows.
    """
    real, fake = as_rows(real), as_rows(fake)
    size = min(size, max(len(real), len(fake)))
    centre = np.zeros(real.width)
    for _, block in real.blocks():
        centre += block.sum(0, dtype=np.float64)
    centre /= len(real)
    real_radii = radii(real, centre, ks, size)
    fake_radii = radii(fake, centre, ks, size)
    around = np.zeros((len(ks), len(fake)), np.int64)
    inside = np.zeros((len(ks), len(real)), bool)
    nearest = np.full(len(real), np.inf, np.float32)
    for start, count, fakes in _blocks(fake, centre, size):
        fakes, limits = jnp.asarray(fakes), _padded(fake_radii, start, count, size)
        for other, width, reals in _blocks(real, centre, size):
            here = slice(other, other + width)
            counts, hit, closest = jax.device_get(
                _compare(fakes, limits, reals, _padded(real_radii, other, width, size))
            )
            around[:, start : start + count] += counts[:, :count]
            inside[:, here] |= hit[:, :width]
            nearest[here] = np.minimum(nearest[here], closest[:width])
    return {
        k: Manifolds(around[i] > 0, around[i] / k, inside[i], nearest < real_radii[i])
        for i, k in enumerate(ks)
    }


def _padded(
    values: Float[np.ndarray, "ks n"], start: int, count: int, size: int
) -> Float[np.ndarray, "ks size"]:
    part = np.full((len(values), size), -1, np.float32)
    part[:, :count] = values[:, start : start + count]
    return part
