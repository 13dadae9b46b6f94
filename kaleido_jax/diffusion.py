"""Forward process and changes of parametrisation (Eq. 2 and 3 of the paper).

x_t = alpha x + sigma eps;  v = alpha eps - sigma x (Salimans & Ho 2022).
`alpha` and `sigma` broadcast against images: give them as [B, 1, 1, 1] or scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kaleido_jax.errors import UserError
from kaleido_jax.types import Pyramid

PREDICTIONS = ("v", "eps", "x0")

Image = Float[Array, "b h w c"]
Coefficient = Float[Array, "..."]


def q_sample(x: Image, eps: Image, alpha: Coefficient, sigma: Coefficient) -> Image:
    """Draws x_t from q(x_t | x) with the given standard normal noise (Eq. 2)."""
    return alpha * x + sigma * eps


def to_x0(kind: str, pred: Image, x_t: Image, alpha: Coefficient, sigma: Coefficient) -> Image:
    """Converts a prediction of `kind` ('v', 'eps' or 'x0') at x_t to the clean image."""
    if kind == "v":
        return alpha * x_t - sigma * pred
    if kind == "eps":
        return (x_t - sigma * pred) / alpha
    if kind == "x0":
        return pred
    raise _unknown(kind)


def to_eps(kind: str, pred: Image, x_t: Image, alpha: Coefficient, sigma: Coefficient) -> Image:
    """Converts a prediction of `kind` at x_t to the noise; sigma must not be 0 for 'x0'."""
    if kind == "v":
        return sigma * x_t + alpha * pred
    if kind == "eps":
        return pred
    if kind == "x0":
        return (x_t - alpha * pred) / sigma
    raise _unknown(kind)


def to_v(kind: str, pred: Image, x_t: Image, alpha: Coefficient, sigma: Coefficient) -> Image:
    """Converts a prediction of `kind` at x_t to v = alpha eps - sigma x."""
    if kind == "v":
        return pred
    if kind == "eps":
        return (pred - sigma * x_t) / alpha
    if kind == "x0":
        return (alpha * x_t - pred) / sigma
    raise _unknown(kind)


def _unknown(kind: str) -> UserError:
    return UserError(f"unknown prediction {kind!r}; one of {', '.join(PREDICTIONS)}")


CONVERSIONS = {"v": to_v, "eps": to_eps, "x0": to_x0}


def expand(coefficient: Float[Array, "b"]) -> Float[Array, "b 1 1 1"]:
    """Gives a per-example coefficient the shape that broadcasts over an image."""
    return coefficient[:, None, None, None]


def normalize(image: Shaped[Array, "b h w c"], centre: float, scale: float) -> Image:
    """Maps uint8 pixels to about [-1, 1] by (image - centre) / scale; floats pass unchanged.

    Ours is (127.5, 127.5); imported MDM weights carry (127, 128).
    """
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    return (image.astype(jnp.float32) - centre) / scale


def pyramid(x: Image, ratios: Sequence[int]) -> Pyramid:
    """Images at each resolution by average pooling, highest first (Sec. B.1, MDM).

    Args:
      x: clean images at the highest resolution.
      ratios: side of each image over the innermost side, descending; the first is x's own.
    """
    levels = [x]
    for ratio in ratios[1:]:
        factor = ratios[0] // ratio
        levels.append(einops.reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=factor, j=factor))
    return tuple(levels)


def first_rows(x: Shaped[Array, "b ..."], rows: int) -> Shaped[Array, "n ..."]:
    """Of every group of b / gcd(b, n) rows the first n / gcd(b, n): `rows` = n of b.

    Groups lie within a device's share of a batch, so nothing is sent between devices.
    """
    size = x.shape[0]
    if rows == size:
        return x
    groups = math.gcd(size, rows)
    grouped = x.reshape(groups, size // groups, *x.shape[1:])
    return grouped[:, : rows // groups].reshape(rows, *x.shape[1:])


def spread_rows(x: Shaped[Array, "n ..."], size: int) -> Shaped[Array, "b ..."]:
    """The inverse of `first_rows`: b = `size` rows, 0 where it took none."""
    rows = x.shape[0]
    if rows == size:
        return x
    groups = math.gcd(size, rows)
    grouped = x.reshape(groups, rows // groups, *x.shape[1:])
    missing = ((0, 0), (0, (size - rows) // groups)) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(grouped, missing).reshape(size, *x.shape[1:])


def rows_of_highest(tree: Any, images: Pyramid) -> Any:
    """What belongs to the rows of the highest resolution, of arrays for those of the lowest.

    In a batch of mixed resolutions each image of the pyramid has rows of the next lower one.
    """
    for image in reversed(images):
        tree = jax.tree.map(lambda x, n=image.shape[0]: first_rows(x, n), tree)
    return tree
