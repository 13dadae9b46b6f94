"""From a vocabulary and the automata of its latents to the tables that the decoder reads.

Tokens that no state tells apart form one class, so the tables are states x classes (about 100 x
1,000 for T5's 32,100 pieces and 8,192 vokens) and the vocabulary enters by one gather.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from kaleido_jax import tokens
from kaleido_jax.errors import UserError
from kaleido_jax.grammar import numbers
from kaleido_jax.grammar.sections import STRUCTURE, Field, Section, State, sections
from kaleido_jax.latents import voken
from kaleido_jax.latents.characters import clean
from kaleido_jax.tokens import Vocabulary

# Kinds of tokens beside those with characters.
_END, _SECTION, _VOKEN = "end", "section", "voken"
# Characters that finish whatever is begun: ' ((' or ' (1000, 1000, 1000, 1000, 179)'.
_CLOSING = 64
_DEAD = -1
_UNREACHABLE = 10_000  # tokens; small enough for int16


class Tables(NamedTuple):
    """What constrained decoding reads on the device. C states, K classes, V tokens, N latents.

    State 0 is the end of the sequence, state 1 its beginning.
    """

    token_class: Int[np.ndarray, "v"]  # class 0: never
    length: Int[np.ndarray, "v"]  # characters
    next: Int[np.ndarray, "c k"]  # -1: not here
    digits: Int[np.ndarray, "c k"]  # which string of digits goes to the number
    finishes: Bool[np.ndarray, "c k"]  # the number of finish_field is then whole
    opens: Bool[np.ndarray, "c k"]  # a shape begins
    fits: Int[np.ndarray, "c k"]  # tokens from the next state to its section's end, number apart
    in_number: Bool[np.ndarray, "c"]
    waiting: Int[np.ndarray, "c"]  # column of the cost table before any digit; WRONG elsewhere
    row: Int[np.ndarray, "c"]  # of the cost table
    row_register: Int[np.ndarray, "c"]  # added to it; 2 is always zero
    later: Int[np.ndarray, "c 2"]  # rows of later numbers bounded by each register; 0 for none
    finish_low: Int[np.ndarray, "c"]  # limits of the number that may be finished from here
    finish_high: Int[np.ndarray, "c"]
    finish_low_register: Int[np.ndarray, "c"]
    finish_high_register: Int[np.ndarray, "c"]
    finish_stored: Int[np.ndarray, "c"]  # register that keeps it; 2 for none
    section: Int[np.ndarray, "c"]  # N at the end, -1 at the beginning
    starts: Int[np.ndarray, "n"]  # state at each section's beginning
    distance: Int[np.ndarray, "n"]  # tokens of the shortest section
    tail: Int[np.ndarray, "n_1 n"]  # [s, last]: tokens after section s, that of the end included
    max_chars: Int[np.ndarray, "n_1"]  # where a section must begin to end
    scale: Int[np.ndarray, "g"]  # a string of digits: 10 ** its length,
    value: Int[np.ndarray, "g"]  # its number,
    leading_zero: Bool[np.ndarray, "g"]  # and whether it cannot begin a number
    cost: Int[np.ndarray, "r columns"]  # numbers.CostTable

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence with all latents, the end included."""
        heading = len(self.starts) > 1
        return int(heading + self.distance[0] + self.tail[0, -1])


class _Outcome(NamedTuple):
    """What a token does from a state."""

    state: State
    digits: str = ""
    finished: bool = False
    opened: bool = False


