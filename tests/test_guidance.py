"""Guidance: Eq. 4, the branch that is not computed, the interval."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import guidance, rng, samplers
from kaleido_jax.errors import UserError
from kaleido_jax.schedule import shifted_schedules, time_grid

SHAPE = (4, 2, 2, 3)


def _denoise(x_t, level, condition):
    """Depends on everything it is given, example by example."""
    t = level.astype(jnp.float32) / 1000
    return tuple(jnp.tanh(x * (1 - t) + condition["c"][:, None, None, None]) for x in x_t)


def _inputs():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    condition = {"c": jnp.linspace(-1.0, 1.0, 4)}
    return (x, x[:, :1, :1]), condition, {"c": jnp.full((4,), 0.3)}


def test_weight_is_linear_between_the_branches():
    x_t, condition, null = _inputs()
    level = jnp.int32(500)
    cond = _denoise(x_t, level, condition)
    uncond = _denoise(x_t, level, null)
    for weight in (0.0, 1.0, 2.5, 8.0):
        guided = guidance.guide(_denoise, condition, null, weight)(x_t, level)
        for g, c, u in zip(guided, cond, uncond, strict=True):
            np.testing.assert_allclose(g, u + weight * (c - u), atol=1e-5)


def test_weight_one_never_computes_the_unconditional_branch():
    x_t, condition, _ = _inputs()
    sizes = []

    def spy(x_t, level, condition):
        sizes.append(x_t[0].shape[0])
        return _denoise(x_t, level, condition)

    level = jnp.int32(500)
    out = guidance.guide(spy, condition, None)(x_t, level)
    assert sizes == [4]
    for got, want in zip(out, _denoise(x_t, level, condition), strict=True):
        np.testing.assert_array_equal(got, want)


def test_interval_skips_the_unconditional_pass():
    x_t, condition, null = _inputs()
    calls = {4: 0, 8: 0}

    def spy(x_t, level, condition):
        batch = x_t[0].shape[0]

        def count(_):
            calls[batch] += 1

        jax.debug.callback(count, level)
        return _denoise(x_t, level, condition)

    schedules = shifted_schedules("cosine", (2, 1))
    keys = rng.per_sample(rng.stream(0, "sample"), jnp.arange(4))
    levels = time_grid(10)
    denoise = guidance.guide(spy, condition, null, 3.0, (0.3, 0.8))
    jax.block_until_ready(samplers.ddim(denoise, x_t, levels, schedules, keys))
    jax.effects_barrier()
    inside = sum(300 <= level <= 800 for level in levels[:-1])
    assert 0 < inside < 10
    assert calls == {4: 10 - inside, 8: inside}


def test_interval_edges_are_inside():
    x_t, condition, null = _inputs()
    denoise = guidance.guide(_denoise, condition, null, 3.0, jnp.asarray([0.3, 0.85]))
    for level, inside in ((299, False), (300, True), (850, True), (851, False)):
        level = jnp.int32(level)
        want = guidance.guide(_denoise, condition, null if inside else None, 3.0)(x_t, level)
        np.testing.assert_allclose(denoise(x_t, level)[0], want[0], atol=1e-6)


def test_whole_interval_equals_none():
    x_t, condition, null = _inputs()
    schedules = shifted_schedules("cosine", (2, 1))
    keys = rng.per_sample(rng.stream(0, "sample"), jnp.arange(4))
    runs = [
        samplers.ddpm(
            guidance.guide(_denoise, condition, null, 4.0, interval),
            x_t,
            time_grid(6),
            schedules,
            keys,
        )[0]
        for interval in (None, (0.0, 1.0))
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "interval"),
    [(float("nan"), None), (-1.0, None), (1e3, None), (2.0, (0.5, 0.5)), (2.0, (0.1, 1.2))],
)
def test_bounds(weight, interval):
    with pytest.raises(UserError):
        guidance.check_guidance(weight, interval)
