"""How fast pictures are made: encoding, decoding, diffusion, and writing them beside it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import compiling, flops, grammar, stages
from kaleido_jax import config as config_lib
from kaleido_jax.bench import measured
from kaleido_jax.bundle import Bundle
from kaleido_jax.generate import Pipeline
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.picture_folder import PictureFolder
from kaleido_jax.settings import Settings as SampleSettings
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.types import Params

STAGES = ("encode", "decode", "diffusion")
_STREAMED = 3  # batches that are drawn and written to measure both together


@dataclass(frozen=True)
class Settings:
    """What to measure with: rows of a batch, how often, sampling settings by name.

    `memory_limit` in bytes and the folder `profile` are as in `training.Settings`.
    """

    batch_size: int = 16
    repeats: int = 3
    sampling: Mapping[str, Any] = field(default_factory=dict)
    memory_limit: int = 0
    profile: str | os.PathLike | None = None


def random_bundle(config: ConfigDict, vocabulary: Vocabulary) -> Bundle:
    """A model of a config at its initialisation, whose pictures cost what others cost."""
    model, data = Kaleido(KaleidoConfig.from_config(config)), config.data
    shapes = stages.process_of(config, model.cfg.ratios).shapes

    def init() -> Params:
        made = model.init(
            jax.random.key(0),
            jnp.ones((1, data.caption_length), jnp.int32),
            jnp.ones((1, data.latent_length if config.latents else 0), jnp.int32),
            tuple(jnp.zeros((1, *shape)) for shape in shapes),
            jnp.zeros((1,)),
        )
        return nn.meta.unbox(made["params"])

    return Bundle(config, jax.jit(init)(), vocabulary, "random")


def measure(model: Bundle, settings: Settings) -> dict[str, Any]:
    """Times the stages of one batch of distinct captions, then a stream of batches.

    Args:
      model: a trained model, or `random_bundle`'s.

    Returns:
      seconds of each stage (medians) and share of their sum; images_per_second of the three
      stages; streamed and written images_per_second: of the pipeline from prompts to arrays, and
      to files that threads write meanwhile. flops_per_image by stage; flops_per_second and
      utilisation of the diffusion; first_seconds: of the first batch, compiling included.

    Raises:
      UserError: settings out of bounds.
      measured.DoesNotFit: more memory is needed than there is.
    """
    config, pipe = model.config, Pipeline(model)
    chosen = pipe.defaults.replace(settings.sampling)
    runner = pipe.runner
    rows = runner.batch_size(settings.batch_size, settings.batch_size)
    counts, program, compile_seconds = _count(config, rows, chosen, settings.memory_limit)
    tables = None
    if pipe.names:
        made = grammar.compile_tables(model.vocabulary, pipe.names, runner.vocab_size)
        tables = runner.place(made)
    part, draw = np.arange(rows), np.random.default_rng(0)
    seeds = np.zeros(rows, np.int64)

    def batch(number: int) -> dict[str, float]:
        length = config.data.caption_length
        words = draw.integers(3, model.vocabulary.num_pieces, (rows, length)).astype(np.int32)
        times = {}
        times["encode"], states = measured.timed(lambda: runner.encode(words))
        latents = np.zeros((rows, 0), np.int32)
        if tables is not None:
            seconds, (latents, _) = measured.timed(
                lambda: runner.decode(states, part, seeds + number, part, rows, chosen, 0, tables)
            )
            times["decode"] = seconds
        times["diffusion"], _ = measured.timed(
            lambda: runner.render(states, part, latents, seeds, part, rows, chosen)
        )
        return times

    first = sum(batch(0).values())
    with measured.profiled(settings.profile):
        found = [batch(1 + number) for number in range(settings.repeats)]
    seconds = {
        name: float(np.median([times[name] for times in found]))
        for name in STAGES
        if name in found[0]
    }
    whole = sum(seconds.values())
    speed = measured.rates(seconds["diffusion"], rows, counts["diffusion"])
    streamed, written = (_stream(pipe, rows, chosen, write) for write in (False, True))
    return {
        "bench": "sample",
        "config_fingerprint": config_lib.fingerprint(config),
        "latents": list(pipe.names),
        "image_size": config.data.image_size,
        "batch_size": rows,
        "repeats": settings.repeats,
        "sampler": chosen.sampler,
        "steps": chosen.num_steps,
        "guidance_weight": chosen.guidance_weight,
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "share": {name: round(value / whole, 4) for name, value in seconds.items()},
        **speed,
        "images_per_second": round(rows / whole, 3),
        "streamed_images_per_second": round(streamed, 3),
        "written_images_per_second": round(written, 3),
        "flops_per_image": {name: round(value / rows) for name, value in counts.items()},
        "first_seconds": round(first, 3),
        "compile_seconds": compile_seconds,
        "memory": measured.memory(program),
        **measured.environment(),
    }


def _stream(pipe: Pipeline, rows: int, chosen: SampleSettings, write: bool) -> float:
    """Pictures a second of the whole pipeline, once it is warm."""
    prompts = [f"a red shape, number {number}" for number in range(rows * (1 + _STREAMED))]
    options = {"batch_size": rows, "sampler": chosen.sampler, "num_steps": chosen.num_steps}
    options["guidance_weight"] = chosen.guidance_weight
    for _ in pipe.stream(prompts[:rows], **options):
        pass
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        if write:
            with PictureFolder(Path(scratch) / "pictures", {}) as folder:
                for numbers, output in pipe.stream(prompts[rows:], **options):
                    folder.add(numbers, output)
                folder.finish()
        else:
            for _ in pipe.stream(prompts[rows:], **options):
                pass
        return rows * _STREAMED / (time.perf_counter() - start)


def _count(
    config: ConfigDict, rows: int, chosen: SampleSettings, limit: int
) -> tuple[dict[str, int], Any, float | None]:
    """Operations of a batch by stage; with a memory limit also the program of the diffusion."""
    model, data = Kaleido(KaleidoConfig.from_config(config)), config.data
    process, plan = stages.process_of(config, model.cfg.ratios), chosen.plan()
    length = data.latent_length if config.latents else 0

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    boxed = jax.eval_shape(
        model.init,
        jax.random.key(0),
        shape(1, data.caption_length),
        shape(1, length),
        tuple(shape(1, *size, dtype=jnp.float32) for size in process.shapes),
        shape(1, dtype=jnp.float32),
    )
    params = nn.meta.unbox(boxed["params"])
    captions, words = shape(rows, data.caption_length), shape(rows, length) if length else None
    ids = shape(rows, dtype=jnp.uint32)

    def encode(params: Params, captions: Any) -> Any:
        return stages.encode(model, params, captions)

    def decode(params: Params, encoded: Any, ids: Any) -> Any:
        one = np.float32(1.0)
        return stages.draw_latents(
            model, params, length, encoded, ids, ids, np.uint32(0), one, np.int32(0), one, None
        )

    def null(params: Params) -> Any:
        return stages.null_condition(model, params, data.caption_length + (length and length + 1))

    def picture(params: Params, encoded: Any, words: Any, null: Any, ids: Any) -> Any:
        return stages.render(
            model, params, process, plan, encoded, words, null, ids, ids, chosen.dials()
        )

    encoded = jax.eval_shape(encode, params, captions)
    condition = jax.eval_shape(null, params) if plan.guided else None
    counts = {"encode": flops.useful(flops.count(encode, params, captions))}
    if length:
        # What stands outside of the loop over tokens is dropped by the compiler.
        one, two = (
            flops.useful(flops.count(decode, params, encoded, ids, trips=n)) for n in (1, 2)
        )
        counts["decode"] = (two - one) * length
    given = (params, encoded, words, condition, ids)
    counts["diffusion"] = flops.useful(flops.count(picture, *given, trips=chosen.num_steps))
    if not limit:
        return counts, None, None
    program, seconds = measured.compiled(compiling.jit(picture), *given)
    measured.check_fits(program, limit)
    return counts, program, seconds
