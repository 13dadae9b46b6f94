"""At which noise a model reads its condition, and at which it loses what it was shown.

Held-out pictures are noised to a level. Either the network says at once what the clean picture is,
with the picture's own condition, with another's, and without: where the three are alike, nothing is
read. Or the sampler goes on from there to the end: what a detector then misses was lost at this
level or below, since above it the picture itself was given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kaleido_jax import diffusion, guidance, losses, outputs, samplers, stages
from kaleido_jax.bundle import Bundle
from kaleido_jax.data.reader import Encoder
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.adherence import Detector, Found
from kaleido_jax.evaluate.data import Data
from kaleido_jax.latents import LatentDocument
from kaleido_jax.metrics import bootstrap
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.rng import stream
from kaleido_jax.schedule import NUM_LEVELS
from kaleido_jax.types import Batch, Params, Pyramid

LEVELS = (50, 100, 200, 300, 400, 500, 600, 800, 1000)
CONDITIONS = ("own", "other", "none")
STEPS = 50  # of DDIM from the highest level to the lowest; fewer from lower ones
_DRAWS = 1000


def rows(
    model: Bundle,
    data: Data,
    detectors: Sequence[Detector],
    count: int = 128,
    seed: int = 0,
    levels: Sequence[int] = LEVELS,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What the network says and where sampling ends, from pictures with noise of each level.

    With latents the other condition is the own caption with the z of the next picture, without them
    the next picture's caption. Sampling is DDIM without guidance, with the true z.

    Args:
      model: config, parameters and vocabulary.
      data: with the model's latents.
      detectors: judge what is sampled (evaluate/adherence.py).
      count: pictures, at least 2.
      seed: of the noise; all levels have the same.
      levels: of the noise, 1..1000.

    Returns:
      Rows {level, noise, measure, value, low, high, n}: noise is sigma / alpha; measure is
      'error, own', 'error, other', 'error, none' (mean square in model space, where pictures lie in
      [-1, 1]) or a name of the detector's. Level 0 are the true pictures.

    Raises:
      UserError: a level or count out of range.
    """
    if count < 2 or not all(1 <= level <= NUM_LEVELS for level in levels):
        raise UserError(f"it needs 2 pictures or more and levels within 1..{NUM_LEVELS}")
    config = model.config
    network = Kaleido(KaleidoConfig.from_config(config))
    process = stages.process_of(config, network.cfg.ratios)
    params = jax.device_put(model.params)
    examples = [data.held_out(number) for number in range(count)]
    d = config.data
    encode = Encoder(
        model.vocabulary, config.latents, d.caption_length, d.latent_length, d.image_size
    )
    batch = encode.collate([encode(example) for example in examples])
    documents = [
        LatentDocument(x["caption"], dict(x["latents"]), sample_index=i)
        for i, x in enumerate(examples)
    ]
    clean = diffusion.pyramid(
        diffusion.normalize(batch.image, d.pixel_centre, d.pixel_scale), network.cfg.ratios
    )
    key = stream(seed, "noise")
    noises = tuple(
        jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(clean)
    )
    conditions = _conditions(network, params, batch)

    def judge(images: Any) -> Found:
        return {k: v for each in detectors for k, v in each.judge(images, documents).items()}

    found = [_entry(0, 0.0, name, pairs) for name, pairs in judge(batch.image).items()]
    for level in sorted(levels):
        say(f"noise of level {level}")
        tables = [schedule.alpha_sigma(level) for schedule in process.schedules]
        noise = float(tables[0][1] / tables[0][0])
        x_t = tuple(
            diffusion.q_sample(x, eps, *table)
            for x, eps, table in zip(clean, noises, tables, strict=True)
        )
        for name in CONDITIONS:
            said = _predict(network, params, process, x_t, level, conditions[name])
            errors = np.asarray(jnp.mean(jnp.square(said[0] - clean[0]), axis=(1, 2, 3)))
            found.append(_entry(level, noise, f"error, {name}", list(enumerate(errors))))
        painted = _paint(network, params, process, x_t, conditions["own"], _grid(level))
        images = outputs.to_uint8(np.asarray(painted[0]), d.pixel_centre, d.pixel_scale)
        found += [_entry(level, noise, name, pairs) for name, pairs in judge(images).items()]
    return found


def _grid(level: int) -> tuple[int, ...]:
    steps = max(2, round(STEPS * level / NUM_LEVELS))
    return tuple(dict.fromkeys(np.linspace(level, 0, steps + 1).round().astype(int).tolist()))


def _conditions(network: Kaleido, params: Params, batch: Batch) -> dict[str, Any]:
    """As the denoiser reads them: those of the pictures, those of others, none."""
    roll = functools.partial(np.roll, shift=-1, axis=0)
    if network.cfg.latent_decoder is None:
        other = batch.replace(caption_tokens=roll(batch.caption_tokens))
    else:
        other = batch.replace(latent_tokens=roll(batch.latent_tokens))
    size = len(batch.image)
    dropout = jax.random.key(0)

    @jax.jit
    def read(batch: Batch, drop: Any) -> Any:
        condition, _ = losses.train_condition(network, params, batch, drop, dropout)
        return network.apply({"params": params}, condition, method="encode_condition")

    kept, dropped = np.zeros(size, bool), np.ones(size, bool)
    return dict(
        zip(CONDITIONS, (read(batch, kept), read(other, kept), read(batch, dropped)), strict=True)
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _predict(
    network: Kaleido,
    params: Params,
    process: stages.Process,
    x_t: Pyramid,
    level: Int[Array, ""],
    condition: Any,
) -> Pyramid:
    return stages.denoise(network, params, process, x_t, level, condition)


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def _paint(
    network: Kaleido,
    params: Params,
    process: stages.Process,
    x_t: Pyramid,
    condition: Any,
    levels: tuple[int, ...],
) -> Pyramid:
    denoise = guidance.with_condition(
        functools.partial(stages.denoise, network, params, process), condition
    )
    keys = jax.random.split(jax.random.key(0), x_t[0].shape[0])  # DDIM of eta 0 draws nothing
    state = samplers.begin(x_t)
    return samplers.ddim(denoise, state, np.array(levels), process.schedules, keys).x_t


def _entry(
    level: int, noise: float, measure: str, pairs: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    groups = np.array([row for row, _ in pairs])
    values: Float[np.ndarray, " n"] = np.array([value for _, value in pairs], np.float64)
    mean, (low, high) = bootstrap.of_mean(values, _DRAWS, 0, groups)
    return {
        "level": level,
        "noise": noise,
        "measure": measure,
        "value": mean,
        "low": low,
        "high": high,
        "n": len(values),
    }
