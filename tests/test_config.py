"""Configs: typed overrides, the nearest key, and every shipped config builds."""

from __future__ import annotations

import pytest

from kaleido_jax import config as config_lib
from kaleido_jax import tokens
from kaleido_jax.errors import UserError
from kaleido_jax.losses import LossConfig
from kaleido_jax.models.kaleido import KaleidoConfig
from tests.tiny import CONFIGS

NAMES = sorted(p.stem for p in CONFIGS.glob("[!_]*.py"))


def load(*overrides, name="shapes"):
    return config_lib.load_config(str(CONFIGS / f"{name}.py"), overrides)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_checks_and_describes_a_model(name):
    cfg = load(name=name)
    model = KaleidoConfig.from_config(cfg)
    assert LossConfig.from_config(cfg, model.ratios).ratios == model.ratios
    again = config_lib.from_json(config_lib.to_json(cfg), name)
    assert config_lib.fingerprint(again) == config_lib.fingerprint(cfg)
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(cfg))


def test_base_is_the_paper():
    cfg = load(name="base")
    d = cfg.model.denoiser
    assert (d.resolution_channels, d.num_resnets_per_resolution) == ((64, 128, 256), (2, 2, 1))
    assert (d.inner.resolution_channels, d.inner.num_attention_layers) == (
        (256, 512, 768),
        (0, 1, 5),
    )
    o, t = cfg.optim, cfg.train
    assert (o.b1, o.b2, o.eps, o.learning_rate, o.warmup_steps, o.clip_norm, o.ema_decay) == (
        0.9,
        0.99,
        1e-8,
        1e-4,
        10_000,
        2.0,
        0.9999,
    )
    assert (t.batch_size, t.num_steps, cfg.sample.steps) == (512, 400_000, 250)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--config.train.num_steps=7", "train.num_steps", 7),
        ("train.latent_weight=1", "train.latent_weight", 1.0),
        ("optim.ema_warmup=false", "optim.ema_warmup", False),
        ("latents=()", "latents", ()),
        ("latents=text,bbox", "latents", ("text", "bbox")),
        ("diffusion.schedule=ddpm", "diffusion.schedule", "ddpm"),
        ("sample.guidance_interval=(0.3,0.85)", "sample.guidance_interval", (0.3, 0.85)),
    ],
)
def test_overrides_keep_the_type_of_their_field(override, key, value):
    got = dict(config_lib.flatten(load(override)))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_step=7", r"'train\.num_step'; the nearest is 'train\.num_steps'"),
        ("train.num_steps", "needs the form"),
        ("train=7", "is a group"),
        ("train.num_steps=many", "must be a int"),
        ("train.num_steps=1.5", "must be a int"),
        ("train.num_steps=0", "must be positive"),
        ("train.batch_size=-1", "must be positive"),
        ("train.cond_drop_rate=1.5", r"must be in \[0"),
        ("train.noisy_share=1.5", r"must be in \[0"),
        ("train.latent_weight=-1.0", "must not be negative"),
        ("train.noisy_steps=-1", "must not be negative"),
        ("optim.text_rate=-0.1", "must not be negative"),
        ("latents=('txt',)", "one of text, bbox, blob, voken"),
        ("data.latent_length=0", "positive length"),
        ("optim.ema_warmup=2", "must be a bool"),
        ("seed=-1", r"'seed' is -1; it must be in \[0, 4294967295\]"),
        (f"seed={2**70}", r"it must be in \[0, 4294967295\]"),
        ("optim.learning_rate=1e999", "must be a finite number"),
        ("optim.learning_rate=-1e-4", "must be positive"),
        ("optim.warmup_steps=-1", "must not be negative"),
        ("optim.b2=1.0", r"must be in \[0, 1\)"),
    ],
)
def test_bad_overrides_are_one_clear_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load(override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import missing_module", "ModuleNotFoundError"),
        ("x = 1", "get_config"),
        ("def get_config(): return 3", "must return a ConfigDict"),
    ],
)
def test_a_broken_config_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        config_lib.load_config(str(path))


def test_a_missing_config_names_those_that_there_are():
    with pytest.raises(UserError, match="shapes"):
        config_lib.load_config("no_such_config")


def test_lists_and_tuples_do_not_differ():
    cfg = load()
    with cfg.unlocked():
        cfg.latents = list(cfg.latents)
        cfg.data.source.parts = [{"name": "toy", "weights": [1, 2]}]
    kept = config_lib.from_json(config_lib.to_json(cfg), "config.json")
    assert config_lib.differences(kept, cfg) == []


def test_samples_are_not_drawn_every_minus_one_steps():
    with pytest.raises(UserError, match=r"'train\.sample_every' is -1; it must not be negative"):
        load("train.sample_every=-1")


def test_the_combined_shapes_count_places_from_the_vocabularys_sections():
    cfg = load(name="shapes_combined")
    vocabulary = tokens.Vocabulary.default(cfg.vocabulary.num_vokens)
    assert cfg.model.section_tokens == (vocabulary.section_offset, len(tokens.SECTIONS))
    assert cfg.model.latent_decoder.vocab_size == vocabulary.size
