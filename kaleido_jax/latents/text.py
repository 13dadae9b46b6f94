"""Latent `text`: a description of the picture, 50 to 80 words (Section 3.2, Appendix A).

    text = prose ;                              (* characters.py; 1 to 4,096 characters *)

The number of words is advice to annotators, not grammar. The value is the string itself.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.latents import drawing
from kaleido_jax.latents.characters import check_prose

NAME = "text"
OVERLAY = False
MAX_CHARS = 4096


def validate(value: str) -> str:
    """Returns the description. Raises LatentError if it is not prose of 1..MAX_CHARS characters."""
    return check_prose(value, NAME, MAX_CHARS)


def parse(string: str) -> str:
    """Reads a description. Raises LatentError, nothing else, whatever the input."""
    return validate(string)


def write(value: str) -> str:
    """Writes a description; parse(write(x)) == x. Raises LatentError if `value` is not valid."""
    return validate(value)


def parts(value: str) -> str:
    """The value as JSON."""
    return validate(value)


def spans(value: str) -> list[drawing.Span]:
    """The value as coloured words for a legend."""
    return [drawing.Span(validate(value))]


def draw(
    image: UInt8[np.ndarray, "height width 3"], value: str
) -> UInt8[np.ndarray, "taller width 3"]:
    """The picture with the wrapped description below it."""
    width = drawing.check_picture(image).shape[1]
    return drawing.below(image, drawing.prose(spans(value), width))
