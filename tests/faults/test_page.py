"""FAULTS 17 and 18 on the server: hostile captions, numbers, strings, uploads and paths."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS, LatentDocument, save_png
from kaleido_jax.settings import Settings
from kaleido_jax.ui import bounds

NAMES = ("text", "bbox", "blob", "voken")
VOKENS = "".join(f"#{i}" for i in range(32))
DOCUMENT = LatentDocument(
    "a dog",
    {
        "text": "A dog.",
        "bbox": "Dog (1, 2, 300, 400) and cat (5, 6, 70, 80).",
        "blob": "Dog (500, 500, 200, 100, 30).",
        "voken": VOKENS,
    },
    sampler="ddim",
    steps=25,
)
DEFAULTS = Settings(2.0, (0.0, 1.0), "ddim", 25, 0.0, "clip", 1.0, 0, 1.0)


def request(**values):
    return bounds.check_request(DEFAULTS, **{"caption": "a dog", **values})


def test_what_is_in_bounds_passes():
    found = request(number="8", guidance="7.5", steps=250.0, sampler="ddpm", temperature=0, seed=9)
    assert (found.number, found.seed, found.batch_size) == (8, 9, bounds.BATCH)
    assert found.settings.num_steps == 250 and found.options()["guidance_weight"] == 7.5
    assert request().settings == DEFAULTS and request().batch_size == 1
    assert bounds.check_weights("1, 2.5;4, 1.0") == (1.0, 2.5, 4.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guidance": float("nan")}, "guidance weight is nan"),
        ({"guidance": "NaN"}, "guidance weight is nan"),
        ({"guidance": float("inf")}, "between 0 and 50"),
        ({"guidance": -1}, "between 0 and 50"),
        ({"guidance": [1]}, "must be a number"),
        ({"guidance": "9" * 10_000}, "must be a number"),
        ({"steps": 10**9}, "between 1 and 250"),
        ({"steps": 1e300}, "between 1 and 250"),
        ({"steps": 10**400}, "must be a whole number"),
        ({"steps": 2.5}, "must be a whole number"),
        ({"steps": 0}, "between 1 and 250"),
        ({"steps": True}, "must be a whole number"),
        ({"number": 9}, "between 1 and 8"),
        ({"number": -1}, "between 1 and 8"),
        ({"number": None}, "must be a whole number"),
        ({"seed": 2**32}, "the seed is"),
        ({"seed": float("nan")}, "must be a whole number"),
        ({"temperature": 1e9}, "between 0 and 5"),
        ({"sampler": "../../etc/passwd"}, "one of ddpm"),
        ({"sampler": ["ddim"]}, "one of ddpm"),
        ({"caption": "x" * 2**20}, "2,000 are the most"),
        ({"caption": ""}, "is empty"),
        ({"caption": "a\x00dog"}, "control character"),
        ({"caption": {"a": 1}}, "must be a text"),
    ],
)
def test_numbers_and_captions_out_of_bounds_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        request(**values)


@pytest.mark.parametrize("text", ["", "1,2,3,4,5", "a", "nan", "1,-2", None, "1," * 1000])
def test_guidance_weights_out_of_bounds_are_refused(text):
    with pytest.raises(UserError):
        bounds.check_weights(text)


def change(strings=(), redraw=(), noise=None, document=DOCUMENT):
    return bounds.check_change(document, dict(strings), redraw, names=NAMES, seed=1, noise=noise)


def test_changes_become_edits():
    made = change({"caption": "a cat", "text": "A cat.", "bbox": None}, ["voken"], noise=4)
    assert made.step == (("set", "caption=a cat"), ("set", "text=A cat."), ("resample", "voken"))
    assert made.noise == 4 and made.seed == 1
    # What is drawn anew need not be valid before.
    assert change({"text": ""}, ["text"]).step == (("resample", "text"),)


@pytest.mark.parametrize(
    ("strings", "redraw", "words"),
    [
        ({}, [], "nothing is changed yet"),
        ({"text": "A dog. "}, [], "nothing is changed yet"),
        ({"bbox": "Dog (1, 2, 1, 4)"}, [], "x1 = 1 must be less than x2 = 1 .at character 4"),
        ({"bbox": "x" * 2**20}, [], "at most 8,192 characters"),
        ({"voken": "#99999" * 32}, [], "voken"),
        ({"voken": "#1" * 31}, [], "31 ids"),
        ({"combined": "x"}, [], "no latent"),
        ({"__class__": "x"}, [], "no latent"),
        ({"text": ["x"]}, [], "must be a text"),
        ({}, ["depth"], "the model's latents are"),
    ],
)
def test_changes_that_are_not_valid_are_refused(strings, redraw, words):
    with pytest.raises(UserError, match=words):
        change(strings, redraw)


@pytest.mark.parametrize("redraw", ["text", [["text"]], ["x" * 101], ["a"] * 99, None, {"text": 1}])
def test_lists_that_are_none_are_refused(redraw):
    with pytest.raises(UserError, match="must be a list"):
        bounds.check_list("what is drawn anew", redraw, 16)


@pytest.mark.parametrize(
    "step", ["set", [["set"]], [["set", 1]], [["exec", "a=b"]], [["set", "a" * 30_000]], [[]] * 99]
)
def test_steps_from_programs_are_checked(step):
    with pytest.raises(UserError):
        bounds.check_step(DOCUMENT, step, names=NAMES, seed=0, noise=None)


@pytest.mark.parametrize("name", ["bbox", "blob"])
def test_the_editor_s_shapes_are_those_of_the_string(name):
    latent = LATENTS[name]
    string = DOCUMENT.latents[name]
    assert bounds.read_shapes(name, latent.parts(latent.parse(string))) == string


NUMBERS = st.one_of(st.integers(-5, 1005), st.floats(), st.text(max_size=3), st.none())
PARTS = st.lists(
    st.fixed_dictionaries(
        {"phrase": st.text(max_size=12), "boxes": st.lists(st.lists(NUMBERS, max_size=5))}
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(PARTS, st.recursive(NUMBERS, st.lists, max_leaves=8)))
def test_whatever_the_editor_sends_is_valid_or_refused(parts):
    try:
        string = bounds.read_shapes("bbox", parts)
    except UserError:
        pass  # nothing else may be raised
    else:
        assert LATENTS["bbox"].write(LATENTS["bbox"].parse(string)) == string


@pytest.mark.parametrize("text", ["", "{", "NaN", "[" * 100_000, "[NaN]", "x" * 2**18, None, 3])
def test_json_from_a_browser_is_bounded(text):
    with pytest.raises(UserError):
        bounds.read_json(text)


# ---- uploads ---------------------------------------------------------------------------------


def put(folder, document=DOCUMENT, size=8):
    path = folder / "picture.png"
    save_png(path, np.zeros((size, size, 3), np.uint8), document)
    return path


def opened(path, folder):
    return bounds.open_png(path, folder, DEFAULTS, NAMES, 8)


def test_our_pictures_open(tmp_path):
    image, document = opened(str(put(tmp_path)), tmp_path)
    assert image.shape == (8, 8, 3) and document == DOCUMENT
    other = dataclasses.replace(DOCUMENT, sampler="ddpm", steps=99, guidance_weight=1.0)
    assert opened(str(put(tmp_path, other)), tmp_path)[1] == other


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "",
        None,
        3,
        "a\0b",
        "/",
        pytest.param("x" * 9999, id="long"),
    ],
)
def test_paths_elsewhere_are_refused_without_a_word_of_them(tmp_path, path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    inside = [path] if not isinstance(path, str) or not path else [path, f"{uploads}/{path}"]
    for given_path in inside:
        with pytest.raises(UserError) as caught:
            opened(given_path, uploads)
        assert "passwd" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_links_out_of_the_folder_are_refused(tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    os.symlink(put(tmp_path), uploads / "link.png")
    with pytest.raises(UserError, match="was not uploaded here"):
        opened(str(uploads / "link.png"), uploads)


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    path = put(tmp_path)
    for data, words in (
        (path.read_bytes()[:200], "cannot be opened"),
        (b"GIF89a" + b"0" * 100, "cannot be opened"),
        (b"\x89PNG" + b"0" * (bounds.MAX_UPLOAD_BYTES + 1), "larger than 8 MiB"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            opened(str(path), tmp_path)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 100_000}, "num_steps is 100000"),
        ({"steps": 1000}, "between 1 and 250"),
        ({"guidance_weight": 99.0}, "between 0 and 50"),
        ({"sampler": "magic"}, "unknown sampler"),
        ({"seed": 2**40}, "seed is"),
        ({"caption": "x" * 3000}, "2,000 are the most"),
        ({"caption": ""}, "is empty"),
        ({"sampler_settings": {"eta": 7.0}}, "eta is 7"),
        # Each would be a program of its own to compile.
        ({"sampler_settings": {"eta": 0.123}}, "eta = 0.123; this page draws with 0.0 only"),
        ({"sampler_settings": {"time_grid": "logsnr"}}, "grid = logsnr; this page"),
        ({"sampler_settings": {"cads_scale": 0.1}}, "annealed = True; this page"),
    ],
)
def test_documents_of_strangers_keep_to_the_bounds(tmp_path, changes, words):
    path = put(tmp_path, dataclasses.replace(DOCUMENT, **changes))
    with pytest.raises(UserError, match=words):
        opened(str(path), tmp_path)


def test_pictures_of_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="16 x 16 pixels"):
        opened(str(put(tmp_path, size=16)), tmp_path)
    with pytest.raises(UserError, match="does not write the latent blob"):
        bounds.open_png(str(put(tmp_path)), tmp_path, DEFAULTS, ("text", "bbox", "voken"), 8)
