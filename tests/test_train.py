"""The train step and the loop: what moves, what does not, and going on to the bit."""

from __future__ import annotations

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kaleido_jax import bundle, config, losses, train
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido
from tests.records import jpeg, record, write_folder
from tests.tiny import tiny_config


def first_batch(cfg):
    return train.make_loader(cfg, bundle.make_vocabulary(cfg)).batch(0)


def leaves(tree):
    return {k: np.asarray(v) for k, v in traverse.flatten_dict(tree, sep="/").items()}


def one_device(cfg):
    return train.Trainer(cfg, devices=jax.devices()[:1])


def whole_params(state):
    return {**state.params, **state.frozen}


def quick_config(*overrides):
    """The toy's config, whose denoiser compiles in no time: the rest of the model is the same.

    With a constant rate the program does not depend on the number of steps either.
    """
    return tiny_config("optim.decay=constant", *overrides, name="toy")


@pytest.fixture(scope="module")
def setup():
    cfg = quick_config()
    trainer = one_device(cfg)
    return cfg, trainer, trainer.init(), first_batch(cfg)


def loss_of(cfg, params, batch, step=0):
    trainer = one_device(cfg)
    return losses.joint_loss(
        trainer.model, params, batch, cfg.seed, jnp.int32(step), trainer.loss_config
    )


def test_the_loss_is_the_sum_that_the_paper_names():
    cfg = tiny_config(nested=True)
    trainer = one_device(cfg)
    _, metrics = trainer.step(trainer.init(), trainer.put(first_batch(cfg)))
    per_resolution = metrics["loss_dm_32"] + metrics["loss_dm_16"]
    assert metrics["loss_dm"] == pytest.approx(float(per_resolution), rel=1e-6)
    eta = cfg.train.latent_weight
    total = metrics["loss_dm"] + eta * metrics["loss_ar"]
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-6)


def test_eta_zero_leaves_only_the_diffusion_loss_to_train_the_decoder(setup):
    cfg, _, state, batch = setup
    cfg = quick_config("train.latent_weight=0.0")
    trainer = one_device(cfg)
    # A zero-initialised output would pass no gradient on: make it pass.
    params = jax.tree.map(lambda x: x + 0.1, state.params)
    grads, metrics = jax.jit(jax.grad(trainer.loss, has_aux=True))(
        params, state.frozen, batch, state.step
    )
    assert metrics["loss"] == metrics["loss_dm"] and metrics["loss_ar"] > 0
    found = leaves(grads["latent_decoder"])
    assert not found["decoder/logits_dense/kernel"].any()
    assert np.abs(found["decoder/layers_0/mlp/wo/kernel"]).max() > 0


def test_the_baseline_is_the_same_code_without_z(setup):
    *_, batch = setup
    cfg = quick_config("latents=()")
    trainer = one_device(cfg)
    state, metrics = trainer.step(trainer.init(), trainer.put(first_batch(cfg)))
    assert sorted(state.params) == ["denoiser", "text_encoder"]
    assert "loss_ar" not in metrics and metrics["loss"] == metrics["loss_dm"]
    assert first_batch(cfg).latent_tokens.shape == (8, 0)
    np.testing.assert_array_equal(first_batch(cfg).image, batch.image)


def test_a_dropped_condition_hides_caption_and_latents_but_not_from_the_latent_loss(setup):
    _, _, state, batch = setup
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), whole_params(state)
    )
    other = batch.replace(
        caption_tokens=batch.caption_tokens[::-1], latent_tokens=batch.latent_tokens[::-1]
    )
    always = quick_config("train.cond_drop_rate=1.0")
    never = quick_config("train.cond_drop_rate=0.0")
    _, dropped = loss_of(always, params, batch)
    _, dropped_other = loss_of(always, params, other)
    _, kept = loss_of(never, params, batch)
    _, kept_other = loss_of(never, params, other)
    assert dropped["loss_dm"] == dropped_other["loss_dm"]
    assert kept["loss_dm"] != kept_other["loss_dm"]
    assert kept["loss_dm"] != dropped["loss_dm"]
    assert dropped["loss_ar"] == kept["loss_ar"]


def test_the_null_condition_is_the_empty_caption_alone(setup):
    _, trainer, state, _ = setup
    variables = {"params": whole_params(state)}
    null = trainer.model.apply(variables, 2, 5, method="null_condition")
    empty = trainer.model.apply(variables, jnp.array([[1]]), method="encode")
    np.testing.assert_array_equal(null.mask, [[True] + [False] * 4] * 2)
    np.testing.assert_allclose(null.states[1, 0], empty.states[0, 0], rtol=1e-6)
    assert not null.states[:, 1:].any()


