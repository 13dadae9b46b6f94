"""Training that starts from imports: what fits is taken, what reads the condition starts anew."""

from __future__ import annotations

import contextlib
import pathlib
import re

import flax.traverse_util as traverse
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from kaleido_jax import bundle, checkpoint, config, train, training_loop, warm_start
from kaleido_jax.errors import UserError
from kaleido_jax.interop import imports
from tests import foreign
from tests.tiny import tiny_config

T5_FIELDS = dict(
    vocab_size=1536, emb_dim=48, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=1, num_decoder_layers=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Imports of a T5 and of an MDM of one resolution."""
    folder = tmp_path_factory.mktemp("weights")
    foreign.huggingface_folder(folder / "hf")
    imports.plan_t5(folder / "hf", vokens=0).write(folder / "t5")
    save_file(foreign.small_mdm(), folder / "m.safetensors")
    imports.plan_mdm(folder / "m.safetensors").write(folder / "mdm")
    return folder


def kaleido_config(weights, denoiser=None, **t5):
    """A training config for Kaleido whose sizes are the imports', and what differs."""
    cfg = tiny_config("train.num_steps=1", "train.checkpoint_every=1", "model.freeze_encoder=True")
    cfg.model.latent_decoder.logits_via_embedding = False  # as in T5 1.1
    stated = bundle.read_config(weights / "mdm").model.denoiser.to_dict()
    with cfg.unlocked():
        cfg.init_from = (str(weights / "t5"), str(weights / "mdm"))
        cfg.vocabulary.num_vokens = 0
        cfg.data.image_size = 32
        for part in ("text_encoder", "latent_decoder"):
            cfg.model[part].update(T5_FIELDS | t5)
        cfg.model.denoiser = ConfigDict(stated | (denoiser or {}))
    config.check(cfg)
    return cfg.lock()


def start(cfg):
    """Flat parameters at the start, the imports' as the config names them, and what was said."""
    trainer, said = train.Trainer(cfg, jax.devices()[:1]), []
    # Zeros in the place of an initialisation, which takes long to compile.
    zeros = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        trainer.abstract_state(),
    )
    state = training_loop._start_from(zeros, cfg, said.append)
    merged = traverse.flatten_dict({**state.params, **state.frozen}, sep="/")
    found = {}
    for folder in cfg.init_from:
        found |= {k: np.asarray(v) for k, v in bundle.read_tensors(pathlib.Path(folder)).items()}
    return {name: np.asarray(value) for name, value in merged.items()}, found, said, state


def test_what_fits_is_taken(weights):
    got, found, said, state = start(kaleido_config(weights))
    assert got.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    parts = ["text_encoder", "latent_decoder", "denoiser"]
    assert [line.partition(":")[0] for line in said] == parts


@pytest.mark.slow
def test_training_goes_on_from_there(weights, tmp_path):
    training_loop.train(kaleido_config(weights), tmp_path, say=lambda line: None)
    trained = traverse.flatten_dict(bundle.load(tmp_path).params, sep="/")
    found = bundle.read_tensors(weights / "t5") | bundle.read_tensors(weights / "mdm")
    assert trained.keys() == found.keys()
    moved = 0
    for name, tensor in found.items():
        apart = np.abs(np.asarray(trained[name]) - np.asarray(tensor)).max()
        assert apart == 0 if name.startswith("text_encoder") else apart < 1e-2, name
        moved += apart > 0
    assert moved > 100


def more_vokens(weights, folder, **changes):
    """A run with a tied embedding, and the config of one with 100 vokens that begins there."""
    cfg = kaleido_config(weights)
    with cfg.unlocked():
        cfg.model.latent_decoder.logits_via_embedding = True
        cfg.init_from = ()
    low = ConfigDict(cfg.to_dict())
    state = train.Trainer(low, jax.devices()[:1]).init()
    params = jax.tree.map(np.asarray, {**state.params, **state.frozen})
    bundle.save(folder, bundle.Bundle(low, params, bundle.make_vocabulary(low), "", None))
    with cfg.unlocked():
        cfg.init_from = (str(folder),)
        cfg.vocabulary.num_vokens = 100
        cfg.model.latent_decoder.vocab_size = 1664
        for key, value in changes.items():
            cfg.model[key] = value
    return cfg


