"""T5: the cached decoder, scan, remat, masks and the readers of other projects' weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from kaleido_jax.errors import UserError
from kaleido_jax.interop import t5 as interop
from kaleido_jax.interop.t5x import read_t5x
from kaleido_jax.models.t5 import (
    T5,
    LatentDecoder,
    T5Config,
    TextEncoder,
    relative_position_bucket,
    stack_layers,
    unstack_layers,
)
from kaleido_jax.models.t5_layers import Attention
from tests.parity_t5 import check_t5x

V1_1 = T5Config(
    vocab_size=64,
    emb_dim=24,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=2,
)
V1_0 = dataclasses.replace(V1_1, mlp_activations=("relu",), logits_via_embedding=True)
SCANNED = dataclasses.replace(V1_1, scan_layers=True)
CAPTIONS = jnp.array([[5, 9, 33, 7, 1], [8, 1, 0, 0, 0]])
LATENTS = jnp.array([[0, 4, 17, 60, 2, 9, 1], [0, 21, 3, 3, 40, 8, 30]])
# These programs run once: what XLA's optimiser would save is less than what it costs.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def params():
    return make_params(V1_1)


@pytest.fixture(scope="module")
def baseline(params):
    """Hidden states and logits of V1_1, teacher-forced."""
    return forward(V1_1, params)


def make_params(cfg: T5Config) -> dict:
    """Random parameters, with position tables large enough to matter; drawn without a compiler."""
    generator = np.random.default_rng(3)

    def draw(path, shape):
        normal = generator.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            return normal * np.float32(shape[0] ** -0.5)
        return 1 + normal / 10 if path[-1] == "scale" else normal

    shapes = interop.expected_shapes(cfg)
    return unflatten_dict({path: draw(path, shape) for path, shape in shapes.items()})


def forward(cfg, params, captions=CAPTIONS, latents=LATENTS, **kwargs):
    return jit(lambda p: T5(cfg).apply({"params": p}, captions, latents, **kwargs))(params)


def part(params, *names):
    return {name: params[name] for name in names}


def cached_states(cfg, params, chunk=1):
    """Hidden states and logits of LATENTS, `chunk` tokens at a time through the cache."""
    encoder, decoder = TextEncoder(cfg), LatentDecoder(cfg)
    mask = CAPTIONS != 0
    weights = part(params, "token_embedder", "decoder")

    @jit
    def encode(params):
        return encoder.apply({"params": part(params, "token_embedder", "encoder")}, CAPTIONS)

    @jit
    def step(tokens, states, cache):
        variables = {"params": weights, **cache}
        return decoder.apply(variables, tokens, states, mask, decode=True, mutable=["cache"])

    states = encode(params)
    _, cache = step(jnp.zeros_like(LATENTS), states, {})
    outputs = []
    for i in range(0, LATENTS.shape[1], chunk):
        # Poisoned states: a step must live on the cached keys and values alone.
        out, cache = step(LATENTS[:, i : i + chunk], jnp.full_like(states, jnp.nan), cache)
        outputs.append(out)
    return tuple(np.concatenate(x, axis=1) for x in zip(*outputs, strict=True))


@pytest.mark.parametrize("cfg", [V1_1, V1_0, SCANNED], ids=["v1_1", "v1_0", "scanned"])
def test_cached_decoder_equals_teacher_forcing(cfg):
    params = make_params(cfg)
    hidden, logits = forward(cfg, params)
    got_hidden, got_logits = cached_states(cfg, params)
    np.testing.assert_allclose(got_hidden, hidden, atol=2e-5, rtol=0)
    np.testing.assert_allclose(got_logits, logits, atol=2e-5 * np.abs(logits).max(), rtol=0)


def test_cache_takes_several_tokens_at_once(params, baseline):
    hidden, _ = baseline
    np.testing.assert_allclose(cached_states(V1_1, params, 3)[0], hidden, atol=2e-5, rtol=0)


def decode_step_flops(params, length: int) -> float:
    decoder, mask = LatentDecoder(V1_1), CAPTIONS != 0
    states = jnp.zeros((*CAPTIONS.shape, V1_1.emb_dim))
    weights = part(params, "token_embedder", "decoder")

    def step(tokens, cache):
        variables = {"params": weights, **cache}
        return decoder.apply(variables, tokens, states, mask, decode=True, mutable=["cache"])

    cache = jax.eval_shape(lambda: step(jnp.zeros((2, length), jnp.int32), {})[1])
    lowered = jit(step).lower(jax.ShapeDtypeStruct((2, 1), jnp.int32), cache)
    return lowered.compile().cost_analysis()["flops"]


def test_decode_step_cost_is_linear_in_length(params):
    flops = [decode_step_flops(params, length) for length in (64, 128, 256)]
    first, second = np.diff(flops)
    assert first > 0
    assert second == pytest.approx(2 * first, rel=0.1)


def test_scanned_layers_equal_unscanned(params, baseline):
    stacked = stack_layers(params)
    assert stacked["decoder"]["layers"]["mlp"]["wo"]["kernel"].shape == (32, 2, 24)
    interop.check_params(stacked, SCANNED)
    for got, want in zip(forward(SCANNED, stacked), baseline, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    back = unstack_layers(stacked)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("cfg", "policies"),
    [
        (dataclasses.replace(V1_1, num_decoder_layers=1, dropout_rate=0.1), ["full"]),
        (SCANNED, ["minimal", "full"]),
    ],
    ids=["layers", "scan"],
)
def test_remat_leaves_gradients_as_they_are(cfg, policies):
    params = make_params(dataclasses.replace(cfg, scan_layers=False))
    params = stack_layers(params) if cfg.scan_layers else params

    def gradient(policy):
        model = T5(dataclasses.replace(cfg, remat_policy=policy))

        def loss(p):
            rngs = {"dropout": jax.random.key(5, impl="rbg")}  # compiles faster than threefry
            _, logits = model.apply({"params": p}, CAPTIONS, LATENTS, train=True, rngs=rngs)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 1])

        return jit(jax.grad(loss))(params)

    want = gradient("none")
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(want))
    for policy in policies:
        got = gradient(policy)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_remat_recomputes(params):
    """The policies differ in what the backward pass keeps, or they would do nothing."""

    def saved(policy):
        model = T5(dataclasses.replace(SCANNED, remat_policy=policy))

        def run(p):
            return model.apply({"params": p}, CAPTIONS, LATENTS)[1]

        _, pullback = jax.eval_shape(lambda p: jax.vjp(run, p), stack_layers(params))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved("full") < saved("minimal") < saved("none")


def test_initialisers_are_t5x_ones():
    # Attention has no 1/sqrt(head_dim) at run time: the query's initialiser holds it instead.
    cfg = dataclasses.replace(V1_1, emb_dim=128, num_heads=8, head_dim=16)
    x, mask = jnp.zeros((1, 2, 128)), jnp.ones((1, 1, 2, 2), bool)
    kernels = nn.meta.unbox(Attention(cfg).init(jax.random.key(0), x, x, mask))["params"]
    std = {name: float(np.std(leaf["kernel"])) * 128**0.5 for name, leaf in kernels.items()}
    assert std == pytest.approx({"query": 0.25, "key": 1, "value": 1, "out": 1}, rel=0.05)


def test_padding_changes_nothing(params, baseline):
    padded = jnp.pad(CAPTIONS, ((0, 0), (0, 4)))
    longer = jnp.pad(LATENTS, ((0, 0), (0, 3)), constant_values=11)
    hidden, logits = baseline
    got_hidden, got_logits = forward(V1_1, params, padded, longer)
    np.testing.assert_allclose(got_hidden[:, :7], hidden, atol=1e-5)
    np.testing.assert_allclose(got_logits[:, :7], logits, atol=1e-4)
    # The second caption alone, without its padding.
    alone, _ = forward(V1_1, params, CAPTIONS[1:, :2], LATENTS[1:])
    np.testing.assert_allclose(alone, hidden[1:], atol=1e-5)


def test_input_mask_hides_keys_and_the_future_is_never_read(params, baseline):
    mask = jnp.ones_like(LATENTS, bool).at[:, 2].set(False)
    changed = LATENTS.at[:, 2].set(50)
    hidden, _ = baseline
    other, _ = forward(V1_1, params, latents=changed)
    np.testing.assert_array_equal(other[:, :2], hidden[:, :2])
    assert np.abs(other[:, 3:] - hidden[:, 3:]).max() > 1e-3
    masked, _ = forward(V1_1, params, input_mask=mask)
    other, _ = forward(V1_1, params, latents=changed, input_mask=mask)
    np.testing.assert_array_equal(other[:, 3:], masked[:, 3:])


def test_dropout_works_in_training_only(params, baseline):
    cfg = dataclasses.replace(V1_1, dropout_rate=0.5)
    rngs = {"dropout": jax.random.key(0, impl="rbg")}
    np.testing.assert_array_equal(forward(cfg, params)[0], baseline[0])
    dropped = forward(cfg, params, train=True, rngs=rngs)[0]
    assert np.abs(dropped - baseline[0]).max() > 0.1


def test_compute_and_parameter_types(params, baseline):
    cfg = dataclasses.replace(V1_1, dtype="bfloat16")
    hidden, logits = forward(cfg, params)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    want, _ = baseline
    assert np.abs(np.float32(hidden) - want).mean() < 0.05 * np.std(want)
    half = dataclasses.replace(V1_1, param_dtype="bfloat16")
    tree = jax.eval_shape(T5(half).init, jax.random.key(0), CAPTIONS, LATENTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}


def test_logical_axes_are_t5x_names():
    tree = jax.eval_shape(T5(SCANNED).init, jax.random.key(0), CAPTIONS, LATENTS)
    specs = nn.get_partition_spec(tree)["params"]
    layer = specs["decoder"]["layers"]
    assert tuple(layer["self_attention"]["query"]["kernel"]) == ("embed", "layers", "joined_kv")
    assert tuple(layer["mlp"]["wi_1"]["kernel"]) == ("embed", "layers", "mlp")
    assert tuple(layer["pre_mlp_layer_norm"]["scale"]) == ("embed", "layers")
    assert tuple(specs["encoder"]["relpos_bias"]["rel_embedding"]) == ("heads", "relpos_buckets")
    assert tuple(specs["decoder"]["logits_dense"]["kernel"]) == ("embed", "vocab")
    assert tuple(specs["token_embedder"]["embedding"]) == ("vocab", "embed")


def test_relative_position_buckets():
    # Section 2.1: exact up to half of the buckets, logarithmic up to 128, all further ones alike.
    past = relative_position_bucket(-np.arange(300), False, 32, 128)
    np.testing.assert_array_equal(past[:17], np.arange(17))
    assert np.all(np.diff(past) >= 0)
    assert set(past[113:]) == {31}
    assert past[112] == 30
    np.testing.assert_array_equal(relative_position_bucket(np.arange(5), False, 32, 128), 0)
    both = relative_position_bucket(np.array([-16, -8, -1, 0, 1, 8, 16, 500]), True, 32, 128)
    np.testing.assert_array_equal(both, [10, 8, 1, 0, 17, 24, 26, 31])


@pytest.mark.parametrize("cfg", [V1_1, V1_0], ids=["v1_1", "v1_0"])
def test_huggingface_round_trip(cfg):
    params = make_params(cfg)
    state = interop.to_huggingface(params, cfg)
    assert state["decoder.block.1.layer.2.DenseReluDense.wo.weight"].shape == (24, 32)
    back = interop.from_huggingface(state, interop.config_from_huggingface(hf_config(cfg)))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # What Hugging Face itself may add: copies of tied weights, and an early unused table.
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros(1)
    if cfg.logits_via_embedding:
        state["lm_head.weight"] = state["shared.weight"]
    back = interop.from_huggingface(state, cfg, parts=("encoder",))
    assert set(back) == {"token_embedder", "encoder"}
    jax.tree.map(np.testing.assert_array_equal, back, part(params, "token_embedder", "encoder"))
    state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
    with pytest.raises(UserError, match=r"encoder\.embed_tokens\.weight differs"):
        interop.from_huggingface(state, cfg)


def hf_config(cfg):
    config = json.loads(json.dumps(interop.config_to_huggingface(cfg)))
    assert interop.config_from_huggingface(config) == cfg
    return config


def test_every_wrong_name_is_listed(params):
    state = interop.to_huggingface(params, V1_1)
    del state["encoder.final_layer_norm.weight"], state["lm_head.weight"]
    state["encoder.block.7.layer.0.layer_norm.weight"] = np.zeros(24)
    state["shared.weight"] = state["shared.weight"][:-1]
    with pytest.raises(UserError) as caught:
        interop.from_huggingface(state, V1_1)
    message = str(caught.value)
    assert "\n" not in message
    assert "4 parameters" in message
    assert "missing encoder.final_layer_norm.weight" in message
    assert "missing lm_head.weight" in message
    assert "extra encoder.block.7.layer.0.layer_norm.weight" in message
    assert "shared.weight has shape (63, 24), not (64, 24)" in message


def test_misuse_of_the_config_is_named():
    with pytest.raises(UserError, match="did you mean 'num_heads'"):
        T5Config.from_dict({"num_head": 4})
    with pytest.raises(UserError, match="remat_policy 'some'"):
        T5Config(remat_policy="some")
    with pytest.raises(UserError, match="feed_forward_proj 'gelu'"):
        interop.config_from_huggingface({"feed_forward_proj": "gelu"})
    with pytest.raises(UserError, match="unscanned"):
        interop.from_huggingface({}, SCANNED)


def test_infer_config_from_shapes(params):
    assert interop.infer_config(params, dropout_rate=0.1).dropout_rate == 0.1
    assert interop.infer_config(params) == V1_1
    assert interop.infer_config(make_params(V1_0)) == V1_0
    with pytest.raises(UserError, match="decoder"):
        interop.infer_config(part(params, "token_embedder", "encoder"))


# t5x checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of a reference checkpoint and its msgpack content."""
    shutil.copytree(REFERENCE / "t5x_square", tmp_path / "t5x_square")
    file = tmp_path / "t5x_square" / "checkpoint_1000" / "checkpoint"
    return file, flax.serialization.msgpack_restore(file.read_bytes())


