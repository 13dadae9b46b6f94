"""How fast latents are decoded, and what the constraint of their grammars costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

import kaleido_jax
from kaleido_jax import grammar, stages
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.tokens import EOS, Vocabulary
from kaleido_jax.types import Conditioning, Params
from kaleido_jax.written import allowed_tokens


@dataclass(frozen=True)
class Settings:
    """What to measure with: rows of a batch, tokens (0: the config's), how often each is timed."""

    batch_size: int = 16
    length: int = 0
    repeats: int = 5


def measure(
    config: ConfigDict,
    vocabulary: Vocabulary,
    settings: Settings,
    params: Params | None = None,
) -> dict[str, Any]:
    """Times decoding with and without the constraint, in turns.

    Both draw from the same decoder; sequences may end at different lengths, so times are divided by
    the steps of the longest of the batch.

    Args:
      config: a model's; its decoder and `data.latent_length` matter.
      vocabulary: the model's.
      params: trained weights; random ones by default, whose cost is the same.

    Returns:
      seconds_per_step and tokens_per_second (steps times rows) of either, constrained and free;
      overhead: how much longer a constrained step takes, 0.05 for 5%, the median of the pairs;
      table_bytes and table_seconds: the tables' size and making.

    Raises:
      UserError: a model without latents, or one whose latents do not fit.
    """
    names, length = tuple(config.latents), settings.length or config.data.latent_length
    if not names:
        raise UserError("bench decode: the config has no latents to decode")
    model = Kaleido(KaleidoConfig.from_config(config))
    size = model.cfg.latent_decoder.vocab_size
    start = time.perf_counter()
    tables = grammar.compile_tables(vocabulary, names, size)
    table_seconds = time.perf_counter() - start
    if tables.shortest > length:
        raise UserError(f"bench decode: {length} tokens; {tables.shortest} are needed at least")
    encoded = _encoded(config, settings.batch_size)
    if params is None:
        params = _random_decoder(model, encoded)
    allowed = jnp.asarray(allowed_tokens(vocabulary, names, size))
    placed = jax.tree.map(jnp.asarray, tables)
    rows = np.arange(settings.batch_size, dtype=np.uint32)

    def run(constrained: bool, seed: int) -> Int[Array, "b lz"]:
        return stages.draw_latents(
            model,
            params,
            length,
            encoded,
            np.full_like(rows, seed),
            rows,
            np.uint32(0),
            np.float32(1.0),
            np.int32(0),
            np.float32(1.0),
            None if constrained else allowed,
            placed if constrained else None,
        )[0]

    times: dict[bool, list[float]] = {True: [], False: []}
    steps = 0
    for constrained in (True, False):
        jax.block_until_ready(run(constrained, 0))
    for repeat in range(settings.repeats):
        # In turns, so that whatever else the machine does falls on both.
        for constrained in (True, False):
            seconds, ids = _timed(lambda c=constrained, seed=repeat: run(c, seed))
            steps = int(_steps(ids))
            times[constrained].append(seconds / steps)
    step = {
        name: statistics.median(times[c]) for name, c in (("constrained", True), ("free", False))
    }
    pairs = zip(times[True], times[False], strict=True)
    return {
        "bench": "decode",
        "latents": list(names),
        "length": length,
        "batch_size": settings.batch_size,
        "pieces": vocabulary.num_pieces,
        "decoder_rows": size,
        "decoder_parameters": sum(x.size for x in jax.tree.leaves(params["latent_decoder"])),
        "seconds_per_step": {name: round(value, 7) for name, value in step.items()},
        "tokens_per_second": {
            name: round(settings.batch_size / value, 1) for name, value in step.items()
        },
        "overhead": round(statistics.median(a / b for a, b in pairs) - 1, 4),
        "table_bytes": sum(np.asarray(array).nbytes for array in tables),
        "table_seconds": round(table_seconds, 3),
        "device": jax.devices()[0].device_kind,
        "version": kaleido_jax.__version__,
    }


def _steps(ids: Int[Array, "b lz"]) -> int:
    """Steps that the loop took: those of its longest sequence."""
    ended = np.asarray(ids) == EOS
    return int(np.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1]).max())


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def _encoded(config: ConfigDict, batch: int) -> Conditioning:
    """Encoder states of captions as long as they may be; their values do not matter."""
    shape = (batch, config.data.caption_length, config.model.text_encoder.emb_dim)
    states = jax.random.normal(jax.random.key(1), shape, config.model.text_encoder.dtype)
    return Conditioning(states=states, mask=jnp.ones(shape[:2], bool))


def _random_decoder(model: Kaleido, encoded: Conditioning) -> Params:
    """Weights of the decoder alone, at its initialisation."""

    def init() -> Params:
        ids = jnp.ones((encoded.mask.shape[0], 2), jnp.int32)
        made = model.init(jax.random.key(0), ids, encoded, method="latent_states")
        return nn.meta.unbox(made["params"])

    return jax.jit(init)()
