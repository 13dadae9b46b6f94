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

from kaleido_jax import diffusion, guidance, outputs, samplers, stages
from kaleido_jax.bundle import Bundle
from kaleido_jax.data.reader import Encoder
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.adherence import Detector, Found
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.subjects import true_document
from kaleido_jax.mesh import make_mesh
from kaleido_jax.metrics import bootstrap
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.runner import DEFAULT_BATCH, Runner
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
    levels: Sequence[int] | None = None,
    wanted: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What the network says and where sampling ends, from pictures with noise of each level.

    With latents the other condition is the own caption with the z of another picture, without them
    another caption. Sampling is DDIM without guidance, with the true z.

    Args:
      model: config, parameters and vocabulary.
      data: with the model's latents.
      detectors: judge what is sampled (evaluate/adherence.py); without any nothing is sampled.
      count: pictures, at least 2; each has the noise that sampling would give it.
      seed: of the noise, the same at all levels.
      levels: of the noise, 1..1000; LEVELS by default.
      wanted: measures of the detectors that there must be.
      say: receives a line for each level.

    Returns:
      Rows {level, noise, measure, value, low, high, n}: noise is sigma / alpha of the highest
      resolution; measure is 'error, own', 'error, other', 'error, none' (mean square there, in
      model space, where pictures lie in [-1, 1]) or a name of a detector's. Level 0 are the true
      pictures.

    Raises:
      UserError: a level or count out of range, weights that do not fit the config, records that
        cannot be read, pictures that all have one condition, or no such measure.
    """
    levels = sorted(LEVELS if levels is None else levels)
    if count < 2 or not all(1 <= level <= NUM_LEVELS for level in levels):
        raise UserError(f"it needs 2 pictures or more and levels within 1..{NUM_LEVELS}")
    held = _Held(model, data, detectors, count, seed)
    found = held.judged(0, 0.0, held.batch.image)
    for name in wanted:
        if name not in {row["measure"] for row in found}:
            there = ", ".join(row["measure"] for row in found) or "none without latents"
            raise UserError(f"no measure {name!r} of this model; there are {there}")
    grid = sorted({0, *levels, *_spread(levels[-1])}, reverse=True)
    for level in levels:
        say(f"noise of level {level}")
        alpha, sigma = held.process.schedules[0].alpha_sigma(level)
        noise = float(sigma / alpha)
        errors, images = held.at(level, tuple(grid))
        for name, values in errors.items():
            found.append(_entry(level, noise, f"error, {name}", list(enumerate(values))))
        found += held.judged(level, noise, images)
    return found


def _spread(highest: int) -> list[int]:
    steps = max(2, round(STEPS * highest / NUM_LEVELS))
    return np.linspace(highest, 0, steps + 1).round().astype(int).tolist()


class _Held:
    """Held-out pictures, their conditions and the network; in batches, each one program."""

    def __init__(
        self, model: Bundle, data: Data, detectors: Sequence[Detector], count: int, seed: int
    ):
        self._config, self._detectors, self._seed = model.config, detectors, seed
        self._network = Kaleido(KaleidoConfig.from_config(model.config))
        self.process = stages.process_of(model.config, self._network.cfg.ratios)
        self._params = Runner(
            model.config, model.params, make_mesh(devices=jax.devices()[:1])
        ).params
        examples = [data.held_out(number) for number in range(count)]
        d = model.config.data
        encode = Encoder(
            model.vocabulary, model.config.latents, d.caption_length, d.latent_length, d.image_size
        )
        self.batch = encode.collate([encode(example) for example in examples])
        self._documents = [true_document(x, i) for i, x in enumerate(examples)]
        self._other = _others(self.batch, bool(model.config.latents))

    def judged(self, level: int, noise: float, images: np.ndarray | None) -> list[dict[str, Any]]:
        """A row for each measure of the detectors."""
        found: Found = {}
        for detector in self._detectors if images is not None else ():
            found |= detector.judge(images, self._documents)
        return [_entry(level, noise, name, pairs) for name, pairs in found.items()]

    def at(
        self, level: int, grid: tuple[int, ...]
    ) -> tuple[dict[str, Float[np.ndarray, " n"]], np.ndarray | None]:
        """Errors of each condition, and with detectors what DDIM makes of the noised pictures."""
        count = len(self.batch.image)
        size = min(DEFAULT_BATCH, count)
        errors: dict[str, list[np.ndarray]] = {name: [] for name in CONDITIONS}
        images = []
        for start in range(0, count, size):
            # The last batch is filled up, so that all of them are one program.
            numbers = np.minimum(np.arange(start, start + size), count - 1)
            kept = min(size, count - start)
            x_t, clean, conditions = _noised(
                self._network,
                self._params,
                self.process,
                jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers], self.batch),
                jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers], self._other),
                self._config.data.pixel_centre,
                self._config.data.pixel_scale,
                np.full(size, self._seed, np.uint32),
                numbers.astype(np.uint32),
                np.int32(level),
            )
            for name, condition in zip(CONDITIONS, conditions, strict=True):
                wrong = _errors(
                    self._network, self._params, self.process, x_t, clean, level, condition
                )
                errors[name].append(np.asarray(wrong)[:kept])
            if self._detectors:
                painted = _paint(
                    self._network,
                    self._params,
                    self.process,
                    x_t,
                    conditions[0],
                    grid,
                    np.int32(grid.index(level)),
                )
                images.append(np.asarray(painted)[:kept])
        d = self._config.data
        return (
            {name: np.concatenate(parts) for name, parts in errors.items()},
            outputs.to_uint8(np.concatenate(images), d.pixel_centre, d.pixel_scale)
            if images
            else None,
        )


def _others(batch: Batch, latents: bool) -> Batch:
    """The batch with z, or without latents captions, of the next pictures that have others."""
    tokens = batch.latent_tokens if latents else batch.caption_tokens
    count = len(tokens)
    chosen = []
    for i in range(count):
        after = (np.arange(1, count) + i) % count
        differ = after[(tokens[after] != tokens[i]).any(1)]
        if not len(differ):
            raise UserError(f"these {count} pictures all have one condition; take more (--samples)")
        chosen.append(int(differ[0]))
    return batch.replace(**{"latent_tokens" if latents else "caption_tokens": tokens[chosen]})


@functools.partial(jax.jit, static_argnums=(0, 2))
def _noised(
    network: Kaleido,
    params: Params,
    process: stages.Process,
    batch: Batch,
    other: Batch,
    centre: float,
    scale: float,
    seeds: Int[Array, "b"],
    indices: Int[Array, "b"],
    level: Int[Array, ""],
) -> tuple[Pyramid, Pyramid, tuple[Any, ...]]:
    """x_t, the clean pictures, and the three conditions as the denoiser reads them."""
    image = diffusion.normalize(batch.image, centre, scale)
    clean = diffusion.pyramid(image, network.cfg.ratios)
    keys = stages.sample_keys(seeds, "sample", indices)
    noises = samplers.sample_noise(keys, 0, process.shapes)
    x_t = tuple(
        diffusion.q_sample(x, eps, *schedule.alpha_sigma(level))
        for x, eps, schedule in zip(clean, noises, process.schedules, strict=True)
    )

    def apply(*args: Any, method: str) -> Any:
        return network.apply({"params": params}, *args, method=method)

    def read(rows: Batch) -> Any:
        z = rows.latent_tokens if network.cfg.latent_decoder is not None else None
        return apply(rows.caption_tokens, z, method="condition")

    own = read(batch)
    null = apply(*own.mask.shape, method="null_condition")
    conditions = (own, read(other), null)
    return x_t, clean, tuple(apply(each, method="encode_condition") for each in conditions)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _errors(
    network: Kaleido,
    params: Params,
    process: stages.Process,
    x_t: Pyramid,
    clean: Pyramid,
    level: Int[Array, ""],
    condition: Any,
) -> Float[Array, "b"]:
    said = stages.denoise(network, params, process, x_t, level, condition)
    return jnp.mean(jnp.square(said[0] - clean[0]), axis=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def _paint(
    network: Kaleido,
    params: Params,
    process: stages.Process,
    x_t: Pyramid,
    condition: Any,
    levels: tuple[int, ...],
    first: Int[Array, ""],
) -> Float[Array, "b h w c"]:
    denoise = guidance.with_condition(
        functools.partial(stages.denoise, network, params, process), condition
    )
    keys = jax.random.split(jax.random.key(0), x_t[0].shape[0])  # DDIM of eta 0 draws nothing
    steps = first, len(levels) - 1
    done = samplers.ddim(
        denoise, samplers.begin(x_t), np.array(levels), process.schedules, keys, steps=steps
    )
    return done.x_t[0]


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
