"""Latent `blob`: a caption with the tilted ellipses of what it names (Section 3.2, Appendix A).

    blob      = phrase , ellipses , { gap , phrase , ellipses } , [ gap , phrase ] ;
    ellipses  = " " , ellipse , { " " , ellipse } ;
    ellipse   = "(" , xc , ", " , yc , ", " , r_major , ", " , r_minor , ", " , theta , ")" ;
    xc, yc    = integer ;                       (* 0..1000 *)
    r_major, r_minor = integer ;                (* 1..1000, r_minor <= r_major *)
    theta     = integer ;                       (* 0..179 *)
    gap       = "" if the phrase that follows begins with an attached character, else " " ;
    attached  = "." | "," | ";" | ":" | "!" | "?" | "'" | "’" ;
    phrase    = prose, each "(" in it written "((" and each ")" written "))" ;
    integer   = "0" | digit1to9 , { digit } ;

    Dog (498, 514, 480, 310, 82) resting head on owner's lap (393, 814, 390, 170, 4).

(xc, yc) is the centre, origin top left; r_major and r_minor are semi-axes; theta turns the major
axis counter-clockwise **as seen on the screen** from the x axis, in degrees: at theta = 45 it runs
from bottom left to top right. All lengths are thousandths of a square picture's side; a picture
that is not square stretches the ellipse with it. The value is a tuple of `Segment`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from kaleido_jax.latents import drawing, grounding
from kaleido_jax.latents.characters import check_integer, check_prose, round_half_up
from kaleido_jax.latents.errors import LatentRangeError

NAME = "blob"
OVERLAY = True
MAX_CHARS = grounding.MAX_CHARS
_LIMITS = {"xc": (0, 1000), "yc": (0, 1000), "r_major": (1, 1000), "r_minor": (1, 1000)}


@dataclass(frozen=True, order=True)
class Ellipse:
    """Centre 0..1000, semi-axes 1 <= r_minor <= r_major <= 1000, theta 0..179 degrees.

    Raises LatentError if they are not.
    """

    xc: int
    yc: int
    r_major: int
    r_minor: int
    theta: int

    def __post_init__(self) -> None:
        for name in KIND.fields:
            number = check_integer(
                getattr(self, name), name, *_LIMITS.get(name, (0, 179)), latent=NAME
            )
            object.__setattr__(self, name, number)
        if self.r_minor > self.r_major:
            raise LatentRangeError(
                f"r_minor = {self.r_minor} must not exceed r_major = {self.r_major}", latent=NAME
            )

    @classmethod
    def rounded(cls, xc: float, yc: float, r_major: float, r_minor: float, theta: float) -> Ellipse:
        """From numbers in thousandths and degrees: halves rounded up, clipped to the limits.

        Radii in the wrong order change places (theta turns by 90), theta is taken modulo 180.
        Raises LatentError for what is not finite.
        """
        values = dict(zip(_LIMITS, (xc, yc, r_major, r_minor), strict=True))
        rounded = {n: round_half_up(v, n, NAME) for n, v in values.items()}
        angle = round_half_up(theta, "theta", NAME)
        # Compared before rounding: 10.4 and 10.2 are in order although both round to 10.
        if r_minor > r_major:
            rounded["r_major"], rounded["r_minor"] = rounded["r_minor"], rounded["r_major"]
            angle += 90
        limited = (min(max(rounded[n], low), high) for n, (low, high) in _LIMITS.items())
        return cls(*limited, angle % 180)

    def points(self, size: tuple[int, int], count: int = 96) -> Float64[np.ndarray, "count 2"]:
        """Points (x, y) of the outline in pixels of a picture of `size` (height, width).

        The first lies at the end of the major axis; they go on counter-clockwise as seen.
        """
        height, width = size
        turn = np.arange(count) * (2 * math.pi / count)
        angle = math.radians(self.theta)
        along, across = self.r_major * np.cos(turn), self.r_minor * np.sin(turn)
        # y points down on the screen, hence the minus before what rises.
        x = self.xc + along * math.cos(angle) - across * math.sin(angle)
        y = self.yc - (along * math.sin(angle) + across * math.cos(angle))
        return np.stack([x * width / 1000, y * height / 1000], axis=1)

    def mask(self, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
        """True where a pixel's centre lies in the ellipse, in a picture of `size`."""
        height, width = size
        dx = ((np.arange(width) + 0.5) * 1000 / width - self.xc)[None, :]
        dy = (self.yc - (np.arange(height) + 0.5) * 1000 / height)[:, None]
        angle = math.radians(self.theta)
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = dy * math.cos(angle) - dx * math.sin(angle)
        return (along / self.r_major) ** 2 + (across / self.r_minor) ** 2 <= 1


KIND = grounding.Kind(NAME, "blob", ("xc", "yc", "r_major", "r_minor", "theta"), Ellipse)


@dataclass(frozen=True)
class Segment:
    """A phrase and the ellipses of what it names (none only in the last segment of a caption)."""

    phrase: str
    ellipses: tuple[Ellipse, ...] = ()

    def __post_init__(self) -> None:
        check_prose(self.phrase, NAME, MAX_CHARS, "phrase")
        ellipses = grounding.check_items(self.ellipses, KIND.make, grounding.MAX_OBJECTS, NAME)
        object.__setattr__(self, "ellipses", ellipses)


def _spell(value: Sequence[Segment]) -> str:
    # The last of them may have no shape, hence one more than there may be objects.
    segments = grounding.check_items(value, Segment, grounding.MAX_OBJECTS + 1, NAME)
    return grounding.check_pairs([(s.phrase, s.ellipses) for s in segments], KIND)


def validate(value: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the segments as a tuple. Raises LatentError if no string spells them."""
    _spell(value)
    return tuple(value)


def parse(string: str) -> tuple[Segment, ...]:
    """Reads a caption with blobs. Raises LatentError, nothing else, whatever the input."""
    return tuple(Segment(*pair) for pair in grounding.read_pairs(string, KIND))


def write(value: Sequence[Segment]) -> str:
    """Writes a caption with blobs; parse(write(x)) == x. Raises LatentError if not valid."""
    return _spell(value)


def parts(value: Sequence[Segment]) -> list[dict]:
    """The value as JSON: [{"phrase": str, "ellipses": [[xc, yc, major, minor, theta], ..]}, ..]."""
    return [
        {
            "phrase": s.phrase,
            "ellipses": [[getattr(e, name) for name in KIND.fields] for e in s.ellipses],
        }
        for s in validate(value)
    ]


def spans(value: Sequence[Segment]) -> list[drawing.Span]:
    """The phrases, each in the colour in which `draw` draws its ellipses."""
    return drawing.phrase_spans([(s.phrase, bool(s.ellipses)) for s in validate(value)])


def draw(
    image: UInt8[np.ndarray, "height width 3"], value: Sequence[Segment]
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture with tinted ellipses and their major axes; labelled where it is large enough."""
    size = drawing.check_picture(image).shape[:2]
    outlines = []
    for index, segment in enumerate(validate(value)):
        for ellipse in segment.ellipses:
            points = ellipse.points(size)
            outlines.append(drawing.Outline(points, segment.phrase, index, axis=True))
    return drawing.outlines(image, outlines)