def compile_tables(vocabulary: Vocabulary, names: Sequence[str], size: int) -> Tables:
    """The tables of a vocabulary for latents of these names, in order.

    Pieces spelled in bytes and pieces that write to two numbers at once are never used; whatever
    they spell, other pieces spell too.

    Args:
      size: rows of the decoder's embedding.

    Raises:
      UserError: a vocabulary that cannot spell some latent.
    """
    spaced = any(vocabulary.token_text(i)[:1] == " " for i in vocabulary.encode_text("a")[:1])
    automata = sections(tuple(names), spaced)
    texts = _usable(vocabulary, size) if tuple(names) != ("voken",) else {}
    builder = _Builder(automata, texts)
    builder.special(tokens.EOS, (_END,))
    if len(names) > 1:
        for index, name in enumerate(names):
            builder.special(vocabulary.section_id(name), (_SECTION, index))
    if "voken" in names:
        for code in range(vocabulary.num_vokens):
            if vocabulary.voken_offset + code < size:
                builder.special(vocabulary.voken_offset + code, (_VOKEN,))
    tables = builder.tables(size)
    if tables.shortest >= _UNREACHABLE:
        raise UserError(
            f"the vocabulary cannot spell the latents {', '.join(names)}: it needs a piece for "
            "each digit, a comma, a space, the parentheses and some letter"
        )
    return tables


def _usable(vocabulary: Vocabulary, size: int) -> dict[int, str]:
    """Token -> text, for tokens whose text a latent may hold and the vocabulary can spell."""

    def good(character: str) -> bool:
        return character == " " or (
            clean(character) == character
            and not unicodedata.combining(character)
            and vocabulary.knows(character)
        )

    texts = {}
    for token in range(min(vocabulary.num_pieces, size)):
        string = vocabulary.token_text(token)
        if string and not vocabulary.is_byte(token) and all(map(good, string)):
            texts[token] = string
    return texts