@pytest.mark.slow
def test_more_vokens_leave_the_other_tokens_as_they_were(weights, tmp_path):
    cfg = more_vokens(weights, tmp_path / "run")
    trainer = train.Trainer(cfg, jax.devices())
    halves = jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, 0.5, leaf.dtype), leaf.sharding),
        trainer.abstract_state(),
    )
    said = []
    state = training_loop._start_from(halves, cfg, said.append)
    got = traverse.flatten_dict({**state.params, **state.frozen}, sep="/")
    found = bundle.starting_point(tmp_path / "run", True)[1]
    table = "latent_decoder/token_embedder/embedding"
    for name in got.keys() - {table}:
        np.testing.assert_array_equal(got[name], found[name], err_msg=name)
    old, new = np.split(np.asarray(got[table]), [1536])
    np.testing.assert_array_equal(old, found[table])
    np.testing.assert_array_equal(new, np.full((128, old.shape[1]), 0.5))  # as initialised
    wanted = trainer.abstract_state().params["latent_decoder"]["token_embedder"]["embedding"]
    assert got[table].sharding.is_equivalent_to(wanted.sharding, 2)
    assert any("tokens after the first 1536 start anew" in line for line in said)


@pytest.mark.slow
def test_more_vokens_only_where_they_can_be_learned(weights, tmp_path, monkeypatch):
    """Not of another tokenizer, not frozen, not in a head of its own, not without vokens."""
    wrong = pytest.raises(UserError, match=r"embedding is \[1536, 48\], should be \[1664, 48\]")
    frozen = dict(train_decoder="last:1", train_vocabulary=False)
    with wrong:
        start(more_vokens(weights, tmp_path / "frozen", **frozen))
    cfg = more_vokens(weights, tmp_path / "run")
    for section, key, value in (
        ("vocabulary", "num_vokens", 0),
        ("latent_decoder", "logits_via_embedding", False),
    ):
        other = cfg.copy_and_resolve_references()
        with other.unlocked():
            (other if section == "vocabulary" else other.model)[section][key] = value
        with wrong:
            start(other)
    monkeypatch.setattr(bundle, "tokenizer_of", lambda folder: b"another")
    with wrong:
        start(cfg)


def test_another_condition_starts_anew(weights):
    """As MDM (2048 wide, nothing learned) to Kaleido (1024 wide, 2 learned layers)."""
    cfg = kaleido_config(weights, dict(conditioning_feature_proj_dim=16, num_lm_head_layers=2))
    got, found, said, _ = start(cfg)
    new = {n for n in got if n not in found or got[n].shape != found[n].shape}
    assert any("/condition/project/" in n for n in new)
    assert any("/condition/layer_1/" in n for n in new)
    assert any("/cross_kv/" in n for n in new)
    assert all(
        any(f"/{part}/" in n for part in ("condition", "cross_norm", "cross_kv")) for n in new
    )
    for name in found.keys() - new:
        np.testing.assert_array_equal(got[name], found[name], err_msg=name)
    assert f"{len(new)} parameters start anew" in said[-1]


def test_a_denoiser_becomes_the_inner_one_of_two(weights):
    stated = bundle.read_config(weights / "mdm").model.denoiser.to_dict()
    del stated["name"]
    outer = dict(
        name="nested_unet", resolution_channels=(32, 32), num_resnets_per_resolution=(1, 1),
        num_attention_layers=(0, 0), temporal_dim=128, skip_normalization=True, inner=stated,
    )  # fmt: skip
    cfg = kaleido_config(weights)
    with cfg.unlocked():
        cfg.model.denoiser = ConfigDict(outer)
    got, found, said, _ = start(cfg)
    stem = "trunk/stem/kernel"
    np.testing.assert_array_equal(got[f"denoiser/inner/{stem}"], found[f"denoiser/{stem}"])
    assert "start anew" in said[-1] and "denoiser/outer/stem/kernel" in got


@pytest.mark.parametrize("width", [64, 32])  # another than the coarse levels have, and the same
def test_a_denoiser_becomes_the_coarse_levels_of_a_finer_one(weights, width):
    stated = bundle.read_config(weights / "mdm").model.denoiser
    finer = {
        "resolution_channels": (width, *stated.resolution_channels),
        "num_resnets_per_resolution": (1, *stated.num_resnets_per_resolution),
        "num_attention_layers": (0, *stated.num_attention_layers),
    }
    got, found, said, _ = start(kaleido_config(weights, finer))
    level = re.compile(r"(denoiser/trunk/(?:down|up)_)(\d+)/")
    seen = set()
    for name in (n for n in got if n.startswith("denoiser/")):
        depth = int(level.match(name)[2]) if level.match(name) else None
        former = level.sub(lambda m: f"{m[1]}{int(m[2]) - 1}/", name)
        ends = ("stem/", "head_norm/", "head_conv/")
        if depth == 0 or name.startswith(tuple(f"denoiser/trunk/{end}" for end in ends)):
            anew = True
        else:  # beside the new level some have another size
            anew = depth == 1 and (former not in found or found[former].shape != got[name].shape)
        seen.add((depth, anew))
        if anew:
            assert not got[name].any(), name  # as before the start: zeros here
        else:
            np.testing.assert_array_equal(got[name], found[former], err_msg=name)
    assert {(0, True), (1, False), (2, False), (None, True), (None, False)} <= seen
    assert "start anew" in said[-1]
    # Levels of other sizes are a mistake, as before.
    finer["resolution_channels"] = (32, 64, *stated.resolution_channels[1:])
    with pytest.raises(UserError, match="should be"):
        start(kaleido_config(weights, finer))


