"""Guidance: functions that make one `denoise` out of a conditional and an unconditional one.

With latents the condition is (c, z) and the unconditional branch drops both (Eq. 8), so one
formula (Eq. 4) serves Kaleido and its baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kaleido_jax.errors import UserError
from kaleido_jax.samplers import Denoise
from kaleido_jax.schedule import NUM_LEVELS
from kaleido_jax.types import Pyramid

# What the denoiser reads besides x_t: any tree of arrays with a leading batch axis.
Condition = Any
# (x_t pyramid, level, condition) -> predictions of x.
ConditionalDenoise = Callable[[Pyramid, Int[Array, ""], Condition], Pyramid]
# (x_t pyramid, level) -> conditional and unconditional predictions.
DenoisePair = Callable[[Pyramid, Int[Array, ""]], tuple[Pyramid, Pyramid]]


def with_condition(denoise: ConditionalDenoise, condition: Condition) -> Denoise:
    """Fixes the condition: the plain conditional model, guidance weight 1."""
    return lambda x_t, level: denoise(x_t, level, condition)


def doubled(denoise: ConditionalDenoise, condition: Condition, null: Condition) -> DenoisePair:
    """Evaluates the conditional and the unconditional branch as one batch of twice the size.

    Args:
      denoise: the conditional denoiser.
      condition: condition of the batch.
      null: null condition with the same shapes.
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def pair(x_t: Pyramid, level: Int[Array, ""]) -> tuple[Pyramid, Pyramid]:
        x0 = denoise(tuple(jnp.concatenate([x, x]) for x in x_t), level, both)
        halves = [jnp.split(x, 2) for x in x0]
        return tuple(half[0] for half in halves), tuple(half[1] for half in halves)

    return pair


def combine(cond: Pyramid, uncond: Pyramid, guidance_weight: float | Float[Array, ""]) -> Pyramid:
    """Eq. 4: x0 = w * (cond - uncond) + uncond, at every resolution."""
    return tuple(guidance_weight * (c - u) + u for c, u in zip(cond, uncond, strict=True))


def classifier_free(pair: DenoisePair, guidance_weight: float | Float[Array, ""]) -> Denoise:
    """Classifier-free guidance (Eq. 4; Eq. 8 with latents).

    Args:
      pair: conditional and unconditional predictions, see `doubled`.
      guidance_weight: may be traced. At exactly 1 the result is the conditional model and the
        caller saves half the work by `with_condition` instead.
    """
    return lambda x_t, level: combine(*pair(x_t, level), guidance_weight)


def within_interval(
    guided: Denoise, plain: Denoise, interval: tuple[float, float] | Float[Array, "2"]
) -> Denoise:
    """Guides only for t = level / 1000 in [low, high] (Kynkäänniemi et al. 2024).

    Outside the interval only `plain` runs: the branch is chosen by a scalar condition, so the
    unconditional pass is skipped and not masked.

    Args:
      guided: denoiser inside the interval.
      plain: denoiser outside of it.
      interval: low and high in [0, 1]; may be traced.
    """
    low, high = interval[0], interval[1]

    def denoise(x_t: Pyramid, level: Int[Array, ""]) -> Pyramid:
        # Half a level of slack: 0.3 and 300 / 1000 differ in float32.
        inside = (level >= low * NUM_LEVELS - 0.5) & (level <= high * NUM_LEVELS + 0.5)
        return jax.lax.cond(inside, guided, plain, x_t, level)

    return denoise


def check_guidance(guidance_weight: float, interval: tuple[float, float] | None) -> None:
    """Raises UserError unless the weight is finite in 0..100 and 0 <= low < high <= 1."""
    if not (math.isfinite(guidance_weight) and 0.0 <= guidance_weight <= 100.0):
        raise UserError(f"guidance weight is {guidance_weight}; it must be between 0 and 100")
    if interval is None:
        return
    if len(interval) != 2 or not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise UserError(
            f"guidance interval is {tuple(interval)}; it must be (low, high) with"
            " 0 <= low < high <= 1"
        )


def guide(
    denoise: ConditionalDenoise,
    condition: Condition,
    null: Condition | None,
    guidance_weight: float | Float[Array, ""] = 1.0,
    interval: tuple[float, float] | Float[Array, "2"] | None = None,
) -> Denoise:
    """Builds the guided denoiser that a sampler runs.

    Args:
      denoise: the conditional denoiser.
      condition: condition of the batch.
      null: null condition with the same shapes; None (decided at trace time) means guidance
        weight 1, and the unconditional branch is never computed.
      guidance_weight: the paper's gamma; may be traced.
      interval: t at which to guide, everywhere by default.
    """
    plain = with_condition(denoise, condition)
    if null is None:
        return plain
    guided = classifier_free(doubled(denoise, condition, null), guidance_weight)
    return guided if interval is None else within_interval(guided, plain, interval)
