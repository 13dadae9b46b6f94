"""Which characters T5's vocabulary can spell, and what stands in for the others.

A latent is learnt as tokens; a character without a piece would be the unknown token there. The set
below is that of the single characters among T5's 32,100 pieces (`{ } < ~ ^ \\` and the backtick are
not among them). Training with another vocabulary spells once more (tokens.Vocabulary.spell).
"""

from __future__ import annotations

import unicodedata

from kaleido_jax.latents.spelling import plain

_ASCII = frozenset(chr(code) for code in range(0x20, 0x7F)) - frozenset("{}<~^\\`")
_OTHERS = frozenset("£«®°»ÉÎÜßàáâäçèéêîóôöùûüăşţșț–—‘’“”„•€′")
SPELLED = _ASCII | _OTHERS

_STAND_INS = {
    "{": "(",
    "}": ")",
    "~": "-",
    "\\": "/",
    "`": "'",
    "´": "'",
    "‚": "'",
    "‐": "-",
    "‑": "-",
    "‒": "–",
    "−": "-",
    "×": "x",
    "æ": "ae",
    "Æ": "AE",
    "œ": "oe",
    "Œ": "OE",
    "ø": "o",
    "Ø": "O",
    "ł": "l",
    "Ł": "L",
    "đ": "d",
    "Đ": "D",
    "ı": "i",
    "þ": "th",
    "ð": "d",
}


def spell(text: str) -> tuple[str, int]:
    """The text with every character in SPELLED, and how many had to change or go.

    Letters lose marks that no piece has (ñ becomes n), what has no plain form goes.
    """
    # Composed first: an e and its accent in two characters are one that T5 knows.
    composed = unicodedata.normalize("NFC", text)
    changed, out = 0, []
    for character in composed:
        if character not in SPELLED:
            changed += 1
            character = _STAND_INS.get(character) or plain(character, SPELLED.__contains__)
        out.append(character)
    return "".join(out), changed
