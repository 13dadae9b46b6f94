"""The embedded shapes: tables, pictures, words, the detector, the theory; and the toy."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from kaleido_jax.data import ShapesSource, ToySource, make_source, shapes, shapes_text, toy
from kaleido_jax.data.shapes_detector import angle_error, box_iou, read, read_modes
from kaleido_jax.data.shapes_modes import (
    effective_modes,
    guided_marginal,
    guided_probabilities,
    mode_probabilities,
    tilt,
)
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox, blob

TRAINING = {"num_objects": (1, 2), "semi_axis": (130, 190)}
TWO = "dawn: a red shape and a blue shape"


def test_a_scene_depends_on_seed_and_index_alone():
    forward = [shapes.make_scene(3, i) for i in range(20)]
    backward = [shapes.make_scene(3, i) for i in reversed(range(20))][::-1]
    assert forward == backward
    assert forward != [shapes.make_scene(4, i) for i in range(20)]


def test_drawn_modes_follow_the_tables():
    scenes = [shapes.make_scene(1, i, (2, 2), (130, 190)) for i in range(4000)]
    for theme in range(4):
        of_theme = [s for s in scenes if s.theme == theme]
        drawn = {
            "layout": [s.layout for s in of_theme],
            "background": [s.background for s in of_theme],
            "shape": [o.shape for s in of_theme for o in s.objects],
            "shade": [o.shade for s in of_theme for o in s.objects],
        }
        for factor, values in drawn.items():
            table = shapes.TABLES[factor][theme]
            share = np.bincount(values, minlength=len(table)) / len(values)
            # Five standard deviations of a share.
            assert np.all(np.abs(share - table) <= 5 * np.sqrt(table * (1 - table) / len(values)))


@pytest.mark.parametrize("ranges", [{}, TRAINING, {"num_objects": (3, 3), "semi_axis": (230, 230)}])
def test_objects_are_apart_inside_and_placed_as_the_layout_says(ranges):
    for i in range(300):
        scene = shapes.make_scene(0, i, **ranges)
        objects = scene.objects
        assert len({o.hue for o in objects}) == len(objects)
        for o in objects:
            assert 0 < o.box[0] < o.box[2] < 1000
            assert 0 < o.box[1] < o.box[3] < 1000
            assert 0.3 < o.minor / o.major < 0.75
            if ranges is TRAINING:
                assert 130 <= o.major <= 190
        for a in range(len(objects)):
            for b in range(a):
                assert box_iou(objects[a].box, objects[b].box) == 0
        if scene.layout is not None:
            dx, dy = objects[0].x - objects[1].x, objects[0].y - objects[1].y
            told = (-dx, dx, -dy, dy)[scene.layout]
            assert told > (abs(dy) if scene.layout < 2 else abs(dx)) + 50


@pytest.mark.parametrize("shape", range(4))
def test_radii_are_those_of_the_moments(shape):
    item = shapes.Shape(0, 1, shape, 500, 480, 230, 140, 30)
    image = shapes.render(shapes.Scene(0, 4, None, (item,), 0), 256)
    found = read(image).objects[0]
    np.testing.assert_allclose(found.ellipse[:4], (500, 480, 230, 140), rtol=0.01)
    assert angle_error(found.ellipse[4], 30) < 0.5
    assert found.shape == shape


def test_theta_turns_counter_clockwise_as_seen():
    item = shapes.Shape(0, 1, 1, 500, 500, 230, 80, 45)
    image = shapes.render(shapes.Scene(0, 4, None, (item,), 0), 64)
    red = image[..., 1] < 100
    assert red[25, 39]  # top right
    assert red[39, 25]  # bottom left
    assert not red[25, 25]


@pytest.mark.parametrize(("size", "least_iou"), [(32, 0.88), (64, 0.93)])
def test_the_detector_reads_true_pictures(size, least_iou):
    scenes = [shapes.make_scene(5, i, **TRAINING) for i in range(250)]
    images = np.stack([shapes.render(s, size) for s in scenes])
    modes = read_modes(images, [shapes_text.caption(s) for s in scenes])
    assert modes["hue"].sum() >= 0.99 * modes["count"].sum()
    layouts = np.array([-1 if s.layout is None else s.layout for s in scenes])
    assert (modes["layout"] == layouts).mean() >= 0.99
    assert (modes["background"] == [s.background for s in scenes]).mean() >= 0.99
    for factor in ("shape", "shade"):
        right = [
            getattr(o, factor) == modes[factor][i, j]
            for i, s in enumerate(scenes)
            for j, o in enumerate(s.objects)
        ]
        assert np.mean(right) >= 0.98
    overlaps, angles = [], []
    for scene, image in zip(scenes, images, strict=True):
        reading = read(image)
        assert len(reading.objects) == len(scene.objects)
        for o in scene.objects:
            found = reading.by_hue(o.hue)
            overlaps.append(box_iou(found.box, o.box))
            angles.append(angle_error(found.ellipse[4], o.theta))
    assert np.mean(overlaps) >= least_iou
    assert np.mean(angles) < 0.6


def test_the_detector_bears_any_picture():
    draw = np.random.default_rng(0)
    pictures = [
        np.zeros((32, 32, 3), np.uint8),
        np.full((32, 32, 3), 255, np.uint8),
        np.tile(np.uint8([255, 0, 0]), (32, 32, 1)),
        draw.integers(0, 256, (32, 32, 3), np.uint8),
    ]
    for picture in pictures:
        assert 0 <= read(picture).background < 5
    modes = read_modes(np.stack(pictures[:2]), [TWO, TWO])
    assert modes["layout"].tolist() == [-1, -1]
    assert modes["hue"].tolist() == [0, 0]


def test_strings_name_every_mode_and_parse():
    for i in range(200):
        scene = shapes.make_scene(2, i)
        theme, hues = shapes_text.parse_caption(shapes_text.caption(scene))
        assert (theme, list(hues)) == (scene.theme, [o.hue for o in scene.objects])
        boxes = bbox.parse(shapes_text.grounded_caption(scene))
        ellipses = blob.parse(shapes_text.blobs(scene))
        for segments in (boxes, ellipses):
            claims, layout, background = shapes_text.read_grounded(segments)
            assert [(c.hue, c.shade, c.shape) for c in claims] == [
                (o.hue, o.shade, o.shape) for o in scene.objects
            ]
            assert (layout, background) == (scene.layout, scene.background)
        text = shapes_text.description(scene)
        assert 50 <= len(text.split()) <= 80
        for o in scene.objects:
            assert shapes_text.name_of(o) in text.replace("A ", "a ")


def test_only_captions_of_shapes_are_parsed():
    for text in ("", "dawn: a red shape and a red", "noon: an red shape", "dawn:a red shape", "x"):
        with pytest.raises(UserError, match="not a caption"):
            shapes_text.parse_caption(text)


def test_theory_of_collapse():
    table = mode_probabilities(TWO, "layout")
    np.testing.assert_allclose(sorted(table), [0.1, 0.2, 0.3, 0.4])
    for factor in ("layout", "shape", "background", "shade"):
        # Guidance 1 samples the condition itself; more guidance leaves fewer modes.
        truth = mode_probabilities(TWO, factor)
        np.testing.assert_allclose(guided_probabilities(TWO, factor, 1.0), truth)
        counts = [effective_modes(guided_probabilities(TWO, factor, g)) for g in (1, 2, 4, 8)]
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(counts))
        if factor == "shade":
            assert counts[-1] == pytest.approx(3)
        else:
            assert counts[-1] < counts[0] / 1.2
    # ANNOTATION's figure: 1.4 of 3.6 modes at guidance 8, the factor alone.
    assert effective_modes(table) == pytest.approx(3.6, abs=0.01)
    assert effective_modes(guided_marginal(TWO, "layout", 8)) == pytest.approx(1.39, abs=0.01)
    # Eq. (6) by hand.
    np.testing.assert_allclose(
        tilt(np.array([0.6, 0.4]), np.array([0.5, 0.5]), 2), np.array([36, 16]) / 52
    )
    with pytest.raises(UserError, match="no layout"):
        guided_probabilities("dawn: a red shape", "layout", 2)
    with pytest.raises(UserError, match="unknown factor"):
        mode_probabilities(TWO, "hue")


def test_effective_modes():
    assert effective_modes(np.array([5, 5, 0])) == pytest.approx(2)
    np.testing.assert_allclose(effective_modes(np.array([[1, 1, 1, 1], [7, 0, 0, 0]])), [4, 1])
    assert effective_modes(np.zeros(3)) == 0
    with pytest.raises(ValueError, match="negative"):
        effective_modes(np.array([1, -1]))


def test_training_pictures_come_fast_enough():
    source = ShapesSource(size=32, latents=("bbox",), **TRAINING)
    started = time.process_time()
    for i in range(300):
        source[i]
    # 5,000 a second on a free core; a shared one must still feed training.
    assert 300 / (time.process_time() - started) > 500


def test_misuse_is_told():
    with pytest.raises(UserError, match="num_objects"):
        make_source({"name": "shapes", "num_objects": [0, 2]})
    with pytest.raises(UserError, match="semi_axis"):
        make_source({"name": "shapes", "semi_axis": [10, 20]})
    with pytest.raises(UserError, match="size 16"):
        make_source({"name": "shapes"}, image_size=16)
    with pytest.raises(UserError, match="did you mean 'seed'"):
        make_source({"name": "shapes", "sead": 1})
    with pytest.raises(UserError, match="one of records, shapes, task, toy, webdataset"):
        make_source({"name": "cifar"})
    with pytest.raises(UserError, match="no latent 'depth'"):
        make_source({"name": "shapes"}, latents=("depth",))


# ---- the toy ----------------------------------------------------------------------------------


def _sample(group: int, mode: int | None, guidance: float, count: int = 2000) -> np.ndarray:
    """Shares of the class's two modes after 100 guided DDIM steps with the exact denoiser."""
    angle = np.linspace(0.9995, 0.0005, 101) * np.pi / 2
    alpha, sigma = np.cos(angle), np.sin(angle)
    x = np.random.default_rng(0).standard_normal((count, 2))
    for i in range(100):
        free = toy.exact_denoiser(x, alpha[i], sigma[i])
        told = toy.exact_denoiser(x, alpha[i], sigma[i], group, mode)
        clean = free + guidance * (told - free)
        x = alpha[i + 1] * clean + sigma[i + 1] * (x - alpha[i] * clean) / sigma[i]
    return np.bincount(toy.nearest_mode(x, group), minlength=2) / count


