"""The whole way in small: the real config shrunk, trained, stopped, resumed, sampled, edited."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from kaleido_jax import bundle, cli, cli_train, training_loop
from kaleido_jax.generate import Pipeline, write_outputs
from kaleido_jax.latents import LatentDocument
from kaleido_jax.latents.document import read_png
from tests.tiny import tiny_config

PROMPT = "dawn: a red shape and a blue shape"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config("train.num_steps=2", "train.sample_every=2", "train.num_samples=2")
    training_loop.train(cfg, folder, cli_train.sample_hook(cfg), say=lambda _: None)
    return folder


def test_training_leaves_everything_that_a_reader_needs(workdir):
    names = {p.name for p in workdir.iterdir()}
    assert names >= {"config.json", "tokenizer.model", "metrics.jsonl", "samples", "checkpoints"}
    with Image.open(workdir / "samples" / "step_00000002.png") as grid:
        assert grid.size == (64, 32) or grid.size[0] >= 32
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2] and all(np.isfinite(x["loss"]) for x in lines)


def test_sample_edit_and_export(workdir, tmp_path):
    pipe = Pipeline.from_pretrained(workdir)
    out = pipe(PROMPT, num_images=2, guidance_weight=3.0, seed=5)
    assert out.images.shape == (2, 32, 32, 3) and out.images.dtype == np.uint8
    write_outputs(out, tmp_path / "pictures")
    image, document = read_png(tmp_path / "pictures" / "000000.png")
    np.testing.assert_array_equal(image, out.images[0])
    assert document == out.documents[0] and isinstance(document, LatentDocument)

    # The same noise with another z is another picture; the same z the same to the bit.
    # (A decoder of two steps writes nothing valid, so the latent is put in, not replaced.)
    z = {"bbox": "a dark red disc (100, 100, 400, 400) on white"}
    edited = dataclasses.replace(document, latents=z)
    both = pipe.render([document, edited])
    np.testing.assert_array_equal(both.images[0], out.images[0])
    assert np.abs(both.samples[1] - both.samples[0]).max() > 0

    folder = bundle.save(tmp_path / "export", bundle.load(workdir))
    assert (bundle.load(workdir).step, bundle.load(folder).step) == (2, None)
    exported = Pipeline.from_pretrained(folder).render(document, batch_size=2)
    np.testing.assert_array_equal(exported.images[0], out.images[0])


def test_the_command_line_samples(workdir, tmp_path, capsys):
    words = ["sample", "--checkpoint", str(workdir), "--prompt", PROMPT, "--num", "1"]
    assert cli.main([*words, "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").rglob("*.png"))
    assert cli.main([*words, "--steps", "0", "--out", str(tmp_path / "none")]) == 2
    assert "steps" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_ratio_of_two_resolutions_reaches_the_picture(tmp_path):
    cfg = tiny_config("train.num_steps=1", "train.checkpoint_every=1", nested=True)
    training_loop.train(cfg, tmp_path, say=lambda _: None)
    out = Pipeline.from_pretrained(tmp_path)(PROMPT, num_images=1, guidance_weight=1.0)
    assert out.images.shape == (1, 32, 32, 3)
