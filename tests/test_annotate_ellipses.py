"""Ellipses of masks: known ones come back, strays and holes do no harm, the sense is as stated."""

from __future__ import annotations

import pathlib

import cv2
import numpy as np
import pytest

from kaleido_jax.annotate import ellipses
from kaleido_jax.data import masks, oracle
from kaleido_jax.latents import blob
from kaleido_jax.latents.blob import Ellipse

COCO = pathlib.Path(__file__).parents[2] / "shared" / "data" / "coco100"
SIDE = 64


def mask_of(xc, yc, major, minor, theta, side=SIDE) -> np.ndarray:
    """Pixels whose centre lies in the ellipse, by OpenCV's drawing at sixteen times the size."""
    fine = np.zeros((side * 16, side * 16), np.uint8)
    axes = (round(major * 16), round(minor * 16))
    # OpenCV turns clockwise as seen.
    cv2.ellipse(fine, (round(xc * 16), round(yc * 16)), axes, -theta, 0, 360, 1, -1)
    return fine[8::16, 8::16].astype(bool)


def turn(first, second):
    """How far two axes are apart, 0..90 degrees."""
    return abs((np.asarray(first) - second + 90) % 180 - 90)


@pytest.fixture(scope="module")
def known() -> np.ndarray:
    """2,000 ellipses inside a picture of 64 pixels: [xc, yc, major, minor, theta]."""
    draw = np.random.default_rng(0)
    major = draw.uniform(8, 24, 2000)
    return np.stack(
        [
            draw.uniform(26, 38, 2000),
            draw.uniform(26, 38, 2000),
            major,
            major * draw.uniform(0.35, 0.8, 2000),
            draw.uniform(0, 180, 2000),
        ],
        axis=1,
    )


def test_two_thousand_known_ellipses(known):
    moments = np.array([masks.moments_ellipse(mask_of(*e)) for e in known])
    contours = np.array([ellipses.contour_ellipse(mask_of(*e)) for e in known])
    for found, bias, error in ((moments, 0.03, 0.8), (contours, 0.1, 0.8)):
        off = found[:, :4] - known[:, :4]
        assert np.abs(off.mean(0)).max() < bias
        assert np.abs(off).max() < 0.8
        assert turn(found[:, 4], known[:, 4]).mean() < error


def test_the_two_fits_agree_on_ellipses(known):
    shares = []
    for axes in known[:200]:
        mask = mask_of(*axes)
        pair = (masks.moments_ellipse(mask), ellipses.contour_ellipse(mask))
        shares.append(ellipses.agreement(*pair, SIDE))
        assert ellipses.fit(mask).marks == ()
    assert np.mean(shares) > 0.97 and min(shares) > 0.9


def test_the_turning_sense():
    """An axis from bottom left to top right, drawn as a line, has theta 45."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    cv2.line(picture, (12, 52), (52, 12), 1, thickness=9)
    found = ellipses.fit(picture.astype(bool))
    assert turn(found.ellipse.theta, 45) <= 1
    assert turn(ellipses.contour_ellipse(picture.astype(bool))[4], 45) < 2
    # The drawing of the latent, the mask of the latent and the fit mean the same.
    tilted = Ellipse(500, 500, 300, 100, 30)
    assert turn(ellipses.fit(tilted.mask((SIDE, SIDE))).ellipse.theta, 30) <= 1
    canvas = np.zeros((256, 256, 3), np.uint8)
    drawn = blob.draw(canvas, (blob.Segment("a", (tilted,)),)).any(-1)
    refitted = ellipses.fit(drawn).ellipse
    assert turn(refitted.theta, 30) <= 1
    assert abs(refitted.xc - 500) <= 2 and abs(refitted.yc - 500) <= 2


def test_strays_and_holes_do_no_harm():
    axes = (28.0, 30.0, 18.0, 8.0, 25.0)
    clean = ellipses.fit(mask_of(*axes)).axes
    stray = mask_of(*axes)
    stray[2:8, 52:62] = True
    assert ellipses.fit(stray).axes == clean
    # All components together would be far off.
    assert turn(masks.moments_ellipse(stray)[4], 25) > 5
    holed = mask_of(*axes)
    holed[28:33, 24:32] = False
    assert ellipses.fit(holed).axes == clean


def test_polygons_are_filled_by_pixel_centres():
    """Against an ellipse's equation, a star that crosses itself, and a corner outside."""
    truth = Ellipse(470, 520, 300, 90, 35)
    outline = truth.points((SIDE, SIDE), 5000)
    assert (masks.polygon_mask(outline, SIDE) == truth.mask((SIDE, SIDE))).all()
    turns = np.arange(5) * 4 * np.pi / 5
    star = 32 + 30 * np.stack([np.sin(turns), -np.cos(turns)], 1)
    filled = masks.polygon_mask(star, SIDE)
    assert not filled[32, 32] and filled[8, 31] and not filled[60, 32]
    outside = masks.polygon_mask(np.array([[-20.0, 10], [90, 10], [90, 20], [-20, 20]]), SIDE)
    assert outside[10:20].all() and outside.sum() == 10 * SIDE


