"""The shipped shapes models, and which of them the demo may compare."""

from __future__ import annotations

import pytest

from kaleido_jax import bundle
from kaleido_jax.demo import shapes
from kaleido_jax.errors import UserError


def test_shipped_weights_open_and_are_small():
    found = {model: bundle.load(shapes.shipped(model)) for model in shapes.MODELS}
    assert tuple(found["kaleido"].config.latents) == ("bbox",)
    assert tuple(found["baseline"].config.latents) == ()
    assert tuple(bundle.load(shapes.shipped("text")).config.latents) == ("text",)
    combined = bundle.load(shapes.shipped("combined"))
    assert tuple(combined.config.latents) == ("text", "bbox", "voken")
    for model in (*shapes.MODELS, "text", "combined"):
        assert sum(p.stat().st_size for p in shapes.shipped(model).iterdir()) < 5e6, model
    with pytest.raises(UserError, match="no weights"):
        shapes.shipped("other")


def test_models_that_were_trained_alike():
    """Also of configs from before a field was there, as a shipped model may have one."""
    configs = [bundle.load(shapes.shipped(model)).config for model in shapes.MODELS]
    assert shapes._trained_alike(configs) in (True, False)
    one = configs[0].copy_and_resolve_references()
    with one.unlocked():
        for field in ("noisy_steps", "noisy_share", "time_logit"):
            if field in one.train:
                del one.train[field]
    assert shapes._trained_alike([one, one.copy_and_resolve_references()])
    for key, value in (
        ("noisy_steps", 7),
        ("noisy_share", 0.5),
        ("time_logit", (0.0, 1.0)),
        ("num_steps", 7),
    ):
        other = one.copy_and_resolve_references()
        with other.unlocked():
            other.train[key] = value
        assert not shapes._trained_alike([one, other]), key


def test_models_with_other_sampling_are_not_compared(tmp_path):
    folders = {model: shapes.shipped(model) for model in shapes.MODELS}
    changed = bundle.load(folders["baseline"])
    with changed.config.unlocked():
        changed.config.sample.steps = 7
    folders["baseline"] = bundle.save(tmp_path / "other", changed)
    with pytest.raises(UserError, match="defaults of sampling"):
        shapes.open_models(folders)
