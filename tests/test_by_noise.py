"""Measures over the noise: what the network says of noised pictures, and where sampling ends."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, cli
from kaleido_jax.demo.shapes import shipped
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import by_noise
from kaleido_jax.evaluate.adherence import make_detector
from kaleido_jax.evaluate.data import Data
from kaleido_jax.rng import stream
from kaleido_jax.schedule import Schedule
from tests.test_generate import _bundle, _config


def tiny(latents=("bbox",)):
    config = _config(latents)
    config.data.image_size = 32
    config.data.latent_length = 34
    return _bundle(config)


def measure(model, count, levels, **more):
    data = Data(model.config, tuple(model.config.latents))
    found = by_noise.rows(model, data, [make_detector("shapes")], count, levels=levels, **more)
    return {(row["level"], row["measure"]): row for row in found}, data


def test_a_network_that_says_nothing_errs_by_what_the_noise_hides():
    """With v = 0 the clean picture is taken for alpha x_t, whatever the condition is."""
    model = tiny()
    model.params["denoiser"] = jax.tree.map(np.zeros_like, model.params["denoiser"])
    found, data = measure(model, 4, (30, 700), seed=3)
    images = np.stack([data.held_out(i)["image"] for i in range(4)])
    clean = (images.astype(np.float32) - 127.5) / 127.5
    eps = jax.random.normal(jax.random.fold_in(stream(3, "noise"), 0), clean.shape)
    for level in (30, 700):
        alpha, sigma = (float(x) for x in Schedule("ddpm").alpha_sigma(jnp.int32(level)))
        wrong = alpha * (alpha * clean + sigma * eps) - clean
        for name in by_noise.CONDITIONS:
            row = found[level, f"error, {name}"]
            assert row["value"] == pytest.approx(float(np.mean(wrong**2)), rel=1e-4)
            assert row["noise"] == pytest.approx(sigma / alpha, rel=1e-4) and row["n"] == 4
            assert row["low"] < row["value"] < row["high"]


def test_the_shipped_model_reads_boxes_where_noise_hides_the_picture():
    found, _ = measure(bundle.load(shipped("kaleido")), 12, (50, 900))
    own, other, none = (found[900, f"error, {name}"]["value"] for name in by_noise.CONDITIONS)
    assert own < 0.3 * none and none < 0.7 * other
    at_little = [found[50, f"error, {name}"]["value"] for name in ("own", "none")]
    assert at_little[1] < 2 * at_little[0]  # there the picture itself says it
    assert found[0, "shape"]["value"] == found[0, "hue"]["value"] == 1
    # What is given of the picture is kept; what had to be painted is less exact.
    overlaps = [found[level, "box_iou"]["value"] for level in (0, 50, 900)]
    assert overlaps == sorted(overlaps, reverse=True) and overlaps[-1] > 0.6
    assert found[50, "shape"]["value"] >= found[900, "shape"]["value"]


@pytest.mark.parametrize("case", [(1, (500,)), (4, (0,)), (4, (1001,))])
def test_what_cannot_be_measured_is_refused(case):
    with pytest.raises(UserError, match="2 pictures"):
        measure(tiny(), *case)


@pytest.mark.parametrize("latents", [("bbox",), ()])
def test_the_figure_and_its_numbers(tmp_path, capsys, latents, monkeypatch):
    monkeypatch.setattr(by_noise.rows, "__defaults__", (128, 0, (100, 900), lambda line: None))
    folder = bundle.save(tmp_path / "model", tiny(latents))
    words = f"figures noise --checkpoint {folder} --samples 3 --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "noise.csv",
        "noise.png",
        "noise.svg",
    }
    with open(tmp_path / "out" / "noise.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = {row["measure"] for row in rows}
    assert {f"error, {name}" for name in by_noise.CONDITIONS} <= seen
    assert ("hue" in seen) == bool(latents)
    capsys.readouterr()
    assert cli.main([*words.split(), "--metrics", "blob_iou"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no measure 'blob_iou'" in line and ("hue" in line) == bool(latents)
    assert cli.main(["figures", "toy", "--samples", "3"]) == 2
    assert "--samples has no meaning" in capsys.readouterr().err
