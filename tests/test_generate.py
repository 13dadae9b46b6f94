"""The pipeline end to end with random weights: identity of pictures, documents, misuse."""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kaleido_jax import bundle, generate, mesh, runner, stages
from kaleido_jax.configs import shapes, toy
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, load_document, read_png
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig

PROMPT = "dawn: a red shape"
# Float sums differ in order between batch sizes and devices; a few steps of a network with
# activations near 1 spread 1e-7 to about 1e-6. Pictures are in [-1, 1].
TOLERANCE = dict(atol=2e-5, rtol=0)


@pytest.fixture(autouse=True)
def _few_shapes(monkeypatch):
    """Most tests share the programs compiled for two pictures at once."""
    monkeypatch.setattr(runner, "DEFAULT_BATCH", 2)


def _config(latents=("text",)):
    """An MLP over each pixel: small enough to compile in a second, and it reads c and z."""
    c = shapes.get_config()
    tiny = dict(emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16)
    tiny |= dict(num_encoder_layers=1, num_decoder_layers=1)
    c.latents = latents
    c.data.image_size = 8
    c.data.latent_length = 10
    c.model.text_encoder = shapes.small_t5(**tiny)
    c.model.latent_decoder = shapes.small_t5(**tiny)
    c.model.denoiser = ConfigDict(
        dict(name="mlp", channels=3, width=16, num_blocks=1, conditioning_feature_dim=16)
    )
    c.sample.sampler = "ddpm"
    c.sample.steps = 3
    c.sample.guidance_weight = 2.0
    return c


def _nested_config():
    c = _config()
    trunk = dict(num_resnets_per_resolution=(1,), num_attention_layers=(0,), temporal_dim=16)
    trunk |= dict(resolution_channels=(4,), num_groups_norm=4)
    inner = trunk | dict(conditioning_feature_dim=16, skip_mid_blocks=True)
    outer = trunk | dict(resolution_channels=(4, 4), num_resnets_per_resolution=(1, 1))
    outer |= dict(name="nested_unet", num_attention_layers=(0, 0), inner=inner)
    c.model.denoiser = ConfigDict(outer)
    return c


