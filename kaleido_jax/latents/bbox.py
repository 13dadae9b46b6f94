"""Latent `bbox`: a caption with the boxes of what it names (Section 3.2, Appendix A).

    bbox      = phrase , boxes , { gap , phrase , boxes } , [ gap , phrase ] ;
    boxes     = " " , box , { " " , box } ;
    box       = "(" , x1 , ", " , y1 , ", " , x2 , ", " , y2 , ")" ;
    x1, y1, x2, y2 = integer ;                  (* 0..1000, x1 < x2, y1 < y2 *)
    gap       = "" if the phrase that follows begins with an attached character, else " " ;
    attached  = "." | "," | ";" | ":" | "!" | "?" | "'" | "’" ;
    phrase    = prose, each "(" in it written "((" and each ")" written "))" ;
    integer   = "0" | digit1to9 , { digit } ;

    Dog (1, 33, 995, 995) resting head on owner's lap (1, 630, 785, 998), two cups (5, 5, 80, 90) (100, 5, 180, 90).

(x1, y1) is the top left corner and (x2, y2) the bottom right one, in thousandths of the picture's
width and height, origin top left. The value is a tuple of `Segment`; grounding.py has the reader
and the writer and says why parentheses are doubled.
"""  # noqa: E501 (the example is one line of the language)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.latents import drawing, grounding
from kaleido_jax.latents.characters import check_integer, check_prose, round_half_up
from kaleido_jax.latents.errors import LatentRangeError

NAME = "bbox"
OVERLAY = True
MAX_CHARS = grounding.MAX_CHARS


@dataclass(frozen=True, order=True)
class Box:
    """Corners in 0..1000, x1 < x2 and y1 < y2. Raises LatentError if they are not."""

    x1: int
    y1: int
    x2: int
    y2: int

    def __post_init__(self) -> None:
        for name in KIND.fields:
            number = check_integer(getattr(self, name), name, 0, 1000, NAME)
            object.__setattr__(self, name, number)
        for low, high in (("x1", "x2"), ("y1", "y2")):
            if getattr(self, low) >= getattr(self, high):
                raise LatentRangeError(
                    f"{low} = {getattr(self, low)} must be less than "
                    f"{high} = {getattr(self, high)}",
                    latent=NAME,
                )

    @classmethod
    def rounded(cls, x1: float, y1: float, x2: float, y2: float) -> Box:
        """From numbers in thousandths: halves rounded up, clipped to 0..1000.

        Raises LatentError for what is not finite and for a box without area after rounding.
        """
        values = zip(KIND.fields, (x1, y1, x2, y2), strict=True)
        return cls(*(min(max(round_half_up(v, n, NAME), 0), 1000) for n, v in values))

    def pixels(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels of a picture of `size` (height, width), not rounded."""
        height, width = size
        return (
            self.x1 * width / 1000,
            self.y1 * height / 1000,
            self.x2 * width / 1000,
            self.y2 * height / 1000,
        )


KIND = grounding.Kind(NAME, "box", ("x1", "y1", "x2", "y2"), Box)


@dataclass(frozen=True)
class Segment:
    """A phrase and the boxes of what it names (none only in the last segment of a caption)."""

    phrase: str
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        check_prose(self.phrase, NAME, MAX_CHARS, "phrase")
        boxes = grounding.check_items(self.boxes, KIND.make, grounding.MAX_OBJECTS, NAME)
        object.__setattr__(self, "boxes", boxes)


def _spell(value: Sequence[Segment]) -> str:
    # The last of them may have no shape, hence one more than there may be objects.
    segments = grounding.check_items(value, Segment, grounding.MAX_OBJECTS + 1, NAME)
    return grounding.check_pairs([(s.phrase, s.boxes) for s in segments], KIND)


def validate(value: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the segments as a tuple. Raises LatentError if no string spells them."""
    _spell(value)
    return tuple(value)


def parse(string: str) -> tuple[Segment, ...]:
    """Reads a grounded caption. Raises LatentError, nothing else, whatever the input."""
    return tuple(Segment(*pair) for pair in grounding.read_pairs(string, KIND))


def write(value: Sequence[Segment]) -> str:
    """Writes a grounded caption; parse(write(x)) == x. Raises LatentError if not valid."""
    return _spell(value)


def parts(value: Sequence[Segment]) -> list[dict]:
    """The value as JSON: [{"phrase": str, "boxes": [[x1, y1, x2, y2], ..]}, ..]."""
    return [
        {"phrase": s.phrase, "boxes": [[b.x1, b.y1, b.x2, b.y2] for b in s.boxes]}
        for s in validate(value)
    ]


def spans(value: Sequence[Segment]) -> list[drawing.Span]:
    """The phrases, each in the colour in which `draw` draws its boxes."""
    return drawing.phrase_spans([(s.phrase, bool(s.boxes)) for s in validate(value)])


def draw(
    image: UInt8[np.ndarray, "height width 3"], value: Sequence[Segment]
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture with outlined boxes; labelled where it is large enough to read them."""
    size = drawing.check_picture(image).shape[:2]
    outlines = []
    for index, segment in enumerate(validate(value)):
        for box in segment.boxes:
            x1, y1, x2, y2 = box.pixels(size)
            corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
            outlines.append(drawing.Outline(corners, segment.phrase, index))
    return drawing.outlines(image, outlines)
