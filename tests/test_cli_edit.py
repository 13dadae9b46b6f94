"""`kaleido edit` from the command line, with a model trained for two steps."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from kaleido_jax import bundle, cli, cli_edit, editing
from kaleido_jax.latents import LatentDocument, bbox, load_document, save_document
from tests.test_constrained import _bundle, _config

CAPTION = "dawn: a red shape"
LATENT = "a red disc (100, 100, 400, 400) and a dog (500, 500, 700, 700)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = _config(("bbox",))
    config.data.latent_length = 48
    made = dataclasses.replace(_bundle(config), fingerprint="model")
    return bundle.save(tmp_path_factory.mktemp("model") / "export", made)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "document.json"
    settings = dict(sampler="ddim", steps=2, seed=5)
    save_document(path, LatentDocument(caption=CAPTION, latents={"bbox": LATENT}, **settings))
    return path


def words(document, model, out, *rest):
    return ["edit", str(document), "--checkpoint", str(model), "--out", str(out), *rest]


def boxes(path):
    return [s.boxes[0] for s in bbox.parse(load_document(path).latents["bbox"]) if s.boxes]


def test_steps_become_pictures_documents_and_a_sheet(model, document, tmp_path, capsys):
    first = tmp_path / "first"
    edits = "--word red=blue --move dog=10,20 --then --remove dog --then --resample bbox".split()
    assert cli.main(words(document, model, first, *edits)) == 0, capsys.readouterr().err
    assert "3 step(s) of edits, 4 pictures" in capsys.readouterr().out
    assert boxes(first / "000000.png") == [
        bbox.Box(100, 100, 400, 400),
        bbox.Box(500, 500, 700, 700),
    ]
    assert boxes(first / "000001.png")[1] == bbox.Box(510, 520, 710, 720)
    assert "blue disc" in load_document(first / "000001.json").latents["bbox"]
    assert len(boxes(first / "000002.png")) == 1
    drawn = load_document(first / "000003.png")
    assert drawn.decoding["resampled"] == ["bbox"] and drawn.seed == 5
    with Image.open(first / "sheet.png") as sheet:
        assert sheet.width > 4 * 300
    assert "sheet.png" in json.loads((first / "manifest.json").read_text())["files"]

    # From one of the pictures, by a script: the same noise, and what is not edited stays.
    script = tmp_path / "edits.jsonl"
    script.write_text('{"move": "dog=1,1"}\n{"move": "dog=-1,-1"}\n')
    second = tmp_path / "second"
    assert cli.main(words(first / "000000.png", model, second, "--script", str(script))) == 0
    before, after = (np.asarray(Image.open(second / f"00000{i}.png")) for i in (0, 2))
    np.testing.assert_array_equal(before, after)
    assert load_document(second / "000000.json").latents["bbox"] == LATENT


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([], "nothing to do; give --script or one of --set"),
        (["--then"], "step 1 has no edit"),
        (["--word", "red=blue", "--then"], "step 2 has no edit"),
        (["--word", "red=blue", "--script", "x"], "not both"),
        (["--script", "no_such.jsonl"], "no_such.jsonl: No such file"),
        (["--mvoe", "dog=1,2"], "did you mean '--move'"),
        (["--move", "cat=1,2"], "no object 'cat' (there are #1 'a red disc', #2 'and a dog')"),
        (["--keep", "text"], "the model's latents are bbox"),
        (["--keep", "bbox"], "nothing is left to draw anew"),
        (["--set", "text=a"], "the document has caption, bbox"),
        (["--resample", "bbox", "--candidates", "0"], "1 to 256"),
    ],
)
def test_misuse_is_one_line(model, document, tmp_path, capsys, rest, message):
    assert cli.main(words(document, model, tmp_path / "out", *rest)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_document_is_named(model, tmp_path, capsys):
    rest = ("--word", "a=b")
    assert cli.main(words(tmp_path / "none.json", model, tmp_path / "out", *rest)) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_flags_are_the_verbs_of_editing():
    assert tuple(cli_edit.EDITS) == editing.VERBS
