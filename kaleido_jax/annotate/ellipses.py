"""From masks to tilted ellipses (the latent `blob`).

The ellipse has the second moments of the mask's largest component, holes filled, pixel centres at
+0.5. Turning sense, stated once: theta turns the major axis counter-clockwise **as seen on the
screen** from the x axis; y points down there, so an axis from bottom left to top right has theta
45. OpenCV's fitEllipse is the cross-check: it fits the contour instead of the area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool

from kaleido_jax.data.masks import Axes, largest_component, moments_ellipse
from kaleido_jax.latents.blob import Ellipse

LEAST_PIXELS = 16
LEAST_SHARE = 0.6  # of the mask that its largest component should be
LEAST_AGREEMENT = 0.7  # intersection over union of the two ellipses


@dataclass(frozen=True)
class Fit:
    """An ellipse of a mask.

    Attributes:
      axes: (xc, yc, r_major, r_minor, theta) in pixels and degrees.
      ellipse: the same in thousandths of a square picture.
      marks: what is doubtful: cut by the border, in pieces, not elliptic.
    """

    axes: Axes
    ellipse: Ellipse
    marks: tuple[str, ...] = ()


def fit(mask: Bool[np.ndarray, "side side"]) -> Fit | None:
    """The ellipse of a square mask; None where its largest component has under 16 pixels.

    Raises:
      ValueError: the mask is not square.
    """
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        raise ValueError(f"a mask must be square, not {mask.shape}")
    component, share = largest_component(mask)
    if component.sum() < LEAST_PIXELS:
        return None
    axes = moments_ellipse(component)
    marks = []
    if share < LEAST_SHARE:
        marks.append(f"the largest part is {share:.0%} of the mask")
    if any(edge.any() for edge in (component[0], component[-1], component[:, 0], component[:, -1])):
        marks.append("cut by the border")
    elif agreement(axes, contour_ellipse(component), len(mask)) < LEAST_AGREEMENT:
        # What the border cuts has a contour that is no ellipse's anyway.
        marks.append("its contour is not that of an ellipse")
    scale = 1000 / len(mask)
    ellipse = Ellipse.rounded(*(value * scale for value in axes[:4]), axes[4])
    return Fit(axes, ellipse, tuple(marks))


def contour_ellipse(component: Bool[np.ndarray, "h w"]) -> Axes | None:
    """The same by OpenCV's fit to the contour; None where the contour has under 5 points.

    OpenCV puts pixel centres at whole numbers and the contour through the outermost centres, so
    centre and radii get half a pixel; its angle belongs to its first axis, clockwise as seen.
    """
    contours, _ = cv2.findContours(
        component.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    contour = max(contours, key=len)
    if len(contour) < 5:
        return None
    (xc, yc), (first, second), angle = cv2.fitEllipse(contour)
    major, minor = first / 2 + 0.5, second / 2 + 0.5
    if major < minor:
        major, minor, angle = minor, major, angle + 90
    theta = 0.0 if major - minor < 0.05 * major else -angle % 180
    return xc + 0.5, yc + 0.5, major, minor, theta


def agreement(first: Axes, second: Axes | None, side: int) -> float:
    """Intersection over union of two ellipses' masks; 1 where there is no second one."""
    if second is None:
        return 1.0
    masks = [_mask(axes, side) for axes in (first, second)]
    union = np.count_nonzero(masks[0] | masks[1])
    return np.count_nonzero(masks[0] & masks[1]) / union if union else 0.0


def _mask(axes: Axes, side: int) -> Bool[np.ndarray, "side side"]:
    xc, yc, major, minor, theta = axes
    dx = (np.arange(side) + 0.5 - xc)[None, :]
    dy = (yc - np.arange(side) - 0.5)[:, None]
    cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return (along / max(major, 0.5)) ** 2 + (across / max(minor, 0.5)) ** 2 <= 1
