"""Weights in: ml-mdm, Hugging Face and t5x through `kaleido import`, exact to the bit."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from kaleido_jax import bundle, cli
from kaleido_jax.errors import UserError
from kaleido_jax.generate import Pipeline
from kaleido_jax.interop import imports, mdm, mdm_settings, t5, t5x
from kaleido_jax.tokens import Vocabulary
from tests import foreign, memory_weights
from tests.foreign import T5_SMALL


def written(plan, folder, dtype=None):
    """The arrays of an import by our names."""
    plan.write(folder, dtype)
    return {name: np.asarray(tensor) for name, tensor in bundle.read_tensors(folder).items()}


def named(part, params, *stacks):
    chosen = {name: params[name] for name in ("token_embedder", *stacks)}
    return flatten_dict({part: chosen}, sep="/")


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_huggingface_t5_becomes_both_halves(tmp_path, shards):
    foreign.huggingface_folder(tmp_path / "hf", shards=shards)
    got = written(imports.plan_t5(tmp_path / "hf", vokens=0), tmp_path / "out")
    params = foreign.t5_params()
    same(got, named("text_encoder", params, "encoder") | named("latent_decoder", params, "decoder"))
    config = bundle.read_config(tmp_path / "out")
    assert config.model.text_encoder.emb_dim == 48 and config.vocabulary.num_vokens == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["parts"]) == {"text_encoder", "latent_decoder"}


@pytest.mark.parametrize("layout", ["zarr", "ocdbt", "scanned", "scanned ocdbt", "version 3"])
def test_every_layout_of_t5x_gives_the_same(tmp_path, layout):
    if layout == "version 3":
        folder = foreign.REFERENCE / "t5x_nonsquare"
        params = t5x.read_t5x(folder)
    else:
        folder, params = tmp_path / "t5x", foreign.t5_params()
        foreign.t5x_orbax(folder, params, "ocdbt" in layout, "scanned" in layout)
    got = written(imports.plan_t5x(folder, vokens=0), tmp_path / "out")
    same(got, named("text_encoder", params, "encoder") | named("latent_decoder", params, "decoder"))


def test_scanned_position_tables_must_agree(tmp_path):
    params = foreign.t5_params()
    for part, count in (("encoder", 1), ("decoder", 2)):
        table = params[part].pop("relpos_bias")
        for i in range(count):
            params[part][f"layers_{i}"]["relpos_bias"] = jax.tree.map(np.copy, table)
    foreign.t5x_orbax(tmp_path / "same", params, scanned=True)
    tree = t5x.read_t5x(tmp_path / "same")
    assert t5.infer_config(tree) == T5_SMALL
    params["decoder"]["layers_1"]["relpos_bias"]["rel_embedding"][0, 0] += 1
    foreign.t5x_orbax(tmp_path / "other", params, scanned=True)
    with pytest.raises(UserError, match="differs between layers"):
        t5x.read_t5x(tmp_path / "other")


def test_new_rows_lie_around_the_mean(tmp_path):
    params = foreign.t5_params()
    flat = flatten_dict({k: params[k] for k in ("token_embedder", "decoder")})
    tensors = {path: t5.as_tensor(value) for path, value in flat.items()}
    grown = {k: np.asarray(v) for k, v in t5.resize_vocabulary(tensors, 4096, seed=1).items()}
    for path, axis in (
        (("token_embedder", "embedding"), 0),
        (("decoder", "logits_dense", "kernel"), 1),
    ):
        old, new = (np.moveaxis(a[path], axis, 0) for a in (flat, grown))
        assert new.shape == (4096, 48) and new.dtype == old.dtype
        np.testing.assert_array_equal(new[:1536], old)
        fresh = new[1536:]
        sigma = t5.SPREAD * old.std(0)
        assert np.all(np.abs(fresh.mean(0) - old.mean(0)) < 5 * sigma / np.sqrt(len(fresh)))
        np.testing.assert_allclose(fresh.std(0), sigma, rtol=0.1)
        assert len(np.unique(fresh, axis=0)) == len(fresh)
    untouched = ("decoder", "decoder_norm", "scale")
    np.testing.assert_array_equal(grown[untouched], flat[untouched])
    # The same row of a smaller vocabulary is the same; another seed gives others.
    path = ("token_embedder", "embedding")
    fewer = np.asarray(t5.resize_vocabulary(tensors, 1664, seed=1)[path])
    np.testing.assert_array_equal(fewer, grown[path][:1664])
    assert (
        np.asarray(t5.resize_vocabulary(tensors, 1664, seed=2)[path])[1536:] != fewer[1536:]
    ).all()
    with pytest.raises(UserError, match="a vocabulary of 1500 is smaller"):
        t5.resize_vocabulary(tensors, 1500)


def test_vokens_get_room_in_the_decoder_alone(tmp_path):
    foreign.huggingface_folder(tmp_path / "hf")
    plan = imports.plan_t5(tmp_path / "hf", vokens=300)
    assert plan.vocabulary.size == 1920 and plan.config.model.latent_decoder.vocab_size == 1920
    assert plan.tensors["latent_decoder/token_embedder/embedding"].shape == (1920, 48)
    assert plan.tensors["latent_decoder/decoder/logits_dense/kernel"].shape == (48, 1920)
    assert plan.tensors["text_encoder/token_embedder/embedding"].shape == (1536, 48)


def test_the_rows_of_the_paper():
    """Sec. 4.1: T5's 32128 rows and SEED's 8192 vokens are 40320, with or without a tokenizer."""
    shapes = t5.expected_shapes(T5_SMALL)
    tensors = {
        path: t5.Tensor((32128, 48) if path[-1] == "embedding" else shape, np.dtype("f4"), None)
        for path, shape in shapes.items()
    }
    cfg = dataclasses.replace(T5_SMALL, vocab_size=32128)
    tensors["decoder", "logits_dense", "kernel"] = t5.Tensor((48, 32128), np.dtype("f4"), None)
    plan = imports._plan_t5(pathlib.Path("nowhere"), cfg, tensors, None, imports.VOKENS, 0)
    assert plan.config.model.latent_decoder.vocab_size == 40320
    assert "tokenizer" in plan.notes[0]


@pytest.mark.parametrize("name", ["mdm_unet_masked0", "mdm_nested", "mdm_nested2"])
def test_released_configs_are_found_from_shapes(name):
    settings, shapes = foreign.mdm_settings(name)
    want = mdm.config_from_mdm(settings, shapes)
    assert mdm.config_from_mdm(mdm_settings.released_settings(shapes), shapes) == want


@pytest.mark.parametrize("name", ["mdm_unet_masked1", "mdm_nested", "mdm_nested2"])
def test_settings_of_ml_mdm_and_back(name):
    config = mdm.config_from_mdm(*foreign.mdm_settings(name))
    settings = yaml.safe_load(yaml.safe_dump(mdm_settings.config_to_mdm(config)))
    assert mdm.config_from_mdm(settings) == config


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_an_mdm_of_any_file_is_the_same(tmp_path, suffix):
    state = foreign.mdm_state("mdm_nested")
    source = tmp_path / f"vis_model{suffix}"
    if suffix == ".pth":
        torch = pytest.importorskip("torch", reason="PyTorch files need torch")
        torch.save(
            {"state_dict": {k: torch.tensor(v) for k, v in state.items()}, "epoch": 3}, source
        )
    elif suffix == ".npz":
        np.savez(source, **state)
    else:
        save_file(state, source)
    got = written(imports.plan_mdm(source), tmp_path / "out")
    config = mdm.config_from_mdm(*foreign.mdm_settings("mdm_nested"))
    same(got, flatten_dict({"denoiser": mdm.from_mdm(state, config)}, sep="/"))
    with pytest.raises(UserError, match=r"it has no tokenizer\.model"):
        Pipeline.from_pretrained(tmp_path / "out")


def test_an_imported_mdm_is_sampled(tmp_path, capsys):
    """The command line, from foreign files to pictures: plain MDM, no latents."""
    foreign.huggingface_folder(tmp_path / "hf")
    save_file(foreign.small_mdm(), tmp_path / "vis_model.safetensors")
    words = ["import", "mdm", str(tmp_path / "vis_model.safetensors"), str(tmp_path / "mdm")]
    assert cli.main([*words, "--text-encoder", str(tmp_path / "hf")]) == 0
    assert "denoiser, text_encoder" in capsys.readouterr().out
    config = bundle.read_config(tmp_path / "mdm")
    assert (config.data.pixel_centre, config.data.pixel_scale) == (127, 128)
    assert config.diffusion.schedule == "deepfloyd" and config.latents == ()
    words = ["sample", "--checkpoint", str(tmp_path / "mdm"), "--prompt", "a dog", "--num", "1"]
    assert cli.main([*words, "--steps", "2", "--out", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "000000.png").is_file()


def test_an_import_serves_as_text_encoder(tmp_path):
    foreign.huggingface_folder(tmp_path / "hf")
    imports.plan_t5(tmp_path / "hf", vokens=0).write(tmp_path / "t5")
    save_file(foreign.small_mdm(), tmp_path / "m.safetensors")
    plans = [
        imports.plan_mdm(tmp_path / "m.safetensors", tmp_path / n, None, None) for n in ("hf", "t5")
    ]
    assert plans[0].tensors.keys() == plans[1].tensors.keys()
    assert plans[0].config.model.text_encoder.to_dict() == {
        **plans[1].config.model.text_encoder.to_dict(), "dtype": "float32",
    }  # fmt: skip
    assert all(plan.vocabulary.size == Vocabulary.default(0).size for plan in plans)


def test_bfloat16_is_kept_and_computed_in(tmp_path):
    foreign.huggingface_folder(tmp_path / "hf")
    got = written(imports.plan_t5(tmp_path / "hf", vokens=0), tmp_path / "out", "bfloat16")
    assert {str(array.dtype) for array in got.values()} == {"bfloat16"}
    model = bundle.read_config(tmp_path / "out").model
    assert model.text_encoder.dtype == model.denoiser.inner.dtype == "bfloat16"


def test_all_misfits_are_listed_and_nothing_is_written(tmp_path, capsys):
    state = foreign.mdm_state("mdm_unet_masked1")
    del state["conv_out.bias"]
    state["extra.weight"] = np.zeros(3, np.float32)
    state["norm_out.weight"] = np.zeros(5, np.float32)
    save_file(state, tmp_path / "m.safetensors")
    words = ["import", "mdm", str(tmp_path / "m.safetensors"), str(tmp_path / "out")]
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "conv_out.bias [3] is missing" in line and "extra.weight is unknown" in line
    assert "norm_out.weight is [5]" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


def test_settings_files_of_ml_mdm(tmp_path):
    save_file(foreign.mdm_state("mdm_unet_masked1"), tmp_path / "m.safetensors")
    settings = tmp_path / "model.yaml"
    config = mdm.config_from_mdm(*foreign.mdm_settings("mdm_unet_masked1"))
    settings.write_text(yaml.safe_dump({"unet_config": mdm_settings.config_to_mdm(config)}))
    plan = imports.plan_mdm(tmp_path / "m.safetensors", settings=settings)
    assert plan.config.model.denoiser.masked_cross_attention is True
    settings.write_text("unet_config: [1]")
    with pytest.raises(UserError, match="no unet_config"):
        imports.plan_mdm(tmp_path / "m.safetensors", settings=settings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("import mdm nowhere.pth out", "there is no file or folder nowhere.pth"),
        ("import t5 nowhere out", "no config.json"),
        ("import t5x nowhere out", "neither a t5x checkpoint"),
        ("import mdm a b --vokens 3", "--vokens has no meaning for mdm"),
        ("import t5 a b --settings c", "--settings has no meaning for t5"),
        ("import gpt a b", "invalid choice"),
        ("export --checkpoint nowhere out", "there is no folder nowhere"),
        ("export --checkpoint a out --steps 3", "--steps has no meaning"),
        ("export --checkpoint a out --format mdm --dtype float16", "--dtype has no meaning"),
        ("export --checkpoint a out --format onnx", "invalid choice"),
    ],
)
def test_misuse_is_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """T5s as wide as XL: twice the layers, the same peak. docs/weights.md has all 24."""
    peaks = []
    for layers in (1, 2):
        memory_weights.write_t5(tmp_path / str(layers) / "hf", layers)
        figures = memory_weights.measure("import", tmp_path / str(layers))
        assert figures["result"] > 1.2  # GiB
        peaks.append(figures["own_peak_beyond_start"])
        shutil.rmtree(tmp_path / str(layers))
    assert max(peaks) < 1.5
    assert peaks[1] - peaks[0] < 0.15