def test_scanned_layers_take_unscanned_weights(weights):
    got, found, _, _ = start(kaleido_config(weights, scan_layers=True))
    layers = [found[f"latent_decoder/decoder/layers_{i}/mlp/wo/kernel"] for i in range(2)]
    np.testing.assert_array_equal(
        got["latent_decoder/decoder/layers/mlp/wo/kernel"], np.stack(layers, 1)
    )


def test_what_does_not_fit_is_listed(weights, tmp_path):
    with pytest.raises(UserError) as caught:
        start(kaleido_config(weights, mlp_dim=64))
    line = str(caught.value)
    assert "\n" not in line and "wi_0/kernel is [48, 32], should be [48, 64]" in line
    with pytest.raises(UserError, match=r"import it with --vokens .* is \[1536, 48\]"):
        start(kaleido_config(weights, vocab_size=1664))
    with pytest.raises(UserError, match="which is not a folder"):
        warm_start.warm_start({}, None, [str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="none of the model's parts"):
        warm_start.warm_start({}, None, [str(weights / "t5")])


@pytest.mark.slow
def test_a_run_at_low_resolution_goes_on_inside_a_nested_network(tmp_path):
    """Progressive training (App. B.2): parameters and average of the workdir, each to its own."""
    low = tiny_config("data.image_size=16")
    trainer = train.Trainer(low, jax.devices()[:1])
    draws = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: draws.normal(0, 0.3, leaf.shape).astype(leaf.dtype), trainer.abstract_state()
    )
    workdir = tmp_path / "low"
    bundle.start_workdir(workdir, low, bundle.make_vocabulary(low))
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(7, state.as_dict(), {"step": 7})

    high = tiny_config(nested=True)
    with high.unlocked():
        high.init_from = (str(workdir),)
    nested = train.Trainer(high, jax.devices()[:1])
    fresh = nested.abstract_state()
    fresh = jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, 0.5, leaf.dtype), leaf.sharding), fresh
    )
    said = []
    started = training_loop._start_from(fresh, high, said.append)
    for kind in ("params", "ema"):
        new, old = getattr(started, kind), getattr(state, kind)
        for part in ("text_encoder", "latent_decoder"):
            jax.tree.map(np.testing.assert_array_equal, new[part], old[part])
        jax.tree.map(np.testing.assert_array_equal, new["denoiser"]["inner"], old["denoiser"])
        assert {float(x.min()) for x in jax.tree.leaves(new["denoiser"]["outer"])} == {0.5}
    assert any(line.startswith("denoiser") and "start anew" in line for line in said)

    # With nothing from the outer network, the inner one predicts what it did alone.
    batch = train.make_loader(high, bundle.make_vocabulary(high)).batch(0)
    noise = draws.normal(size=(8, 16, 16, 3)).astype(np.float32)
    above = draws.normal(size=(8, 32, 32, 3)).astype(np.float32)
    times = np.linspace(0, 999, 8, dtype=np.float32)

    def predict(model, params, pyramid):
        tokens = (batch.caption_tokens, batch.latent_tokens)
        return jax.jit(model.apply)({"params": params}, *tokens, pyramid, times)[-1]

    def with_way_in(value):
        denoiser = {**started.params["denoiser"]}
        denoiser["to_inner"] = jax.tree.map(
            lambda x: np.full(x.shape, value, x.dtype), denoiser["to_inner"]
        )
        return {**started.params, "denoiser": denoiser}

    alone = predict(trainer.model, state.params, (noise,))
    inside = predict(nested.model, with_way_in(0.0), (above, noise))
    np.testing.assert_allclose(inside, alone, rtol=1e-5, atol=1e-5)
    assert np.abs(predict(nested.model, with_way_in(0.1), (above, noise)) - alone).max() > 0.1
