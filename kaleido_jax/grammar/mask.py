"""Constrained decoding on the device: which tokens may follow, and the state after one.

A state is a handful of whole numbers per sequence. Every function is pure and runs inside the
decoding loop. A token is allowed if the grammar holds it, its numbers can still become valid, and
the rest can be finished within the tokens that remain. From every state that is reached so, some
token leads to a state one token nearer to the end; so no sequence is ever stuck or cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kaleido_jax.grammar.compiler import Tables
from kaleido_jax.grammar.numbers import LARGEST, NEVER, NEXT, WRONG
from kaleido_jax.latents import grounding


class State(NamedTuple):
    """Where each sequence of a batch is in its grammar."""

    place: Int[Array, "b"]  # row of the tables
    number: Int[Array, "b"]  # column of the cost table: the number so far, or EMPTY or SPACE
    registers: Int[Array, "b 3"]  # numbers that bound later ones; the last is always 0
    shapes: Int[Array, "b"]
    characters: Int[Array, "b"]  # of this section
    distance: Int[Array, "b"]  # tokens of the shortest way to the end


class _Next(NamedTuple):
    """The states after each class of tokens."""

    possible: Bool[Array, "b k"]
    place: Int[Array, "b k"]
    number: Int[Array, "b k"]
    registers: tuple[Int[Array, "b k"], Int[Array, "b k"]]
    opens: Bool[Array, "b k"]
    distance: Int[Array, "b k"]


def start(tables: Tables, first: Int[Array, "b"], last: Int[Array, "b"]) -> State:
    """The state before the first token.

    Args:
      first: section that comes next, its opening token written already; -1: nothing is written.
      last: the section after which the sequence ends.
    """
    zero = jnp.zeros_like(first)
    begun = jnp.maximum(first, 0)
    heading = tables.starts.shape[0] > 1
    unwritten = 1 if heading else tables.starts[0]
    distance = tables.distance[begun] + tables.tail[begun, last] + (heading & (first < 0))
    return State(
        place=jnp.where(first < 0, unwritten, tables.starts[begun]).astype(jnp.int32),
        number=zero + WRONG,
        registers=jnp.zeros((*first.shape, 3), jnp.int32),
        shapes=zero,
        characters=zero,
        distance=distance.astype(jnp.int32),
    )


def _options(tables: Tables, state: State, last: Int[Array, "b"]) -> _Next:
    here = state.place
    following = tables.next[here].astype(jnp.int32)
    group = tables.digits[here].astype(jnp.int32)
    finishes = tables.finishes[here]
    section = tables.section[following]
    ends = following == 0
    # The end stands after the last section, and no section stands after it.
    possible = following >= 0
    possible &= jnp.where(
        ends,
        (tables.section[here] == last)[:, None] | (here == 0)[:, None],
        section <= last[:, None],
    )

    fresh = state.number > LARGEST
    before = jnp.where(fresh, 0, state.number)[:, None]
    written = group > 0
    grown = before * tables.scale[group] + tables.value[group]
    wrong = jnp.where(fresh[:, None], tables.leading_zero[group], before == 0) & written
    wrong |= grown > LARGEST
    nothing = fresh[:, None] & ~written

    low = tables.finish_low[here] + _register(state, tables.finish_low_register[here])
    high = tables.finish_high[here] + _register(state, tables.finish_high_register[here])
    inside = (grown >= low[:, None]) & (grown <= high[:, None]) & ~wrong & ~nothing
    possible &= inside | ~finishes
    stored = tables.finish_stored[here]
    registers = tuple(
        jnp.where(finishes & (stored == i)[:, None], grown, state.registers[:, i, None])
        for i in (0, 1)
    )

    # After a number is finished, or before one is begun, the place says what is missing.
    waiting = tables.waiting[following]
    number = jnp.where(nothing | finishes, waiting, jnp.where(wrong, WRONG, grown))
    number = jnp.where(tables.in_number[following], number, WRONG)
    row_register = tables.row_register[following]
    row = tables.row[following] + jnp.where(
        row_register == 0, registers[0], jnp.where(row_register == 1, registers[1], 0)
    )
    later = tables.later[following]
    costs = jnp.where(tables.in_number[following], tables.cost[row, number].astype(jnp.int32), 0)
    possible &= costs < NEVER
    for i in (0, 1):
        block = later[..., i]
        costs += jnp.where(block > 0, tables.cost[block + registers[i], NEXT].astype(jnp.int32), 0)
    distance = tables.fits[here].astype(jnp.int32) + costs + tables.tail[section, last[:, None]]
    opens = tables.opens[here]
    possible &= ~opens | (state.shapes < grounding.MAX_OBJECTS)[:, None]
    return _Next(possible, following, number, registers, opens, distance)


def _register(state: State, index: Int[Array, "b"]) -> Int[Array, "b"]:
    return jnp.take_along_axis(state.registers, index[:, None], axis=1)[:, 0]


def allowed(
    tables: Tables, state: State, last: Int[Array, "b"], remaining: Int[Array, "b"]
) -> Bool[Array, "b v"]:
    """Tokens that may come next.

    Args:
      last: as `start`.
      remaining: tokens that may still be written, this one included.
    """
    options = _options(tables, state, last)
    good = options.possible & (options.distance < remaining[:, None])
    # Near a section's most characters every token must bring the end nearer.
    ending = state.characters > tables.max_chars[tables.section[state.place]]
    good &= ~ending[:, None] | (options.distance < state.distance[:, None])
    good |= ((state.place == 0)[:, None]) & (options.place == 0)
    return jnp.take(good, tables.token_class, axis=1)


def advance(tables: Tables, state: State, last: Int[Array, "b"], token: Int[Array, "b"]) -> State:
    """The state after `token`, which must have been allowed."""
    options = _options(tables, state, last)
    own = tables.token_class[token][:, None]

    def pick(values: Array) -> Array:
        return jnp.take_along_axis(values, own, axis=1)[:, 0]

    place = pick(options.place)
    moved = tables.section[place] != tables.section[state.place]
    first, second = (pick(values) for values in options.registers)
    return State(
        place=place,
        number=pick(options.number),
        registers=jnp.stack([first, second, jnp.zeros_like(first)], axis=1),
        shapes=jnp.where(moved, 0, state.shapes + pick(options.opens)),
        characters=jnp.where(moved, 0, state.characters + tables.length[token]),
        distance=pick(options.distance),
    )
