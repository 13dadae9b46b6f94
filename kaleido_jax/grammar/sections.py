"""The grammars of the latents as automata over characters: what may follow what.

The rules are those of `latents/text.py`, `bbox.py`, `blob.py` (with `grounding.py`) and `voken.py`,
written for reading one character at a time. What a finite automaton would need a million states
for, the order of numbers, stands in `Field`; numbers.py turns it into tables.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from kaleido_jax.latents import bbox, blob, combined, grounding, text, voken

DIGITS = "0123456789"
# Characters that the automata tell from others.
STRUCTURE = frozenset(" ()" + grounding.ATTACHED + DIGITS)


class Field(NamedTuple):
    """A whole number in a shape: low..high, and how an earlier one of its shape bounds it.

    above: it must exceed the field of this index. most: it must not exceed that field.
    """

    low: int
    high: int
    above: int | None = None
    most: int | None = None


BOX = (Field(0, 999), Field(0, 999), Field(1, 1000, above=0), Field(1, 1000, above=1))
ELLIPSE = (Field(0, 1000), Field(0, 1000), Field(1, 1000), Field(1, 1000, most=2), Field(0, 179))


class State(NamedTuple):
    """Where in a section: `mode`, and what of the past decides the future.

    Modes: 'start' (before the space that SentencePiece puts at the beginning, and drops), 'begun'
    (after it), 'word' and 'gap' (words, after a character or a space), 'open' and 'close' (half of
    a doubled parenthesis), 'either' (a parenthesis after a space: a shape, or half of a doubled
    one), 'space', 'first' and 'number' (before the space, the first digit and in `field`), 'shape'
    (after a shape), 'after' (after a shape and a space), 'vokens' (`field` of them written).
    """

    mode: str = "start"
    field: int = 0
    shaped: bool = False  # there is a shape already
    marker: str = ""  # beginning of a section marker that the last characters spell


class Step(NamedTuple):
    """The next state; the digit that was written to a number; whether a number was finished."""

    state: State
    digit: str = ""
    finished: bool = False


@dataclass(frozen=True)
class Section:
    """One latent's automaton.

    Attributes:
      name: the latent.
      fields: numbers of one shape; () for text and vokens.
      max_chars: no valid string is longer.
      markers: strings that the section must not hold, as `latents/combined.py` demands.
      spaced: whether the tokens of a text begin with a space that is none of its characters.
    """

    name: str
    fields: tuple[Field, ...]
    max_chars: int
    markers: tuple[str, ...] = ()
    spaced: bool = True

    @property
    def start(self) -> State:
        """The state before anything of the section is written."""
        if self.name == "voken":
            return State("vokens")
        return State("start" if self.spaced else "begun")

    def complete(self, state: State) -> bool:
        """Whether the section may end here."""
        if self.name == "voken":
            return state.field == voken.COUNT
        return state.mode == "shape" or (state.mode == "word" and (state.shaped or not self.fields))

    def step(self, state: State, character: str) -> Step | None:
        """Reads one allowed character; None where it may not stand. Vokens are no characters."""
        mode = state.mode
        if mode in ("start", "begun", "word", "gap", "after"):
            return self._prose(state, character)
        if mode in ("open", "close"):
            good = character == ("(" if mode == "open" else ")")
            return Step(state._replace(mode="word")) if good else None
        if mode == "either":
            if character == "(":
                return Step(state._replace(mode="word"))
            return self._digit(state, 0, character)
        if mode == "shape":
            if character == " ":
                return Step(state._replace(mode="after"))
            return self._word(state, character) if character in grounding.ATTACHED else None
        if mode == "space":
            return Step(state._replace(mode="first")) if character == " " else None
        if mode in ("first", "number"):
            if mode == "number" and character not in DIGITS:
                return self._end_number(state, character)
            return self._digit(state, state.field, character)
        return None

    def _prose(self, state: State, character: str) -> Step | None:
        mode = state.mode
        if character == " ":
            after = {"start": "begun", "word": "gap"}.get(mode)
            return Step(state._replace(mode=after, marker="")) if after else None
        if mode == "start":
            return None
        if mode == "after" and character in grounding.ATTACHED:
            return None
        if self.fields and character in "()":
            half = "close" if character == ")" else "open"
            if character == "(" and mode in ("gap", "after"):
                half = "either"
            return Step(state._replace(mode=half, marker=""))
        return self._word(state, character)

    def _word(self, state: State, character: str) -> Step | None:
        seen = state.marker + character
        if seen in self.markers:
            return None
        starts = [m[:n] for m in self.markers for n in range(len(m), 0, -1)]
        marker = max((s for s in starts if seen.endswith(s)), key=len, default="")
        return Step(state._replace(mode="word", marker=marker))

    def _digit(self, state: State, field: int, character: str) -> Step | None:
        if character not in DIGITS:
            return None
        # Once the shape is whole there is one, whatever there was before.
        return Step(State("number", field, True), digit=character)

    def _end_number(self, state: State, character: str) -> Step | None:
        if character == "," and state.field + 1 < len(self.fields):
            return Step(State("space", state.field + 1, True), finished=True)
        if character == ")" and state.field + 1 == len(self.fields):
            return Step(State("shape", 0, True), finished=True)
        return None


@functools.cache
def sections(names: tuple[str, ...], spaced: bool = True) -> tuple[Section, ...]:
    """The automata of a model's latents in order.

    `spaced` as in `Section`. Several latents refuse the markers of a combined latent in each
    other, as its grammar does.
    """
    markers = tuple(combined.MARKERS.values()) if len(names) > 1 else ()
    made = {
        "text": Section("text", (), text.MAX_CHARS, markers, spaced),
        "bbox": Section("bbox", BOX, bbox.MAX_CHARS, markers, spaced),
        "blob": Section("blob", ELLIPSE, blob.MAX_CHARS, markers, spaced),
        "voken": Section("voken", (), voken.MAX_CHARS),
    }
    return tuple(made[name] for name in names)
