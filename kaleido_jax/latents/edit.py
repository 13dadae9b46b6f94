"""Edits of latents (Section 3.4, Figures 8 and 14): words, boxes, ellipses and vokens.

Each is a function from one valid string to another. An object is named by words of its phrase
('dog', with '#2' for the second that matches: 'dog#2') or by its number in the string ('#3').
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from kaleido_jax.latents import bbox, blob, voken
from kaleido_jax.latents.characters import clean
from kaleido_jax.latents.errors import (
    LatentError,
    LatentRangeError,
    LatentSyntaxError,
    LatentTypeError,
    excerpt,
)
from kaleido_jax.latents.table import latent_type

# What holds the shapes of a segment, and the shape itself.
_SHAPES: dict[str, tuple[str, type]] = {
    "bbox": ("boxes", bbox.Box),
    "blob": ("ellipses", blob.Ellipse),
}
_ORDINAL = re.compile(r"(.*?)#([0-9]{1,3})")


def replace_word(name: str, string: str, old: str, new: str) -> str:
    """Replaces words wherever they stand as whole words; in phrases, never in numbers.

    Args:
      name: 'text', 'bbox' or 'blob'.
      old: one word or several, matched with its case or with a capital first letter, which the new
        one then gets too.
      new: what comes in its place; "" leaves the words out.

    Raises:
      LatentError: the words do not occur, or nothing valid would be left.
    """
    if name not in ("text", *_SHAPES):
        raise LatentTypeError(f"there are no words in {excerpt(name)}", latent=name)
    old = clean(old)
    if not old:
        raise LatentSyntaxError("no word to replace", latent=name)
    pattern = re.compile(rf"(?<!\w)(?:{re.escape(old)}|{re.escape(_capital(old))})(?!\w)")
    count = 0

    def put(match: re.Match) -> str:
        nonlocal count
        count += 1
        return _capital(new) if match[0] != old else new

    latent = latent_type(name)
    value = latent.parse(string)
    if name == "text":
        value = clean(pattern.sub(put, value))
    else:
        value = tuple(
            dataclasses.replace(s, phrase=clean(pattern.sub(put, s.phrase))) for s in value
        )
    if not count:
        raise LatentSyntaxError(f"the word {excerpt(old)} does not occur", latent=name)
    return latent.write(value)


def objects(name: str, string: str) -> list[tuple[str, Any]]:
    """(phrase, Box or Ellipse) of every object, in order. Raises LatentError."""
    value = _segments(name, string)
    return [(s.phrase, shape) for s in value for shape in getattr(s, _SHAPES[name][0])]


def find(name: str, string: str, which: str) -> int:
    """The number (from 0) of the object that `which` names.

    Raises:
      LatentError: none or several are so named; the message lists what there is.
    """
    found = objects(name, string)
    match = _ORDINAL.fullmatch(which.strip())
    words, ordinal = (match[1].strip(), int(match[2])) if match else (which.strip(), None)
    pattern = re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)
    hits = [i for i, (phrase, _) in enumerate(found) if not words or pattern.search(phrase)]
    there = ", ".join(f"#{i + 1} {phrase[-30:]!r}" for i, (phrase, _) in enumerate(found[:8]))
    if ordinal is not None and 1 <= ordinal <= len(hits):
        return hits[ordinal - 1]
    if ordinal is None and len(hits) == 1:
        return hits[0]
    problem = "no object" if ordinal is not None or not hits else f"{len(hits)} objects"
    hint = "; say which, as in 'dog#2'" if problem != "no object" else ""
    raise LatentSyntaxError(f"{problem} {excerpt(which)}{hint} (there are {there})", latent=name)


def place(name: str, string: str, which: str, numbers: tuple[int, ...]) -> str:
    """Gives an object other numbers: (x1, y1, x2, y2) or (xc, yc, r_major, r_minor, theta)."""
    return _change(name, string, which, lambda shape: _make(name, numbers))


def move(name: str, string: str, which: str, dx: int, dy: int) -> str:
    """Moves an object by thousandths of the picture; it keeps its size.

    Raises:
      LatentError: it would leave the picture.
    """

    def moved(shape: Any) -> Any:
        if name == "bbox":
            return dataclasses.replace(
                shape, x1=shape.x1 + dx, x2=shape.x2 + dx, y1=shape.y1 + dy, y2=shape.y2 + dy
            )
        return dataclasses.replace(shape, xc=shape.xc + dx, yc=shape.yc + dy)

    return _change(name, string, which, moved)


def resize(name: str, string: str, which: str, factor: float) -> str:
    """Scales an object about its centre; boxes are cut at the picture's edges.

    Raises:
      LatentError: a factor that is not in 0.01..100, or nothing is left of the object.
    """
    if not 0.01 <= factor <= 100.0:
        raise LatentRangeError(f"factor {factor} is not in 0.01..100", latent=name)

    def scaled(shape: Any) -> Any:
        if name == "blob":
            major, minor = shape.r_major * factor, shape.r_minor * factor
            return blob.Ellipse.rounded(shape.xc, shape.yc, major, minor, shape.theta)
        x, y = (shape.x1 + shape.x2) / 2, (shape.y1 + shape.y2) / 2
        w, h = (shape.x2 - shape.x1) * factor / 2, (shape.y2 - shape.y1) * factor / 2
        return bbox.Box.rounded(x - w, y - h, x + w, y + h)

    return _change(name, string, which, scaled)


def add(name: str, string: str, phrase: str, numbers: tuple[int, ...]) -> str:
    """Adds an object with its phrase after the last one, before words that follow it.

    Raises:
      LatentError: not valid, or too many.
    """
    attribute, _ = _SHAPES[_known(name)]
    value = list(_segments(name, string))
    end = len(value) if getattr(value[-1], attribute) else len(value) - 1
    made = type(value[0])(clean(phrase), (_make(name, numbers),))
    return latent_type(name).write((*value[:end], made, *value[end:]))


def remove(name: str, string: str, which: str) -> str:
    """Takes an object away; its phrase goes with it if that has no other.

    Raises:
      LatentError: it is the only object, which a grounded caption must have.
    """
    if len(objects(name, string)) == 1:
        raise LatentSyntaxError("its only object cannot be removed", latent=name)
    return _change(name, string, which, lambda shape: None)


def replace_vokens(string: str, changes: Mapping[int, int]) -> str:
    """Puts other ids at some places (0..31, row by row in the 4 x 8 grid). Raises LatentError."""
    value = list(voken.parse(string))
    for position, number in changes.items():
        if not 0 <= position < voken.COUNT:
            raise LatentRangeError(
                f"place {position} is not in 0..{voken.COUNT - 1}", latent="voken"
            )
        value[position] = number
    return voken.write(value)


def _known(name: str) -> str:
    if name not in _SHAPES:
        raise LatentTypeError(
            f"there are no objects in {excerpt(name)}, only in {' and '.join(_SHAPES)}"
        )
    return name


def _segments(name: str, string: str) -> tuple:
    return latent_type(_known(name)).parse(string)


def _make(name: str, numbers: tuple[int, ...]) -> Any:
    kind = _SHAPES[_known(name)][1]
    wanted = [field.name for field in dataclasses.fields(kind)]
    if len(numbers) != len(wanted):
        raise LatentSyntaxError(
            f"{len(numbers)} numbers; {len(wanted)} are needed: {', '.join(wanted)}", latent=name
        )
    return kind(*numbers)


def _change(name: str, string: str, which: str, change: Callable[[Any], Any]) -> str:
    """The string with one object changed, or taken away where the change is None."""
    number = find(name, string, which)
    attribute = _SHAPES[name][0]
    made = []
    for segment in _segments(name, string):
        shapes = list(getattr(segment, attribute))
        if 0 <= number < len(shapes):
            try:
                changed = change(shapes[number])
            except LatentError as error:
                raise type(error)(f"{which}: {error.message}", latent=name) from None
            shapes[number : number + 1] = [] if changed is None else [changed]
        number -= len(getattr(segment, attribute))
        if shapes or not getattr(segment, attribute):
            made.append(dataclasses.replace(segment, **{attribute: tuple(shapes)}))
    return latent_type(name).write(tuple(made))


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]