class _Builder:
    """Walks every automaton with every kind of text once, then lays the tables out."""

    def __init__(self, automata: tuple[Section, ...], texts: dict[int, str]):
        self.automata, self.texts = automata, texts
        markers = {m for section in automata for m in section.markers}
        self._marks = {m[i:] for m in markers for i in range(len(m))}
        # Two states around the sections, then every state that some text leads to.
        self.states: list[tuple[int, State] | None] = [None, None]
        self.index: dict[tuple[int, State], int] = {}
        self.signatures: dict[object, list[int]] = {}
        for token, string in texts.items():
            self.signatures.setdefault(self._signature(string), []).append(token)
        self.outcomes: dict[tuple[int, object], _Outcome] = {}

    def special(self, token: int, kind: tuple) -> None:
        """Adds a token that writes no characters."""
        self.signatures.setdefault(kind, []).append(token)

    def _signature(self, string: str) -> str:
        """The text with every run of characters that no automaton tells apart as one 'x'."""
        marks = "[" in string or any(
            mark.startswith(string) or string.startswith(mark) for mark in self._marks
        )
        kept = STRUCTURE | ({c for m in self._marks for c in m} if marks else frozenset())
        out: list[str] = []
        for character in string:
            plain = character if character in kept else "\0"
            if plain != "\0" or out[-1:] != ["\0"]:
                out.append(plain)
        return "".join(out)

    def _walk(self, section: Section, state: State, text: str) -> _Outcome | None:
        digits, finished, opened = "", False, False
        for character in text:
            step = section.step(state, character)
            if step is None:
                return None
            if step.digit and step.state.mode == "number" and finished:
                return None  # a second number
            opened |= bool(step.digit) and state.mode == "either"
            digits += step.digit
            finished |= step.finished
            state = step.state
        # Longer than any number; a shape opened and closed cannot be, it has several numbers.
        return None if len(digits) > 4 else _Outcome(state, digits, finished, opened)

    def _explore(self) -> None:
        for number, section in enumerate(self.automata):
            self._visit(number, section.start)
            position = self.index[number, section.start]
            while position < len(self.states):
                self._leave(position, number, section)
                position += 1

    def _visit(self, number: int, state: State) -> None:
        if (number, state) not in self.index:
            self.index[number, state] = len(self.states)
            self.states.append((number, state))

    def _leave(self, position: int, number: int, section: Section) -> None:
        state = self.states[position][1]
        for signature in self.signatures:
            if isinstance(signature, str):
                outcome = self._walk(section, state, signature)
            elif signature == (_VOKEN,) and state.mode == "vokens" and state.field < voken.COUNT:
                outcome = _Outcome(state._replace(field=state.field + 1))
            else:
                outcome = None
            if outcome is not None:
                self._visit(number, outcome.state)
                self.outcomes[position, signature] = outcome

    def tables(self, size: int) -> Tables:
        """Everything laid out for a decoder with `size` rows."""
        self._explore()
        groups = {"": 0}
        columns = {signature: [] for signature in self.signatures}
        for position in range(len(self.states)):
            for signature, column in columns.items():
                column.append(self._entry(position, signature, groups))
        # Signatures that do the same everywhere are one class; class 0 is allowed nowhere.
        never = tuple((_DEAD, 0, False, False) for _ in self.states)
        classes = {never: 0}
        token_class = np.zeros(size, np.int32)
        for signature, column in columns.items():
            number = classes.setdefault(tuple(column), len(classes))
            token_class[self.signatures[signature]] = number
        laid = np.array(list(classes), np.int32).transpose(1, 0, 2)
        length = np.zeros(size, np.int32)
        for token, string in self.texts.items():
            length[token] = len(string)
        return self._assemble(laid, token_class, length, list(groups))

    def _entry(self, position: int, signature: object, groups: dict[str, int]) -> tuple:
        outcome = self.outcomes.get((position, signature))
        if outcome is not None:
            number = self.states[position][0]
            group = groups.setdefault(outcome.digits, len(groups))
            return (
                self.index[number, outcome.state], group, outcome.finished, outcome.opened
            )  # fmt: skip
        target = _DEAD
        if signature == (_END,) and (position == 0 or self._complete(position)):
            target = 0
        elif isinstance(signature, tuple) and signature[0] == _SECTION:
            before = self.states[position][0] if self._complete(position) else None
            if before is None and position == 1:
                before = -1
            if before is not None and before + 1 == signature[1]:
                target = self.index[signature[1], self.automata[signature[1]].start]
        return target, 0, False, False

    def _complete(self, position: int) -> bool:
        found = self.states[position]
        return found is not None and self.automata[found[0]].complete(found[1])

    def _assemble(self, laid, token_class, length, groups: list[str]) -> Tables:
        costs = numbers.CostTable(self.texts.values())
        places = [self._place(position, costs) for position in range(len(self.states))]
        place = {name: np.array([p[name] for p in places]) for name in places[0]}
        following, digits = laid[..., 0], laid[..., 1]
        scale, value, leading_zero = (
            np.array(column) for column in zip(*map(_number, groups), strict=True)
        )
        count = len(self.automata)
        starts = np.array([self.index[i, s.start] for i, s in enumerate(self.automata)])
        # How a shape may open on the shortest way: with a number begun, not yet finished.
        entered = np.where((value > numbers.LARGEST) | leading_zero, numbers.WRONG, value)[digits]
        entered = np.where(laid[..., 2] > 0, numbers.WRONG, entered)
        base = self._distances(laid, place, costs.rows, entered)
        distance = base[starts]
        tail = np.ones((count + 1, count), np.int32)
        for last in range(count):
            for number in range(last + 1):
                tail[number, last] += sum(1 + distance[i] for i in range(number + 1, last + 1))
        tail[count] = 0
        longest = int(length.max())
        limits = [s.max_chars - _CLOSING - 2 * longest for s in self.automata]
        return Tables(
            token_class=token_class,
            length=length,
            next=following.astype(np.int16),
            digits=digits.astype(np.int16),
            finishes=laid[..., 2].astype(bool),
            opens=laid[..., 3].astype(bool),
            fits=np.where(following >= 0, base[following], _UNREACHABLE).astype(np.int16),
            starts=starts.astype(np.int32),
            distance=distance.astype(np.int32),
            tail=tail,
            max_chars=np.array([*limits, 2**30], np.int32),
            scale=scale.astype(np.int32),
            value=value.astype(np.int32),
            leading_zero=leading_zero,
            cost=costs.rows,
            **place,
        )

    def _place(self, position: int, costs: numbers.CostTable) -> dict[str, object]:
        """Everything of a state that depends on its section and number alone."""
        made = dict(
            in_number=False, waiting=numbers.WRONG, row=0, row_register=2, later=(0, 0),
            finish_low=0, finish_high=0, finish_low_register=2, finish_high_register=2,
            finish_stored=2, section=-1, rest=0,
        )  # fmt: skip
        if position < 2:
            return made | dict(section=(len(self.automata), -1)[position])
        number, state = self.states[position]
        fields = self.automata[number].fields
        made["section"] = number
        if not fields:
            return made
        rows = costs.fields(fields)
        inside = state.mode in ("space", "first", "number")
        # From words a shape may open, so that the number finished is the first.
        index = state.field if inside else 0
        field, row = fields[index], rows[index]
        made |= _limits(field, rows) | dict(finish_stored=row.stored % 3)
        if inside:
            waiting = {"space": numbers.SPACE, "first": numbers.EMPTY}
            made |= dict(
                in_number=True,
                waiting=waiting.get(state.mode, numbers.WRONG),
                row=row.block,
                row_register=row.register % 3,
                later=_later(fields, rows, index),
                rest=_fixed(fields, rows, index, costs.rows),
            )
        return made

    def _distances(self, laid, place, cost, entered) -> Int[np.ndarray, "c"]:
        """Tokens from each state to its section's end by a shortest way, as far as it is fixed.

        In a number: what comes after all bounded numbers; the device adds those (mask.py).
        """
        following = laid[..., 0]
        inside = place["in_number"]
        rest = place.pop("rest")
        complete = np.array([self._complete(p) for p in range(len(self.states))])
        sections_end = following == 0
        vokens = [s is not None and s[1].mode == "vokens" for s in self.states]
        best = np.where(inside, rest, np.where(complete, 0, _UNREACHABLE))
        best[:2] = 0
        for position, found in enumerate(self.states):
            if vokens[position]:
                best[position] = voken.COUNT - found[1].field
        own = place["section"]
        same = (following >= 0) & ~sections_end & (own[following] == own[:, None])
        # A shape opens with registers unset: its first numbers' rows include all that they bound.
        entered = cost[place["row"][following], entered].astype(np.int32)
        entered = np.where(entered < numbers.NEVER, entered, _UNREACHABLE)
        plain = ~inside & ~np.array(vokens) & ~complete
        plain[:2] = False
        # Only a digit leads from words into a number.
        same &= ~inside[following] | (laid[..., 1] > 0)
        for _ in range(len(self.states)):
            steps = np.where(same, 1 + best[following] + entered * inside[following], _UNREACHABLE)
            better = np.where(plain, np.minimum(best, steps.min(axis=1)), best)
            if (better == best).all():
                break
            best = better
        return np.minimum(best, _UNREACHABLE).astype(np.int32)


