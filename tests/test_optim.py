"""Warm-up, clip, Adam and the average, by their own arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import optim
from kaleido_jax.errors import UserError
from tests.tiny import tiny_config


def test_the_rate_warms_up_linearly_from_the_first_step():
    cfg = tiny_config("optim.decay=constant", "optim.warmup_steps=10", "optim.learning_rate=1.0")
    rate = optim.learning_rate(cfg)
    np.testing.assert_allclose([rate(i) for i in range(10)], np.arange(1, 11) / 10, rtol=1e-6)
    assert rate(10) == rate(10_000) == 1.0


def test_cosine_decay_ends_at_zero_at_the_last_step():
    cfg = tiny_config("optim.warmup_steps=10", "optim.learning_rate=1.0", "train.num_steps=110")
    rate = optim.learning_rate(cfg)
    assert rate(10) == pytest.approx(1.0) and rate(60) == pytest.approx(0.5)
    assert rate(110) == pytest.approx(0.0, abs=1e-6)


def test_an_unknown_decay_is_refused():
    with pytest.raises(UserError, match=r"optim\.decay"):
        optim.learning_rate(tiny_config("optim.decay=sudden"))


def test_large_gradients_are_clipped_and_the_first_adam_step_has_the_rate():
    fields = ("optim.decay=constant", "optim.warmup_steps=0", "optim.learning_rate=0.1")
    cfg = tiny_config(*fields, "optim.text_rate=1.0")
    optimizer = optim.make_optimizer(cfg)
    params = {"a": jnp.zeros(4)}
    huge = {"a": jnp.array([1e6, -1e6, 1e6, 0.0])}
    updates, state = optimizer.update(huge, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.1, 0.1, -0.1, 0.0], rtol=1e-5)
    clipped = next(s for s in state if hasattr(s, "mu")).mu["a"] / (1 - cfg.optim.b1)
    assert np.linalg.norm(clipped) == pytest.approx(cfg.optim.clip_norm, rel=1e-5)


def test_t5_learns_at_its_share_of_the_rate():
    fields = ("optim.decay=constant", "optim.warmup_steps=0", "optim.learning_rate=0.1")
    params = {part: {"w": jnp.zeros(3)} for part in ("text_encoder", "latent_decoder", "denoiser")}
    gradients = jax.tree.map(lambda p: p + 1.0, params)
    optimizer = optim.make_optimizer(tiny_config(*fields, "optim.text_rate=0.25"))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["denoiser"]["w"], -0.1, rtol=1e-5)
    for part in ("text_encoder", "latent_decoder"):
        np.testing.assert_allclose(updates[part]["w"], -0.025, rtol=1e-5)


def test_the_average_follows_its_decay_and_its_warm_up():
    ema, params = {"a": jnp.zeros(())}, {"a": jnp.ones(())}
    assert optim.update_ema(ema, params, 0, 0.9, False)["a"] == pytest.approx(0.1)
    assert optim.update_ema(ema, params, 0, 0.9, True)["a"] == pytest.approx(0.9)
    assert optim.update_ema(ema, params, 10_000, 0.9, True)["a"] == pytest.approx(0.1)
