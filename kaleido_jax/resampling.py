"""Some latents drawn anew while the others stay as they are (`--keep`, `--resample`).

A latent after the kept ones is drawn from the prior, p(z_i | z_<i, c), exactly. One that stands
before a kept one would have to come from p(z_i | z_<i, z_>i, c), which the decoder does not have:
`candidates` whole draws are made from the prior instead, weighted by the probability that they give
to the kept latents after them, and one is picked by its weight (sampling importance resampling).
That is exact in the limit of many candidates only; `effective` says how many of them counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from kaleido_jax import rng, tokens
from kaleido_jax.batches import batches
from kaleido_jax.decode import Plan
from kaleido_jax.errors import UserError
from kaleido_jax.grammar import Tables
from kaleido_jax.runner import Runner
from kaleido_jax.settings import Settings
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.written import own_tokens, read_latents

MAX_CANDIDATES = 256
# Draws of a first z count from 0 (generate.MAX_DRAWS of them); these never meet them.
FIRST_ATTEMPT = 1000


class Redrawn(NamedTuple):
    """One z, some of it drawn anew.

    Attributes:
      latents: all strings.
      tokens: where they would be cut when spelled anew, else None.
      log_prob: log p(z | c) of all of it.
      candidates: how many were drawn.
      effective: how many of them the weights left, 1..candidates (Kish's effective sample size).
    """

    latents: dict[str, str]
    tokens: list[int] | None
    log_prob: float
    candidates: int
    effective: float


def redraw(
    runner: Runner,
    vocabulary: Vocabulary,
    tables: Tables,
    names: Sequence[str],
    caption: Int[np.ndarray, "lc"],
    latents: Mapping[str, str],
    free: Sequence[str],
    settings: Settings,
    *,
    seed: int,
    index: int,
    step: int,
    candidates: int,
    batch: int,
    on_draw: Callable[[], None] | None = None,
) -> Redrawn:
    """Draws the latents `free` anew, given the caption and the others.

    Args:
      tables: from `Runner.place`.
      names: the model's latents in order.
      caption: tokens of the caption.
      latents: those that stay; others are not read.
      seed, index, step: decide all random numbers; `step` counts from 0.
      candidates: 1..256; more than one are drawn only where a kept latent follows a free one.
      on_draw: is called before each batch is drawn; may raise to stop.

    Raises:
      UserError: nothing to draw, an unknown latent, or no room left beside the kept ones.
    """
    _check(names, free, candidates)
    kept = _kept_tokens(vocabulary, names, latents, free)
    first = min(names.index(name) for name in free)
    if not any(names.index(name) > first for name in kept):
        candidates = 1
    encoded = runner.encode(caption[None])
    parts = [[] for _ in range(candidates)]  # tokens so far, without an end
    marks = [[] for _ in range(candidates)]  # whether each belongs to a kept latent
    position = 0
    while position < len(names):
        name = names[position]
        if name not in free:
            for written, mark in zip(parts, marks, strict=True):
                written += kept.get(name, [])
                mark += [True] * len(kept.get(name, []))
            position += 1
            continue
        last = position
        while last + 1 < len(names) and names[last + 1] in free:
            last += 1
        after = _room(tables, names, kept, last)
        heading = [vocabulary.section_id(name)] if len(names) > 1 else []
        opened = [written + heading for written in parts] if position else parts
        plan = _plan(runner.latent_length, opened, position, last, after, tables)
        for rows in batches(np.arange(candidates), batch):
            if on_draw is not None:
                on_draw()
            drawn, _ = runner.decode(
                encoded,
                np.zeros(len(rows), int),
                np.full(len(rows), seed),
                index + rows,
                batch,
                settings,
                FIRST_ATTEMPT + step,
                tables,
                Plan(*(np.asarray(field)[rows] for field in plan)),
            )
            for row, ids in zip(rows, drawn, strict=True):
                parts[row] = [int(i) for i in ids[: np.argmax(ids == tokens.EOS)]]
                marks[row] += [False] * (len(parts[row]) - len(marks[row]))
        position = last + 1
    return _pick(
        runner, vocabulary, names, encoded, parts, marks, seed=seed, step=step, batch=batch
    )


def _check(names: Sequence[str], free: Sequence[str], candidates: int) -> None:
    unknown = [name for name in free if name not in names]
    if unknown or not free:
        what = f"no latent {unknown[0]!r}" if unknown else "nothing to draw"
        raise UserError(f"{what}; the model's latents are {', '.join(names) or 'none'}")
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise UserError(f"candidates is {candidates}; it must be between 1 and {MAX_CANDIDATES}")


def _kept_tokens(
    vocabulary: Vocabulary, names: Sequence[str], latents: Mapping[str, str], free: Sequence[str]
) -> dict[str, list[int]]:
    """Tokens of each kept latent, its section token with it."""
    kept = {}
    for name in names:
        string = latents.get(name, "")
        if name not in free and string:
            # As many tokens as characters are more than enough.
            ids = vocabulary.encode_latents({name: string}, (name,), len(string) + 64)[:-1]
            kept[name] = ([vocabulary.section_id(name)] if len(names) > 1 else []) + ids
    return kept


def _room(
    tables: Tables, names: Sequence[str], kept: Mapping[str, Sequence[int]], last: int
) -> int:
    """Tokens that whatever comes after section `last` needs, the end not counted."""
    shortest = np.asarray(tables.distance)
    return sum(
        len(kept.get(names[i], [])) if names[i] in kept else int(1 + shortest[i])
        for i in range(last + 1, len(names))
    )


def _plan(
    length: int,
    opened: Sequence[Sequence[int]],
    first: int,
    last: int,
    after: int,
    tables: Tables,
) -> Plan:
    """Rows of what stands already, for drawing the sections first..last."""
    rows = len(opened)
    shortest = np.asarray(tables.distance)
    needed = int(shortest[first : last + 1].sum()) + last - first + 1  # with the end
    needed += first == 0 and len(shortest) > 1
    longest = max(map(len, opened))
    if longest + needed + after > length:
        raise UserError(
            f"the kept latents leave no room for the others: {longest + needed + after} tokens are "
            f"needed, the model writes {length}"
        )
    prefix = np.stack([tokens.pad(ids, length) for ids in opened])
    return Plan(
        prefix=prefix,
        first=np.full(rows, first if first else -1, np.int32),
        last=np.full(rows, last, np.int32),
        limit=np.full(rows, length - after, np.int32),
    )


def _pick(
    runner: Runner,
    vocabulary: Vocabulary,
    names: Sequence[str],
    encoded,
    parts: Sequence[Sequence[int]],
    marks: Sequence[Sequence[bool]],
    *,
    seed: int,
    step: int,
    batch: int,
) -> Redrawn:
    """One of the candidates, by the probability of the kept tokens after the first drawn one."""
    count, length = len(parts), runner.latent_length
    ids = np.stack([tokens.pad([*part, tokens.EOS], length) for part in parts])
    scores = np.zeros((count, length))
    for rows in batches(np.arange(count), batch):
        zeros = np.zeros(len(rows), int)
        scores[rows] = runner.score(encoded, zeros, ids[rows], batch)
    # The same kept tokens before every candidate's first drawn one cancel out.
    weighed = np.zeros((count, length), bool)
    for row, mark in enumerate(marks):
        weighed[row, : len(mark)] = mark
        weighed[row, len(mark)] = mark[-1]  # the end, after a kept latent
    log_weights = np.where(weighed, scores, 0.0).sum(1)
    chosen, effective = _resample(log_weights, seed, step)
    latents, problems = read_latents(vocabulary, ids[chosen], names)
    if problems:
        raise UserError(f"the kept latents do not read back: {problems[0]}")
    return Redrawn(
        latents=latents,
        tokens=own_tokens(vocabulary, ids[chosen], latents, names),
        log_prob=float(scores[chosen].sum()),
        candidates=count,
        effective=effective,
    )


def _resample(log_weights: Float[np.ndarray, "m"], seed: int, step: int) -> tuple[int, float]:
    weights = np.exp(log_weights - log_weights.max())
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    noise = np.asarray(jax.random.gumbel(rng.stream(seed, "resample", step), log_weights.shape))
    return int(np.argmax(log_weights + noise)), effective
