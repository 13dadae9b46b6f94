"""Which characters a latent may hold, and whole numbers.

    char   = any printable Unicode character except the space
             (no control, format, surrogate or private character, no line or exotic space) ;
    prose  = char , { [ " " ] , char } ;        (* single spaces, none at either end *)

Tokenizers fold every kind of space into one and drop what cannot be seen; refusing both here keeps
string, tokens and string again the same thing.
"""

from __future__ import annotations

import math
import numbers
import operator
import unicodedata

from kaleido_jax.latents.errors import (
    LatentCharacterError,
    LatentRangeError,
    LatentSizeError,
    LatentTypeError,
)


def _allowed(character: str) -> bool:
    # An unassigned code point (Cn) may be assigned in a newer Python: refusing it would make
    # validity depend on the interpreter.
    return character.isprintable() or unicodedata.category(character) == "Cn"


def check_prose(value: object, latent: str, limit: int, what: str = "string") -> str:
    """Returns `value` if it is prose of 1..limit characters.

    Raises: LatentTypeError, LatentSizeError (before looking at any character, so time is bounded),
    LatentCharacterError.
    """
    if not isinstance(value, str):
        raise LatentTypeError(f"{what} must be a str, not {type(value).__name__}", latent=latent)
    if not value:
        raise LatentSizeError(f"{what} is empty", latent=latent)
    if len(value) > limit:
        raise LatentSizeError(
            f"{what} has {len(value)} characters, at most {limit} are allowed", latent=latent
        )
    if not value.isprintable():
        for position, character in enumerate(value):
            if not _allowed(character):
                raise LatentCharacterError(
                    f"{what} holds the character U+{ord(character):04X}; control, invisible and "
                    "broken characters are not allowed",
                    position,
                    latent,
                )
    for flaw, position in (("begins", 0), ("ends", len(value) - 1)):
        if value[position] == " ":
            raise LatentCharacterError(f"{what} {flaw} with a space", position, latent)
    if "  " in value:
        raise LatentCharacterError(f"{what} holds a double space", value.index("  "), latent)
    return value


def clean(raw: str, limit: int | None = None) -> str:
    """Prose from any str: spaces folded into one, what cannot be seen dropped, cut to `limit`.

    Cuts at a word where there is one. Returns "" if nothing is left.
    """
    # A soft hyphen or zero-width joiner goes; a line break or exotic space becomes a space.
    spaced = "".join(
        c if _allowed(c) else " " if unicodedata.category(c) in ("Cc", "Zs", "Zl", "Zp") else ""
        for c in raw
    )
    text = " ".join(spaced.split())
    if limit is not None and len(text) > limit:
        head = text[: limit + 1]
        text = (head.rpartition(" ")[0] or head[:limit]).strip()
    return text


def check_integer(value: object, name: str, low: int, high: int, latent: str | None) -> int:
    """Returns `value` as a Python int in low..high. Raises LatentTypeError, LatentRangeError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise LatentTypeError(
            f"{name} must be a whole number, not {type(value).__name__}", latent=latent
        ) from None
    if not low <= number <= high:
        shown = str(number) if abs(number) < 10**12 else "a longer number"
        raise LatentRangeError(f"{name} = {shown} is not in {low}..{high}", latent=latent)
    return number


def round_half_up(value: object, name: str, latent: str) -> int:
    """Nearest whole number, halves upwards. Raises LatentTypeError, LatentRangeError (NaN)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise LatentTypeError(f"{name} must be a number, not {type(value).__name__}", latent=latent)
    if not math.isfinite(value):
        raise LatentRangeError(f"{name} = {float(value)} is not a finite number", latent=latent)
    return math.floor(value + 0.5)