def _bundle(config, seed=0):
    """Random weights everywhere: at initialisation the zero heads would hide the condition."""
    model = Kaleido(KaleidoConfig.from_config(config))
    data, ratios = config.data, model.cfg.ratios
    sides = [data.image_size * r // ratios[0] for r in ratios]
    boxed = jax.eval_shape(
        model.init,
        jax.random.key(seed),
        jnp.ones((1, data.caption_length), jnp.int32),
        jnp.ones((1, data.latent_length if config.latents else 0), jnp.int32),
        tuple(jnp.zeros((1, side, side, data.channels)) for side in sides),
        jnp.zeros((1,)),
    )["params"]
    generator = np.random.default_rng(seed)

    def draw(leaf):
        normal = generator.standard_normal(leaf.shape, dtype=np.float32)
        return 1 + 0.1 * normal if leaf.ndim < 2 else normal / np.sqrt(np.prod(leaf.shape[:-1]))

    params = jax.tree.map(draw, nn.meta.unbox(boxed))
    return bundle.Bundle(config, params, bundle.make_vocabulary(config), "test")


def _pipeline(config, devices=1):
    return generate.Pipeline(_bundle(config), mesh.make_mesh(devices=jax.devices()[:devices]))


@functools.cache
def _pipe(latents=("text",), devices=1):
    return _pipeline(_config(latents), devices)


def test_prompts_become_pictures_and_documents():
    out = _pipe()([PROMPT, "dusk: a blue shape"], num_images=2, seed=3)
    assert out.images.shape == (4, 8, 8, 3) and out.images.dtype == np.uint8
    assert out.samples.dtype == np.float32 and np.abs(out.samples).max() <= 1.0
    assert [d.caption for d in out.documents] == [PROMPT] * 2 + ["dusk: a blue shape"] * 2
    assert [d.sample_index for d in out.documents] == [0, 1, 0, 1]
    for document in out.documents:
        assert list(document.latents) == ["text"] and document.log_prob < 0
        assert (document.seed, document.steps, document.sampler) == (3, 3, "ddpm")
        assert document.guidance_weight == 2.0 and document.checkpoint_hash == "test"
    assert len({image.tobytes() for image in out.images}) == 4


def test_batch_size_and_other_prompts_do_not_change_a_picture():
    together = _pipe()(["a", PROMPT], num_images=4, seed=1, batch_size=8)
    alone = _pipe()(PROMPT, num_images=4, seed=1, batch_size=1)
    assert [d.latents for d in alone.documents] == [d.latents for d in together.documents[4:]]
    np.testing.assert_allclose(alone.samples, together.samples[4:], **TOLERANCE)
    third = _pipe()(PROMPT, num_images=1, seed=1, first_index=2)
    np.testing.assert_allclose(third.samples[0], alone.samples[2], **TOLERANCE)
    assert np.abs(_pipe()(PROMPT, seed=2).samples[0] - alone.samples[0]).max() > 0.01


def test_prompts_may_have_indices_of_their_own():
    prompts = [PROMPT, "noon: a blue shape", PROMPT]
    together = _pipe().draw_latents(prompts, seed=1, first_index=[5, 2, 9])
    for prompt, index, document in zip(prompts, (5, 2, 9), together, strict=True):
        (alone,) = _pipe().draw_latents(prompt, seed=1, first_index=index)
        assert document.sample_index == index
        assert document.latents == alone.latents
    with pytest.raises(UserError, match="2 values of first_index for 3 prompts"):
        _pipe().draw_latents(prompts, first_index=[1, 2])


def test_eight_devices_give_the_pictures_of_one():
    one = _pipe()(PROMPT, num_images=8, seed=1, batch_size=8)
    eight = _pipe(devices=8)(PROMPT, num_images=8, seed=1)
    assert [d.latents for d in one.documents] == [d.latents for d in eight.documents]
    np.testing.assert_allclose(one.samples, eight.samples, **TOLERANCE)


def test_log_probability_is_that_of_the_teacher_forced_decoder():
    config = _config()
    weights = _bundle(config)
    model, variables = Kaleido(KaleidoConfig.from_config(config)), {"params": weights.params}
    encoded = stages.encode(model, weights.params, jnp.array([[5, 6, 7, 1], [8, 9, 1, 0]]))
    seeds, indices = np.array([0, 0], np.uint32), np.array([0, 1], np.uint32)
    allowed = np.ones(1536, bool)
    ids, log_prob = stages.draw_latents(
        model, weights.params, 10, encoded, seeds, indices, np.uint32(0), 0.8, 0, 0.95, allowed
    )
    teacher = jax.jit(functools.partial(model.apply, method="latent_states"))
    _, logits, _ = teacher(variables, ids, encoded)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[..., None], -1)[..., 0]
    # Everything up to and with the end of the sequence counts.
    ended = np.cumsum(np.asarray(ids) == 1, axis=1) - (np.asarray(ids) == 1)
    np.testing.assert_allclose(log_prob, np.where(ended == 0, each, 0).sum(1), rtol=1e-4)


def test_a_document_alone_makes_its_picture_again():
    pipe = _pipe()
    out = pipe(PROMPT, num_images=3, seed=5, sampler="ddim", eta=0.5, guidance_weight=3.0)
    copy = type(out.documents[1]).from_json(out.documents[1].to_json())
    again = pipe.render(copy, batch_size=2)
    np.testing.assert_allclose(again.samples[0], out.samples[1], **TOLERANCE)
    edited = pipe.render(copy.replace(text="a large green star"), batch_size=2)
    assert np.abs(edited.samples[0] - out.samples[1]).max() > 1e-3
    other = pipe.render(copy, seed=6, batch_size=2)
    assert np.abs(other.samples[0] - out.samples[1]).max() > 0.01
    assert other.documents[0].seed == 6 and other.documents[0].latents == copy.latents


def test_documents_of_different_settings_render_together():
    pipe = _pipe()
    weights = (1.0, 4.0, 1.0)
    documents = [pipe.draw_latents(PROMPT, guidance_weight=w, batch_size=2)[0] for w in weights]
    output = pipe.render(documents)
    for i in (0, 1):
        alone = pipe.render(documents[i], batch_size=2)
        np.testing.assert_allclose(alone.samples[0], output.samples[i], **TOLERANCE)
    np.testing.assert_allclose(output.samples[0], output.samples[2], **TOLERANCE)
    assert np.abs(output.samples[0] - output.samples[1]).max() > 1e-3
    assert [d.guidance_weight for d in output.documents] == list(weights)


