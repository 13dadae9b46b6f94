"""Latent `voken`: 32 visual tokens (Section 3.2, Appendix A and Figure 14).

    voken     = "#" , id , 31 * ( "#" , id ) ;  (* as Figure 14 writes it: what we write *)
              | id , 31 * ( "#" , id ) ;        (* as the appendix writes it: also read *)
    id        = "0" | digit1to9 , { digit } ;   (* below the size of the codebook, at most 65535 *)

    #1872#680#2888#2619#680#3445# ... #2619#6187#4863

The value is a tuple of 32 ints. No codebook of more than 65,536 codes is known here; a caller that
knows its own gives `codebook_size`.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.latents import drawing
from kaleido_jax.latents.characters import check_integer, check_prose
from kaleido_jax.latents.errors import (
    LatentError,
    LatentRangeError,
    LatentSizeError,
    LatentSyntaxError,
    LatentTypeError,
    excerpt,
)

NAME = "voken"
OVERLAY = False
COUNT = 32
GRID = (4, 8)  # rows, columns of the picture's patches
MAX_CODES = 65536
MAX_CHARS = COUNT * 6

_DIGITS = re.compile(r"[0-9]+")
_CANONICAL = re.compile(rf"(?:#(?:0|[1-9][0-9]{{0,4}})){{{COUNT}}}")


def validate(value: Sequence[int], codebook_size: int | None = None) -> tuple[int, ...]:
    """Returns the ids as ints. Raises LatentError if they are not 32 ids of the codebook."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise LatentTypeError(
            f"the value must be a sequence of {COUNT} ids, not {type(value).__name__}", latent=NAME
        )
    if len(value) != COUNT:
        raise LatentSizeError(f"{len(value)} ids, exactly {COUNT} are needed", latent=NAME)
    limit = MAX_CODES if codebook_size is None else min(codebook_size, MAX_CODES)
    return tuple(check_integer(v, f"id {i + 1}", 0, limit - 1, NAME) for i, v in enumerate(value))


def parse(string: str, codebook_size: int | None = None) -> tuple[int, ...]:
    """Reads 32 ids. Raises LatentError, nothing else, whatever the input."""
    if isinstance(string, str) and len(string) <= MAX_CHARS and _CANONICAL.fullmatch(string):
        # The loader's way: no word by word, which only errors and the other spelling need.
        ids = tuple(map(int, string[1:].split("#")))
        if max(ids) < (MAX_CODES if codebook_size is None else min(codebook_size, MAX_CODES)):
            return ids
    check_prose(string, NAME, MAX_CHARS)
    position = 1 if string[0] == "#" else 0
    found = []
    for word in string[position:].split("#"):
        if not _DIGITS.fullmatch(word):
            raise LatentSyntaxError(
                f"{excerpt(word)} is not an id; ids are written #1872#680#...", position, NAME
            )
        if len(word) > 5:
            raise LatentRangeError(f"id {excerpt(word)[1:-1]} is out of range", position, NAME)
        if word != str(int(word)):
            raise LatentSyntaxError(f"{word} is written {int(word)}", position, NAME)
        found.append((position, int(word)))
        position += len(word) + 1
    values = [value for _, value in found]
    if len(values) == COUNT:
        # One at a time, for the position of the first that the codebook lacks.
        limit = MAX_CODES if codebook_size is None else min(codebook_size, MAX_CODES)
        for number, (start, value) in enumerate(found, 1):
            try:
                check_integer(value, f"id {number}", 0, limit - 1, NAME)
            except LatentError as error:
                raise error.located(start) from None
    return validate(values, codebook_size)


def write(value: Sequence[int], codebook_size: int | None = None) -> str:
    """Writes `#I1#I2#...#I32`; parse(write(x)) == x. Raises LatentError if not valid."""
    return "".join(f"#{number}" for number in validate(value, codebook_size))


def parts(value: Sequence[int]) -> list[int]:
    """The value as JSON."""
    return list(validate(value))


def spans(value: Sequence[int]) -> list[drawing.Span]:
    """Nothing: a mosaic tells more than 32 numbers."""
    validate(value)
    return []


def draw(
    image: UInt8[np.ndarray, "height width 3"], value: Sequence[int]
) -> UInt8[np.ndarray, "taller width 3"]:
    """The picture with the ids below it as a 4 x 8 mosaic, equal ids in equal colours."""
    ids = validate(value)
    width = drawing.check_picture(image).shape[1]
    return drawing.below(image, drawing.mosaic(ids, [colour(i) for i in ids], GRID, width))


def colour(number: int) -> tuple[int, int, int]:
    """A colour for an id: golden-ratio steps in hue keep neighbouring ids apart."""
    hue = number * 0.6180339887498949 % 1
    shade = number * 0.7548776662466927 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.35 + 0.4 * shade, 0.95 - 0.3 * shade)
    return round(red * 255), round(green * 255), round(blue * 255)
