"""A document makes its picture again: the same bytes in the batch shape that it records."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from kaleido_jax import Pipeline, mesh
from kaleido_jax.latents import load_document, save_png

MODEL = pathlib.Path(__file__).parent.parent / "kaleido_jax" / "assets" / "shapes_kaleido"
PROMPTS = ["dawn: a red shape", "noon: a blue shape and a red shape", "dusk: a green shape"]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(MODEL, mesh.make_mesh(devices=jax.devices()[:1]))


def test_a_picture_of_a_large_batch_is_made_again_alone(pipe, tmp_path):
    out = pipe(PROMPTS, num_images=5, num_steps=4, seed=2)
    assert {document.batch_size for document in out.documents} == {16}
    for number in (0, 7, 14):
        save_png(tmp_path / "first.png", out.images[number], out.documents[number])
        document = load_document(tmp_path / "first.png")
        # From the file alone, in a program that has other pictures' places empty.
        fresh = Pipeline.from_pretrained(MODEL, mesh.make_mesh(devices=jax.devices()[:1]))
        for again in (pipe, fresh):
            made = again.render(document, batch_size=document.batch_size)
            save_png(tmp_path / "again.png", made.images[0], made.documents[0])
            assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()


@pytest.mark.parametrize("batch_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_batch_shape_moves_no_pixel_by_more_than_one(pipe, batch_size):
    out = pipe(PROMPTS, num_images=5, num_steps=4, seed=2)
    documents = [out.documents[number] for number in (0, 7, 14)]
    made = pipe.render(documents, batch_size=batch_size)
    difference = np.abs(made.images.astype(int) - out.images[[0, 7, 14]].astype(int))
    assert difference.max() <= 1
    assert all(document.batch_size == batch_size for document in made.documents)
