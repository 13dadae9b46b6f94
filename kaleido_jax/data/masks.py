"""Masks of polygons, their largest part, and the ellipse that has its second moments."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float

from kaleido_jax.data.transforms import ellipse_axes

Axes = tuple[float, float, float, float, float]


def polygon_mask(points: Float[np.ndarray, "n 2"], side: int) -> Bool[np.ndarray, "side side"]:
    """The pixels of a square whose centre lies in a closed polygon (even-odd rule).

    OpenCV's filling adds every pixel that the outline touches, which makes an ellipse's radii half
    a pixel too long.

    Args:
      points: corners (x, y) in pixels; they may lie outside of the square.
      side: of the square.
    """
    x, y = points.T
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    centres = np.arange(side) + 0.5
    crossed = (y[:, None] <= centres) != (y_next[:, None] <= centres)
    edge, row = np.nonzero(crossed)
    slope = (x_next[edge] - x[edge]) / (y_next[edge] - y[edge])
    at = x[edge] + (centres[row] - y[edge]) * slope
    # Each crossing turns inside to outside for all pixel centres to its right.
    first = np.clip(np.ceil(at - 0.5), 0, side).astype(np.int64)
    flips = np.bincount(row * (side + 1) + first, minlength=side * (side + 1))
    return flips.reshape(side, side + 1)[:, :side].cumsum(1) % 2 == 1


def largest_component(mask: Bool[np.ndarray, "h w"]) -> tuple[Bool[np.ndarray, "h w"], float]:
    """The largest 8-connected part with its holes filled, and its share of the mask before that."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return np.zeros(mask.shape, bool), 0.0
    areas = stats[1:, cv2.CC_STAT_AREA]
    best = 1 + int(areas.argmax())
    # Holes are background that cannot be reached from around the picture.
    around = np.pad((labels != best).astype(np.uint8), 1, constant_values=1)
    _, outside = cv2.connectedComponents(around, connectivity=4)
    filled = outside != outside[0, 0]
    return filled[1:-1, 1:-1], float(areas[best - 1] / areas.sum())


def moments_ellipse(component: Bool[np.ndarray, "h w"]) -> Axes:
    """(xc, yc, r_major, r_minor, theta) by second moments, in pixels; of a non-empty mask.

    Pixel centres lie at + 0.5; theta as in `ellipse_axes`.
    """
    ys, xs = np.nonzero(component)
    points = np.stack([xs, ys]) + 0.5
    xc, yc = points.mean(1)
    return (xc, yc, *ellipse_axes(4 * np.cov(points, bias=True)))
