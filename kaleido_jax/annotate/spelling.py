"""Which characters T5's vocabulary can spell, and what stands in for the others.

A latent is learnt as tokens; a character without a piece would be the unknown token there. The set
below is that of the single characters among T5's 32,100 pieces (`{ } < ~ ^ \\` and the backtick are
not among them).
"""

from __future__ import annotations

import unicodedata

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

    Letters lose marks that no piece has (ñ becomes n), what has no stand-in goes.
    """
    # Composed first: an e and its accent in two characters are one that T5 knows.
    composed = unicodedata.normalize("NFC", text)
    changed, out = 0, []
    for character in composed:
        if character in SPELLED:
            out.append(character)
            continue
        changed += 1
        out.append(_stand_in(character))
    return "".join(out), changed


def _stand_in(character: str) -> str:
    if character in _STAND_INS:
        return _STAND_INS[character]
    pieces = unicodedata.normalize("NFKD", character)
    return "".join(_STAND_INS.get(c, c if c in SPELLED else "") for c in pieces)
