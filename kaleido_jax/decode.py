"""Autoregressive sampling of the latents z ~ p(z | c) (Sec. 3.2) in one compiled loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kaleido_jax import grammar as grammar_lib
from kaleido_jax import tokens
from kaleido_jax.errors import UserError

# T5's start token is its padding token.
START = tokens.PAD

# (cache, token [B]) -> (logits of the next token [B, V], cache).
DecodeStep = Callable[[Any, Int[Array, "b"]], tuple[Float[Array, "b v"], Any]]


class Plan(NamedTuple):
    """Which part of z is to be drawn, for each sequence of a batch.

    Attributes:
      prefix: tokens that stand at the beginning; 0 after them.
      first: the section that comes after the prefix, which ends with its section token; -1 where
        there is no prefix.
      last: the section after which the sequence ends.
      limit: tokens of the whole sequence, prefix and EOS included.
    """

    prefix: Int[Array, "b l"]
    first: Int[Array, "b"]
    last: Int[Array, "b"]
    limit: Int[Array, "b"]


def whole(batch: int, max_length: int, num_latents: int) -> Plan:
    """The plan that draws all latents."""
    ones = jnp.ones((batch,), jnp.int32)
    prefix = jnp.zeros((batch, max_length), jnp.int32)
    return Plan(prefix, -ones, (num_latents - 1) * ones, max_length * ones)


def filter_logits(
    logits: Float[Array, "b v"],
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] = 0,
    top_p: float | Float[Array, ""] = 1.0,
) -> Float[Array, "b v"]:
    """Applies temperature, top-k and top-p in this order, as transformers does.

    Ties with the last token kept are kept too. All three settings may be traced.

    Args:
      logits: unnormalised log-probabilities; -inf forbids a token.
      temperature: > 0 divides the logits; exactly 0 keeps the likeliest token only (greedy).
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens with mass >= top_p; 1 keeps all.

    Returns:
      Filtered logits, -inf where a token is dropped.
    """
    vocabulary = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    temperature = jnp.asarray(temperature, jnp.float32)
    greedy = jnp.arange(vocabulary) == jnp.argmax(logits, axis=-1, keepdims=True)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)

    descending = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(jnp.asarray(top_k) > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    kth = jnp.take(descending, k - 1, axis=-1)[..., None]
    probabilities = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), axis=-1)
    # A token stays while the mass of the likelier ones has not reached top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) | (jnp.asarray(top_p) >= 1.0)
    kept = kept.at[..., 0].set(True) & (descending >= kth)
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)

    keep = jnp.where(temperature > 0, scaled >= smallest, greedy)
    return jnp.where(keep, scaled, -jnp.inf)


def sample_tokens(
    decode_step: DecodeStep,
    cache: Any,
    keys: Key[Array, "b"],
    max_length: int,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] = 0,
    top_p: float | Float[Array, ""] = 1.0,
    allowed: Bool[Array, "v"] | None = None,
    grammar: grammar_lib.Tables | None = None,
    plan: Plan | None = None,
) -> tuple[Int[Array, "b l"], Float[Array, "b"]]:
    """Samples token sequences until every one has its EOS or `max_length` tokens.

    Args:
      decode_step: one step of the decoder with its key-value cache; the first token it gets is
        the start token.
      cache: the empty cache, of at least `max_length` positions.
      keys: one key per sample, from rng.per_sample(stream(seed, 'decode'), ids); token n uses
        the key folded with n, so a sequence does not depend on its neighbours in the batch.
      max_length: static number of tokens, EOS included.
      temperature, top_k, top_p: see `filter_logits`.
      allowed: tokens that may be written; all by default.
      grammar: tables that let every sequence end in time and parse; no constraint by default.
      plan: with a grammar, which part of z to draw; all of it by default.

    Returns:
      tokens: int32 [B, max_length], 0 after EOS; without any EOS the sequence is unfinished.
      log_prob: log p(z | c) of the tokens up to EOS under the unmodified model (no temperature,
        no filter, no mask), float32 [B]; the tokens of a prefix count too.
    """
    batch = keys.shape[0]
    if grammar is not None and plan is None:
        plan = whole(batch, max_length, grammar.starts.shape[0])

    def unfinished(state):
        index, done = state[0], state[5]
        return (index < max_length) & ~jnp.all(done)

    def body(state):
        index, token, cache, written, log_prob, done, place = state
        logits, cache = decode_step(cache, token)
        logits = logits.astype(jnp.float32)
        permitted = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        if grammar is not None:
            remaining = plan.limit - index
            legal = grammar_lib.allowed(grammar, place, plan.last, remaining)
            permitted = jnp.where(legal, logits, -jnp.inf)
        filtered = filter_logits(permitted, temperature, top_k, top_p)
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        drawn = jax.vmap(jax.random.categorical)(step_keys, filtered).astype(jnp.int32)
        if grammar is not None:
            given = plan.prefix[:, index]
            # Inside the prefix the state stays that of its end.
            moved = grammar_lib.advance(grammar, place, plan.last, drawn)
            place = jax.tree.map(
                lambda old, new: jnp.where(_like(given > 0, new), old, new), place, moved
            )
            drawn = jnp.where(given > 0, given, drawn)
        token = jnp.where(done, tokens.PAD, drawn)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=-1)[:, 0]
        log_prob = log_prob + jnp.where(done, 0.0, own)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], index, axis=1)
        done |= token == tokens.EOS
        return index + 1, token, cache, written, log_prob, done, place

    state = (
        jnp.int32(0),
        jnp.full((batch,), START, jnp.int32),
        cache,
        jnp.full((batch, max_length), tokens.PAD, jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        jnp.zeros((batch,), bool),
        None if grammar is None else grammar_lib.start(grammar, plan.first, plan.last),
    )
    _, _, _, written, log_prob, _, _ = jax.lax.while_loop(unfinished, body, state)
    return written, log_prob


def _like(flags: Bool[Array, "b"], array: Array) -> Bool[Array, "b *ones"]:
    return flags.reshape(flags.shape + (1,) * (array.ndim - 1))


def check_filter(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError unless temperature is 0..100, top_k >= 0 and 0 < top_p <= 1."""
    if not (math.isfinite(temperature) and 0.0 <= temperature <= 100.0):
        raise UserError(f"temperature is {temperature}; it must be between 0 (greedy) and 100")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (keep all) or more")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1 (keep all)")
