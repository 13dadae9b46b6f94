"""What it costs, in tokens, to finish a number that must lie in an interval; as one table.

A row is an interval, a column what is written so far. Rows of a field that an earlier number
bounds form a block, one for each value of that number, so that a register of the decoder picks the
row: the order x1 < x2 needs no states of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kaleido_jax.grammar.sections import Field

LARGEST = 1000
# Columns after the numbers 0..1000: nothing written yet; the space before it missing too; what the
# separator before it leaves (one of those two); something that no number begins with.
EMPTY, SPACE, NEXT, WRONG = LARGEST + 1, LARGEST + 2, LARGEST + 3, LARGEST + 4
COLUMNS = LARGEST + 5
NEVER = 100  # no number costs as much; it fits into int8


@dataclass(frozen=True)
class FieldCost:
    """Rows of one field.

    Attributes:
      block: row of the table, or first row of a block.
      register: which register is added to `block`; -1 for none.
      stored: the register that keeps the field's value once it is written; -1 for none.
    """

    block: int
    register: int
    stored: int


class CostTable:
    """Rows for the fields of any number of kinds of shapes.

    Attributes:
      rows: int8 [R, COLUMNS]; tokens until the number is whole, in its interval, and followed by
        its comma or parenthesis; NEVER where it cannot be. Row 0 is all zero, for places that are
        in no number.
    """

    def __init__(self, pieces: Iterable[str]):
        """Args: all texts that one token can write."""
        self._pieces = frozenset(pieces)
        # Whichever the vocabulary has decides where one number's tokens end and the next's begin.
        self._comma = ", " if ", " in self._pieces else ","
        self.rows = np.zeros((1, COLUMNS), np.int8)
        self._blocks: dict[tuple, int] = {}
        self._reaches: dict[str, np.ndarray] = {}

    def _reach(self, end: str) -> Int[np.ndarray, "columns numbers"]:
        """Tokens from what is written so far to each number with `end` after it."""
        if end not in self._reaches:
            rest = functools.cache(lambda string: self._spell(string, end, rest))
            reach = np.full((COLUMNS, LARGEST + 1), NEVER, np.int64)
            for number in range(LARGEST + 1):
                string = str(number)
                reach[EMPTY, number] = rest(string)
                reach[SPACE, number] = rest(f" {string}")
                for length in range(1, len(string) + 1):
                    reach[int(string[:length]), number] = rest(string[length:])
            reach[NEXT] = reach[EMPTY if self._comma == ", " else SPACE]
            self._reaches[end] = np.minimum(reach, NEVER)
        return self._reaches[end]

    def _spell(self, string: str, end: str, rest: Callable[[str], int]) -> int:
        if string + end in self._pieces:
            return 1
        heads = [n for n in range(1, len(string) + 1) if string[:n] in self._pieces]
        return min((1 + rest(string[n:]) for n in heads), default=NEVER)

    def fields(self, fields: Sequence[Field]) -> tuple[FieldCost, ...]:
        """Adds the rows that a shape's fields need."""
        bounding = [f.above if f.most is None else f.most for f in fields]
        registers = {index: i for i, index in enumerate(sorted({*bounding} - {None}))}
        # Bounded fields first: what they cost is part of what the bounding field costs.
        costs = {}
        for index in sorted(range(len(fields)), key=lambda i: bounding[i] is None):
            field, bound = fields[index], bounding[index]
            bounded = [costs[i].block for i, other in enumerate(bounding) if other == index]
            end = ")" if index + 1 == len(fields) else self._comma
            block = self._block(field, end, bounded[0] if bounded else None)
            costs[index] = FieldCost(block, registers.get(bound, -1), registers.get(index, -1))
        return tuple(costs[index] for index in range(len(fields)))

    def _block(self, field: Field, end: str, bounded: int | None) -> int:
        key = (field.low, field.high, field.above is None, field.most is None, end, bounded)
        if key not in self._blocks:
            reach = self._reach(end).copy()
            reach[:, : field.low] = NEVER
            reach[:, field.high + 1 :] = NEVER
            if bounded is not None:
                reach += self.rows[bounded : bounded + LARGEST + 1, NEXT]
            if field.above is not None:
                # Row n: the number must be at least n + 1.
                least = np.minimum.accumulate(reach[:, ::-1], axis=1)[:, ::-1]
                made = np.concatenate([least[:, 1:], np.full((COLUMNS, 1), NEVER)], axis=1).T
            elif field.most is not None:
                # Row n: the number must be at most n.
                made = np.minimum.accumulate(reach, axis=1).T
            else:
                made = reach.min(axis=1)[None]
            self._blocks[key] = len(self.rows)
            made = np.minimum(made, NEVER).astype(np.int8)
            self.rows = np.concatenate([self.rows, made])
        return self._blocks[key]
