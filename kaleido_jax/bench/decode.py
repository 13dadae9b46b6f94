"""How fast latents are decoded, and what the constraint of their grammars costs."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from kaleido_jax import compiling, flops, grammar, stages
from kaleido_jax import config as config_lib
from kaleido_jax.bench import measured
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.tokens import EOS, Vocabulary
from kaleido_jax.types import Conditioning, Params
from kaleido_jax.written import allowed_tokens

KINDS = ("constrained", "free")


@dataclass(frozen=True)
class Settings:
    """What to measure with: rows of a batch, tokens (0: the config's), how often each is timed.

    `memory_limit` in bytes and the folder `profile` are as in `training.Settings`.
    """

    batch_size: int = 16
    length: int = 0
    repeats: int = 5
    memory_limit: int = 0
    profile: str | os.PathLike | None = None


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
      flops_per_token, flops_per_second and utilisation: of the model in a constrained step;
      compile_seconds, memory: as measured.py says; table_bytes and table_seconds: the tables' size
      and making.

    Raises:
      UserError: a model without latents, or one whose latents do not fit.
      measured.DoesNotFit: more memory is needed than there is.
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
    # Once: what lies on the host, mapped from a file, would be copied in every run.
    params = jax.device_put({"latent_decoder": params["latent_decoder"]})
    allowed = jnp.asarray(allowed_tokens(vocabulary, names, size))
    placed = jax.tree.map(jnp.asarray, tables)
    rows = np.arange(settings.batch_size, dtype=np.uint32)

    def arguments(constrained: bool, seed: int) -> tuple[Any, ...]:
        return (
            params,
            encoded,
            np.full_like(rows, seed),
            rows,
            np.uint32(0),
            np.float32(1.0),
            np.int32(0),
            np.float32(1.0),
            None if constrained else allowed,
            placed if constrained else None,
        )

    def draw(params: Params, *args: Any) -> Any:
        return stages.draw_latents(model, params, length, *args)

    programs, compile_seconds = {}, {}
    for kind in KINDS:
        shapes = arguments(kind == "constrained", 0)
        programs[kind], compile_seconds[kind] = measured.compiled(compiling.jit(draw), *shapes)
        measured.check_fits(programs[kind], settings.memory_limit)
        jax.block_until_ready(programs[kind](*shapes))
    # The first step alone would count what happens once.
    one, two = (
        flops.useful(flops.count(draw, *arguments(False, 0), trips=trips)) for trips in (1, 2)
    )
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with measured.profiled(settings.profile):
        for repeat in range(settings.repeats):
            # In turns, so that whatever else the machine does falls on both.
            for kind in KINDS:
                given = arguments(kind == "constrained", repeat)
                seconds, (ids, _) = measured.timed(lambda k=kind, g=given: programs[k](*g))
                times[kind].append(seconds / _steps(ids))
    step = {kind: statistics.median(times[kind]) for kind in KINDS}
    pairs = zip(times["constrained"], times["free"], strict=True)
    speed = measured.rates(step["constrained"], 0, two - one)
    del speed["images_per_second"]
    return {
        "bench": "decode",
        "config_fingerprint": config_lib.fingerprint(config),
        "latents": list(names),
        "length": length,
        "batch_size": settings.batch_size,
        "repeats": settings.repeats,
        "pieces": vocabulary.num_pieces,
        "decoder_rows": size,
        "decoder_parameters": sum(x.size for x in jax.tree.leaves(params["latent_decoder"])),
        "seconds_per_step": {name: round(value, 7) for name, value in step.items()},
        "tokens_per_second": {
            name: round(settings.batch_size / value, 1) for name, value in step.items()
        },
        "overhead": round(statistics.median(a / b for a, b in pairs) - 1, 4),
        "flops_per_token": round((two - one) / settings.batch_size),
        **speed,
        "compile_seconds": compile_seconds,
        "memory": measured.memory(programs["constrained"]),
        "table_bytes": sum(np.asarray(array).nbytes for array in tables),
        "table_seconds": round(table_seconds, 3),
        **measured.environment(),
    }


def _steps(ids: Int[Array, "b lz"]) -> int:
    """Steps that the loop took: those of its longest sequence."""
    ended = np.asarray(ids) == EOS
    return int(np.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1]).max())


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
