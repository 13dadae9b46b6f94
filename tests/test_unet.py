"""UNet, nested UNet and MLP: what holds besides parity with ml-mdm."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax.errors import UserError
from kaleido_jax.interop import mdm, mdm_settings
from kaleido_jax.models import layers, mlp, nested_unet, unet
from tests.reference_rule import rule_array

SMALL = dict(num_heads=2, num_groups_norm=4, num_groups_attention=4, temporal_dim=16)
INNER = unet.Config(
    resolution_channels=(8, 8),
    num_resnets_per_resolution=(1, 1),
    num_attention_layers=(0, 1),
    use_attention_ffn=True,
    micro_conditioning={"scale": 64.0},
    conditioning_feature_dim=12,
    conditioning_feature_proj_dim=8,
    num_lm_head_layers=1,
    **SMALL,
)
MIDDLE = nested_unet.Config(
    resolution_channels=(4, 8),
    num_resnets_per_resolution=(1, 1),
    num_attention_layers=(0, 0),
    inner=INNER,
    micro_conditioning={"scale": 256.0, "score": 0.5},
    **SMALL,
)
OUTER = dataclasses.replace(MIDDLE, inner=MIDDLE, skip_normalization=True)
DEPTHS = {1: INNER, 2: MIDDLE, 3: OUTER}


def inputs(config, side: int = 4, batch: int = 2, length: int = 5):
    """Images, times, states and mask for a config; the last two tokens are padding."""
    rng = np.random.default_rng(0)
    sides = [side * ratio for ratio in config.ratios]
    images = tuple(
        jnp.asarray(rng.normal(size=(batch, s, s, config.channels)), jnp.float32) for s in sides
    )
    states = jnp.asarray(rng.normal(size=(batch, length, config.condition_dim)), jnp.float32)
    mask = jnp.arange(length)[None] < jnp.full((batch, 1), length - 2)
    return images, jnp.asarray([3.0, 700.0][:batch]), states, mask


def abstract(config):
    """Shapes of the boxed parameters."""
    init = nested_unet.build(config).init
    return jax.eval_shape(init, jax.random.key(0), *inputs(config))["params"]


def ruled(config):
    """Parameters from the rule: nothing is 0, so every path counts."""
    flat = flax.traverse_util.flatten_dict(nn.unbox(abstract(config)))
    state = mdm.to_mdm(
        flax.traverse_util.unflatten_dict({k: np.zeros(v.shape) for k, v in flat.items()}), config
    )
    return mdm.from_mdm({n: rule_array(n, v.shape, 1) for n, v in state.items()}, config)


@pytest.fixture(scope="module")
def params():
    return ruled(INNER)


@functools.cache
def compiled(config):
    """The compiled network, once per config."""
    return jax.jit(nested_unet.build(config).apply, static_argnames=("train",))


def predict(config, params, *args, **kwargs):
    return compiled(config)({"params": params}, *args, **kwargs)


@pytest.mark.parametrize("depth", DEPTHS)
def test_predictions_have_the_shapes_of_the_images(depth):
    config = DEPTHS[depth]
    images, time, states, mask = inputs(config)
    assert config.ratios == (1, 2, 4)[:depth][::-1]
    model = nested_unet.build(config)
    out = jax.eval_shape(model.apply, {"params": nn.unbox(abstract(config))}, images, time, states,
                         mask)  # fmt: skip
    assert [x.shape for x in out] == [x.shape for x in images]
    assert all(x.dtype == jnp.float32 for x in out)


def test_a_fresh_network_predicts_zero():
    args = inputs(MIDDLE)

    @jax.jit
    def fresh(key):
        return nested_unet.build(MIDDLE).init_with_output(key, *args)[0]

    assert all((np.asarray(x) == 0).all() for x in fresh(jax.random.key(0)))


def test_encoding_the_condition_first_changes_nothing(params):
    images, time, states, mask = inputs(INNER)
    whole = predict(INNER, params, images, time, states, mask)
    model = unet.Model(INNER)

    @jax.jit
    def parts(params):
        condition = model.apply({"params": params}, states, mask, method="encode_condition")
        return model.apply({"params": params}, images, time, condition, method="denoise")

    np.testing.assert_allclose(parts(params)[0], whole[0], atol=1e-5)
    assert np.asarray(whole[0]).std() > 0.1


def test_padding_is_not_read_unless_asked_for(params):
    images, time, states, mask = inputs(INNER)
    other = jnp.where(mask[..., None], states, 5.0)
    got = [predict(INNER, params, images, time, s, mask)[0] for s in (states, other)]
    np.testing.assert_allclose(*got, atol=1e-5)
    unmasked = dataclasses.replace(INNER, masked_cross_attention=False)
    got = [predict(unmasked, params, images, time, s, mask)[0] for s in (states, other)]
    assert np.abs(got[0] - got[1]).max() > 0.01


def test_longer_padding_changes_nothing(params):
    images, time, states, mask = inputs(INNER)
    short = predict(INNER, params, images, time, states[:, :3], mask[:, :3])[0]
    np.testing.assert_allclose(
        predict(INNER, params, images, time, states, mask)[0], short, atol=1e-5
    )


def test_a_wholly_masked_condition_is_finite_and_ignored(params):
    images, time, states, mask = inputs(INNER)
    nothing = jnp.zeros_like(mask)

    @jax.jit
    def loss(params, states):
        out = unet.Model(INNER).apply({"params": params}, images, time, states, nothing)
        return (out[0] ** 2).mean(), out[0]

    (_, one), grads = jax.value_and_grad(loss, has_aux=True)(params, states)
    np.testing.assert_allclose(one, loss(params, states + 3)[1], atol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_micro_conditions_default_and_saturate(params):
    args = inputs(INNER)
    scale = lambda value: {"scale": jnp.full(2, value)}  # noqa: E731
    plain = predict(INNER, params, *args)[0]
    np.testing.assert_array_equal(predict(INNER, params, *args, scale(64.0))[0], plain)
    np.testing.assert_array_equal(predict(INNER, params, *args, scale(512.0))[0], plain)
    assert np.abs(predict(INNER, params, *args, scale(16.0))[0] - plain).max() > 0.01
    with pytest.raises(UserError, match=r"'size'.*scale"):
        predict(INNER, params, *args, {"size": jnp.ones(2)})


@pytest.mark.slow
def test_remat_keeps_values_and_gradients(params):
    args = inputs(INNER)

    @jax.jit
    def results(params):
        def loss(params, config):
            return (unet.Model(config).apply({"params": params}, *args)[0] ** 2).mean()

        configs = [dataclasses.replace(INNER, remat_policy=p) for p in layers.REMAT_POLICIES]
        return [jax.value_and_grad(loss)(params, config) for config in configs]

    plain, *others = results(params)
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, other
        )
    text = str(jax.make_jaxpr(results)(params))
    assert text.count("remat") > 0


def test_bfloat16_computes_on_float32_parameters(params):
    config = dataclasses.replace(INNER, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(abstract(config))} == {jnp.dtype("float32")}
    args = inputs(INNER)
    exact, rounded = (np.asarray(predict(c, params, *args)[0]) for c in (INNER, config))
    assert rounded.dtype == np.float32
    assert 1e-5 < np.abs(exact - rounded).max() / exact.std() < 0.3


def test_dropout_acts_in_training_only(params):
    config = dataclasses.replace(INNER, dropout=0.5)
    args = inputs(INNER)
    plain = predict(config, params, *args)[0]
    np.testing.assert_array_equal(plain, predict(INNER, params, *args)[0])
    rngs = {"dropout": jax.random.key(0)}
    dropped = predict(config, params, *args, train=True, rngs=rngs)[0]
    assert np.abs(dropped - plain).max() > 0.01


def test_patches_trade_space_for_channels():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    deep = layers.space_to_depth(x, 2)
    assert deep.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(deep[0, 1, 2], x[0, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(deep, 2), x)


def test_positions_are_the_same_places_at_every_size():
    image = jnp.zeros((1, 4, 6, 3))
    read = layers.with_positions(image, 4)
    assert read.shape == (1, 4, 6, 3 + 2 * 4)
    rows, columns = read[0, :, :, 3:7], read[0, :, :, 7:]
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    # Half of the wavelength fits the side: the first cosine tells every row from every other.
    assert (jnp.diff(rows[:, 0, 2]) < 0).all() and (jnp.diff(columns[0, :, 2]) < 0).all()
    large = layers.with_positions(jnp.zeros((1, 12, 18, 3)), 4)
    assert np.allclose(large[:, 1::3, 1::3], read, atol=1e-6)
    assert layers.with_positions(image, 0) is image


def test_positions_are_read_and_are_not_ml_mdms():
    config = dataclasses.replace(INNER, position_features=4)
    assert nn.unbox(abstract(config))["trunk"]["stem"]["kernel"].shape[2] == 3 + 2 * 4
    with pytest.raises(UserError, match="position_features is 4"):
        mdm_settings.config_to_mdm(config)


def test_patch_size_enters_the_ratios_and_keeps_shapes():
    inner = dataclasses.replace(INNER, patch_size=2, channels=1)
    config = dataclasses.replace(MIDDLE, patch_size=4, inner=inner, channels=1)
    assert config.ratios == (4, 1)
    images, *rest = inputs(config)
    out = jax.eval_shape(
        nested_unet.Model(config).apply, {"params": nn.unbox(abstract(config))}, images, *rest
    )
    assert [x.shape for x in out] == [(2, 16, 16, 1), (2, 4, 4, 1)]


def test_the_inner_network_may_get_no_features():
    config = dataclasses.replace(MIDDLE, skip_inner_unet_input=True)
    assert "to_inner" not in abstract(config) and "from_inner" in abstract(config)


def test_without_condition_nothing_is_read():
    config = unet.Config(
        resolution_channels=(8,), num_resnets_per_resolution=(1,), num_attention_layers=(1,),
        **SMALL,
    )  # fmt: skip
    images, time, _, mask = inputs(config)
    params = ruled(config)
    got = [predict(config, params, images, time, s * jnp.ones((2, 5, 4)), mask)[0] for s in (0, 1)]
    np.testing.assert_array_equal(*got)


def test_wrong_pyramids_are_refused():
    images, *rest = inputs(MIDDLE)
    model = nested_unet.build(MIDDLE)
    with pytest.raises(UserError, match=r"sides \[8, 8\].*\[2, 1\]"):
        jax.eval_shape(model.init, jax.random.key(0), (images[0], images[0]), *rest)
    with pytest.raises(UserError, match="pyramid of 2"):
        jax.eval_shape(unet.Model(INNER).init, jax.random.key(0), images, *rest)


def test_every_parameter_and_the_features_have_logical_axes():
    boxed = abstract(OUTER)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    for box in boxes:
        assert len(box.names) == box.value.ndim
    conv = boxed["inner"]["inner"]["trunk"]["down_0"]["resnet_0"]["conv_in"]["kernel"]
    assert conv.names == ("height", "width", "conv_in", "conv_out")

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data")]):
        features = jax.jit(layers.constrain)(jnp.zeros((4, 2, 2, 3)))
    assert features.sharding.spec[0] == "data"


@pytest.mark.parametrize("depth", DEPTHS)
def test_mdm_round_trip_is_exact(depth):
    config = DEPTHS[depth]
    params = ruled(config)
    state = mdm.to_mdm(params, config)
    again = mdm.from_mdm(state, config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert jax.tree.structure(nn.unbox(abstract(config))) == jax.tree.structure(params)
    names = set(state)
    assert "inner_unet." * (depth - 1) + "lm_head.0.mlp.main.3.bias" in names
    assert "inner_unet." * (depth - 1) + "up_blocks.0.attn.1.ffn.1.weight" in names


def test_all_misfits_are_named_at_once():
    state = mdm.to_mdm(ruled(INNER), INNER)
    del state["conv_in.bias"]
    state["conv_out.bias"] = np.zeros(7)
    state["extra.weight"] = np.zeros(1)
    with pytest.raises(UserError) as error:
        mdm.from_mdm(state, INNER)
    text = str(error.value)
    assert "conv_in.bias [8] is missing" in text
    assert "conv_out.bias is [7], should be [3]" in text
    assert "extra.weight is unknown" in text


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_config_can_be_read_off_the_weights(depth):
    config = INNER
    stated = dict(num_heads=2, num_groups_norm=4, num_groups_attention=4)
    groups = [stated]
    for _ in range(depth - 1):
        scale = 4 * config.micro_conditioning[0][1]
        config = dataclasses.replace(MIDDLE, inner=config, micro_conditioning={"scale": scale})
        groups = [stated, *groups]
    state = {n: v.shape for n, v in mdm.to_mdm(ruled(config), config).items()}
    names = [*["outer", "mid"][: depth - 1], "inner"]
    settings = dict(zip(names, groups, strict=True)) if depth > 1 else stated
    assert mdm.config_from_mdm(settings | {"schedule": "cosine"}, state) == config


def test_mdm_fields_become_ours():
    settings = {
        "kind": "nested_unet",
        "outer": {
            "resolution_channels": "32,64",
            "num_resnets_per_resolution": "2,1",
            "temporal_dim": 128,
            "skip_normalization": True,
            "micro_conditioning": "scale:256,score:0",
        },
        "inner": {
            "resolution_channels": "32,64,64",
            "num_resnets_per_resolution": "2",
            "attention_levels": "1,2",
            "num_attention_layers": "0,1,5",
            "conditioning_feature_dim": 48,
            "conditioning_feature_proj_dim": -1,
            "masked_cross_attention": 0,
            "use_attention_ffn": True,
        },
    }
    config = mdm.config_from_mdm(settings)
    assert config.num_attention_layers == (0, 0)
    assert config.skip_normalization
    assert config.micro_conditioning == (("scale", 256.0), ("score", 0.0))
    assert config.inner == unet.Config(
        resolution_channels=(32, 64, 64),
        num_resnets_per_resolution=(2, 2, 2),
        num_attention_layers=(0, 1, 5),
        use_attention_ffn=True,
        conditioning_feature_dim=48,
        masked_cross_attention=False,
    )


def test_from_dict_reads_nested_groups_and_names_the_nearest_key():
    values = dict(
        resolution_channels=[8, 8], num_resnets_per_resolution=[1, 1],
        num_attention_layers=[0, 0], dtype="bfloat16", num_groups_norm=4,
        inner=dict(resolution_channels=(8,), num_resnets_per_resolution=(1,),
                   num_attention_layers=(1,), num_groups_norm=4, num_groups_attention=4),
    )  # fmt: skip
    config = nested_unet.Config.from_dict(values)
    assert config.inner.dtype == "bfloat16" and config.time_width == 32
    with pytest.raises(UserError, match=r"'num_head'.*'num_heads'"):
        nested_unet.Config.from_dict(values | {"inner": {"num_head": 2}})
    with pytest.raises(UserError, match="'inner'"):
        nested_unet.Config.from_dict({"dropout": 0.1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_resnets_per_resolution=(1,)), "num_resnets_per_resolution"),
        (dict(num_heads=3), "num_heads"),
        (dict(num_groups_norm=3), "num_groups_norm"),
        (dict(temporal_dim=12), "temporal_dim"),
        (dict(remat_policy="some"), "remat_policy"),
        (dict(attention="fast"), "attention is 'fast'; one of auto, xla, cudnn"),
        (dict(conditioning_feature_dim=0), "conditioning_feature_dim"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(INNER, **change)


def test_nested_resolutions_must_fit():
    with pytest.raises(UserError, match="temporal_dim is 32 outside and 16 inside"):
        dataclasses.replace(MIDDLE, temporal_dim=32)
    with pytest.raises(UserError, match="channels is 1 outside and 3 inside"):
        dataclasses.replace(MIDDLE, channels=1)


def test_mlp_denoises_points():
    config = mlp.Config.from_dict(
        dict(width=16, num_blocks=2, expansion=2, conditioning_feature_dim=4)
    )
    images, time, states, mask = inputs(config, side=1)
    model = mlp.Model(config)
    params = nn.unbox(model.init(jax.random.key(0), images, time, states, mask)["params"])
    apply = jax.jit(model.apply)
    assert (apply({"params": params}, images, time, states, mask)[0] == 0).all()
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    (out,) = apply({"params": params}, images, time, states, mask)
    assert out.shape == (2, 1, 1, 2)
    padded = jnp.where(mask[..., None], states, 9.0)
    np.testing.assert_allclose(
        apply({"params": params}, images, time, padded, mask)[0], out, atol=1e-5
    )
    for other in ((images, time + 100, states, mask), (images, time, -states, mask)):
        assert np.abs(apply({"params": params}, *other)[0] - out).max() > 1e-4
    with pytest.raises(UserError, match="micro-condition"):
        apply({"params": params}, images, time, states, mask, {"scale": time})
