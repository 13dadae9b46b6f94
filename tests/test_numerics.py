"""Random streams, schedules and the diffusion algebra (Eq. 2 and 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax import diffusion, rng, schedule
from kaleido_jax.errors import UserError
from kaleido_jax.schedule import Schedule


def test_streams_differ_by_seed_name_and_step_and_nothing_else():
    keys = [
        jax.random.key_data(rng.stream(*args)).tobytes()
        for args in [(0, "noise", 0), (1, "noise", 0), (0, "time", 0), (0, "noise", 1)]
    ]
    assert len(set(keys)) == 4
    again = jax.jit(lambda step: jax.random.key_data(rng.stream(0, "noise", step)))(1)
    assert np.asarray(again).tobytes() == keys[3]


def test_an_unknown_stream_is_an_error_not_another_stream():
    with pytest.raises(ValueError, match="nois"):
        rng.stream(0, "nois")


def test_the_key_of_a_sample_does_not_depend_on_its_batch():
    key = rng.stream(3, "sample")
    whole = jax.random.key_data(rng.per_sample(key, jnp.arange(8)))
    part = jax.random.key_data(rng.per_sample(key, jnp.array([5])))
    np.testing.assert_array_equal(whole[5], part[0])
    assert len({k.tobytes() for k in np.asarray(whole)}) == 8


@pytest.mark.parametrize("name", schedule.NAMES)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_noise_only_grows(name, scale):
    table = Schedule(name, scale).alpha_bar_table
    assert table.shape == (1001,) and table[0] == 1.0
    assert (np.diff(table) < 0).all() and table[-1] > 0


@pytest.mark.parametrize("name", schedule.NAMES)
def test_the_shift_divides_the_signal_to_noise_ratio(name):
    levels = np.arange(1, 1001)
    plain, shifted = Schedule(name), Schedule(name, 4.0, 2.0)
    np.testing.assert_allclose(
        shifted.logsnr(levels), plain.logsnr(levels) - np.log(16.0), rtol=1e-7, atol=1e-7
    )


def test_levels_between_integers_are_interpolated_and_keep_unit_variance():
    s = Schedule("deepfloyd")
    alpha, sigma = s.alpha_sigma(np.array([10.0, 10.5, 11.0, 999.25]))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    assert alpha[0] > alpha[1] > alpha[2]
    np.testing.assert_allclose(alpha[[0, 2]], s.alpha(np.array([10, 11])), rtol=1e-12)
    traced = jax.jit(s.alpha)(jnp.array([10.5]))
    np.testing.assert_allclose(traced, alpha[1:2], rtol=1e-6)


def test_bad_schedules_are_refused():
    with pytest.raises(UserError, match="cosine"):
        Schedule("cosin")
    with pytest.raises(UserError, match="at least 1"):
        Schedule("cosine", 0.5)


@pytest.mark.parametrize("steps", [1, 2, 25, 50, 250, 1000])
def test_a_time_grid_descends_to_the_clean_image(steps):
    grid = schedule.time_grid(steps)
    assert len(grid) == steps + 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    assert grid[0] <= 1000


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_time_grid_of_no_or_too_many_steps_is_refused(steps):
    with pytest.raises(UserError, match="between 1 and 1000"):
        schedule.time_grid(steps)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.02, 0.98), st.integers(0, 2**31), st.sampled_from(diffusion.PREDICTIONS))
def test_every_parametrisation_tells_the_same_picture(alpha_bar, seed, kind):
    generator = np.random.default_rng(seed)
    x, eps = generator.standard_normal((2, 1, 2, 2, 3))
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x_t = diffusion.q_sample(x, eps, alpha, sigma)
    pred = {"x0": x, "eps": eps, "v": alpha * eps - sigma * x}[kind]
    for name, want in (("x0", x), ("eps", eps), ("v", alpha * eps - sigma * x)):
        got = diffusion.CONVERSIONS[name](kind, pred, x_t, alpha, sigma)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_pixels_are_normalised_and_points_pass():
    image = jnp.array([0, 127, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(
        diffusion.normalize(image, 127.5, 127.5).ravel(), [-1.0, -1 / 255, 1.0], atol=1e-6
    )
    np.testing.assert_allclose(
        diffusion.normalize(image, 127.0, 128.0).ravel(), [-127 / 128, 0.0, 1.0], atol=1e-6
    )
    point = jnp.array([[[[3.0, -2.0]]]])
    assert diffusion.normalize(point, 127.5, 127.5) is point


def test_a_pyramid_averages_blocks():
    x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    high, middle, low = diffusion.pyramid(x, (4, 2, 1))
    assert (high.shape, middle.shape, low.shape) == ((1, 8, 8, 1), (1, 4, 4, 1), (1, 2, 2, 1))
    assert middle[0, 0, 0, 0] == np.mean([0, 1, 8, 9])
    np.testing.assert_allclose(low, diffusion.pyramid(middle, (2, 1))[1])
