"""What `bbox` and `blob` share: phrases, each followed by the shapes that it names.

    grounded  = phrase , shapes , { gap , phrase , shapes } , [ gap , phrase ] ;
    shapes    = " " , shape , { " " , shape } ;
    gap       = "" if the phrase that follows begins with an attached character, else " " ;
    attached  = "." | "," | ";" | ":" | "!" | "?" | "'" | "’" ;
    phrase    = prose, each "(" in it written "((" and each ")" written "))" ;
    shape     = "(" , integer , { ", " , integer } , ")" ;
    integer   = "0" | digit1to9 , { digit } ;

A single parenthesis always opens or closes a shape; a doubled one is a parenthesis of the prose
(T5 has no piece for a backslash, but it can spell these). So "((1, 2, 3, 4))" is prose, and
"(1, 2, 3)" is a mistake, not prose. Every value has one spelling and every valid string one
reading: parse(write(x)) == x and write(parse(s)) == s. A string holds at least one shape (a picture
without objects has no such latent), at most MAX_OBJECTS shapes and MAX_CHARS characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

from kaleido_jax.latents.characters import check_prose
from kaleido_jax.latents.errors import (
    LatentError,
    LatentRangeError,
    LatentSizeError,
    LatentSyntaxError,
    LatentTypeError,
    excerpt,
)

MAX_CHARS = 8192
MAX_OBJECTS = 128
ATTACHED = ".,;:!?'’"

_PROSE = re.compile(r"(?:[^()]+|\(\(|\)\))*")
_SHAPE = re.compile(r"\(([^()]{0,64})\)")
_INTEGER = re.compile(r"-?[0-9]+")

Shape = TypeVar("Shape")
Pair = tuple[str, tuple[Shape, ...]]


class Kind(NamedTuple):
    """One kind of shape: the latent's name, the noun for messages, its fields and its maker."""

    latent: str
    noun: str
    fields: tuple[str, ...]
    make: type


def check_items(items: object, make: type, limit: int, latent: str) -> tuple:
    """Returns a list or tuple of at most `limit` instances of `make` as a tuple.

    Raises LatentTypeError, and LatentSizeError before looking at any item.
    """
    if not isinstance(items, (list, tuple)):
        raise LatentTypeError(
            f"needs a list or tuple of {make.__name__}, not {type(items).__name__}", latent=latent
        )
    if len(items) > limit:
        raise LatentSizeError(
            f"{len(items)} times {make.__name__}, at most {limit} are allowed", latent=latent
        )
    for item in items:
        if not isinstance(item, make):
            raise LatentTypeError(
                f"needs only {make.__name__} in the sequence, not {type(item).__name__}",
                latent=latent,
            )
    return tuple(items)


def check_pairs(pairs: list[Pair], kind: Kind) -> str:
    """Returns the string that spells the segments. Raises LatentError if none can."""
    latent = kind.latent
    count = sum(len(shapes) for _, shapes in pairs)
    if count == 0:
        raise LatentSizeError(f"there is no {kind.noun} at all", latent=latent)
    if count > MAX_OBJECTS:
        raise LatentSizeError(f"{count} objects, at most {MAX_OBJECTS} are allowed", latent=latent)
    for phrase, shapes in pairs[:-1]:
        if not shapes:
            raise LatentSyntaxError(
                f"the phrase {excerpt(phrase)} has no {kind.noun}; only the last may have none",
                latent=latent,
            )
    spelled = []
    for phrase, shapes in pairs:
        gap = " " if spelled and phrase[0] not in ATTACHED else ""
        spelled.append(gap + phrase.replace("(", "((").replace(")", "))"))
        spelled.extend(
            f" ({', '.join(str(getattr(shape, name)) for name in kind.fields)})" for shape in shapes
        )
    string = "".join(spelled)
    if len(string) > MAX_CHARS:
        raise LatentSizeError(
            f"string has {len(string)} characters, at most {MAX_CHARS} are allowed", latent=latent
        )
    return string


