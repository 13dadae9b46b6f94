"""Parts of a batch one after the other, batches of mixed resolutions, frozen parameters in fewer
bits: what must stay the same does, and what is rounded is bounded."""

from __future__ import annotations

import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, diffusion, losses, mesh, quantize, train
from kaleido_jax.errors import UserError
from kaleido_jax.models import layers, nested_unet, unet
from kaleido_jax.models.t5 import T5Config, TextEncoder, stack_layers
from tests.tiny import tiny_config


def toy(*overrides):
    return tiny_config("model.freeze_encoder=True", *overrides, name="toy")


def one_device(*overrides):
    return train.Trainer(toy(*overrides), devices=jax.devices()[:1])


def first_batch(cfg):
    return train.make_loader(cfg, bundle.make_vocabulary(cfg)).batch(0)


def noisy(params, scale=0.1):
    """Parameters away from their start, so that nothing is 0."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + scale * rng.normal(size=x.shape) for x in leaves])


def test_parts_add_up_to_the_gradient_of_the_batch():
    whole, parts = one_device(), one_device("train.accumulate=4")
    state, batch = whole.init(), first_batch(whole.config)
    state = state.replace(params=jax.tree.map(lambda x: jnp.float32(x), noisy(state.params)))
    # Uneven numbers of tokens: a mean of means would not do.
    tokens = batch.latent_tokens.copy()
    tokens[::3, 2:] = 0
    batch = batch.replace(latent_tokens=tokens)
    found = []
    for trainer in (whole, parts):
        with mesh.use_mesh(trainer.mesh):
            found.append(jax.jit(trainer.gradients)(state, batch))
    for (name, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-6 + 1e-5 * np.abs(a).max(), err_msg=name
        )


def test_parts_have_rows_of_every_device_and_whole_units():
    trainer = train.Trainer(toy("train.batch_size=32", "train.accumulate=2"))
    with mesh.use_mesh(trainer.mesh):
        parts = jax.jit(trainer._in_parts)(jnp.arange(32))
    np.testing.assert_array_equal(parts[0], np.arange(0, 32, 2))
    assert parts.sharding.shard_shape(parts.shape) == (2, 2)
    with pytest.raises(UserError, match=r"multiple of the 8 devices .* times the 3 parts"):
        train.Trainer(toy("train.accumulate=3"))
    with pytest.raises(UserError, match="accumulate' is 0"):
        train.Trainer(toy("train.accumulate=0"))


def test_rows_of_higher_resolutions_are_the_first_of_each_group():
    x = jnp.arange(8)
    np.testing.assert_array_equal(diffusion.first_rows(x, 6), [0, 1, 2, 4, 5, 6])
    spread = diffusion.spread_rows(diffusion.first_rows(x, 6), 8)
    np.testing.assert_array_equal(spread, [0, 1, 2, 0, 4, 5, 6, 0])
    images = tuple(jnp.zeros((n, 1, 1, 1)) for n in (4, 6, 8))
    np.testing.assert_array_equal(diffusion.rows_of_highest(x, images), [0, 1, 4, 5])
    cfg = tiny_config("train.mixed_ratio=(3, 1)", nested=True)
    config = losses.LossConfig.from_config(cfg, (2, 1))
    mixed = config.mix((x, 10 * x))
    np.testing.assert_array_equal(mixed[0], [0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(mixed[1], 10 * x)
    for wrong in ("(1,)", "(0, 1)", "(1, -1)", "(0.5, 0.5)"):
        with pytest.raises(UserError, match=r"'train.mixed_ratio' is .*2 resolutions"):
            losses.LossConfig.from_config(tiny_config(f"train.mixed_ratio={wrong}"), (2, 1))


def test_a_mixed_batch_is_the_whole_network_on_some_rows_and_the_inner_one_on_the_rest():
    inner = unet.Config(
        resolution_channels=(8,), num_resnets_per_resolution=(1,), num_attention_layers=(1,),
        num_heads=2, temporal_dim=16, num_groups_norm=4, num_groups_attention=4,
        conditioning_feature_dim=8, skip_mid_blocks=True,
    )  # fmt: skip
    config = nested_unet.Config(
        resolution_channels=(8, 8), num_resnets_per_resolution=(1, 1),
        num_attention_layers=(0, 0), num_groups_norm=4, inner=inner,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    images = tuple(jnp.float32(rng.normal(size=(4, side, side, 3))) for side in (8, 4))
    time, states = jnp.arange(4.0), jnp.float32(rng.normal(size=(4, 3, 8)))
    mask = jnp.array(rng.random((4, 3)) < 0.7)
    model = nested_unet.Model(config)
    args = (time, states, mask)
    params = noisy(nn.unbox(jax.jit(model.init)(jax.random.key(0), images, *args)["params"]))
    run = jax.jit(lambda images: model.apply({"params": params}, images, *args))
    rows = [0, 2]  # of (1, 1)
    high, low = run((images[0][np.array(rows)], images[1]))
    whole_high, whole_low = run(images)
    np.testing.assert_allclose(high, whole_high[np.array(rows)], atol=1e-5)
    np.testing.assert_allclose(low[np.array(rows)], whole_low[np.array(rows)], atol=1e-5)
    alone = unet.Model(inner).apply({"params": params["inner"]}, images[1:], *args)[0]
    assert np.abs(low[1] - whole_low[1]).max() > 1e-3
    np.testing.assert_allclose(low[np.array([1, 3])], alone[np.array([1, 3])], atol=1e-5)


def test_eight_bit_kernels_are_off_by_half_a_scale_and_take_a_quarter():
    rng = np.random.default_rng(2)
    kernel = jnp.float32(rng.normal(size=(64, 3, 32)) * np.exp(rng.normal(size=(1, 3, 32))))
    tree = {"mlp": {"kernel": kernel}, "norm": {"scale": jnp.ones(64)}}
    stored = quantize.store(tree, "int8")
    back = quantize.restore(stored)
    scale = np.abs(np.asarray(kernel)).max(axis=0) / 127
    assert (np.abs(back["mlp"]["kernel"] - kernel) <= scale * 0.5001).all()
    assert quantize.is_rounded(stored) and not quantize.is_rounded(back)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(stored["mlp"]) < 0.27 * size(tree["mlp"])
    assert size(quantize.store(tree, "bfloat16")) == size(tree) / 2
    assert quantize.store(tree, "float32")["mlp"]["kernel"] is kernel
    assert not quantize.restore(quantize.store({"kernel": jnp.zeros((2, 2))}, "int8"))[
        "kernel"
    ].any()


@pytest.mark.parametrize("scan", [False, True])
def test_the_encoder_reads_eight_bit_kernels_a_layer_at_a_time(scan):
    cfg = T5Config(
        vocab_size=32, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2,
        scan_layers=scan,
    )  # fmt: skip
    tokens = jnp.array([[3, 4, 5, 1], [6, 1, 0, 0]])
    plain = TextEncoder(T5Config(**{**cfg.__dict__, "scan_layers": False}))
    params = nn.unbox(plain.init(jax.random.key(0), tokens)["params"])
    states = plain.apply({"params": params}, tokens)
    params = stack_layers(params) if scan else params
    stored = quantize.store(params, "int8")
    got = TextEncoder(cfg).apply({"params": stored}, tokens)
    same = TextEncoder(cfg).apply({"params": quantize.restore(stored)}, tokens)
    np.testing.assert_allclose(got, same, atol=1e-5)
    error = np.abs(got - states)[np.asarray(tokens) != 0]
    assert 0 < error.max() < 0.05 * np.abs(states).max()


@pytest.mark.slow
def test_a_run_with_a_rounded_encoder_leaves_it_as_it_is_and_moves_the_loss_little():
    trainer = one_device("model.frozen_storage=int8")
    state, batch = trainer.init(), first_batch(trainer.config)
    names = {k[-1] for k in traverse.flatten_dict(state.frozen)}
    assert {"int8", "scale"} < names
    exact = one_device()
    _, wanted = exact.step(exact.init(), exact.put(batch))
    kept = jax.device_get(state.frozen)
    state, metrics = trainer.step(state, trainer.put(batch))
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=0.01)
    assert float(metrics["loss"]) != float(wanted["loss"])
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(state.frozen))
    with pytest.raises(UserError, match=r"'model\.frozen_storage' is 'int4'; one of float32"):
        one_device("model.frozen_storage=int4")
    with pytest.raises(UserError, match=r"'int8'; it needs model\.freeze_encoder=True"):
        one_device("model.frozen_storage=int8", "model.freeze_encoder=False")


def test_only_the_encoder_is_kept_in_fewer_bits():
    """The decoder's frozen layers are joined with those that train."""
    trainer = one_device("model.frozen_storage=int8", "model.train_decoder=last:1")
    frozen = trainer.abstract_state().frozen
    kinds = {part: {str(x.dtype) for x in jax.tree.leaves(t)} for part, t in frozen.items()}
    assert kinds["text_encoder"] == {"int8", "float32", "bfloat16"}
    assert kinds["latent_decoder"] == {"float32"}


def test_a_norm_keeps_its_input_for_the_backward_pass_and_no_wider_copy():
    norm = layers.GroupNorm(4, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
    params = norm.init(jax.random.key(1), x)

    def loss(x, dtype):
        return (norm.apply(params, x.astype(dtype)).astype(jnp.float32) ** 3).sum()

    kept = jax.tree.leaves(jax.vjp(lambda x: norm.apply(params, x), x.astype(jnp.bfloat16))[1])
    assert not [leaf for leaf in kept if leaf.shape == x.shape and leaf.dtype == jnp.float32]
    got, want = (jax.grad(loss)(x, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.3)
