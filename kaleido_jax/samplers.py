"""Samplers: from noise to pictures, each one function over a `denoise` closure.

`denoise(x_t, level, memory)` gives the clean-image predictions of the whole pyramid; it knows the
network, the condition and the guidance (guidance.py), and a sampler knows none of them. All
resolutions are sampled jointly, each with the schedule of its own resolution (Sec. B.1).

Every method is linear in what it reads: x_s = c_x0 * x0 + c_xt * x_t + c_noise * noise + c_old *
(the prediction before), and Heun's corrector adds c_new * (the prediction at s). The coefficients
depend on the levels alone, so they are computed on the host in float64 and the steps are one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kaleido_jax.errors import UserError
from kaleido_jax.schedule import Schedule
from kaleido_jax.thresholds import THRESHOLDS
from kaleido_jax.types import Pyramid

# What a guidance carries from step to step; () for those that carry nothing.
Memory = Any
# (x_t, integer level as a scalar array, memory) -> (unthresholded predictions of x, memory).
Denoise = Callable[[Pyramid, Int[Array, ""], Memory], tuple[Pyramid, Memory]]
Table = Float[np.ndarray, "..."]
# alpha**2 at t and at s -> names of the terms and their coefficients, shaped like the levels.
Coefficients = Mapping[str, Table]


class State(NamedTuple):
    """Where a sampler stands between two steps.

    Attributes:
      x_t: the noisy pyramid, float32, highest resolution first.
      x0: the thresholded prediction of the step before (zeros before the first): a preview.
      memory: of the guidance.
    """

    x_t: Pyramid
    x0: Pyramid
    memory: Memory = ()


def begin(noise: Pyramid, memory: Memory = ()) -> State:
    """The state before the first step."""
    x_t = tuple(x.astype(jnp.float32) for x in noise)
    return State(x_t, tuple(map(jnp.zeros_like, x_t)), memory)


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


def ddpm_coefficients(alpha_bar_t: Table, alpha_bar_s: Table) -> Coefficients:
    """Posterior q(x_s | x_t, x0) of Ho et al. 2020 (Eq. 6, 7) for any s < t.

    Args:
      alpha_bar_t: alpha**2 at t, in (0, 1).
      alpha_bar_s: alpha**2 at s, in (alpha_bar_t, 1]; at 1 no noise is added.
    """
    kept = alpha_bar_t / alpha_bar_s
    variance = (1.0 - kept) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)
    return {
        "x0": np.sqrt(alpha_bar_s) * (1.0 - kept) / (1.0 - alpha_bar_t),
        "xt": np.sqrt(kept) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t),
        "noise": np.sqrt(variance),
    }


def ddim_coefficients(alpha_bar_t: Table, alpha_bar_s: Table, eta: float = 0.0) -> Coefficients:
    """DDIM (Song et al. 2021, Eq. 12): eta 0 is deterministic, eta 1 is ancestral.

    Arguments as `ddpm_coefficients`; raises UserError unless 0 <= eta <= 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; it must be between 0 (deterministic) and 1 (ancestral)")
    c_noise = eta * ddpm_coefficients(alpha_bar_t, alpha_bar_s)["noise"]
    c_eps = np.sqrt(np.maximum(1.0 - alpha_bar_s - c_noise**2, 0.0))
    # eps = (x_t - alpha_t x0) / sigma_t, written out in x0 and x_t.
    c_xt = c_eps / np.sqrt(1.0 - alpha_bar_t)
    return {"x0": np.sqrt(alpha_bar_s) - np.sqrt(alpha_bar_t) * c_xt, "xt": c_xt, "noise": c_noise}


