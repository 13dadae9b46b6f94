"""Outlines, labels, mosaics and wrapped words on pictures: what the latents' `draw` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from kaleido_jax.latents.errors import LatentTypeError
from kaleido_jax.latents.grounding import ATTACHED

Colour = tuple[int, int, int]
Picture = UInt8[np.ndarray, "height width 3"]

PALETTE: tuple[Colour, ...] = (
    (214, 39, 40),
    (31, 108, 190),
    (30, 140, 50),
    (225, 110, 0),
    (130, 80, 190),
    (0, 145, 160),
    (205, 60, 150),
    (125, 85, 60),
)
INK, GREY, ALARM, PAPER = (32, 32, 36), (130, 130, 138), (190, 20, 20), (255, 255, 255)
LABEL_FROM = 160  # px: smaller pictures have no room for words
MAX_LINES = 24
_SUPERSAMPLE, _LARGEST = 4, 4096
_PADDING = 6


class Span(NamedTuple):
    """Words of one colour; `glued` ones follow the span before without a space."""

    text: str
    colour: Colour = INK
    glued: bool = False


class Outline(NamedTuple):
    """A closed outline in pixels, its words, its colour by number, and whether to draw its axis.

    With `axis` the points run once around an ellipse from one end of its major axis.
    """

    points: Float[np.ndarray, "count 2"]
    label: str
    index: int
    axis: bool = False


def object_colour(index: int) -> Colour:
    """The colour of the index-th phrase, in pictures and legends alike."""
    return PALETTE[index % len(PALETTE)]


def phrase_spans(phrases: Sequence[tuple[str, bool]]) -> list[Span]:
    """(phrase, whether it has shapes) pairs as spans in the colours of their shapes."""
    return [
        Span(phrase, object_colour(i) if shaped else INK, i > 0 and phrase[0] in ATTACHED)
        for i, (phrase, shaped) in enumerate(phrases)
    ]


def check_picture(image: object) -> Picture:
    """Returns `image` if it is uint8 [H, W, 3] with H, W >= 1. Raises LatentTypeError."""
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or 0 in image.shape
    ):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise LatentTypeError(f"a picture is a numpy uint8 array [height, width, 3], not {found}")
    return image


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def outlines(image: Picture, shapes: Sequence[Outline]) -> Picture:
    """The picture with the shapes drawn smoothly, and their labels if it is large enough."""
    check_picture(image)
    height, width = image.shape[:2]
    factor = max(1, min(_SUPERSAMPLE, _LARGEST // max(height, width)))
    stroke = max(1.3, min(height, width) / 130)
    canvas = Image.new("RGBA", (width * factor, height * factor))
    pen = ImageDraw.Draw(canvas)
    tinted = [s for s in shapes if s.axis]
    # Large ones first: drawing on RGBA replaces what lies below.
    for shape in sorted(tinted, key=lambda s: -float(np.ptp(s.points, axis=0).prod())):
        pen.polygon(_scaled(shape.points, factor), fill=(*object_colour(shape.index), 64))
    for shape in shapes:
        closed = _scaled(np.concatenate([shape.points, shape.points[:2]]), factor)
        half = len(shape.points) // 2
        axis = _scaled(shape.points[[0, half]], factor) if shape.axis else None
        # A light casing keeps a line visible on a ground of its own colour.
        for colour, share in (((255, 255, 255, 230), 2.2), ((*object_colour(shape.index), 255), 1)):
            line = max(1, round(stroke * factor * share))
            pen.line(closed, fill=colour, width=line, joint="curve")
            if axis:
                pen.line(axis, fill=colour, width=max(1, line // 2))
    layer = canvas.resize((width, height), Image.Resampling.LANCZOS)
    picture = Image.alpha_composite(Image.fromarray(image).convert("RGBA"), layer).convert("RGB")
    if min(height, width) >= LABEL_FROM:
        _labels(picture, shapes)
    return np.asarray(picture).copy()


def _scaled(points: np.ndarray, factor: int) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points * factor]


def _labels(picture: Image.Image, shapes: Sequence[Outline]) -> None:
    pen = ImageDraw.Draw(picture)
    size = max(10, min(18, min(picture.size) // 26))
    font = _font(size)
    for shape in shapes:
        left, top = shape.points.min(axis=0)
        room = max(float(np.ptp(shape.points[:, 0])), picture.width * 0.3) - 6
        words = shorten(shape.label, font, room)
        wide, tall = font.getlength(words) + 6, size + 5
        x = min(max(float(left), 0), max(picture.width - wide, 0))
        # Above the shape if there is room, otherwise inside its upper edge.
        y = top - tall if top >= tall else min(max(float(top), 0), picture.height - tall)
        pen.rectangle((x, y, x + wide, y + tall), fill=object_colour(shape.index))
        pen.text((x + 3, y + tall / 2), words, fill=PAPER, font=font, anchor="lm")


def shorten(words: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of `words` as fits into `room` pixels, with three dots if some is left out."""
    # No letter is narrower than a pixel or so: what is longer than the room cannot fit.
    head = words[: max(1, int(room))]
    if head == words and font.getlength(words) <= room:
        return words
    kept = _fitting(head, font, room - font.getlength("..."))
    return head[:kept].rstrip() + "..."


