"""Patch k-means vokens: the shipped codebook, fitting, strange files."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from kaleido_jax.data import ShapesSource, make_source, shapes, train_vokens
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models.voken_tokenizer import PatchTokenizer, fit


@pytest.fixture(scope="module")
def pictures():
    return np.stack([shapes.render(shapes.make_scene(9, i), 32) for i in range(200)])


@pytest.fixture(scope="module")
def tokenizer():
    return PatchTokenizer.default()


def test_the_shipped_codebook_keeps_pictures(tokenizer, pictures):
    ids = tokenizer.encode(pictures)
    assert tokenizer.num_codes == 1000
    assert ids.shape == (200, 32)
    decoded = tokenizer.decode(ids)
    error = ((decoded.astype(float) - pictures) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 24  # dB; another picture's ids give 11
    assert (tokenizer.encode(decoded) == ids).mean() > 0.95
    assert len(np.unique(ids)) > 500
    assert tokenizer.decode(ids[:2], 64).shape == (2, 64, 64, 3)


def test_patches_are_read_row_by_row(tokenizer):
    picture = np.full((64, 64, 3), 16, np.uint8)
    picture[:16, 56:] = shapes.colour(0, 1)  # the last patch of the first row
    ids = tokenizer.encode(picture[None])[0]
    assert ids[7] != ids[0]
    assert np.all(np.delete(ids, 7) == ids[0])


def test_strings_go_through_the_grammar(tokenizer, pictures):
    string = tokenizer.encode_string(pictures[0])
    assert voken.parse(string, 1000) == tuple(tokenizer.encode(pictures[:1])[0])
    source = ShapesSource(size=32, seed=9, latents=("voken",))
    assert source[0]["latents"] == {"voken": string}


def test_fitting_is_repeatable_and_saved(tmp_path, pictures):
    first, second = (fit(pictures[:60], num_codes=40, components=12) for _ in range(2))
    np.testing.assert_array_equal(first.encode(pictures), second.encode(pictures))
    first.save(tmp_path / "codes.npz")
    loaded = PatchTokenizer.load(tmp_path / "codes.npz")
    assert (loaded.encode(pictures) == first.encode(pictures)).mean() > 0.99
    assert loaded.basis.shape == (12, 96)


def test_a_codebook_is_fitted_on_a_folder_of_shards(tmp_path):
    generator = np.random.default_rng(0)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(40):
            encoded = io.BytesIO()
            pixels = generator.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(encoded, "PNG")
            for name, data in ((f"{i}.png", encoded.getvalue()), (f"{i}.txt", b"noise")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert train_vokens.main([str(tmp_path / "codes.npz"), str(tmp_path)]) == 0
    codes = str(tmp_path / "codes.npz")
    settings = {"name": "webdataset", "path": str(tmp_path), "vokens": codes}
    source = make_source(settings, 32, ("voken",))
    ids = voken.parse(source[0]["latents"]["voken"], 1000)
    np.testing.assert_array_equal(
        ids, PatchTokenizer.load(codes).encode(source[0]["image"][None])[0]
    )
    assert train_vokens.main([codes, str(tmp_path / "none")]) == 2


def test_misuse_is_told(tmp_path, tokenizer, pictures):
    with pytest.raises(UserError, match="cannot give"):
        fit(pictures[:1], num_codes=1000)
    with pytest.raises(UserError, match="components"):
        fit(pictures, components=97)
    with pytest.raises(UserError, match=r"not in 0\.\.999"):
        tokenizer.decode(np.full((1, 32), 1000))
    with pytest.raises(UserError, match="32 a picture"):
        tokenizer.decode(np.zeros((1, 31), int))
    with pytest.raises(UserError, match="cannot read"):
        PatchTokenizer.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="not a codebook"):
        PatchTokenizer.load(tmp_path / "text.npz")
    # An object array needs pickle, which is never used.
    hostile = np.array([print], dtype=object)
    np.savez(tmp_path / "hostile.npz", mean=hostile, basis=hostile, centres=hostile)
    with pytest.raises(UserError, match="not a codebook"):
        PatchTokenizer.load(tmp_path / "hostile.npz")