def test_the_last_decoder_state_has_read_all_of_z_and_padding_changes_nothing(setup):
    _, trainer, state, _ = setup
    variables = {"params": whole_params(state)}
    encoded = trainer.model.apply(variables, jnp.array([[5, 6, 1]]), method="encode")

    def run(z):
        return trainer.model.apply(variables, jnp.array([z]), encoded, method="latent_states")

    hidden, logits, mask = run([7, 8, 1])
    assert hidden.shape[1] == logits.shape[1] == 4 and mask.all()
    changed, _, _ = run([7, 8, 2])
    np.testing.assert_allclose(hidden[:, :3], changed[:, :3], atol=1e-6)
    assert np.abs(hidden[:, 3] - changed[:, 3]).max() > 1e-3
    padded, _, padded_mask = run([7, 8, 1, 0, 0])
    np.testing.assert_allclose(hidden, padded[:, :4], atol=1e-6)
    np.testing.assert_array_equal(padded_mask, [[True] * 4 + [False] * 2])
    assert not run([0, 0])[2].any()  # no latents: nothing of the decoder is read


def test_a_frozen_encoder_has_no_slots_and_does_not_move():
    cfg = quick_config("model.freeze_encoder=True")
    trainer = one_device(cfg)
    state = trainer.init()
    before = leaves(state.frozen)
    assert list(state.frozen) == ["text_encoder"] and "text_encoder" not in state.params
    slots = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(s.size for s in slots) == 2 * sum(p.size for p in jax.tree.leaves(state.params))
    params = leaves(state.params)
    after, _ = trainer.step(state, trainer.put(first_batch(cfg)))
    for name, value in leaves(after.frozen).items():
        np.testing.assert_array_equal(value, before[name])
    moved = [name for name, v in leaves(after.params).items() if (v != params[name]).any()]
    assert any(name.startswith("latent_decoder") for name in moved)
    assert any(name.startswith("denoiser") for name in moved)


@pytest.mark.slow
def test_parameters_slots_and_batches_lie_where_the_rules_say():
    cfg = tiny_config("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    trainer = train.Trainer(cfg)
    state = trainer.init()
    path = ("latent_decoder", "decoder", "layers_0", "mlp", "wi_0", "kernel")

    def at(tree):
        return traverse.flatten_dict(tree)[path]

    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        assert at(tree).sharding.spec == PartitionSpec("fsdp", "tensor")
        assert at(tree).addressable_shards[0].data.shape == (8, 8)
    batch = trainer.put(first_batch(cfg))
    assert batch.image.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert batch.image.addressable_shards[0].data.shape[0] == 2
    after, _ = trainer.step(state, batch)
    assert at(after.params).sharding.spec == PartitionSpec("fsdp", "tensor")


def test_a_source_that_bears_missing_files_is_read_without_them(tmp_path):
    image = jpeg(np.full((64, 64, 3), 90, np.uint8))
    made = [record(f"k{i}", image, 64) for i in range(60)]
    folder = write_folder(tmp_path / "records", made, shards=5, file_format="tfrecord")
    (folder / "tiny-train.tfrecord-00000-of-00005").unlink()

    def loader(share):
        cfg = tiny_config()
        with cfg.unlocked():
            cfg.data.source = {"name": "records", "path": str(folder), "max_bad_fraction": share}
        return train.make_loader(cfg, bundle.make_vocabulary(cfg))

    lossy = loader(0.25)
    for step in range(8):
        lossy.batch(step)
    assert len(lossy.bad) == 12
    with pytest.raises(UserError, match="12 of 60 records are lost"):
        loader(0.1)


def test_a_batch_that_the_mesh_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size"):
        train.Trainer(tiny_config("train.batch_size=12"))


def test_a_decoder_too_small_for_its_vocabulary_is_refused():
    cfg = tiny_config("model.latent_decoder.vocab_size=256")
    with pytest.raises(UserError, match=r"model\.latent_decoder\.vocab_size"):
        train.make_loader(cfg, bundle.make_vocabulary(cfg))


def test_the_model_is_built_from_plain_config_values():
    model = Kaleido(train.KaleidoConfig.from_config(tiny_config()))
    assert model.cfg.ratios == (1,)
    wrong = tiny_config()
    with wrong.unlocked():
        wrong.model.latent_decoder.emb_dim = 32
    with pytest.raises(UserError, match="emb_dim"):
        train.KaleidoConfig.from_config(wrong)
    assert config.fingerprint(wrong) != config.fingerprint(tiny_config())