def _fitting(word: str, font: ImageFont.FreeTypeFont, room: float) -> int:
    """The largest number of leading characters that fit into `room`, at least one (bisection)."""
    low, high = 1, max(1, min(len(word), int(room)))
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(word[:middle]) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def below(image: Picture, strip: Picture) -> Picture:
    """The picture with a strip of the same width under it."""
    return np.concatenate([check_picture(image), strip], axis=0)


def prose(spans: Sequence[Span], width: int) -> UInt8[np.ndarray, "any width 3"]:
    """Coloured words wrapped to `width` pixels on white, at most MAX_LINES lines, then dots."""
    size = max(9, min(17, width // 24))
    font = _font(size)
    room = max(width - 2 * _PADDING, 1)
    space = font.getlength(" ")
    placed: list[tuple[float, int, str, Colour]] = []
    x, line, full = 0.0, 0, False
    for span in spans:
        for number, word in enumerate(span.text.split(" ")):
            gap = 0.0 if x == 0 or (span.glued and number == 0) else space
            rest = word
            while rest:
                piece = rest[: _fitting(rest, font, room)]
                length = font.getlength(piece)
                if x + gap + length > room and x > 0:
                    x, gap, line = 0.0, 0.0, line + 1
                if line == MAX_LINES:
                    full = True
                    break
                placed.append((x + gap, line, piece, span.colour))
                x, gap, rest = x + gap + length, 0.0, rest[len(piece) :]
            if full:
                break
        if full:
            placed.append((0.0, line, "...", GREY))
            break
    lines = placed[-1][1] + 1 if placed else 0
    pitch = size + 5
    strip = Image.new("RGB", (width, lines * pitch + 2 * _PADDING), PAPER)
    pen = ImageDraw.Draw(strip)
    for left, row, piece, colour in placed:
        middle = _PADDING + row * pitch + pitch / 2
        pen.text((_PADDING + left, middle), piece, fill=colour, font=font, anchor="lm")
    return np.asarray(strip).copy()


def mosaic(
    ids: Sequence[int], colours: Sequence[Colour], grid: tuple[int, int], width: int
) -> UInt8[np.ndarray, "any width 3"]:
    """One coloured cell per id, row by row, numbered where the cells are wide enough."""
    rows, columns = grid
    tall = max(1, round(width / columns * 0.6))
    cells = np.asarray(colours, np.uint8).reshape(rows, columns, 3)
    edges = np.linspace(0, width, columns + 1).round().astype(int)
    body = np.repeat(np.repeat(cells, np.diff(edges), axis=1), tall, axis=0)
    size = min(14, int(tall * 0.55))
    if size < 8:
        return body
    picture = Image.fromarray(body)
    pen, font = ImageDraw.Draw(picture), _font(size)
    for number, identity in enumerate(ids):
        row, column = divmod(number, columns)
        middle = (edges[column] + edges[column + 1]) / 2, (row + 0.5) * tall
        pen.text(middle, str(identity), fill=INK, font=font, anchor="mm")
    return np.asarray(picture).copy()
