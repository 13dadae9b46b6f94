"""`train.noisy_steps` and `train.time_logit`: which times the steps draw."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import losses
from kaleido_jax.errors import UserError
from kaleido_jax.types import Batch
from tests.tiny import tiny_config


def _times(noisy: int, step: int, share: float = 1.0, logit: str = "()") -> np.ndarray:
    config = tiny_config(
        f"train.noisy_steps={noisy}", f"train.noisy_share={share}", f"train.time_logit={logit}"
    )
    cfg = losses.LossConfig.from_config(config, (1,))
    tokens = jnp.zeros((4096, 1), jnp.int32)
    images = jnp.zeros((4096, 1, 1, 3), jnp.uint8)
    batch = Batch(
        caption_tokens=tokens, latent_tokens=tokens, image=images, key_hash=jnp.zeros(4096)
    )
    return np.asarray(losses.draw(batch, 0, jnp.int32(step), cfg).time_index)


def test_the_first_third_draws_the_noisiest_tenth_and_the_rest_widens_to_all():
    for step, least in ((0, 900), (99, 900), (100, 900), (200, 450), (299, 4), (300, 0), (9999, 0)):
        drawn = _times(300, step)
        assert least <= drawn.min() <= least + 10, step
        assert drawn.max() >= 997 and drawn.dtype == np.int32


def test_without_it_all_times_are_drawn_from_the_first_step():
    assert _times(0, 0).min() < 5
    np.testing.assert_array_equal(_times(0, 7), _times(7, 7))


def test_a_share_of_the_batch_draws_them_and_the_rest_all_times():
    drawn = _times(300, 0, 0.25)
    quarter = np.arange(4096) % 4 == 3  # spread evenly
    assert drawn[quarter].min() >= 900 and drawn[~quarter].min() < 5
    assert np.mean(drawn[~quarter] >= 900) < 0.15
    assert _times(300, 300, 0.25)[quarter].min() < 5
    # The rows that draw all times draw the same ones as without it.
    np.testing.assert_array_equal(drawn[~quarter], _times(0, 0)[~quarter])


def test_the_others_draw_the_times_whose_logit_is_normal():
    drawn = _times(300, 0, 0.25, "(-1.0,0.5)")
    quarter = np.arange(4096) % 4 == 3
    np.testing.assert_array_equal(drawn[quarter], _times(300, 0, 0.25)[quarter])
    share = (drawn[~quarter] + 0.5) / 1000
    logit = np.log(share / (1 - share))
    assert abs(logit.mean() + 1) < 0.04 and abs(logit.std() - 0.5) < 0.03
    assert drawn.dtype == np.int32
    # Later the quarter draws all times evenly, the others as before.
    later = _times(300, 300, 0.25, "(-1.0,0.5)")
    assert later[quarter].min() < 10 and abs(later[quarter].mean() - 500) < 30
    assert _times(0, 0, 0.0, "(20.0,9.0)").max() == 999


@pytest.mark.parametrize(
    ("logit", "share", "why"),
    [
        ("(1.0,)", 0.5, "mean, deviation"),
        ("(0.0,0.0)", 0.5, "above 0"),
        ("(0.0,1.0)", 1.0, "noisy_share"),
    ],
)
def test_times_that_cannot_be_drawn_are_refused(logit, share, why):
    with pytest.raises(UserError, match=why):
        _times(0, 0, share, logit)


@pytest.mark.parametrize("mixed", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_rows_of_every_resolution_are_among_the_noisy_ones(mixed, share):
    config = tiny_config("train.noisy_steps=9", f"train.noisy_share={share}", nested=True)
    with config.unlocked():
        config.train.mixed_ratio = mixed
    cfg = losses.LossConfig.from_config(config, (2, 1))
    size = 48 * sum(mixed)
    noisy = cfg.noisy_rows(size)
    assert abs(noisy.mean() - share) < 0.03
    rows = np.arange(size)
    images = (rows[:, None, None, None], rows[:, None, None, None])
    highest, lowest = (np.asarray(x).ravel() for x in cfg.mix(images))
    for own in (highest, np.setdiff1d(lowest, highest)):
        assert abs(noisy[own].mean() - share) < 0.1
