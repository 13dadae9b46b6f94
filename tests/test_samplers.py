"""Samplers against closed forms and the reference steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import rng, samplers, thresholds
from kaleido_jax.errors import UserError
from kaleido_jax.samplers import begin
from kaleido_jax.schedule import TIME_GRIDS, Schedule, shifted_schedules, time_grid

MEAN, VARIANCE = 0.3, 0.25


def _keys(seed, count):
    return rng.per_sample(rng.stream(seed, "sample"), jnp.arange(count))


def _gaussian(schedules, mean=MEAN, variance=VARIANCE):
    """E[x | x_t] for x ~ N(mean, variance)."""

    def denoise(x_t, level, memory):
        x0 = []
        for x, schedule in zip(x_t, schedules, strict=True):
            alpha, sigma = schedule.alpha_sigma(level)
            gain = alpha * variance / (alpha**2 * variance + sigma**2)
            x0.append(mean + gain * (x - alpha * mean))
        return tuple(x0), memory

    return denoise


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {})])
def test_gaussian_moments_at_two_resolutions(name, options):
    # deepfloyd begins at logsnr 10; the cosine's 5 would cost 6% of the variance in the last step.
    schedules = shifted_schedules("deepfloyd", (2, 1))
    keys = _keys(0, 512)
    x = samplers.sample_noise(keys, 0, [(4, 4, 3), (2, 2, 3)])
    run = samplers.SAMPLERS[name]
    out = run(
        _gaussian(schedules), begin(x), time_grid(250), schedules, keys, "none", **options
    ).x_t
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
        (out,) = run(_gaussian(schedules, 0.5, 0.0), begin(x), [1000, 0], schedules, keys).x_t
        np.testing.assert_allclose(out, 0.5, atol=1e-6)


def test_ddim_without_noise_depends_on_the_start_only():
    schedules = shifted_schedules("cosine", (1,))
    x = samplers.sample_noise(_keys(0, 2), 0, [(2, 2, 3)])
    denoise = _gaussian(schedules)
    first = samplers.ddim(denoise, begin(x), time_grid(8), schedules, _keys(1, 2)).x_t[0]
    second = samplers.ddim(denoise, begin(x), time_grid(8), schedules, _keys(2, 2)).x_t[0]
    np.testing.assert_array_equal(first, second)
    ancestral = [
        samplers.ddpm(denoise, begin(x), time_grid(8), schedules, _keys(seed, 2)).x_t[0]
        for seed in (1, 2)
    ]
    assert float(jnp.abs(ancestral[0] - ancestral[1]).max()) > 0.01


def test_eta_one_is_ancestral():
    table = Schedule("deepfloyd", 4.0).alpha_bar_table
    t, s = np.array([1000, 600, 4]), np.array([996, 500, 0])
    ancestral = samplers.ddpm_coefficients(table[t], table[s])
    eta_one = samplers.ddim_coefficients(table[t], table[s], 1.0)
    for name, value in ancestral.items():
        np.testing.assert_allclose(value, eta_one[name], atol=1e-12)
    assert ancestral["noise"][-1] == 0.0


def test_a_sample_does_not_depend_on_its_batch():
    schedules = shifted_schedules("cosine", (1,))

    def run(ids):
        keys = rng.per_sample(rng.stream(7, "sample"), jnp.asarray(ids))
        x = samplers.sample_noise(keys, 0, [(2, 2, 3)])
        return samplers.ddpm(_gaussian(schedules), begin(x), time_grid(5), schedules, keys).x_t[0]

    together = run([0, 1, 2, 3])
    # Elementwise arithmetic only, so equal to the bit.
    np.testing.assert_array_equal(together[2], run([2])[0])
    assert float(jnp.abs(together[2] - together[1]).max()) > 0.01


def test_thresholds():
    x = jnp.linspace(-4.0, 4.0, 2 * 200).reshape(2, 10, 20, 1)
    assert float(jnp.abs(thresholds.clip(x)).max()) == 1.0
    s = np.quantile(np.abs(np.asarray(x)).reshape(2, -1), 0.995, axis=1)[:, None, None, None]
    np.testing.assert_allclose(thresholds.dynamic(x), np.clip(x, -s, s) / s, rtol=1e-6)
    small = 0.1 * x
    np.testing.assert_array_equal(thresholds.dynamic(small), small)
    np.testing.assert_allclose(jnp.abs(thresholds.dynamic(1e4 * x)).max(), 100.0 / 100.0)


def test_misuse_is_a_user_error():
    schedules = shifted_schedules("cosine", (1,))
    x = (jnp.zeros((1, 2, 2, 1)),)
    run = lambda levels, threshold: samplers.ddpm(  # noqa: E731
        _gaussian(schedules), begin(x), levels, schedules, _keys(0, 1), threshold
    )
    with pytest.raises(UserError, match="threshold"):
        run([10, 0], "clamp")
    with pytest.raises(UserError, match="levels"):
        run([0, 10], "clip")
    with pytest.raises(UserError, match="eta"):
        samplers.ddim(_gaussian(schedules), begin(x), [10, 0], schedules, _keys(0, 1), eta=1.5)


def test_one_compilation_serves_every_seed():
    schedules = shifted_schedules("cosine", (1,))
    traces = []

    @jax.jit
    def run(keys):
        traces.append(1)
        x = samplers.sample_noise(keys, 0, [(2, 2, 3)])
        return samplers.ddpm(_gaussian(schedules), begin(x), time_grid(4), schedules, keys).x_t[0]

    run(_keys(0, 2)), run(_keys(1, 2))
    assert len(traces) == 1


def _exact(x, schedule, first, last):
    """Where the probability flow of x ~ N(MEAN, VARIANCE) carries x from one level to another."""
    (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(first), schedule.alpha_sigma(last)
    spread = np.sqrt(alpha**2 * VARIANCE + sigma**2)
    spread_s = np.sqrt(alpha_s**2 * VARIANCE + sigma_s**2)
    return alpha_s * MEAN + (np.asarray(x, np.float64) - alpha * MEAN) * spread_s / spread


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp", 2), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian(name, order):
    # Away from both ends, where the steps in log(alpha / sigma) do not shrink with their number.
    (schedule,) = schedules = shifted_schedules("cosine", (1,))
    x = samplers.sample_noise(_keys(0, 4), 0, [(2, 2, 3)])
    errors = []
    for count in (32, 64, 128):
        levels = np.round(np.linspace(900, 100, count + 1)).astype(int)
        run = samplers.SAMPLERS[name]
        state = run(_gaussian(schedules), begin(x), levels, schedules, _keys(0, 4), "none")
        errors.append(np.abs(state.x_t[0] - _exact(x[0], schedule, 900, 100)).max())
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(np.abs(orders - order) < 0.35), (errors, orders)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_parts_of_the_loop_give_the_whole(name):
    schedules = shifted_schedules("cosine", (2, 1))
    keys = _keys(3, 2)
    x = samplers.sample_noise(keys, 0, [(4, 4, 3), (2, 2, 3)])
    run = jax.jit(
        lambda state, first, end: samplers.SAMPLERS[name](
            _gaussian(schedules), state, time_grid(7), schedules, keys, steps=(first, end)
        )
    )
    whole = run(begin(x), 0, 7)
    parts = begin(x)
    for first, end in ((0, 2), (2, 3), (3, 7)):
        parts = run(parts, first, end)
    assert run._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_evaluations_are_counted_right(name):
    schedules = shifted_schedules("cosine", (1,))
    calls = []

    def spy(x_t, level, memory):
        jax.debug.callback(calls.append, level)
        return _gaussian(schedules)(x_t, level, memory)

    x = samplers.sample_noise(_keys(0, 1), 0, [(2, 2, 1)])
    jax.block_until_ready(
        samplers.SAMPLERS[name](spy, begin(x), [900, 500, 100, 0], schedules, _keys(0, 1))
    )
    jax.effects_barrier()
    assert len(calls) == samplers.evaluations(name, 3)
    assert min(calls) > 0  # the network knows no level 0


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 20, 250, 1000])
def test_time_grids_descend_to_zero(grid, steps):
    levels = time_grid(steps, grid, Schedule("deepfloyd"))
    assert len(levels) == steps + 1
    assert levels[-1] == 0
    assert levels[0] <= 1000
    assert np.all(np.diff(levels) < 0)


def test_the_logsnr_grid_is_even():
    schedule = Schedule("cosine")
    logsnr = schedule.logsnr(time_grid(10, "logsnr", schedule)[1:-1])
    assert np.ptp(np.diff(logsnr)) < 0.35 * np.diff(logsnr).mean()
