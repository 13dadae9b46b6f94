"""L = L_DM + eta L_AR (Sec. 3.3): the joint loss, pure in (parameters, batch, seed, step)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from kaleido_jax import diffusion, rng, schedule, tokens
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, drop_condition, join
from kaleido_jax.types import Batch, Conditioning, Params, Pyramid

GOLDEN = 0.6180339887498949


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What shapes the loss.

    Attributes:
      schedules: one per resolution, highest first.
      ratios: side of each image over the innermost side.
      prediction: what the network predicts: 'v', 'eps' or 'x0'.
      loss_target: in which space the squared error is taken.
      latent_weight: eta.
      cond_drop_rate: share of examples whose condition is dropped (p_uncond).
      pixel_centre, pixel_scale: image = (uint8 - centre) / scale.
      mixed_ratio: parts of the batch by the highest resolution that they train, highest first;
        () trains all of them on every row.
      noisy_steps: the first third of so many steps draws only the noisiest tenth of the times, the
        rest widens evenly to all of them. There the condition alone decides the picture.
      noisy_share: of the batch that does so; the others draw from all times throughout, so that a
        denoiser that begins at nothing does not forget how to pass noise on.
      time_logit: (mean, deviation) of the logit of time / 1000 for the rows outside of noisy_share:
        more of some times than of others (Esser et al. 2024, Eq. 19); () is uniform. The rows of
        noisy_share are not concerned, also after noisy_steps or without.
    """

    schedules: tuple[schedule.Schedule, ...]
    ratios: tuple[int, ...]
    prediction: str
    loss_target: str
    latent_weight: float
    cond_drop_rate: float
    pixel_centre: float
    pixel_scale: float
    mixed_ratio: tuple[int, ...] = ()
    noisy_steps: int = 0
    noisy_share: float = 1.0
    time_logit: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: ConfigDict, ratios: tuple[int, ...]) -> LossConfig:
        """Reads `config.diffusion`, `config.train` and `config.data`; raises UserError."""
        d = config.diffusion
        for key, kind in (("prediction", d.prediction), ("loss_target", d.loss_target)):
            if kind not in diffusion.PREDICTIONS:
                raise UserError(
                    f"config key 'diffusion.{key}' is {kind!r}; "
                    f"one of {', '.join(diffusion.PREDICTIONS)}"
                )
        mixed = tuple(config.train.get("mixed_ratio", ()))
        whole = all(isinstance(part, int) and part >= 0 for part in mixed)
        if mixed and (len(mixed) != len(ratios) or not whole or mixed[0] < 1):
            raise UserError(
                f"config key 'train.mixed_ratio' is {mixed}; it must have a whole number for each "
                f"of the {len(ratios)} resolutions, highest first and that one at least 1, or be ()"
            )
        return cls(
            schedules=schedule.shifted_schedules(d.schedule, ratios, d.shift_power, d.shifted),
            ratios=ratios,
            prediction=d.prediction,
            loss_target=d.loss_target,
            latent_weight=config.train.latent_weight,
            cond_drop_rate=config.train.cond_drop_rate,
            pixel_centre=config.data.pixel_centre,
            pixel_scale=config.data.pixel_scale,
            mixed_ratio=mixed,
            noisy_steps=config.train.get("noisy_steps", 0),
            noisy_share=config.train.get("noisy_share", 1.0),
            time_logit=_time_logit(config.train),
        )

    def least_time(self, step: Int[Array, ""], size: int) -> Int[Array, "..."] | int:
        """The least time index that `step` may draw, for each row of a batch or for all."""
        if not self.noisy_steps:
            return 0
        noisiest = schedule.NUM_LEVELS * 9 // 10
        left = jnp.maximum(self.noisy_steps - step, 0)
        least = jnp.minimum(3 * noisiest * left // (2 * self.noisy_steps), noisiest)
        return least if self.noisy_share == 1 else jnp.where(self.noisy_rows(size), least, 0)

    def noisy_rows(self, size: int) -> Bool[np.ndarray, " size"]:
        """The rows of noisy_share, spread over the batch."""
        if self.mixed_ratio:
            # Resolutions have rows at even distances too; the golden ratio keeps step with none.
            return np.arange(1, size + 1) * GOLDEN % 1 < self.noisy_share
        return np.diff(np.floor(np.arange(size + 1) * self.noisy_share)) > 0

    def mix(self, images: Pyramid) -> Pyramid:
        """The rows of each resolution that train it."""
        mixed = list(images)
        if self.mixed_ratio:
            part = images[0].shape[0] // sum(self.mixed_ratio)
            rows = [part * total for total in itertools.accumulate(self.mixed_ratio)]
            for i, image in enumerate(images):
                for count in reversed(rows[i:]):
                    image = diffusion.first_rows(image, count)
                mixed[i] = image
        return tuple(mixed)


def _time_logit(training: ConfigDict) -> tuple[float, ...]:
    found = tuple(training.get("time_logit", ()))
    numbers = all(isinstance(n, int | float) and math.isfinite(n) for n in found)
    if found and not (len(found) == 2 and numbers and found[1] > 0):
        raise UserError(
            f"config key 'train.time_logit' is {found}; it must be (mean, deviation), the latter "
            "above 0, or ()"
        )
    if found and training.get("noisy_share", 1.0) == 1:
        raise UserError(
            "config key 'train.time_logit' is for the rows outside of train.noisy_share, which is "
            "1.0: all of them; make that smaller"
        )
    return found


@flax.struct.dataclass
class Draws:
    """The random numbers of one step for a whole batch, made on global arrays.

    Neither the mesh nor a restart changes them, nor do parts of the batch that are computed one
    after the other.

    Attributes:
      time_index: 0..999. drop: whether the condition is dropped.
      noises: standard normal, one array per resolution, highest first.
    """

    time_index: Int[Array, "b"]
    drop: Bool[Array, "b"]
    noises: Pyramid


def draw(batch: Batch, seed: int, step: Int[Array, ""], cfg: LossConfig) -> Draws:
    """The random numbers of `step`, from the streams of `seed`."""
    size, side, _, channels = batch.image.shape
    least = cfg.least_time(step, size)
    times = rng.stream(seed, "time", step)
    time_index = jax.random.randint(times, (size,), least, schedule.NUM_LEVELS)
    if cfg.time_logit:
        mean, deviation = cfg.time_logit
        normal = jax.random.normal(rng.stream(seed, "time_logit", step), (size,))
        share = jax.nn.sigmoid(mean + deviation * normal)
        chosen = jnp.minimum((share * schedule.NUM_LEVELS).astype(int), schedule.NUM_LEVELS - 1)
        time_index = jnp.where(cfg.noisy_rows(size), time_index, chosen)
    key = rng.stream(seed, "noise", step)
    sides = [side * ratio // cfg.ratios[0] for ratio in cfg.ratios]
    noises = tuple(
        jax.random.normal(jax.random.fold_in(key, i), (size, s, s, channels))
        for i, s in enumerate(sides)
    )
    drop = jax.random.uniform(rng.stream(seed, "cond_drop", step), (size,)) < cfg.cond_drop_rate
    return Draws(time_index, drop, noises)


def diffusion_loss(
    predict: Any,
    images: Pyramid,
    noises: Pyramid,
    time_index: Int[Array, "b"],
    cfg: LossConfig,
) -> tuple[tuple[Float[Array, "n"], ...], Pyramid]:
    """Squared error of every resolution and example, mean over pixels and channels (Eq. 3).

    Higher resolutions may have fewer rows, as `diffusion.first_rows` takes them.

    Args:
      predict: (x_t pyramid, time_index) -> predictions pyramid.
      images: clean images, highest resolution first.
      noises: standard normal noise of the same shapes.
      time_index: 0..999, fed to the network; the noise level is time_index + 1.

    Returns:
      (errors of each resolution in the space of `cfg.loss_target`, the x_t that were fed).
    """
    coefficients = [
        s.alpha_sigma(diffusion.rows_of_highest(time_index, images[i:]) + 1)
        for i, s in enumerate(cfg.schedules)
    ]
    coefficients = [(diffusion.expand(a), diffusion.expand(s)) for a, s in coefficients]
    x_t = tuple(
        diffusion.q_sample(x, eps, *c)
        for x, eps, c in zip(images, noises, coefficients, strict=True)
    )
    predictions = predict(x_t, time_index.astype(jnp.float32))
    convert = diffusion.CONVERSIONS[cfg.loss_target]
    errors = []
    for x, eps, noisy, pred, c in zip(images, noises, x_t, predictions, coefficients, strict=True):
        # v = alpha eps - sigma x is written out: from x_t alone it would divide by a small sigma.
        target = {"x0": x, "eps": eps, "v": c[0] * eps - c[1] * x}[cfg.loss_target]
        got = convert(cfg.prediction, pred.astype(jnp.float32), noisy, *c)
        errors.append(jnp.mean(jnp.square(got - target), axis=(1, 2, 3)))
    return tuple(errors), x_t


def count_tokens(latent_tokens: Int[Array, "b lz"]) -> Float[Array, ""]:
    """Number of z tokens, EOS included, at least 1."""
    return jnp.maximum((latent_tokens != tokens.PAD).sum().astype(jnp.float32), 1.0)


def latent_loss(
    logits: Float[Array, "b lz1 v"],
    latent_tokens: Int[Array, "b lz"],
    count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy over the z tokens of the batch, EOS included (Eq. 1), in nats.

    The decoder's last position, which has read all of z, predicts nothing. For a part of a batch
    `count` is the number of tokens of all of it.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    weights = (latent_tokens != tokens.PAD).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, latent_tokens[..., None], axis=-1)[..., 0]
    count = count_tokens(latent_tokens) if count is None else count
    correct = (logits.argmax(-1) == latent_tokens) * weights
    loss = -(picked * weights).sum() / count
    return loss, {"loss_ar": loss, "ar_accuracy": correct.sum() / count}


def train_condition(
    model: Kaleido, params: Params, batch: Batch, drop: Bool[Array, "b"], dropout: Any
) -> tuple[Conditioning, Float[Array, "b lz1 v"] | None]:
    """The condition with dropped rows, and the logits of z, which always see the true c and z."""
    variables = {"params": params}
    rngs = {"dropout": dropout}

    def apply(*args, method, **kwargs):
        return model.apply(variables, *args, method=method, rngs=rngs, **kwargs)

    condition = apply(batch.caption_tokens, method="encode", train=True)
    logits = None
    if model.cfg.latent_decoder is not None:
        hidden, logits, mask = apply(
            batch.latent_tokens, condition, method="latent_states", train=True
        )
        condition = join(condition, Conditioning(states=hidden, mask=mask))
    null = apply(*condition.mask.shape, method="null_condition")
    return drop_condition(condition, null, drop), logits


def joint_loss(
    model: Kaleido,
    params: Params,
    batch: Batch,
    seed: int,
    step: Int[Array, ""],
    cfg: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L = L_DM + eta L_AR over one global batch.

    All draws are made from (seed, stream, step). With eta = 0 the decoder still learns from L_DM
    through its states.

    Returns:
      (loss, metrics): 'loss', 'loss_dm', 'loss_dm_<side>' per resolution and, with latents,
      'loss_ar' (nats per token) and 'ar_accuracy'.
    """
    draws = draw(batch, seed, step, cfg)
    return drawn_loss(model, params, batch, draws, rng.stream(seed, "dropout", step), cfg)


def drawn_loss(
    model: Kaleido,
    params: Params,
    batch: Batch,
    draws: Draws,
    dropout: Key[Array, ""],
    cfg: LossConfig,
    share: float = 1.0,
    num_tokens: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What a part of a batch adds to `joint_loss` and its metrics.

    Args:
      draws: those of the part's rows. dropout: key of what the networks drop.
      share: of the whole batch's rows; 1 is all of it.
      num_tokens: z tokens of the whole batch; the part's own by default.
    """
    image = diffusion.normalize(batch.image, cfg.pixel_centre, cfg.pixel_scale)
    images = cfg.mix(diffusion.pyramid(image, cfg.ratios))
    noises = cfg.mix(draws.noises)
    condition, logits = train_condition(model, params, batch, draws.drop, dropout)
    encoded = model.apply({"params": params}, condition, method="encode_condition")

    def predict(x_t: Pyramid, index: Float[Array, "b"]) -> Pyramid:
        return model.apply(
            {"params": params},
            x_t,
            index,
            encoded,
            method="denoise",
            train=True,
            rngs={"dropout": jax.random.fold_in(dropout, 1)},
        )

    errors, _ = diffusion_loss(predict, images, noises, draws.time_index, cfg)
    per_resolution = [share * error.mean() for error in errors]
    loss = loss_dm = jnp.stack(per_resolution).sum()
    metrics = {"loss_dm": loss_dm}
    for x, error in zip(images, per_resolution, strict=True):
        metrics[f"loss_dm_{x.shape[1]}"] = error
    if logits is not None:
        loss_ar, ar_metrics = latent_loss(logits, batch.latent_tokens, num_tokens)
        metrics |= ar_metrics
        loss = loss + cfg.latent_weight * loss_ar
    return loss, metrics | {"loss": loss}
