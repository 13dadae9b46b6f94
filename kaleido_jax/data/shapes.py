"""The embedded data set: coloured tilted shapes on grey, made from (seed, index) alone.

A caption names the hues and opens with a theme word. The theme permutes known tables from which
layout, shape and background are drawn, so the true p(mode | caption) is known, and with it what
guidance makes of it (Eq. 6). Nothing else in the picture depends on the theme.

Lengths are in thousandths of the picture's side, origin top left, x first, y down. An object's
`major` and `minor` are the radii of its moments' ellipse, so all shapes of one size weigh alike and
a blob is exact for each; `theta` in degrees counter-clockwise from the x axis as seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.errors import UserError

HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 55,
    "green": 125,
    "cyan": 182,
    "blue": 225,
    "purple": 275,
    "pink": 325,
}
SHADES = {"dark": (0.95, 0.50), "vivid": (0.90, 0.80), "pale": (0.50, 0.97)}  # saturation, value
SHAPES = ("disc", "rectangle", "diamond", "triangle")
GREYS = {"black": 16, "dark grey": 76, "grey": 132, "light grey": 188, "white": 244}
LAYOUTS = ("left of", "right of", "above", "below")
THEMES = ("dawn", "noon", "dusk", "night")

HUE_NAMES, SHADE_NAMES, GREY_NAMES = tuple(HUES), tuple(SHADES), tuple(GREYS)

# Rows are themes. Layout and shape are Latin squares, so their mean over themes is uniform. There
# are five greys for four weights: each theme leaves one out, and each has another favourite.
TABLES = {
    "layout": np.array([[4, 3, 2, 1], [3, 4, 1, 2], [2, 1, 4, 3], [1, 2, 3, 4]]) / 10,
    "shape": np.array([[50, 25, 15, 10], [25, 50, 10, 15], [15, 10, 50, 25], [10, 15, 25, 50]])
    / 100,
    "background": np.array([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [1, 4, 0, 2, 3], [1, 0, 4, 2, 3]])
    / 10,
    "shade": np.full((4, 3), 1 / 3),
}
FACTORS = tuple(TABLES)
FACTOR_NAMES = {
    "layout": LAYOUTS,
    "shape": SHAPES,
    "background": GREY_NAMES,
    "shade": SHADE_NAMES,
}
_CUMULATIVE = {name: np.cumsum(table, axis=1).tolist() for name, table in TABLES.items()}

_MARGIN, _GAP, _AXIS_LEAD = 15, 30, 80


@dataclass(frozen=True)
class Shape:
    """One object: indices into HUES, SHADES and SHAPES, and its ellipse of moments (0..1000)."""

    hue: int
    shade: int
    shape: int
    x: int
    y: int
    major: int
    minor: int
    theta: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) around the outline, in 0..1000."""
        x1, y1, x2, y2 = _extent(self.shape, self.major, self.minor, self.theta)
        return (
            max(0, math.floor(self.x + x1)),
            max(0, math.floor(self.y + y1)),
            min(1000, math.ceil(self.x + x2)),
            min(1000, math.ceil(self.y + y2)),
        )


@dataclass(frozen=True)
class Scene:
    """A picture's whole truth; `layout` places the first object relative to the second."""

    theme: int
    background: int
    layout: int | None
    objects: tuple[Shape, ...]
    style: int  # chooses the description's template