def read_pairs(string: object, kind: Kind) -> list[Pair]:
    """Reads (phrase, shapes) pairs. Raises LatentError, nothing else, whatever the input."""
    check_prose(string, kind.latent, MAX_CHARS)
    pairs: list[tuple[str, list]] = []
    position = count = 0
    while position < len(string):
        raw = _PROSE.match(string, position).group()
        stop = position + len(raw)
        if stop < len(string) and string[stop] == ")":
            raise LatentSyntaxError(
                "a ')' without its '('; a parenthesis of the prose is doubled: '))'",
                stop,
                kind.latent,
            )
        ends = stop == len(string)
        if not (pairs and raw == " "):
            pairs.append((_read_phrase(raw, position, bool(pairs), ends, kind), []))
        if ends:
            break
        shape, position = _read_shape(string, stop, kind)
        count += 1
        if count > MAX_OBJECTS:
            raise LatentSizeError(
                f"more than {MAX_OBJECTS} objects are not allowed", stop, kind.latent
            )
        pairs[-1][1].append(shape)
    if count == 0:
        raise LatentSyntaxError(
            f"there is no {kind.noun}; write ({', '.join(kind.fields)}) after a phrase",
            len(string),
            kind.latent,
        )
    return [(phrase, tuple(shapes)) for phrase, shapes in pairs]


def _read_phrase(raw: str, position: int, follows: bool, ends: bool, kind: Kind) -> str:
    """The phrase in `raw`, which stands between the last shape and the next one or the end."""

    def wrong(message: str, offset: int = 0) -> LatentSyntaxError:
        return LatentSyntaxError(message, position + offset, kind.latent)

    if not ends:
        if not raw:
            raise wrong(
                f"one space goes before each {kind.noun}"
                if follows
                else f"a phrase goes before the first {kind.noun}"
            )
        if not raw.endswith(" "):
            raise wrong(f"one space goes before each {kind.noun}", len(raw))
        raw = raw[:-1]
    if follows:
        if raw[0] == " ":
            raw = raw[1:]
            if raw[0] in ATTACHED:
                raise wrong(f"no space goes between a {kind.noun} and {raw[0]!r}")
        elif raw[0] not in ATTACHED:
            raise wrong(f"one space goes between a {kind.noun} and the words after it")
    return raw.replace("((", "(").replace("))", ")")


def _read_shape(string: str, position: int, kind: Kind) -> tuple[object, int]:
    """The shape whose '(' stands at `position`, and the position after its ')'."""
    form = f"({', '.join(kind.fields)})"
    match = _SHAPE.match(string, position)
    if match is None:
        raise LatentSyntaxError(
            f"not a {kind.noun} {form}: {excerpt(string[position:])}; "
            "a parenthesis of the prose is doubled: '(('",
            position,
            kind.latent,
        )
    words = match.group(1).split(", ")
    for word in words:
        if not _INTEGER.fullmatch(word):
            raise LatentSyntaxError(
                f"{excerpt(word)} is not a whole number; a {kind.noun} is written {form}",
                position,
                kind.latent,
            )
    if len(words) != len(kind.fields):
        raise LatentSyntaxError(
            f"{len(words)} numbers in {excerpt(match.group())}; a {kind.noun} is written {form}",
            position,
            kind.latent,
        )
    for name, word in zip(kind.fields, words, strict=True):
        if len(word) > 4:
            raise LatentRangeError(
                f"{name} = {excerpt(word)[1:-1]} is out of range", position, kind.latent
            )
        if word != str(int(word)):
            raise LatentSyntaxError(
                f"{name} is written {word}; write {int(word)}", position, kind.latent
            )
    try:
        shape = kind.make(*map(int, words))
    except LatentError as error:
        raise error.located(position, kind.latent) from None
    return shape, match.end()
