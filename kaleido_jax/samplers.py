"""Samplers: from noise to pictures, each one function over a `denoise` closure.

`denoise(x_t, level)` gives the clean-image predictions of the whole pyramid; it knows the network,
the condition and the guidance (guidance.py), and a sampler knows none of them. All resolutions
are sampled jointly, each with the schedule of its own resolution (Sec. B.1).

A one-step sampler is linear: x_s = c_x0 * x0 + c_xt * x_t + c_noise * noise. The coefficients
depend on the levels alone, so they are computed on the host in float64 and the loop is a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kaleido_jax.errors import UserError
from kaleido_jax.schedule import Schedule
from kaleido_jax.types import Pyramid

# (x_t pyramid, integer level as a scalar array) -> unthresholded predictions of x, same shapes.
Denoise = Callable[[Pyramid, Int[Array, ""]], Pyramid]
# c_x0, c_xt, c_noise as float64 arrays shaped like the levels.
Coefficients = tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]

DYNAMIC_QUANTILE = 0.995
DYNAMIC_MAX = 100.0


def clip(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Static thresholding: clips the clean-image prediction to [-1, 1]."""
    return jnp.clip(x0, -1.0, 1.0)


def dynamic(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Dynamic thresholding (Saharia et al. 2022, Sec. 2.3) with ml-mdm's constants.

    Each picture is clipped to [-s, s] and divided by s, the 0.995 quantile of its absolute
    values, kept within [1, 100].
    """
    magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
    s = jnp.clip(jnp.quantile(magnitude, DYNAMIC_QUANTILE, axis=1), 1.0, DYNAMIC_MAX)
    s = s[:, None, None, None]
    return jnp.clip(x0, -s, s) / s


def _unbounded(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return x0


# 'none' is for data that is not a picture, such as the 2-D toy.
THRESHOLDS = {"clip": clip, "dynamic": dynamic, "none": _unbounded}


def ddpm_coefficients(
    alpha_bar_t: Float[np.ndarray, "..."], alpha_bar_s: Float[np.ndarray, "..."]
) -> Coefficients:
    """Posterior q(x_s | x_t, x0) of Ho et al. 2020 (Eq. 6, 7) for any s < t.

    Args:
      alpha_bar_t: alpha**2 at t, in (0, 1).
      alpha_bar_s: alpha**2 at s, in (alpha_bar_t, 1]; at 1 no noise is added.
    """
    kept = alpha_bar_t / alpha_bar_s
    c_x0 = np.sqrt(alpha_bar_s) * (1.0 - kept) / (1.0 - alpha_bar_t)
    c_xt = np.sqrt(kept) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)
    variance = (1.0 - kept) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)
    return c_x0, c_xt, np.sqrt(variance)


def ddim_coefficients(
    alpha_bar_t: Float[np.ndarray, "..."], alpha_bar_s: Float[np.ndarray, "..."], eta: float = 0.0
) -> Coefficients:
    """DDIM (Song et al. 2021, Eq. 12): eta 0 is deterministic, eta 1 is ancestral.

    Arguments as `ddpm_coefficients`; raises UserError unless 0 <= eta <= 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; it must be between 0 (deterministic) and 1 (ancestral)")
    c_noise = eta * ddpm_coefficients(alpha_bar_t, alpha_bar_s)[2]
    c_eps = np.sqrt(np.maximum(1.0 - alpha_bar_s - c_noise**2, 0.0))
    # eps = (x_t - alpha_t x0) / sigma_t, written out in x0 and x_t.
    c_xt = c_eps / np.sqrt(1.0 - alpha_bar_t)
    return np.sqrt(alpha_bar_s) - np.sqrt(alpha_bar_t) * c_xt, c_xt, c_noise


def step(
    x_t: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    coefficients: Sequence[Float[Array, ""]],
    noise: Float[Array, "b h w c"] | None,
) -> Float[Array, "b h w c"]:
    """One step t -> s of one resolution: c_x0 * x0 + c_xt * x_t (+ c_noise * noise)."""
    c_x0, c_xt, c_noise = coefficients
    x_s = c_x0 * x0 + c_xt * x_t
    return x_s if noise is None else x_s + c_noise * noise


def sample_noise(
    keys: Key[Array, "b"], index: int | Int[Array, ""], shapes: Sequence[tuple[int, int, int]]
) -> Pyramid:
    """Standard normal noise of one step, a function of (sample key, index, resolution) alone.

    Args:
      keys: one key per sample, from rng.per_sample(stream(seed, 'sample'), ids).
      index: 0 for the initial noise, n + 1 for the noise of step n.
      shapes: (height, width, channels) of each resolution, highest first.
    """
    keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)

    def draw(number: int, shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
        return jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
        )(keys)

    return tuple(draw(number, shape) for number, shape in enumerate(shapes))


def ddpm(
    denoise: Denoise,
    x_t: Pyramid,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
) -> Pyramid:
    """Ancestral sampling (Ho et al. 2020), the paper's sampler.

    Args:
      denoise: clean-image predictions at (x_t, level).
      x_t: noise at levels[0], highest resolution first.
      levels: static descending levels; the last, usually 0, is the one returned.
      schedules: one schedule per resolution.
      keys: one key per sample.
      threshold: name in THRESHOLDS, applied to every prediction.

    Returns:
      The pyramid at levels[-1], float32.

    Raises:
      UserError: on an unknown threshold or levels that do not descend within 1000..0.
    """
    return _scan(denoise, x_t, levels, schedules, keys, threshold, ddpm_coefficients)


def ddim(
    denoise: Denoise,
    x_t: Pyramid,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
    eta: float = 0.0,
) -> Pyramid:
    """DDIM (Song et al. 2021); arguments as `ddpm`, and static `eta` in [0, 1]."""
    return _scan(
        denoise,
        x_t,
        levels,
        schedules,
        keys,
        threshold,
        lambda alpha_bar_t, alpha_bar_s: ddim_coefficients(alpha_bar_t, alpha_bar_s, eta),
    )


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def _scan(
    denoise: Denoise,
    x_t: Pyramid,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str,
    coefficients: Callable[..., Coefficients],
) -> Pyramid:
    if threshold not in THRESHOLDS:
        raise UserError(f"unknown threshold {threshold!r}; one of {', '.join(THRESHOLDS)}")
    levels = np.asarray(levels)
    if levels.size < 2 or np.any(np.diff(levels) >= 0) or levels[0] > 1000 or levels[-1] < 0:
        raise UserError("levels must be at least two, descending, within 1000..0")
    tables = [schedule.alpha_bar_table for schedule in schedules]
    # [steps, resolutions, 3]
    table = np.stack(
        [np.stack(coefficients(t[levels[:-1]], t[levels[1:]]), -1) for t in tables], axis=1
    )
    stochastic = bool(np.any(table[..., 2] > 0))
    shapes = [x.shape[1:] for x in x_t]

    def body(x_t: Pyramid, inputs):
        level, index, c = inputs
        x0 = tuple(map(THRESHOLDS[threshold], denoise(x_t, level)))
        noise = sample_noise(keys, index + 1, shapes) if stochastic else (None,) * len(x_t)
        return tuple(map(step, x_t, x0, c, noise)), None

    inputs = (
        jnp.asarray(levels[:-1], jnp.int32),
        jnp.arange(levels.size - 1),
        jnp.asarray(table, jnp.float32),
    )
    return jax.lax.scan(body, tuple(x.astype(jnp.float32) for x in x_t), inputs)[0]