def write(file, content):
    file.write_bytes(flax.serialization.msgpack_serialize(content))


def test_t5x_arrays_inline_and_from_buckets(checkpoint):
    file, content = checkpoint
    want = read_t5x(file.parent)
    encoder = content["optimizer"]["target"]["encoder"]
    encoder["encoder_norm"]["scale"] = want["encoder"]["encoder_norm"]["scale"]
    query = encoder["layers_0"]["attention"]["query"]["kernel"]
    query["kvstore"] = {"driver": "gcs", "bucket": "b", "path": query["kvstore"]["path"]}
    key = encoder["layers_0"]["attention"]["key"]["kernel"]
    key["path"] = key.pop("kvstore")["path"]
    key["kvstore"] = {"driver": "gfile"}
    write(file, content)
    (file.parent.parent / "checkpoint_20").mkdir()  # older, and empty
    got = read_t5x(file.parent.parent)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "path", ["../t5x_square/checkpoint_1000/{}", "/tmp/{}", "a/../{}", "link/", "", ".", "..\\{}"]
)
@pytest.mark.parametrize("top", [False, True])
def test_t5x_paths_cannot_leave_the_folder(checkpoint, path, top):
    file, content = checkpoint
    spec = content["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"]
    place = path.format(spec["kvstore"]["path"])
    outside = file.parent.parent / "outside"
    shutil.copytree(file.parent / spec["kvstore"]["path"], outside)
    (file.parent / "link").symlink_to(outside)
    if top:
        spec["kvstore"] = {"driver": "gfile"}
        spec["path"] = place
    else:
        spec["kvstore"]["path"] = place
    write(file, content)
    with pytest.raises(UserError, match=r"encoder/encoder_norm/scale (points|names)"):
        read_t5x(file.parent)


