"""Guidance: functions that make one `denoise` out of several branches of the network.

With latents the condition is (c, z) and the unconditional branch drops both (Eq. 8), so one
formula (Eq. 4) serves Kaleido and its baseline.

Three kinds of functions compose, innermost first: one that changes the condition (`cads`), one
that evaluates branches (`branches`), and a rule that makes one prediction of them
(`classifier_free`, `projected`, `separate`, each of them `rescaled` if wished). `within_interval`
wraps the whole. `guide` puts them together from settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kaleido_jax.errors import UserError
from kaleido_jax.samplers import Denoise, Memory
from kaleido_jax.schedule import NUM_LEVELS
from kaleido_jax.types import Pyramid

# What the denoiser reads besides x_t: any tree of arrays with a leading batch axis.
Condition = Any
Weight = float | Float[Array, ""]
# (x_t pyramid, level, condition) -> predictions of x.
ConditionalDenoise = Callable[[Pyramid, Int[Array, ""], Condition], Pyramid]
# (x_t pyramid, level) -> predictions of every branch.
Branches = Callable[[Pyramid, Int[Array, ""]], list[Pyramid]]
# (predictions: conditional, unconditional, .., memory) -> (guided prediction, memory).
Rule = Callable[[Sequence[Pyramid], Memory], tuple[Pyramid, Memory]]


class Projection(NamedTuple):
    """Adaptive projected guidance (Sadat et al. 2024); fields may be traced.

    Attributes:
      eta: how much of the part parallel to the conditional prediction is kept; 1 keeps all.
      norm: longest update per picture and resolution; 0 sets no limit.
      momentum: of the updates over the steps; negative pushes away from the steps before.
    """

    eta: Weight
    norm: Weight
    momentum: Weight


class Annealing(NamedTuple):
    """CADS (Sadat et al. 2023): noise on the condition that fades out; fields may be traced.

    Attributes:
      scale: of the noise, in deviations of the condition.
      low, high: t at and below which there is no noise, at and above which it is all noise.
      mixing: 1 restores mean and deviation of the condition, 0 leaves them as they come.
    """

    scale: Weight
    low: Weight
    high: Weight
    mixing: Weight


def with_condition(denoise: ConditionalDenoise, condition: Condition) -> Denoise:
    """Fixes the condition: the plain conditional model, guidance weight 1."""
    return lambda x_t, level, memory: (denoise(x_t, level, condition), memory)


def branches(denoise: ConditionalDenoise, conditions: Sequence[Condition]) -> Branches:
    """Evaluates the same x_t under several conditions of equal shapes, as one batch."""
    count = len(conditions)
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions)

    def evaluate(x_t: Pyramid, level: Int[Array, ""]) -> list[Pyramid]:
        x0 = denoise(tuple(jnp.concatenate([x] * count) for x in x_t), level, together)
        return list(zip(*(jnp.split(x, count) for x in x0), strict=True))

    return evaluate


def apply_rule(evaluate: Branches, rule: Rule) -> Denoise:
    """The denoiser that combines its branches by a rule."""
    return lambda x_t, level, memory: rule(evaluate(x_t, level), memory)


def combine(cond: Pyramid, uncond: Pyramid, guidance_weight: Weight) -> Pyramid:
    """Eq. 4: x0 = w * (cond - uncond) + uncond, at every resolution."""
    return tuple(guidance_weight * (c - u) + u for c, u in zip(cond, uncond, strict=True))


def classifier_free(guidance_weight: Weight) -> Rule:
    """Classifier-free guidance (Eq. 4; Eq. 8 with latents); the weight may be traced."""
    return lambda found, memory: (combine(found[0], found[1], guidance_weight), memory)


def separate(caption_weight: Weight, latent_weight: Weight) -> Rule:
    """One weight for c and one for z: u + w_c (x(c) - u) + w_z (x(c, z) - x(c)).

    Reads the branches (c, z), none, and c alone. Equal weights give Eq. 8. The network has seen
    c without z in training only as an empty z is seen, so x(c) is an extrapolation.
    """

    def rule(found: Sequence[Pyramid], memory: Memory) -> tuple[Pyramid, Memory]:
        both, none, caption = found
        x0 = tuple(
            u + caption_weight * (c - u) + latent_weight * (b - c)
            for b, u, c in zip(both, none, caption, strict=True)
        )
        return x0, memory

    return rule


def projected(guidance_weight: Weight, settings: Projection) -> Rule:
    """Adaptive projected guidance (Sadat et al. 2024, Alg. 1), per picture and resolution.

    x0 = cond + (w - 1) * update, the update being the difference of the branches averaged over
    the steps, shortened to `norm`, with its part parallel to cond scaled by eta. The memory is
    the average, a pyramid that begins with zeros.
    """

    def one(
        cond: Float[Array, "b h w c"],
        uncond: Float[Array, "b h w c"],
        average: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        average = cond - uncond + settings.momentum * average
        length = _norm(average)
        limit = jnp.where(jnp.asarray(settings.norm) > 0, settings.norm, jnp.inf)
        # The small numbers keep a picture without any difference from dividing by zero.
        update = average * jnp.minimum(1.0, limit / jnp.maximum(length, 1e-12))
        direction = cond / jnp.maximum(_norm(cond), 1e-12)
        parallel = jnp.sum(update * direction, axis=(1, 2, 3), keepdims=True) * direction
        update = update - parallel + settings.eta * parallel
        return cond + (guidance_weight - 1.0) * update, average

    def rule(found: Sequence[Pyramid], memory: Memory) -> tuple[Pyramid, Memory]:
        pairs = [one(*arrays) for arrays in zip(found[0], found[1], memory, strict=True)]
        return tuple(x for x, _ in pairs), tuple(average for _, average in pairs)

    return rule


def rescaled(rule: Rule, share: Weight) -> Rule:
    """Guidance rescale (Lin et al. 2023, Eq. 15, 16): the deviation of the conditional branch.

    Args:
      rule: makes the guided prediction.
      share: of the rescaled prediction in the result, 0..1.
    """

    def rescale(x0: Float[Array, "b h w c"], cond: Float[Array, "b h w c"]) -> Array:
        deviation = jnp.std(x0, axis=(1, 2, 3), keepdims=True)
        wanted = jnp.std(cond, axis=(1, 2, 3), keepdims=True)
        return share * x0 * (wanted / jnp.maximum(deviation, 1e-12)) + (1.0 - share) * x0

    def outer(found: Sequence[Pyramid], memory: Memory) -> tuple[Pyramid, Memory]:
        x0, memory = rule(found, memory)
        return tuple(map(rescale, x0, found[0])), memory

    return outer


def cads(
    denoise: ConditionalDenoise, settings: Annealing, keys: Key[Array, "b"]
) -> ConditionalDenoise:
    """Condition-annealed sampling (Sadat et al. 2023, Eq. 5 to 7).

    The condition y becomes sqrt(g) y + scale * sqrt(1 - g) n, where g falls from 1 to 0 between
    t = low and high, and n is normal noise with the deviation of y, drawn anew at each level from
    the sample's key. Noise goes onto what the denoiser reads: the prepared states and vectors.

    Args:
      denoise: the conditional denoiser.
      settings: see `Annealing`.
      keys: one per sample of the batch that `denoise` is called with; a batch of several
        branches gets the same noise in each.
    """

    def disturb(y: Array, keep: Array, key: Key[Array, "b"]) -> Array:
        axes = tuple(range(1, y.ndim))
        y32 = y.astype(jnp.float32)
        mean, deviation = y32.mean(axes, keepdims=True), y32.std(axes, keepdims=True)
        noise = jax.vmap(lambda k: jax.random.normal(k, y.shape[1:], jnp.float32))(key)
        out = jnp.sqrt(keep) * y32 + settings.scale * jnp.sqrt(1.0 - keep) * deviation * noise
        spread = jnp.maximum(out.std(axes, keepdims=True), 1e-12)
        restored = (out - out.mean(axes, keepdims=True)) / spread * deviation + mean
        return (settings.mixing * restored + (1.0 - settings.mixing) * out).astype(y.dtype)

    def annealed(x_t: Pyramid, level: Int[Array, ""], condition: Condition) -> Pyramid:
        t = level / NUM_LEVELS
        keep = jnp.clip((settings.high - t) / (settings.high - settings.low), 0.0, 1.0)
        rows = x_t[0].shape[0]
        here = jax.vmap(lambda key: jax.random.fold_in(key, level))(keys)
        leaves, tree = jax.tree.flatten(condition)
        changed = []
        for number, leaf in enumerate(leaves):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                changed.append(leaf)
                continue
            own = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(here)
            own = jnp.tile(own, rows // own.shape[0])
            changed.append(disturb(leaf, keep, own))
        return denoise(x_t, level, jax.tree.unflatten(tree, changed))

    return annealed


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

    def denoise(x_t: Pyramid, level: Int[Array, ""], memory: Memory) -> tuple[Pyramid, Memory]:
        # Half a level of slack: 0.3 and 300 / 1000 differ in float32.
        inside = (level >= low * NUM_LEVELS - 0.5) & (level <= high * NUM_LEVELS + 0.5)
        return jax.lax.cond(inside, guided, plain, x_t, level, memory)

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
    guidance_weight: Weight = 1.0,
    interval: tuple[float, float] | Float[Array, "2"] | None = None,
    *,
    caption_only: Condition | None = None,
    latent_weight: Weight | None = None,
    projection: Projection | None = None,
    rescale: Weight | None = None,
    annealing: Annealing | None = None,
    keys: Key[Array, "b"] | None = None,
) -> Denoise:
    """Builds the guided denoiser that a sampler runs. What is None is not computed at all.

    Args:
      denoise: the conditional denoiser.
      condition: condition of the batch.
      null: null condition with the same shapes; None means guidance weight 1: one branch.
      guidance_weight: the paper's gamma.
      interval: t at which to guide, everywhere by default.
      caption_only: the condition without z; with `latent_weight`, the weight of z alone.
      projection: guides by APG; the sampler's state then begins with `first_memory`.
      rescale: share of guidance rescale.
      annealing: adds CADS noise to the condition, with guidance and without.
      keys: of the samples' CADS noise.

    Raises:
      UserError: projection and separate weights together, which are two different rules.
    """
    if projection is not None and latent_weight is not None:
        raise UserError("APG and a weight of its own for the latents exclude each other")
    if annealing is not None:
        denoise = cads(denoise, annealing, keys)
    plain = with_condition(denoise, condition)
    if null is None:
        return plain
    conditions = [condition, null]
    if latent_weight is not None:
        conditions.append(caption_only)
        rule = separate(guidance_weight, latent_weight)
    elif projection is not None:
        rule = projected(guidance_weight, projection)
    else:
        rule = classifier_free(guidance_weight)
    if rescale is not None:
        rule = rescaled(rule, rescale)
    guided = apply_rule(branches(denoise, conditions), rule)
    if interval is not None:
        guided = within_interval(guided, plain, interval)
    return guided


def first_memory(projection: bool, batch: int, shapes: Sequence[tuple[int, int, int]]) -> Memory:
    """What a guidance carries before the first step: the average of APG, nothing otherwise.

    Args:
      projection: whether the guidance is APG.
      batch: pictures.
      shapes: (height, width, channels) of each resolution.
    """
    return tuple(jnp.zeros((batch, *shape)) for shape in shapes) if projection else ()


def _norm(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))
