"""Latent `combined`: text, then bbox, then voken; the later follow the earlier (Appendix B.3).

    combined = "[text] " , text , " [bbox] " , bbox , " [voken] " , voken ;

text, bbox and voken are the sentences of their own grammars. Neither may hold one of the three
markers in square brackets: there is no escape for them, and the writer refuses them. (T5 has pieces
for square brackets. In token form each section is opened by one special token instead.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.latents import bbox, drawing, grounding, text, voken
from kaleido_jax.latents.characters import check_prose
from kaleido_jax.latents.errors import LatentError, LatentSyntaxError, LatentTypeError

NAME = "combined"
OVERLAY = False
SECTIONS = {"text": text, "bbox": bbox, "voken": voken}
MARKERS = {name: f"[{name}]" for name in SECTIONS}
MAX_CHARS = text.MAX_CHARS + grounding.MAX_CHARS + voken.MAX_CHARS + 32


@dataclass(frozen=True)
class Combined:
    """One picture's description, grounded caption and visual tokens. Raises LatentError."""

    text: str
    bbox: tuple[bbox.Segment, ...]
    voken: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, module in SECTIONS.items():
            value = module.validate(getattr(self, name))
            object.__setattr__(self, name, value)
            _refuse_markers(module.write(value), 0, name)


def _refuse_markers(section: str, offset: int, name: str) -> None:
    for marker in MARKERS.values():
        if marker in section:
            raise LatentSyntaxError(
                f"the {name} section holds the marker {marker}, which only opens a section",
                offset + section.index(marker),
                NAME,
            )


def split(string: str) -> dict[str, str]:
    """The strings of the sections in order, each valid for its own grammar.

    Raises LatentError, nothing else, whatever the input; positions are those in `string`.
    """
    return {name: section for name, (section, _) in _read(string).items()}


def join(sections: dict[str, str]) -> str:
    """The combined string of the strings of all three sections. Raises LatentError."""
    if not isinstance(sections, dict) or set(sections) != set(SECTIONS):
        raise LatentTypeError(f"needs exactly the sections {', '.join(SECTIONS)}", latent=NAME)
    return write(Combined(**{n: m.parse(sections[n]) for n, m in SECTIONS.items()}))


def _read(string: str) -> dict[str, tuple[str, object]]:
    check_prose(string, NAME, MAX_CHARS)
    starts = []
    position = 0
    for name, marker in MARKERS.items():
        opening = f" {marker} " if starts else f"{marker} "
        found = string.find(opening, position)
        if found < 0 or (not starts and found > 0):
            raise LatentSyntaxError(
                f"the section marker {opening.strip()} is missing or out of place; "
                "write [text] ... [bbox] ... [voken] ...",
                position,
                NAME,
            )
        position = found + len(opening)
        starts.append((name, found, position))
    ends = [found for _, found, _ in starts[1:]] + [len(string)]
    sections = {}
    for (name, _, start), end in zip(starts, ends, strict=True):
        section = string[start:end]
        _refuse_markers(section, start, name)
        try:
            sections[name] = section, SECTIONS[name].parse(section)
        except LatentError as error:
            raise error.located(start, f"{NAME}, {name}") from None
    return sections


def validate(value: Combined) -> Combined:
    """Returns the value. Raises LatentError if it is not a Combined (whose parts are valid)."""
    if not isinstance(value, Combined):
        raise LatentTypeError(
            f"the value must be a Combined, not {type(value).__name__}", latent=NAME
        )
    return value


def parse(string: str) -> Combined:
    """Reads the three sections. Raises LatentError, nothing else, whatever the input."""
    return Combined(**{name: value for name, (_, value) in _read(string).items()})


def write(value: Combined) -> str:
    """Writes `[text] .. [bbox] .. [voken] ..`; parse(write(x)) == x. Raises LatentError."""
    validate(value)
    return " ".join(f"{MARKERS[n]} {m.write(getattr(value, n))}" for n, m in SECTIONS.items())


def parts(value: Combined) -> dict:
    """The value as JSON: the parts of each section under its name."""
    return {name: m.parts(getattr(validate(value), name)) for name, m in SECTIONS.items()}


def spans(value: Combined) -> list[drawing.Span]:
    """The description and the coloured phrases."""
    return text.spans(validate(value).text) + bbox.spans(value.bbox)


def draw(
    image: UInt8[np.ndarray, "height width 3"], value: Combined
) -> UInt8[np.ndarray, "taller width 3"]:
    """The picture with its boxes; below it the mosaic, the description and the phrases."""
    validate(value)
    picture = voken.draw(bbox.draw(image, value.bbox), value.voken)
    return drawing.below(picture, drawing.prose(spans(value), picture.shape[1]))
