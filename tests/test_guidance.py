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
        guided = guidance.guide(_denoise, condition, null, weight)(x_t, level, ())[0]
        for g, c, u in zip(guided, cond, uncond, strict=True):
            np.testing.assert_allclose(g, u + weight * (c - u), atol=1e-5)


def test_weight_one_never_computes_the_unconditional_branch():
    x_t, condition, _ = _inputs()
    sizes = []

    def spy(x_t, level, condition):
        sizes.append(x_t[0].shape[0])
        return _denoise(x_t, level, condition)

    level = jnp.int32(500)
    out = guidance.guide(spy, condition, None)(x_t, level, ())[0]
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
    jax.block_until_ready(samplers.ddim(denoise, samplers.begin(x_t), levels, schedules, keys))
    jax.effects_barrier()
    inside = sum(300 <= level <= 800 for level in levels[:-1])
    assert 0 < inside < 10
    assert calls == {4: 10 - inside, 8: inside}


def test_interval_edges_are_inside():
    x_t, condition, null = _inputs()
    denoise = guidance.guide(_denoise, condition, null, 3.0, jnp.asarray([0.3, 0.85]))
    for level, inside in ((299, False), (300, True), (850, True), (851, False)):
        level = jnp.int32(level)
        want = guidance.guide(_denoise, condition, null if inside else None, 3.0)(x_t, level, ())[0]
        np.testing.assert_allclose(denoise(x_t, level, ())[0][0], want[0], atol=1e-6)


def test_whole_interval_equals_none():
    x_t, condition, null = _inputs()
    schedules = shifted_schedules("cosine", (2, 1))
    keys = rng.per_sample(rng.stream(0, "sample"), jnp.arange(4))
    runs = [
        samplers.ddpm(
            guidance.guide(_denoise, condition, null, 4.0, interval),
            samplers.begin(x_t),
            time_grid(6),
            schedules,
            keys,
        ).x_t[0]
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


def _guided(**settings):
    x_t, condition, null = _inputs()
    projection = settings.get("projection")
    memory = guidance.first_memory(projection is not None, 4, [x.shape[1:] for x in x_t])
    denoise = guidance.guide(_denoise, condition, null, 3.0, **settings)
    return denoise(x_t, jnp.int32(400), memory)


def test_projection_that_keeps_everything_is_classifier_free():
    plain, _ = _guided()
    apg, memory = _guided(projection=guidance.Projection(1.0, 0.0, 0.0))
    for a, b in zip(plain, apg, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [m.shape for m in memory] == [x.shape for x in apg]


def test_a_projected_update_is_orthogonal_and_short():
    x_t, condition, _ = _inputs()
    cond = _denoise(x_t, jnp.int32(400), condition)
    apg, _ = _guided(projection=guidance.Projection(0.0, 0.2, 0.0))
    for guided, c in zip(apg, cond, strict=True):
        update = np.asarray(guided - c).reshape(4, -1)
        np.testing.assert_allclose((update * c.reshape(4, -1)).sum(1), 0.0, atol=1e-4)
        assert np.all(np.linalg.norm(update, axis=1) <= 2 * 0.2 + 1e-5)


def test_rescaling_restores_the_deviation():
    x_t, condition, _ = _inputs()
    cond = _denoise(x_t, jnp.int32(400), condition)
    for guided, c in zip(_guided(rescale=1.0)[0], cond, strict=True):
        np.testing.assert_allclose(guided.std((1, 2, 3)), c.std((1, 2, 3)), rtol=1e-4)


def test_equal_weights_of_caption_and_latents_are_one_weight():
    _, condition, _ = _inputs()
    half = jax.tree.map(lambda x: 0.5 * x, condition)
    plain, _ = _guided()
    same, _ = _guided(caption_only=half, latent_weight=3.0)
    other, _ = _guided(caption_only=half, latent_weight=1.0)
    np.testing.assert_allclose(plain[0], same[0], atol=1e-5)
    assert float(jnp.abs(plain[0] - other[0]).max()) > 0.1


def test_projection_and_separate_weights_exclude_each_other():
    with pytest.raises(UserError, match="exclude"):
        _guided(projection=guidance.Projection(0.0, 0.0, 0.0), latent_weight=1.0)


def _annealed(level, keys, scale=0.5, mixing=1.0, copies=1):
    condition = {
        "y": jnp.tile(jax.random.normal(jax.random.key(3), (2, 6, 5)) + 2.0, (copies, 1, 1)),
        "mask": jnp.ones((2 * copies, 6), bool),
    }
    seen = []
    spy = lambda x_t, level, condition: seen.append(condition) or x_t  # noqa: E731
    settings = guidance.Annealing(scale, 0.6, 0.9, mixing)
    x_t = (jnp.zeros((2 * copies, 2, 2, 1)),)
    guidance.cads(spy, settings, keys)(x_t, jnp.int32(level), condition)
    np.testing.assert_array_equal(seen[0]["mask"], condition["mask"])
    return condition["y"], seen[0]["y"]


def test_condition_noise_fades_out_and_belongs_to_the_sample():
    keys = rng.per_sample(rng.stream(0, "cads"), jnp.arange(2))
    y, below = _annealed(590, keys)
    np.testing.assert_allclose(below, y, atol=1e-5)
    y, middle = _annealed(750, keys)
    assert float(jnp.abs(middle - y).max()) > 0.1
    np.testing.assert_allclose(middle.std((1, 2)), y.std((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(middle.mean((1, 2)), y.mean((1, 2)), rtol=1e-4)
    # The same noise in every branch, and for a sample in any company.
    _, doubled = _annealed(750, keys, copies=2)
    np.testing.assert_allclose(doubled[:2], middle, atol=1e-6)
    np.testing.assert_allclose(doubled[2:], middle, atol=1e-6)
    _, other = _annealed(750, keys[::-1])
    assert float(jnp.abs(other - middle).max()) > 0.1


def test_condition_noise_without_mixing_follows_the_formula():
    keys = rng.per_sample(rng.stream(0, "cads"), jnp.arange(2))
    y, out = _annealed(750, keys, scale=0.0, mixing=0.0)
    np.testing.assert_allclose(out, np.sqrt(0.5) * y, rtol=1e-5)