def test_t5x_damage_is_an_error(checkpoint):
    file, content = checkpoint
    array = file.parent / "target.encoder.encoder_norm.scale"
    chunk = (array / "0").read_bytes()
    (array / "0").unlink()
    with pytest.raises(UserError, match="cannot read encoder/encoder_norm/scale"):
        read_t5x(file.parent)
    (file.parent.parent / "secret").write_bytes(chunk)
    (array / "0").symlink_to(file.parent.parent / "secret")
    with pytest.raises(UserError, match="link out of the checkpoint"):
        read_t5x(file.parent)
    shutil.rmtree(array)
    with pytest.raises(UserError, match="no array at"):
        read_t5x(file.parent)
    scale = content["optimizer"]["target"]["encoder"]["encoder_norm"]
    scale["scale"]["driver"] = "n5"
    write(file, content)
    with pytest.raises(UserError, match="driver 'n5'"):
        read_t5x(file.parent)
    scale["scale"] = "scale"
    write(file, content)
    with pytest.raises(UserError, match="neither an array"):
        read_t5x(file.parent)
    write(file, {"version": 2, "optimizer": content["optimizer"]})
    with pytest.raises(UserError, match="version is 2"):
        read_t5x(file.parent)
    write(file, {"version": 3, "optimizer": []})
    with pytest.raises(UserError, match="no optimizer/target"):
        read_t5x(file.parent)
    file.write_bytes(b"\x93damaged")
    with pytest.raises(UserError, match="not a t5x checkpoint"):
        read_t5x(file.parent)
    with pytest.raises(UserError, match="neither a t5x checkpoint folder"):
        read_t5x(file.parent.parent / "nowhere")


def test_changed_t5x_parameter_fails_parity(checkpoint):
    file, content = checkpoint
    scale = read_t5x(file.parent)["encoder"]["encoder_norm"]["scale"]
    content["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = np.nextafter(scale, 9)
    write(file, content)
    with pytest.raises(ValueError, match="params/encoder/encoder_norm/scale"):
        check_t5x(file.parent.parent)