def _number(group: str) -> tuple[int, int, bool]:
    return 10 ** len(group), int(group or 0), len(group) > 1 and group[0] == "0"


def _limits(field: Field, rows: Sequence[numbers.FieldCost]) -> dict[str, int]:
    """Limits of a finished number: constants, or 1 more than or equal to a register."""
    made = dict(finish_low=field.low, finish_high=field.high)
    if field.above is not None:
        made |= dict(finish_low=1, finish_low_register=rows[field.above].stored)
    if field.most is not None:
        made |= dict(finish_high=0, finish_high_register=rows[field.most].stored)
    return made


def _bound(field: Field) -> int | None:
    return field.above if field.most is None else field.most


def _later(
    fields: Sequence[Field], rows: Sequence[numbers.FieldCost], index: int
) -> tuple[int, int]:
    """Blocks of the numbers after `index` that a number before it bounds, by register."""
    later = [0, 0]
    for i in range(index + 1, len(fields)):
        bound = _bound(fields[i])
        if bound is not None and bound < index:
            later[rows[i].register] = rows[i].block
    return tuple(later)


def _fixed(
    fields: Sequence[Field], rows: Sequence[numbers.FieldCost], index: int, cost: np.ndarray
) -> int:
    """Tokens of the numbers after `index` that none bounds, with what they bound themselves."""
    free = [i for i in range(index + 1, len(fields)) if _bound(fields[i]) is None]
    return int(sum(cost[rows[i].block, numbers.NEXT] for i in free))
