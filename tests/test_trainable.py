"""Training a part of the decoder: what stays, what moves, and that nobody else sees adapters."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, checkpoint, config, lora, optim, train, trainable
from kaleido_jax.errors import UserError
from kaleido_jax.trainable import Trainable
from kaleido_jax.training_loop import train as run_training
from tests.test_train import first_batch, leaves, one_device, quick_config

DEPTH = "model.latent_decoder.num_decoder_layers=3"
SCANNED = "model.latent_decoder.scan_layers=True"
LORA = ("model.train_decoder=lora:2", "model.lora_kernels=query,wo", "model.lora_alpha=4")
WO = "latent_decoder/decoder/layers/mlp/wo/lora_b"
PARTS = {
    "all": (),
    "last": ("model.train_decoder=last:1", "model.train_vocabulary=False"),
    "last_scanned": ("model.train_decoder=last:2", SCANNED),
    "lora": (*LORA, "model.freeze_encoder=True"),
    "lora_scanned": (*LORA, SCANNED),
}


def part_config(name, *overrides):
    # From the first step at full rate: two steps then move what they move by far.
    return quick_config(DEPTH, "optim.warmup_steps=0", *PARTS[name], *overrides)


def abstract(name):
    trainer = one_device(part_config(name))
    return trainer, trainer.abstract_state()


def decoder_names(tree):
    prefix = "latent_decoder/"
    return {n.removeprefix(prefix): v for n, v in leaves_of(tree).items() if n.startswith(prefix)}


def leaves_of(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_splitting_and_merging_are_inverse():
    params = {"text_encoder": {"a": 1}, "denoiser": {"b": 2}}
    frozen = Trainable(freeze_encoder=True)
    assert trainable.split(params, frozen) == (
        {"denoiser": {"b": 2}},
        {"text_encoder": {"a": 1}},
    )
    assert trainable.merge(*trainable.split(params, frozen)) == params
    assert trainable.split(params, Trainable(freeze_encoder=False)) == (params, {})
    stack = np.arange(24.0).reshape(2, 4, 3)
    decoder = {"latent_decoder": {"decoder": {"layers": {"mlp": {"kernel": stack}}}}}
    what = Trainable(freeze_encoder=False, layers=1, num_layers=4)
    trained, rest = trainable.split(decoder, what)
    assert leaves_of(trained).popitem()[1].shape == (2, 1, 3)
    np.testing.assert_array_equal(leaves_of(trainable.merge(trained, rest)).popitem()[1], stack)
    whole = trainable.split(decoder, Trainable(freeze_encoder=False, layers=4, num_layers=4))
    assert leaves_of(whole[0]).popitem()[1].shape == (2, 4, 3) and whole[1] == {}


@pytest.mark.parametrize("name", ["all", pytest.param("last", marks=pytest.mark.slow), "lora"])
def test_whatever_part_of_t5_trains_learns_at_its_share_of_the_rate(name):
    cfg = part_config(name, "optim.text_rate=0.125", "optim.decay=constant")
    params = jax.tree.map(lambda a: jnp.ones(a.shape), one_device(cfg).abstract_state().params)
    optimizer = optim.make_optimizer(cfg)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {"latent_decoder", "denoiser"} <= set(updates)
    for part, tree in updates.items():
        rate = cfg.optim.learning_rate * (1 if part == "denoiser" else 0.125)
        for leaf in jax.tree.leaves(tree):
            np.testing.assert_allclose(leaf, -rate, rtol=1e-3)


@pytest.mark.parametrize("name", PARTS)
def test_what_trains_and_the_slots_that_it_needs(name):
    _, state = abstract(name)
    trained = decoder_names(state.params)
    slots = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    counted = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 2 * counted <= slots <= 2 * counted + 4  # two moments, and the counters
    if name == "last":
        assert trained.keys() == {
            n for n in decoder_names(abstract("all")[1].params) if "layers_2" in n
        } | {"decoder/decoder_norm/scale"}
    if name == "last_scanned":
        frozen = decoder_names(state.frozen)
        kernel = "decoder/layers/mlp/wo/kernel"
        assert (trained[kernel].shape[1], frozen[kernel].shape[1]) == (2, 1)
        assert "token_embedder/embedding" in trained and "decoder/relpos_bias" not in trained
    if name.startswith("lora"):
        words = {n for n in trained if "token_embedder" not in n and "logits_dense" not in n}
        assert words and all(n.rsplit("/", 1)[-1] in ("lora_a", "lora_b") for n in words)
        assert {n.split("/")[-2] for n in words} == {"query", "wo"}
        assert ("text_encoder" in state.frozen) == (name == "lora")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.train_decoder=some", "one of 'all', 'last:N'"),
        ("model.train_decoder=last:0", "one of 'all', 'last:N'"),
        ("model.train_decoder=last:4", "the decoder has 3 layers"),
        ("model.lora_kernels=query,qkv", "'model.lora_kernels'"),
        ("model.lora_kernels=()", "'model.lora_kernels'"),
    ],
)
def test_words_that_mean_nothing_are_one_clear_line(override, words):
    cfg = quick_config(DEPTH, *LORA, override)
    with pytest.raises(UserError, match=words) as error:
        train.Trainer(cfg)
    assert "\n" not in str(error.value)


def test_frozen_parameters_stay_to_the_bit_and_the_others_move(tmp_path):
    trainer = one_device(part_config("last_scanned"))
    state = trainer.init()
    before = {kind: leaves(getattr(state, kind)) for kind in ("params", "frozen")}
    for step in range(2):
        vocabulary = bundle.make_vocabulary(trainer.config)
        batch = train.make_loader(trainer.config, vocabulary).batch(step)
        state, metrics = trainer.step(state, trainer.put(batch))
    assert np.isfinite(float(metrics["loss"]))
    for leaf, value in leaves(state.frozen).items():
        np.testing.assert_array_equal(value, before["frozen"][leaf], err_msg=leaf)
    moved = [n for n, v in leaves(state.params).items() if np.any(v != before["params"][n])]
    assert any("latent_decoder/decoder/layers" in leaf for leaf in moved)
    averages = leaves(state.ema)
    assert all(np.any(averages[n] != before["params"][n]) for n in moved)
    # Layers that lie in two arrays are read back as one.
    bundle.start_workdir(tmp_path, trainer.config, vocabulary)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(2, state.as_dict(), {"step": 2})
    got = leaves(bundle.load(tmp_path).params)
    wanted = leaves(trainable.merge(state.ema, state.frozen))
    assert got.keys() == wanted.keys()
    for leaf, value in wanted.items():
        np.testing.assert_array_equal(got[leaf], value, err_msg=leaf)


@pytest.mark.parametrize("name", ["lora_scanned", pytest.param("lora", marks=pytest.mark.slow)])
def test_adapters_start_as_nothing_and_merge_to_the_same_model(name):
    cfg = part_config(name)
    trainer, batch = one_device(cfg), first_batch(cfg)
    state = trainer.init()
    plain_cfg, plain = bundle.plain_model(cfg, trainable.merge(state.params, state.frozen))
    assert plain_cfg.model.train_decoder == "all" and cfg.model.train_decoder == "lora:2"
    plain_trainer = one_device(plain_cfg)
    fresh = plain_trainer.abstract_state()
    wanted = leaves_of(trainable.merge(fresh.params, fresh.frozen))
    assert {n: v.shape for n, v in leaves(plain).items()} == {n: v.shape for n, v in wanted.items()}

    def losses(params, merged):
        one = jax.jit(trainer.loss)(params, state.frozen, batch, jnp.int32(0))[1]
        two = jax.jit(plain_trainer.loss)(merged, {}, batch, jnp.int32(0))[1]
        return float(one["loss_ar"]), float(two["loss_ar"])

    at_start = losses(state.params, plain)
    assert at_start[0] == pytest.approx(at_start[1], rel=1e-6)
    key = jax.random.key(0)
    grown = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), state.params)
    both = losses(grown, lora.merge(trainable.merge(grown, state.frozen), cfg.model.lora_alpha))
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert abs(both[0] - at_start[0]) > 1e-3


@pytest.mark.slow
def test_runs_with_adapters_go_on_and_leave_a_model_without(tmp_path):
    cfg = part_config("lora_scanned")
    whole = run_training(cfg, tmp_path / "whole", say=lambda line: None)
    start = one_device(cfg).init()
    for name, value in leaves(whole.frozen).items():
        np.testing.assert_array_equal(value, leaves(start.frozen)[name], err_msg=name)
    assert np.any(leaves(whole.params)[WO] != leaves(start.params)[WO])
    short = part_config("lora_scanned", "train.num_steps=2")
    run_training(short, tmp_path / "parts", say=lambda line: None)
    parts = run_training(cfg, tmp_path / "parts", say=lambda line: None)
    for name, value in leaves(whole.params).items():
        np.testing.assert_array_equal(value, leaves(parts.params)[name], err_msg=name)
    model = bundle.load(tmp_path / "parts")
    assert model.config.model.train_decoder == "all"
    _, averaged = bundle.plain_model(cfg, trainable.merge(parts.ema, parts.frozen))
    got = leaves(model.params)
    for name, value in leaves(averaged).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    again = bundle.load(bundle.save(tmp_path / "export", model))
    assert got.keys() == leaves(again.params).keys() and not any("lora" in n for n in got)
    # The next run starts from it, with adapters of its own that are nothing yet.
    with cfg.unlocked():
        cfg.init_from = (str(tmp_path / "parts"),)
        cfg.train.num_steps = 1
    config.check(cfg)
    said = []
    run_training(cfg, tmp_path / "next", say=said.append)
    assert any("start anew" in line and "lora_a" in line for line in said)