def _exponential(
    alpha_bar_t: Table, alpha_bar_s: Table
) -> tuple[Table, Table, Table, Float[np.ndarray, "..."]]:
    """sigma_s / sigma_t, alpha_s, exp(-h) and h, where h is the step in log(alpha / sigma)."""
    alpha_t, alpha_s = np.sqrt(alpha_bar_t), np.sqrt(alpha_bar_s)
    sigma_t, sigma_s = np.sqrt(1.0 - alpha_bar_t), np.sqrt(1.0 - alpha_bar_s)
    decay = (alpha_t * sigma_s) / (sigma_t * alpha_s)
    with np.errstate(divide="ignore"):
        return sigma_s / sigma_t, alpha_s, decay, -np.log(decay)


def dpmpp_coefficients(alpha_bar_t: Table, alpha_bar_s: Table) -> Coefficients:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2), midpoint form, for consecutive steps.

    The first step has no prediction before it and the step to sigma = 0 has infinite h: both are
    of first order, which is DDIM.

    Args:
      alpha_bar_t, alpha_bar_s: [steps, ...]; row n ends where row n + 1 begins.
    """
    c_xt, alpha_s, decay, h = _exponential(alpha_bar_t, alpha_bar_s)
    before = np.concatenate([np.full_like(h[:1], np.inf), h[:-1]])
    # 1 / (2r) with r = h_before / h.
    extrapolation = np.where(np.isfinite(h), np.where(np.isfinite(h), h, 0.0) / (2 * before), 0.0)
    weight = alpha_s * (1.0 - decay)
    return {
        "x0": weight * (1.0 + extrapolation),
        "xt": c_xt,
        "old": -weight * extrapolation,
    }


def heun_coefficients(alpha_bar_t: Table, alpha_bar_s: Table) -> Coefficients:
    """Heun's method in log(alpha / sigma): a DDIM step, then a corrector with the prediction at s.

    The linear part is solved exactly and the prediction taken as linear between t and s
    (Hochbruck and Ostermann 2010, Eq. 2.39). EDM's form (Karras et al. 2022, Alg. 1), linear in
    sigma / alpha, extrapolates without bound from the levels near zero signal at which our
    schedules begin; both are of second order. At sigma_s = 0 there is no corrector.

    Returns the predictor's "x0" and "xt", and the corrector's "mid" for x0 and "new" for the
    prediction at s.
    """
    c_xt, alpha_s, decay, h = _exponential(alpha_bar_t, alpha_bar_s)
    finite = np.isfinite(h)
    new = np.where(finite, 1.0 - (1.0 - decay) / np.where(finite, h, 1.0), 0.0)
    weight = 1.0 - decay
    return {
        "x0": alpha_s * weight,
        "xt": c_xt,
        "mid": alpha_s * (weight - new),
        "new": alpha_s * new,
    }


def step(
    x_t: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    coefficients: Mapping[str, Float[Array, ""]],
    noise: Float[Array, "b h w c"] | None = None,
    old: Float[Array, "b h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """One step t -> s of one resolution; terms that a method does not have are left out."""
    x_s = coefficients["x0"] * x0 + coefficients["xt"] * x_t
    if "noise" in coefficients and noise is not None:
        x_s = x_s + coefficients["noise"] * noise
    if "old" in coefficients and old is not None:
        x_s = x_s + coefficients["old"] * old
    return x_s


def ddpm(
    denoise: Denoise,
    state: State,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
    steps: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
) -> State:
    """Ancestral sampling (Ho et al. 2020), the paper's sampler.

    Args:
      denoise: clean-image predictions at (x_t, level).
      state: from `begin` with noise at levels[0], or from the steps before.
      levels: static descending levels; the last, usually 0, is where the last step ends.
      schedules: one schedule per resolution.
      keys: one key per sample.
      threshold: name in THRESHOLDS, applied to every prediction.
      steps: (first, end), the steps to take, may be traced; all by default. Taking them in
        parts gives the same numbers.

    Returns:
      The state after the last step taken; its x_t is float32.

    Raises:
      UserError: on an unknown threshold or levels that do not descend within 1000..0.
    """
    return _run(denoise, state, levels, schedules, keys, threshold, steps, ddpm_coefficients)


def ddim(
    denoise: Denoise,
    state: State,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
    steps: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
    eta: float = 0.0,
) -> State:
    """DDIM (Song et al. 2021); arguments as `ddpm`, and static `eta` in [0, 1]."""

    def coefficients(alpha_bar_t: Table, alpha_bar_s: Table) -> Coefficients:
        return ddim_coefficients(alpha_bar_t, alpha_bar_s, eta)

    return _run(denoise, state, levels, schedules, keys, threshold, steps, coefficients)


def dpmpp(
    denoise: Denoise,
    state: State,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
    steps: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
) -> State:
    """DPM-Solver++(2M): second order with one evaluation a step; arguments as `ddpm`."""
    return _run(denoise, state, levels, schedules, keys, threshold, steps, dpmpp_coefficients)


def heun(
    denoise: Denoise,
    state: State,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str = "clip",
    steps: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
) -> State:
    """Heun's method: second order, two evaluations a step but the last; arguments as `ddpm`."""
    return _run(denoise, state, levels, schedules, keys, threshold, steps, heun_coefficients)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp, "heun": heun}