def make_scene(
    seed: int,
    index: int,
    num_objects: tuple[int, int] = (1, 3),
    semi_axis: tuple[int, int] = (110, 230),
) -> Scene:
    """The scene number `index` of a seed: the same whatever was drawn before.

    Args:
      num_objects: least and largest number of objects, 1..3, drawn uniformly.
      semi_axis: range of the major radius, 40..230.

    Raises:
      UserError: a range out of bounds.
    """
    check_ranges(num_objects, semi_axis)
    draw = _uniforms(seed, index)
    theme = _below(next(draw), len(THEMES))
    count = num_objects[0] + _below(next(draw), num_objects[1] - num_objects[0] + 1)
    hues = list(range(len(HUES)))
    hues = [hues.pop(_below(next(draw), len(hues))) for _ in range(count)]
    shades = [_below(next(draw), len(SHADES)) for _ in range(count)]
    # The modes are drawn first; only sizes, angles and places are drawn again when they do not
    # fit, so the tables stay exact.
    shapes = [_pick("shape", theme, next(draw)) for _ in range(count)]
    background = _pick("background", theme, next(draw))
    layout = _pick("layout", theme, next(draw)) if count > 1 else None
    style = _below(next(draw), 1 << 16)
    places = None
    attempt = 0
    while places is None:
        low, high = semi_axis
        # Three large objects may never fit: after some trials the range slides down.
        shrink = 0.9 ** (attempt // 20)
        low, high = low * shrink, high * shrink
        frames = []
        for shape in shapes:
            major = round(low + (high - low) * next(draw))
            minor = max(1, round(major * (0.35 + 0.35 * next(draw))))
            theta = _below(next(draw), 180)
            frames.append((major, minor, theta, _extent(shape, major, minor, theta)))
        places = _place([frame[3] for frame in frames], layout, draw)
        attempt += 1
    objects = tuple(
        Shape(hue, shade, shape, x, y, major, minor, theta)
        for hue, shade, shape, (major, minor, theta, _), (x, y) in zip(
            hues, shades, shapes, frames, places, strict=True
        )
    )
    return Scene(theme, background, layout, objects, style)


def check_ranges(num_objects: tuple[int, int], semi_axis: tuple[int, int]) -> None:
    """Raise UserError unless both are (least, largest) within what can be drawn."""
    if not 1 <= num_objects[0] <= num_objects[1] <= 3:
        raise UserError(
            f"shapes: num_objects {tuple(num_objects)} must be (least, largest) in 1..3"
        )
    if not 40 <= semi_axis[0] <= semi_axis[1] <= 230:
        raise UserError(f"shapes: semi_axis {tuple(semi_axis)} must be (least, largest) in 40..230")


def _uniforms(seed: int, index: int) -> Iterator[float]:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    while True:
        yield from generator.random(48).tolist()


def _below(uniform: float, bound: int) -> int:
    return int(uniform * bound)


def _pick(factor: str, theme: int, uniform: float) -> int:
    row = _CUMULATIVE[factor][theme]
    # Rounding may leave the last sum a hair under 1; entries of weight 0 are never first to pass.
    return next((i for i, total in enumerate(row) if uniform < total), int(np.argmax(row)))


def _extent(shape: int, major: int, minor: int, theta: int) -> tuple[float, float, float, float]:
    """The outline's box around its own centre: (x1, y1, x2, y2), y down."""
    angle = math.radians(theta)
    cos, sin = math.cos(angle), math.sin(angle)
    if SHAPES[shape] == "disc":
        x, y = math.hypot(major * cos, minor * sin), math.hypot(major * sin, minor * cos)
        return -x, -y, x, y
    corners = _CORNERS[SHAPES[shape]]
    xs = [u * major * cos - v * minor * sin for u, v in corners]
    ys = [-u * major * sin - v * minor * cos for u, v in corners]
    return min(xs), min(ys), max(xs), max(ys)


# Corners in units of the moments' radii (2 standard deviations): a rectangle's side has variance
# (side / 2)^2 / 3, a diamond's half diagonal d variance d^2 / 6, a triangle of height h variance
# h^2 / 18 about its centroid at h / 3. The triangle's apex points along theta.
_RECTANGLE, _DIAMOND = math.sqrt(3) / 2, math.sqrt(1.5)
_APEX, _BASE = math.sqrt(2), -1 / math.sqrt(2)
_CORNERS = {
    "rectangle": [(s * _RECTANGLE, t * _RECTANGLE) for s in (-1, 1) for t in (-1, 1)],
    "diamond": [(_DIAMOND, 0), (-_DIAMOND, 0), (0, _DIAMOND), (0, -_DIAMOND)],
    "triangle": [(_APEX, 0), (_BASE, _DIAMOND), (_BASE, -_DIAMOND)],
}


def _place(
    extents: list[tuple[float, float, float, float]], layout: int | None, draw: Iterator[float]
) -> list[tuple[int, int]] | None:
    """Centres with disjoint boxes that obey the layout, or None where this trial does not fit."""

    def free(extent, axis: int) -> int:
        start = _MARGIN - extent[axis]
        return round(start + (1000 - _MARGIN - extent[axis + 2] - start) * next(draw))

    if layout is None:
        return [(free(extents[0], 0), free(extents[0], 1))]
    axis, reverse = layout // 2, layout % 2
    first, second = (1, 0) if reverse else (0, 1)  # in order along the axis
    lengths = [extent[axis + 2] - extent[axis] for extent in extents]
    room = 1000 - 2 * _MARGIN - _GAP - lengths[first] - lengths[second]
    if room < 0:
        return None
    low, high = sorted((next(draw) * room, next(draw) * room))
    along = {
        first: _MARGIN + low - extents[first][axis],
        second: _MARGIN + lengths[first] + _GAP + high - extents[second][axis],
    }
    across = {i: free(extents[i], 1 - axis) for i in (0, 1)}
    # "left of" must be what anyone would say: clearly more beside than above.
    if abs(along[1] - along[0]) < abs(across[1] - across[0]) + _AXIS_LEAD:
        return None
    centres = [
        (round(along[i]), across[i]) if axis == 0 else (across[i], round(along[i])) for i in (0, 1)
    ]
    if len(extents) == 3:
        centres.append((free(extents[2], 0), free(extents[2], 1)))
        boxes = [
            (x + e[0] - _GAP, y + e[1] - _GAP, x + e[2], y + e[3])
            for (x, y), e in zip(centres, extents, strict=True)
        ]
        c = boxes[2]
        for b in boxes[:2]:
            if b[0] < c[2] and c[0] < b[2] and b[1] < c[3] and c[1] < b[3]:
                return None
    return centres


# ---- the picture ------------------------------------------------------------------------------


@cache
def colour(hue: int, shade: int) -> tuple[int, int, int]:
    """RGB 0..255 of a hue and a shade (indices)."""
    saturation, value = SHADES[SHADE_NAMES[shade]]
    sector = HUES[HUE_NAMES[hue]] / 60

    def channel(offset: int) -> int:
        k = (offset + sector) % 6
        return round(255 * (value - value * saturation * max(0, min(k, 4 - k, 1))))

    return channel(5), channel(3), channel(1)


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a scene, each pixel's coverage by super-sampling.

    Raises:
      UserError: a size under 32.
    """
    if size < 32:
        raise UserError(f"shapes: size {size} is too small, 32 is the least")
    image = np.full((size, size, 3), GREYS[GREY_NAMES[scene.background]], np.float32)
    for item in scene.objects:
        rows, columns, coverage = _coverage(item, size)
        patch = image[rows, columns]
        patch += coverage[..., None] * (np.float32(colour(item.hue, item.shade)) - patch)
    return np.rint(image).astype(np.uint8)


def _coverage(item: Shape, size: int) -> tuple[slice, slice, np.ndarray]:
    """The pixels around an object and the share of each that it covers."""
    samples = 8 if size <= 64 else 4
    scale = size / 1000
    box = item.box
    x1, y1 = math.floor(box[0] * scale), math.floor(box[1] * scale)
    x2, y2 = math.ceil(box[2] * scale), math.ceil(box[3] * scale)
    dx = _sample_points(x1, x2, samples) / scale - item.x
    dy = _sample_points(y1, y2, samples) / scale - item.y
    angle = math.radians(item.theta)
    cos, sin = math.cos(angle), math.sin(angle)
    # u along the major axis, v across it, in units of the radii; y points down.
    u = np.add.outer(dy * (-sin / item.major), dx * (cos / item.major))
    v = np.add.outer(dy * (-cos / item.minor), dx * (-sin / item.minor))
    name = SHAPES[item.shape]
    if name == "disc":
        inside = u * u + v * v <= 1
    elif name == "rectangle":
        inside = np.maximum(np.abs(u), np.abs(v)) <= _RECTANGLE
    elif name == "diamond":
        inside = np.abs(u) + np.abs(v) <= _DIAMOND
    else:
        slope = (_APEX - _BASE) / _DIAMOND
        inside = (np.abs(v) * slope + u <= _APEX) & (u >= _BASE)
    height, width = y2 - y1, x2 - x1
    sums = inside.reshape(height, samples, width * samples).sum(1, dtype=np.uint16)
    sums = sums.reshape(height, width, samples).sum(2, dtype=np.uint16)
    return slice(y1, y2), slice(x1, x2), sums.astype(np.float32) / samples**2


def _sample_points(start: int, stop: int, samples: int) -> np.ndarray:
    return (np.arange(start * samples, stop * samples, dtype=np.float32) + 0.5) / samples