def test_guidance_extrapolates_one_step():
    pipe = _pipe()
    documents = pipe.draw_latents(PROMPT, 2, num_steps=1, threshold="none")
    x = {w: pipe.render(documents, guidance_weight=w).samples for w in (0.0, 1.0, 3.0)}
    np.testing.assert_allclose(x[3.0], x[0.0] + 3.0 * (x[1.0] - x[0.0]), atol=1e-4)
    assert np.abs(x[1.0] - x[0.0]).max() > 1e-3
    # Weight 0 is the unconditional model: the same picture for every prompt and z.
    other = pipe.render(
        [dataclasses.replace(d, caption="noon: a green shape", latents={}) for d in documents],
        guidance_weight=0.0,
    )
    np.testing.assert_allclose(other.samples, x[0.0], **TOLERANCE)


def test_a_baseline_is_the_same_code_without_latents():
    pipe = _pipe(())
    out = pipe(PROMPT, num_images=2)
    assert out.images.shape == (2, 8, 8, 3) and not out.warnings
    assert all(d.latents == {} and d.log_prob is None for d in out.documents)
    np.testing.assert_allclose(pipe.render(out.documents).samples, out.samples, **TOLERANCE)
    with pytest.raises(UserError, match="no latent 'text'"):
        pipe.render(_pipe().draw_latents(PROMPT))


def test_greedy_latents_are_all_the_same():
    documents = _pipe().draw_latents(PROMPT, num_images=3, temperature=0.0)
    assert len({json.dumps(d.latents) for d in documents}) == 1


def test_latents_that_stay_invalid_are_marked_and_never_crash():
    pipe = _pipe(("bbox",))
    out = pipe(PROMPT, num_images=3, seed=0, constrained=False)
    assert out.images.shape[0] == 3 and len(out.warnings) == 3
    for document, warning in zip(out.documents, out.warnings, strict=True):
        assert document.decoding["draws"] == generate.MAX_DRAWS
        assert document.decoding["problems"] and "not valid" in warning
    np.testing.assert_allclose(pipe.render(out.documents).samples, out.samples, **TOLERANCE)


def test_several_latents_open_their_sections():
    pipe = _pipe(("text", "bbox"))
    for document in pipe.draw_latents(PROMPT, num_images=2, constrained=False):
        assert set(document.latents) <= {"text", "bbox"}
    with pytest.raises(UserError, match=r"latent_length' is 10; the latents text, bbox need 14"):
        pipe.draw_latents(PROMPT)


def test_a_sweep_compiles_once():
    pipe = _pipe()
    documents = pipe.draw_latents(PROMPT, 2)
    pipe.render(documents, guidance_weight=2.0)
    before = stages.advance.jitted._cache_size(), stages.draw_latents.jitted._cache_size()
    pipe.render(documents, guidance_weight=5.0, seed=9)
    pipe.draw_latents("noon: a green shape", 2, seed=4, temperature=0.5, top_k=3, top_p=0.9)
    assert (
        stages.advance.jitted._cache_size(),
        stages.draw_latents.jitted._cache_size(),
    ) == before


@pytest.mark.parametrize(
    "settings",
    [
        dict(sampler="dpmpp", time_grid="logsnr"),
        dict(sampler="heun", time_grid="trailing"),
        dict(guidance="apg", apg_norm=2.0),
        dict(guidance_rescale=0.7),
        dict(latent_guidance_weight=5.0),
        dict(cads_scale=0.25, guidance_interval=(0.2, 0.8)),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_sampler_and_guidance_changes_the_picture_and_is_written_down(settings):
    pipe = _pipe()
    documents = pipe.draw_latents(PROMPT, 2, guidance_weight=3.0)
    plain = pipe.render(documents)
    out = pipe.render(documents, **settings)
    assert np.isfinite(out.samples).all()
    assert np.abs(out.samples - plain.samples).max() > 1e-3
    # The document alone says how its picture was made, alone or in company.
    again = pipe.render(LatentDocument.from_json(out.documents[1].to_json()))
    np.testing.assert_allclose(again.samples[0], out.samples[1], **TOLERANCE)


def test_progress_is_told_and_changes_nothing():
    pipe = _pipe()
    documents = pipe.draw_latents(PROMPT, 3)
    told = []
    out = pipe.render(documents, batch_size=3, on_step=told.append)
    steps = documents[0].steps
    assert [p.step for p in told] == [*range(2, steps, 2), steps]
    assert all(p.pictures == [0, 1, 2] and p.num_steps == steps for p in told)
    assert told[0].preview.shape == out.images.shape
    np.testing.assert_array_equal(out.samples, pipe.render(documents, batch_size=3).samples)


def test_what_on_step_raises_ends_the_sampling():
    class Cancelled(Exception):
        pass

    def stop(progress):
        told.append(progress.step)
        raise Cancelled

    told = []
    with pytest.raises(Cancelled):
        _pipe()(PROMPT, 2, on_step=stop)
    assert told == [2]


def test_a_model_without_latents_has_no_weight_for_them():
    with pytest.raises(UserError, match="no latents"):
        _pipe(())(PROMPT, latent_guidance_weight=2.0)


def test_two_resolutions_are_sampled_together():
    pipe = _pipeline(_nested_config())
    out = pipe(PROMPT, num_images=2)
    assert out.images.shape == (2, 8, 8, 3) and np.isfinite(out.samples).all()
    np.testing.assert_allclose(pipe.render(out.documents).samples, out.samples, **TOLERANCE)


def test_points_of_the_toy_pass_through(tmp_path):
    config = toy.get_config()
    config.model.denoiser.update(width=16, num_blocks=1)
    config.sample.steps = 4
    out = _pipeline(config)(
        "class a", num_images=5, guidance_weight=4.0, guidance_interval=(0.2, 0.7)
    )
    assert out.samples.shape == (5, 1, 1, 2) and np.isfinite(out.samples).all()
    folder = generate.write_outputs(out, tmp_path / "points")
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), out.samples)
    assert not list(folder.glob("*.png"))


