"""Latents in the characters that a vocabulary has pieces for.

T5 has no piece for `{ } < ~ ^ \\`, the backtick, and most of the world's writing. A latent that
held one would teach the decoder the unknown token, which it must never write. So such characters
are written plainly where they have a plain form (a letter without its accent), and left out where
they have none. What parses before parses after.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable

from kaleido_jax.latents.characters import clean
from kaleido_jax.latents.table import latent_type

NAMELESS = "object"  # what a phrase becomes of which nothing is left
_STRUCTURE = frozenset("()")


def plain(character: str, known: Callable[[str], bool]) -> str:
    """The character in known ones: itself, its compatible form, without accents, or "".

    Never a parenthesis for anything else: those are grammar.
    """
    folded = unicodedata.normalize("NFKC", character)
    bare = "".join(
        c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)
    )
    for form in (folded, bare):
        if form == character and known(form):
            return form
        if form and not _STRUCTURE & set(form) and all(c == " " or known(c) for c in form):
            return form
    return ""


def spell(name: str, string: str, known: Callable[[str], bool]) -> str:
    """A latent's string in known characters.

    Args:
      name: 'text', 'bbox' or 'blob'.
      string: valid for that latent's grammar.
      known: whether a single character has a piece. Letters, digits and the grammar's own
        characters must be known.

    Returns:
      A valid string again, or "" where nothing is left of a text.

    Raises:
      LatentError: `string` is not valid.
    """
    latent = latent_type(name)

    def prose(words: str) -> str:
        return clean("".join(c if c == " " else plain(c, known) for c in words))

    if name == "text":
        return prose(latent.parse(string))
    segments = latent.parse(string)
    shapes = next(f.name for f in dataclasses.fields(segments[0]) if f.name != "phrase")
    spelled = [dataclasses.replace(s, phrase=prose(s.phrase) or NAMELESS) for s in segments]
    if not getattr(segments[-1], shapes) and not prose(segments[-1].phrase):
        spelled.pop()  # words after the last shape, of which nothing is left
    return latent.write(tuple(spelled))
