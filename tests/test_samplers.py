"""Samplers against closed forms and the reference steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import rng, samplers
from kaleido_jax.errors import UserError
from kaleido_jax.schedule import Schedule, shifted_schedules, time_grid

MEAN, VARIANCE = 0.3, 0.25


def _keys(seed, count):
    return rng.per_sample(rng.stream(seed, "sample"), jnp.arange(count))


def _gaussian(schedules, mean=MEAN, variance=VARIANCE):
    """E[x | x_t] for x ~ N(mean, variance)."""

    def denoise(x_t, level):
        x0 = []
        for x, schedule in zip(x_t, schedules, strict=True):
            alpha, sigma = schedule.alpha_sigma(level)
            gain = alpha * variance / (alpha**2 * variance + sigma**2)
            x0.append(mean + gain * (x - alpha * mean))
        return tuple(x0)

    return denoise


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {})])
def test_gaussian_moments_at_two_resolutions(name, options):
    # deepfloyd begins at logsnr 10; the cosine's 5 would cost 6% of the variance in the last step.
    schedules = shifted_schedules("deepfloyd", (2, 1))
    keys = _keys(0, 512)
    x = samplers.sample_noise(keys, 0, [(4, 4, 3), (2, 2, 3)])
    run = samplers.SAMPLERS[name]
    out = run(_gaussian(schedules), x, time_grid(250), schedules, keys, "none", **options)
    for sample in out:
        count = sample.size
        # Five standard errors, plus 2% for 250 finite steps.
        standard_error = np.sqrt(VARIANCE / count)
        assert abs(float(sample.mean()) - MEAN) < 5 * standard_error + 0.01
        assert abs(float(sample.var()) / VARIANCE - 1) < 5 * np.sqrt(2 / count) + 0.02


def test_one_step_is_exact_for_a_point_mass():
    schedules = shifted_schedules("deepfloyd", (1,))
    keys = _keys(1, 3)
    x = samplers.sample_noise(keys, 0, [(2, 2, 1)])
    for run in samplers.SAMPLERS.values():
        (out,) = run(_gaussian(schedules, 0.5, 0.0), x, [1000, 0], schedules, keys)
        np.testing.assert_allclose(out, 0.5, atol=1e-6)


def test_ddim_without_noise_depends_on_the_start_only():
    schedules = shifted_schedules("cosine", (1,))
    x = samplers.sample_noise(_keys(0, 2), 0, [(2, 2, 3)])
    denoise = _gaussian(schedules)
    first = samplers.ddim(denoise, x, time_grid(8), schedules, _keys(1, 2))[0]
    second = samplers.ddim(denoise, x, time_grid(8), schedules, _keys(2, 2))[0]
    np.testing.assert_array_equal(first, second)
    ancestral = [
        samplers.ddpm(denoise, x, time_grid(8), schedules, _keys(seed, 2))[0] for seed in (1, 2)
    ]
    assert float(jnp.abs(ancestral[0] - ancestral[1]).max()) > 0.01


def test_eta_one_is_ancestral():
    table = Schedule("deepfloyd", 4.0).alpha_bar_table
    t, s = np.array([1000, 600, 4]), np.array([996, 500, 0])
    for a, b in zip(
        samplers.ddpm_coefficients(table[t], table[s]),
        samplers.ddim_coefficients(table[t], table[s], 1.0),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert samplers.ddpm_coefficients(table[t], table[s])[2][-1] == 0.0


def test_a_sample_does_not_depend_on_its_batch():
    schedules = shifted_schedules("cosine", (1,))

    def run(ids):
        keys = rng.per_sample(rng.stream(7, "sample"), jnp.asarray(ids))
        x = samplers.sample_noise(keys, 0, [(2, 2, 3)])
        return samplers.ddpm(_gaussian(schedules), x, time_grid(5), schedules, keys)[0]

    together = run([0, 1, 2, 3])
    # Elementwise arithmetic only, so equal to the bit.
    np.testing.assert_array_equal(together[2], run([2])[0])
    assert float(jnp.abs(together[2] - together[1]).max()) > 0.01


def test_thresholds():
    x = jnp.linspace(-4.0, 4.0, 2 * 200).reshape(2, 10, 20, 1)
    assert float(jnp.abs(samplers.clip(x)).max()) == 1.0
    s = np.quantile(np.abs(np.asarray(x)).reshape(2, -1), 0.995, axis=1)[:, None, None, None]
    np.testing.assert_allclose(samplers.dynamic(x), np.clip(x, -s, s) / s, rtol=1e-6)
    small = 0.1 * x
    np.testing.assert_array_equal(samplers.dynamic(small), small)
    np.testing.assert_allclose(jnp.abs(samplers.dynamic(1e4 * x)).max(), 100.0 / 100.0)


def test_misuse_is_a_user_error():
    schedules = shifted_schedules("cosine", (1,))
    x = (jnp.zeros((1, 2, 2, 1)),)
    run = lambda levels, threshold: samplers.ddpm(  # noqa: E731
        _gaussian(schedules), x, levels, schedules, _keys(0, 1), threshold
    )
    with pytest.raises(UserError, match="threshold"):
        run([10, 0], "clamp")
    with pytest.raises(UserError, match="levels"):
        run([0, 10], "clip")
    with pytest.raises(UserError, match="eta"):
        samplers.ddim(_gaussian(schedules), x, [10, 0], schedules, _keys(0, 1), eta=1.5)


def test_one_compilation_serves_every_seed():
    schedules = shifted_schedules("cosine", (1,))
    traces = []

    @jax.jit
    def run(keys):
        traces.append(1)
        x = samplers.sample_noise(keys, 0, [(2, 2, 3)])
        return samplers.ddpm(_gaussian(schedules), x, time_grid(4), schedules, keys)[0]

    run(_keys(0, 2)), run(_keys(1, 2))
    assert len(traces) == 1