def evaluations(sampler: str, num_steps: int) -> int:
    """Evaluations of the denoiser that a picture takes."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def _run(
    denoise: Denoise,
    state: State,
    levels: Int[np.ndarray, "steps_plus_1"],
    schedules: Sequence[Schedule],
    keys: Key[Array, "b"],
    threshold: str,
    steps: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None,
    coefficients: Callable[[Table, Table], Coefficients],
) -> State:
    if threshold not in THRESHOLDS:
        raise UserError(f"unknown threshold {threshold!r}; one of {', '.join(THRESHOLDS)}")
    levels = np.asarray(levels)
    if levels.size < 2 or np.any(np.diff(levels) >= 0) or levels[0] > 1000 or levels[-1] < 0:
        raise UserError("levels must be at least two, descending, within 1000..0")
    alpha_bar = np.stack([schedule.alpha_bar_table[levels] for schedule in schedules], axis=1)
    # Terms that are zero throughout, such as DDIM's noise at eta 0, cost nothing.
    table = {
        name: jnp.asarray(value, jnp.float32)  # [steps, resolutions]
        for name, value in coefficients(alpha_bar[:-1], alpha_bar[1:]).items()
        if name in ("x0", "xt") or np.any(value)
    }
    grid = jnp.asarray(levels, jnp.int32)
    bound = THRESHOLDS[threshold]
    shapes = [x.shape[1:] for x in state.x_t]
    absent = (None,) * len(shapes)

    def body(index: Int[Array, ""], state: State) -> State:
        terms = {name: value[index] for name, value in table.items()}
        c = [{name: term[i] for name, term in terms.items()} for i in range(len(shapes))]
        x0, memory = denoise(state.x_t, grid[index], state.memory)
        x0 = tuple(map(bound, x0))
        noise = sample_noise(keys, index + 1, shapes) if "noise" in table else absent
        x_s = tuple(map(step, state.x_t, x0, c, noise, state.x0))
        if "new" not in table:
            return State(x_s, x0, memory)

        def correct(x_s: Pyramid, memory: Memory) -> tuple[Pyramid, Memory]:
            new, memory = denoise(x_s, grid[index + 1], memory)
            corrected = tuple(
                k["xt"] * x + k["mid"] * a + k["new"] * bound(b)
                for k, x, a, b in zip(c, state.x_t, x0, new, strict=True)
            )
            return corrected, memory

        # At level 0 the picture is clean: nothing is left to correct, and the network knows no
        # such level.
        x_s, memory = jax.lax.cond(grid[index + 1] > 0, correct, lambda *same: same, x_s, memory)
        return State(x_s, x0, memory)

    first, end = (0, levels.size - 1) if steps is None else steps
    return jax.lax.fori_loop(first, end, body, state)
