"""Measures over the noise: what the network says of noised pictures, and where sampling ends."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, cli, losses, samplers
from kaleido_jax.demo.shapes import shipped
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import by_noise
from kaleido_jax.evaluate.adherence import make_detector
from kaleido_jax.evaluate.data import Data
from kaleido_jax.figures import noise
from kaleido_jax.rng import per_sample, stream
from kaleido_jax.types import Batch
from tests.test_generate import _bundle, _config
from tests.tiny import tiny_config


def tiny(latents=("bbox",)):
    config = _config(latents)
    config.data.image_size = 32
    config.data.latent_length = 34
    return _bundle(config)


def measure(model, count, levels, **more):
    data = Data(model.config, tuple(model.config.latents))
    found = by_noise.rows(model, data, [make_detector("shapes")], count, levels=levels, **more)
    return {(row["level"], row["measure"]): row for row in found}, data


@pytest.mark.parametrize("nested", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_that_says_nothing_errs_by_what_the_noise_hides(nested):
    """With v = 0 the clean picture is taken for alpha x_t, whatever the condition is."""
    model = _bundle(tiny_config(nested=True)) if nested else tiny()
    model.params["denoiser"] = jax.tree.map(np.zeros_like, model.params["denoiser"])
    # One more than a batch has, so that one is filled up.
    found, data = measure(model, 17, (30, 700), seed=3)
    images = np.stack([data.held_out(i)["image"] for i in range(17)])
    clean = (images.astype(np.float32) - 127.5) / 127.5
    keys = per_sample(stream(3, "sample"), np.arange(17))
    eps = samplers.sample_noise(keys, 0, [(32, 32, 3), (16, 16, 3)])[0]
    schedule = losses.LossConfig.from_config(model.config, (2, 1) if nested else (1,)).schedules[0]
    for level in (30, 700):
        alpha, sigma = (float(x) for x in schedule.alpha_sigma(jnp.int32(level)))
        wrong = alpha * (alpha * clean + sigma * eps) - clean
        for name in by_noise.CONDITIONS:
            row = found[level, f"error, {name}"]
            assert row["value"] == pytest.approx(float(np.mean(wrong**2)), rel=1e-4)
            assert row["noise"] == pytest.approx(sigma / alpha, rel=1e-4) and row["n"] == 17
            assert row["low"] < row["value"] < row["high"]


def test_nothing_is_dropped_and_a_picture_is_the_same_among_more():
    model = tiny()

    def errors(count, seed=0):
        data = Data(model.config, ("bbox",))
        return by_noise._Held(model, data, [], count, seed).at(400, (400, 0))

    few, images = errors(3)
    assert images is None  # nobody would judge them
    assert not np.allclose(few["own"], few["other"])  # this network reads its condition
    assert not np.allclose(few["own"], few["none"])
    many = errors(4)[0]
    other_noise = errors(3, seed=1)[0]
    with model.config.unlocked():
        model.config.model.latent_decoder.dropout_rate = 0.5
        model.config.model.text_encoder.dropout_rate = 0.5
    without = errors(3)[0]
    for name in ("own", "none"):
        np.testing.assert_allclose(many[name][:3], few[name], rtol=1e-5)
        np.testing.assert_array_equal(without[name], few[name])
        assert not np.allclose(other_noise[name], few[name])


def test_another_condition_is_another():
    tokens = np.array([[1, 2], [1, 2], [1, 3], [1, 2]])
    batch = Batch(
        caption_tokens=tokens, latent_tokens=tokens, image=np.zeros(4), key_hash=np.zeros(4)
    )
    one, other = by_noise._others(batch, True), by_noise._others(batch, False)
    assert one.latent_tokens.tolist() == [[1, 3], [1, 3], [1, 2], [1, 3]]
    assert one.caption_tokens is tokens and other.latent_tokens is tokens
    same = batch.replace(caption_tokens=tokens[:2])
    with pytest.raises(UserError, match="one condition"):
        by_noise._others(same, False)


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


@pytest.mark.parametrize("latents", [("bbox",), pytest.param((), marks=pytest.mark.slow)])
def test_the_figure_and_its_numbers(tmp_path, capsys, latents, monkeypatch):
    monkeypatch.setattr(by_noise, "LEVELS", (100, 900))
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
    one = [*words.split(), "--data", "num_objects=1,1", "--data", "seed=7"]
    assert cli.main(one) == 0
    with open(tmp_path / "out" / "noise.csv", newline="", encoding="utf-8") as file:
        again = list(csv.DictReader(file))
    assert again != rows
    assert {row["n"] for row in again if row["measure"] == "hue"} <= {"3"}
    capsys.readouterr()
    assert cli.main(["figures", "toy", "--samples", "3"]) == 2
    assert "--samples has no meaning" in capsys.readouterr().err


def test_angles_have_room_and_vokens_a_panel():
    def row(level, measure, value):
        numbers = dict(value=value, low=value - 0.1, high=value + 0.1, n=9)
        return {"level": level, "noise": level / 100, "measure": measure, **numbers}

    errors = [row(w, f"error, {c}", 0.5) for w in (50, 500) for c in by_noise.CONDITIONS]
    turned = [row(50, "angle", 20.0), row(500, "angle", 40.0)]
    _, axes = noise.draw(errors + turned, ("angle",)).axes
    low, high = axes.get_ylim()
    assert low < 20 and high > 40
    figure = noise.draw([*errors, row(50, "voken", 0.7), row(500, "voken", 0.4)])
    assert len(figure.axes) == 2
    assert figure.axes[1].containers[0].lines[0].get_ydata().tolist() == [0.7, 0.4]
    assert len(noise.draw(errors + turned).axes) == 1
