"""Weights out: exact in other projects' names, the same pictures from every form."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import yaml
from jax import export
from safetensors.numpy import load_file, save_file

from kaleido_jax import bundle, cli, generate, mesh, stablehlo, stages
from kaleido_jax.errors import UserError
from kaleido_jax.interop import exports, imports
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from tests import foreign
from tests.test_generate import PROMPT, _bundle, _config, _nested_config

ROOT = pathlib.Path(__file__).resolve().parent.parent


@functools.cache
def model(latents=("text",)):
    return _bundle(_config(latents))


def pipeline(a_bundle):
    return generate.Pipeline(a_bundle, mesh.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("name", ["mdm_unet_masked0", "mdm_nested", "mdm_nested2"])
def test_ml_mdm_to_ours_and_back_is_exact(tmp_path, name):
    state = foreign.mdm_state(name)
    save_file(state, tmp_path / "vis_model.safetensors")
    foreign.huggingface_folder(tmp_path / "hf")
    plan = imports.plan_mdm(tmp_path / "vis_model.safetensors", tmp_path / "hf")
    plan.write(tmp_path / "ours")
    exports.export_mdm(tmp_path / "back", bundle.load(tmp_path / "ours"))
    back = load_file(tmp_path / "back" / "vis_model.safetensors")
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    settings = yaml.safe_load((tmp_path / "back" / "model.yaml").read_text())
    kinds = {"mdm_nested": "nested_unet", "mdm_nested2": "nested2_unet"}
    assert settings["vision_model"] == kinds.get(name, "unet")
    again = imports.plan_mdm(
        tmp_path / "back" / "vis_model.safetensors", settings=tmp_path / "back" / "model.yaml"
    )
    assert again.config.model.denoiser == plan.config.model.denoiser


def test_ml_mdm_reads_our_pth(tmp_path):
    torch = pytest.importorskip("torch", reason="a .pth needs torch")
    save_file(foreign.small_mdm(), tmp_path / "m.safetensors")
    foreign.huggingface_folder(tmp_path / "hf")
    imports.plan_mdm(tmp_path / "m.safetensors", tmp_path / "hf").write(tmp_path / "ours")
    words = ["export", "--checkpoint", str(tmp_path / "ours"), str(tmp_path / "out")]
    assert cli.main([*words, "--format", "mdm"]) == 0
    content = torch.load(tmp_path / "out" / "vis_model.pth", weights_only=True)
    assert set(content) == {"state_dict"}
    for key, value in foreign.small_mdm().items():
        np.testing.assert_array_equal(content["state_dict"][key].numpy(), value)


def test_what_ml_mdm_cannot_build_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no counterpart in ml-mdm"):
        exports.export_mdm(tmp_path / "out", model())
    config = _nested_config()
    config.model.denoiser.inner.patch_size = 2
    with pytest.raises(UserError, match="patch_size is 2"):
        exports.export_mdm(tmp_path / "out", _bundle(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vokens", [0, 1000])
def test_huggingface_to_ours_and_back_is_exact(tmp_path, vokens):
    state = foreign.huggingface_folder(tmp_path / "hf")
    imports.plan_t5(tmp_path / "hf", vokens=vokens).write(tmp_path / "ours")
    exports.export_t5(tmp_path / "back", bundle.load(tmp_path / "ours"))
    back = load_file(tmp_path / "back" / "t5" / "model.safetensors")
    assert back.keys() == state.keys()
    rows = {"shared.weight", "lm_head.weight"}
    for key, value in state.items():
        got = back[key][: len(value)] if key in rows else back[key]
        np.testing.assert_array_equal(got, value, err_msg=key)
    assert len(back["shared.weight"]) == {0: 1536, 1000: 2560}[vokens]
    again = imports.plan_t5(tmp_path / "back" / "t5", vokens=0)
    assert again.config.model.text_encoder.vocab_size == len(back["shared.weight"])


def test_transformers_computes_what_we_do(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    a_bundle = model()
    exports.export_t5(tmp_path / "out", a_bundle)
    # Drawn apart, the two stacks have other embeddings: two folders.
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"latent_decoder", "text_encoder"}
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "out" / "text_encoder")
    ids = np.array([[5, 9, 33, 7, 1] + [0] * 7])
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(ids != 0)).last_hidden_state
    network = Kaleido(KaleidoConfig.from_config(a_bundle.config))
    got = stages.encode(network, a_bundle.params, ids.astype(np.int32)).states
    np.testing.assert_allclose(got[0, :5], want[0, :5].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    "latents", [("text",), pytest.param((), marks=pytest.mark.slow)], ids=["kaleido", "baseline"]
)
def test_stablehlo_gives_the_pictures_of_the_pipeline(tmp_path, latents):
    a_bundle = model(latents)
    pipe = pipeline(a_bundle)
    folder = stablehlo.save_stablehlo(tmp_path / "out", a_bundle, settings={"sampler": "ddim"})
    about = json.loads((folder / "stablehlo.json").read_text())
    assert about["platforms"] == ["cpu", "cuda"] and about["num_steps"] == 3
    weights = load_file(folder / "model.safetensors")
    call = {
        name: export.deserialize((folder / f"{name}.stablehlo").read_bytes()).call
        for name in about["programs"]
    }
    for count in (1, 3):  # any batch
        out = pipe(PROMPT, num_images=count, seed=3, guidance_weight=2.5, sampler="ddim")
        captions = pipe._caption_tokens([PROMPT] * count)
        seeds, indices = np.full(count, 3, np.uint32), np.arange(count, dtype=np.uint32)
        z = []
        if latents:
            filters = (np.uint32(0), np.float32(1), np.int32(0), np.float32(1))
            drawn, log_prob = call["decode"](weights, captions, seeds, indices, *filters)
            first = [i for i, d in enumerate(out.documents) if d.decoding["draws"] == 1]
            assert np.asarray(drawn).shape == (count, 10) and np.isfinite(log_prob).all()
            for i in first:
                assert float(log_prob[i]) == pytest.approx(out.documents[i].log_prob, abs=1e-4)
            z = [np.stack([pipe._latent_tokens(document) for document in out.documents])]
        x = call["render"](weights, captions, *z, seeds, indices, np.float32(2.5))
        assert np.abs(np.asarray(x) - out.samples).max() < 1e-4
    # It is an export as well.
    again = pipeline(bundle.load(folder))(PROMPT, 1, seed=3, guidance_weight=2.5, sampler="ddim")
    want = pipe(PROMPT, 1, seed=3, guidance_weight=2.5, sampler="ddim")
    np.testing.assert_allclose(again.samples, want.samples, atol=1e-6)


def test_unknown_platforms_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be of cpu, cuda"):
        stablehlo.save_stablehlo(tmp_path / "out", model(), platforms=["abacus"])
    assert not (tmp_path / "out").exists()


def test_an_export_has_a_card_with_front_matter(tmp_path):
    folder = pipeline(model()).save_pretrained(tmp_path / "out", "bfloat16")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "kaleido_jax" and front["pipeline_tag"] == "text-to-image"
    assert "latent-text" in front["tags"] and "Pipeline.from_pretrained" in text
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.model", "README.md", "manifest.json",
    }  # fmt: skip
    assert load_file(folder / "model.safetensors")
    # People write into the card; that does not damage the model.
    (folder / "README.md").write_text("# Mine")
    (folder / ".gitattributes").write_text("*.safetensors")
    assert bundle.load(folder).config.latents == ("text",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_types_give_the_pictures_of_their_values(tmp_path, dtype):
    """Weights that stay as they are stored give what the same numbers in float32 give."""
    a_bundle = model()
    folder = bundle.save(tmp_path / "out", a_bundle, dtype)
    opened = bundle.load(folder)
    widened = jax.tree.map(lambda a: np.asarray(a, np.float32), opened.params)
    same = bundle.Bundle(opened.config, widened, opened.vocabulary, opened.fingerprint)
    got, want = (pipeline(b)(PROMPT, num_images=2, seed=1) for b in (opened, same))
    assert [d.latents for d in got.documents] == [d.latents for d in want.documents]
    np.testing.assert_array_equal(got.samples, want.samples)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def stop(size):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .* No space left"):
        bundle.save(tmp_path / "out", model(), tick=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_loader_of_the_docs_draws_the_same(tmp_path):
    """The code block of docs/weights.md, run as it stands, beside the pipeline."""
    text = (ROOT / "docs" / "weights.md").read_text("utf-8")
    blocks = [b.partition("```")[0] for b in text.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "stablehlo.json" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    a_bundle = bundle.load(ROOT / "kaleido_jax" / "assets" / "shapes_kaleido")
    folder = stablehlo.save_stablehlo(tmp_path / "out", a_bundle, settings={"num_steps": 2})
    names = {}
    exec(code.replace('pathlib.Path("exported")', f"pathlib.Path({str(folder)!r})"), names)
    images = names["draw"](PROMPT, 2, seed=3)
    out = pipeline(a_bundle)(PROMPT, num_images=2, seed=3, num_steps=2)
    assert np.abs(images.astype(int) - out.images).max() <= 1
