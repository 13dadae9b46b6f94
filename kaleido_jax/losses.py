"""L = L_DM + eta L_AR (Sec. 3.3): the joint loss, pure in (parameters, batch, seed, step)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from kaleido_jax import diffusion, rng, schedule, tokens
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, drop_condition, join
from kaleido_jax.types import Batch, Conditioning, Params, Pyramid


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
    """

    schedules: tuple[schedule.Schedule, ...]
    ratios: tuple[int, ...]
    prediction: str
    loss_target: str
    latent_weight: float
    cond_drop_rate: float
    pixel_centre: float
    pixel_scale: float

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
        return cls(
            schedules=schedule.shifted_schedules(d.schedule, ratios, d.shift_power, d.shifted),
            ratios=ratios,
            prediction=d.prediction,
            loss_target=d.loss_target,
            latent_weight=config.train.latent_weight,
            cond_drop_rate=config.train.cond_drop_rate,
            pixel_centre=config.data.pixel_centre,
            pixel_scale=config.data.pixel_scale,
        )


def diffusion_loss(
    predict: Any,
    images: Pyramid,
    noises: Pyramid,
    time_index: Int[Array, "b"],
    cfg: LossConfig,
) -> tuple[Float[Array, "r b"], Pyramid]:
    """Squared error of every resolution and example, mean over pixels and channels (Eq. 3).

    Args:
      predict: (x_t pyramid, time_index) -> predictions pyramid.
      images: clean images, highest resolution first.
      noises: standard normal noise of the same shapes.
      time_index: 0..999, fed to the network; the noise level is time_index + 1.

    Returns:
      (errors [resolutions, batch] in the space of `cfg.loss_target`, the x_t that were fed).
    """
    coefficients = [s.alpha_sigma(time_index + 1) for s in cfg.schedules]
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
    return jnp.stack(errors), x_t


def latent_loss(
    logits: Float[Array, "b lz1 v"], latent_tokens: Int[Array, "b lz"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy over the z tokens of the batch, EOS included (Eq. 1), in nats.

    The decoder's last position, which has read all of z, predicts nothing.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    weights = (latent_tokens != tokens.PAD).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, latent_tokens[..., None], axis=-1)[..., 0]
    count = jnp.maximum(weights.sum(), 1.0)
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

    All draws are made on global arrays from (seed, stream, step), so neither the mesh nor a
    restart changes them. With eta = 0 the decoder still learns from L_DM through its states.

    Returns:
      (loss, metrics): 'loss', 'loss_dm', 'loss_dm_<side>' per resolution and, with latents,
      'loss_ar' (nats per token) and 'ar_accuracy'.
    """
    image = diffusion.normalize(batch.image, cfg.pixel_centre, cfg.pixel_scale)
    images = diffusion.pyramid(image, cfg.ratios)
    size = image.shape[0]
    time_index = jax.random.randint(rng.stream(seed, "time", step), (size,), 0, schedule.NUM_LEVELS)
    noise_key = rng.stream(seed, "noise", step)
    noises = tuple(
        jax.random.normal(jax.random.fold_in(noise_key, i), x.shape) for i, x in enumerate(images)
    )
    drop = jax.random.uniform(rng.stream(seed, "cond_drop", step), (size,)) < cfg.cond_drop_rate
    dropout = rng.stream(seed, "dropout", step)
    condition, logits = train_condition(model, params, batch, drop, dropout)
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

    errors, _ = diffusion_loss(predict, images, noises, time_index, cfg)
    per_resolution = errors.mean(axis=1)
    loss = loss_dm = per_resolution.sum()
    metrics = {"loss_dm": loss_dm}
    for x, error in zip(images, per_resolution, strict=True):
        metrics[f"loss_dm_{x.shape[1]}"] = error
    if logits is not None:
        loss_ar, ar_metrics = latent_loss(logits, batch.latent_tokens)
        metrics |= ar_metrics
        loss = loss + cfg.latent_weight * loss_ar
    return loss, metrics | {"loss": loss}