def test_a_folder_of_outputs(tmp_path):
    out = _pipe()([PROMPT, "dusk: a blue shape"], num_images=2)
    folder = generate.write_outputs(out, tmp_path / "deep" / "out")
    image, document = read_png(folder / "000002.png")
    np.testing.assert_array_equal(image, out.images[2])
    assert document == out.documents[2] == load_document(folder / "000002.json")
    assert (folder / "panels" / "000003.png").is_file() and (folder / "grid.png").is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pictures"] == 4 and "000000.png" in manifest["files"]
    assert not [p for p in folder.parent.iterdir() if p != folder]
    with pytest.raises(UserError, match="already holds files"):
        generate.write_outputs(out, folder)


def test_grid_keeps_every_picture():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 4, 3), np.uint8)
    sheet = generate.grid(images)
    assert sheet.shape == (10, 16, 3)
    assert [sheet[r, c, 0] for r, c in ((0, 0), (0, 6), (0, 12), (6, 0), (6, 6))] == [0, 1, 2, 3, 4]
    assert sheet[4, 0, 0] == sheet[6, 12, 0] == 255


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(num_images=0), "num_images"),
        (dict(num_images=10_001), "num_images"),
        (dict(num_images=True), "num_images"),
        (dict(prompts=[]), "pictures"),
        (dict(prompts=["x"] * 3, num_images=5_000), "pictures"),
        (dict(prompts=" "), "empty"),
        (dict(prompts="x" * 10_000), "characters"),
        (dict(prompts=[1]), "string"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(batch_size=0), "batch_size"),
        (dict(num_steps=1_001), "num_steps"),
        (dict(num_steps=2.5), "num_steps"),
        (dict(guidance_weight=float("nan")), "guidance"),
        (dict(guidance_weight="high"), "guidance_weight"),
        (dict(guidance_interval=(0.9, 0.1)), "interval"),
        (dict(sampler="euler"), "sampler"),
        (dict(eta=0.5), "eta"),
        (dict(threshold="soft"), "threshold"),
        (dict(top_p=0.0), "top_p"),
        (dict(guidence_weight=2.0), "nearest is 'guidance_weight'"),
        (dict(guidance="cfgg"), "cfg, apg"),
        (dict(time_grid="even"), "time_grid"),
        (dict(guidance_rescale=1.5), "guidance_rescale"),
        (dict(cads_scale=float("nan")), "cads_scale"),
        (dict(cads_interval=(0.9, 0.6)), "cads_interval"),
        (dict(guidance="apg", latent_guidance_weight=2.0), "apg"),
    ],
)
def test_misuse_is_refused_before_any_work(arguments, words):
    with pytest.raises(UserError, match=words):
        _pipe()(**(dict(prompts=PROMPT) | arguments))


def test_weights_that_do_not_fit_are_listed():
    good = _bundle(_config())
    params = dict(good.params)
    params["denoizer"] = params.pop("denoiser")
    params["text_encoder"] = jax.tree.map(lambda x: x[..., :1], params["text_encoder"])
    with pytest.raises(UserError) as error:
        generate.Pipeline(dataclasses.replace(good, params=params))
    message = str(error.value)
    assert "is missing" in message and "is unknown" in message and "has shape" in message