@pytest.mark.parametrize("group", [0, 1])
def test_guidance_collapses_the_toy_only_without_z(group):
    np.testing.assert_allclose(_sample(group, None, 1.0), toy.WEIGHTS, atol=0.05)
    assert _sample(group, None, 4.0)[1] < 0.05
    assert _sample(group, None, 8.0)[1] < 0.01
    for guidance in (1.0, 4.0, 8.0):
        kept = sum(w * _sample(group, m, guidance) for m, w in enumerate(toy.WEIGHTS))
        assert kept.min() >= 0.3


def test_toy_points_follow_the_mixture():
    source = ToySource(num_examples=3000, seed=1)
    examples = [source[i] for i in range(3000)]
    points = np.stack([e["image"][0, 0] for e in examples])
    assert examples[7]["image"].shape == (1, 1, 2)
    assert examples[7]["image"].dtype == np.float32
    for group, caption in enumerate(toy.CLASSES):
        for mode, name in enumerate(toy.MODES):
            mine = [e["caption"] == caption and e["latents"]["text"] == name for e in examples]
            assert np.mean(mine) == pytest.approx(toy.WEIGHTS[mode] / 2, abs=0.04)
            np.testing.assert_allclose(points[mine].mean(0), toy.CENTRES[group, mode], atol=0.02)
            np.testing.assert_allclose(points[mine].std(0), toy.STD, atol=0.02)
    with pytest.raises(IndexError):
        source[3000]


def test_the_exact_denoiser_is_the_posterior_mean():
    draw = np.random.default_rng(0)
    source = ToySource(seed=2)
    clean = np.stack([source[i]["image"][0, 0] for i in range(4000)]).astype(float)
    alpha, sigma = 0.8, 0.6
    noisy = alpha * clean + sigma * draw.standard_normal(clean.shape)
    best = ((toy.exact_denoiser(noisy, alpha, sigma) - clean) ** 2).mean()
    for wrong in (noisy / alpha, noisy * alpha, 0.9 * toy.exact_denoiser(noisy, alpha, sigma)):
        assert best < ((wrong - clean) ** 2).mean()
    with pytest.raises(ValueError, match="without its class"):
        toy.exact_denoiser(noisy, alpha, sigma, mode=1)
