"""Named random streams: every key is a function of (seed, stream name, step or sample index)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

STREAMS = (
    "params",
    "data",
    "time",
    "time_logit",
    "noise",
    "cond_drop",
    "dropout",
    "decode",
    "sample",
    "cads",
    "resample",
)


def stream(seed: int, name: str, step: int | Int[Array, ""] = 0) -> Key[Array, ""]:
    """Returns the key of stream `name` at `step`; keys are never stored or carried.

    Args:
      seed: the run's seed, 0 <= seed < 2**32.
      name: one of STREAMS.
      step: training step or another index; may be traced.

    Raises:
      ValueError: if `name` is not a known stream (a typo would silently be another stream).
    """
    if name not in STREAMS:
        raise ValueError(f"unknown random stream {name!r}; one of {', '.join(STREAMS)}")
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def per_sample(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
    """Returns one key per sample index, so that picture i is the same at any batch size."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(ids, jnp.uint32))