def test_what_is_marked():
    assert "cut by the border" in ellipses.fit(mask_of(0, 32, 20, 10, 0)).marks
    pieces = mask_of(16, 16, 10, 8, 0) | mask_of(48, 48, 9, 8, 0)
    assert ellipses.fit(pieces).marks[0].startswith("the largest part is 5")
    angle = np.zeros((SIDE, SIDE), bool)
    angle[4:60, 4:8] = angle[56:60, 4:60] = True
    assert ellipses.fit(angle).marks == ("its contour is not that of an ellipse",)


def test_limits():
    small = np.zeros((SIDE, SIDE), bool)
    assert ellipses.fit(small) is None
    small[10:13, 10:15] = True  # 15 pixels
    assert ellipses.fit(small) is None
    small[13, 10] = True
    assert ellipses.fit(small) is not None
    line = np.zeros((SIDE, SIDE), bool)
    line[20, 10:50] = True
    assert ellipses.fit(line).ellipse.r_minor == 1
    circle = ellipses.fit(mask_of(32, 32, 20, 19.5, 70))
    assert circle.ellipse.theta == 0
    full = ellipses.fit(np.ones((SIDE, SIDE), bool)).ellipse
    assert (full.xc, full.yc, full.theta) == (500, 500, 0)
    with pytest.raises(ValueError, match="square"):
        ellipses.fit(np.ones((4, 5), bool))


def test_random_masks_never_break_it():
    draw = np.random.default_rng(1)
    for _ in range(300):
        side = int(draw.integers(8, 40))
        mask = draw.random((side, side)) < draw.random()
        found = ellipses.fit(mask)
        if found is not None:
            blob.validate((blob.Segment("a", (found.ellipse,)),))


@pytest.mark.skipif(not COCO.is_dir(), reason="needs ../shared/data/coco100")
def test_true_polygons():
    """Masks of photographs' true polygons at 128 pixels: the ellipse covers what the mask does."""
    import json
    import tarfile

    overlaps, inside = [], []
    with tarfile.open(COCO / "00000.tar") as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                continue
            for thing in json.loads(tar.extractfile(member).read())["objects"]:
                points = np.array(thing["polygon"], float).reshape(-1, 2)
                mask = np.zeros((128, 128), bool)
                for part in oracle._parts(points):
                    mask |= masks.polygon_mask(points[part] * 0.128, 128)
                found = ellipses.fit(mask)
                if found is None:
                    continue
                component, _ = masks.largest_component(mask)
                shape = found.ellipse.mask((128, 128))
                overlaps.append((component & shape).sum() / (component | shape).sum())
                x1, y1, x2, y2 = thing["bbox_xyxy"]
                inside.append(
                    x1 - 10 <= found.ellipse.xc <= x2 + 10
                    and y1 - 10 <= found.ellipse.yc <= y2 + 10
                )
    assert len(overlaps) > 300 and all(inside)
    assert np.median(overlaps) > 0.7
