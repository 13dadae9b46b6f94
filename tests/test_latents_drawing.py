"""What is drawn: where, in which sense, in which colours, and that nothing makes it fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import ImageFont

from kaleido_jax.latents import LATENTS, LatentTypeError, bbox, blob, drawing, panel, text, voken
from kaleido_jax.latents.blob import Ellipse

VOKENS = "".join(f"#{i % 7}" for i in range(32))
STRINGS = {
    "text": "A red square above a blue disc, on a light grey ground.",
    "bbox": "a red square (100, 100, 500, 400) above a blue disc (600, 550, 900, 950).",
    "blob": "a tilted disc (500, 500, 400, 150, 45)",
    "voken": VOKENS,
}
STRINGS["combined"] = f"[text] {STRINGS['text']} [bbox] {STRINGS['bbox']} [voken] {VOKENS}"


def grey(height: int, width: int, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_counter_clockwise_as_seen_on_the_screen() -> None:
    """theta = 45 runs from bottom left to top right of the picture, as one looks at it."""
    tilted = Ellipse(500, 500, 400, 60, 45)
    mask = tilted.mask((100, 100))
    assert mask[25, 75]  # up and to the right of the middle
    assert mask[75, 25]
    assert not mask[25, 25]
    assert not mask[75, 75]
    drawn = blob.draw(grey(100, 100), (blob.Segment("disc", (tilted,)),))
    changed = (drawn != 128).any(axis=2)
    assert changed[25, 75]
    assert changed[75, 25]
    assert not changed[25, 25]
    assert not changed[75, 75]
    # The axis end comes first, and the points go on counter-clockwise from there.
    points = Ellipse(500, 500, 400, 100, 0).points((100, 100), count=4)
    np.testing.assert_allclose(points, [(90, 50), (50, 40), (10, 50), (50, 60)], atol=1e-9)
    assert Ellipse(500, 500, 400, 60, 10).points((100, 100))[0][1] < 50


def test_mask_has_the_area_centre_and_angle_of_the_ellipse() -> None:
    for theta in (0, 30, 90, 150):
        mask = Ellipse(400, 600, 300, 120, theta).mask((500, 500))
        rows, columns = np.nonzero(mask)
        assert mask.sum() == pytest.approx(math.pi * 150 * 60, rel=0.01)
        assert columns.mean() + 0.5 == pytest.approx(200, abs=0.2)
        assert rows.mean() + 0.5 == pytest.approx(300, abs=0.2)
        covariance = np.cov(columns, -rows)
        angle = math.degrees(
            math.atan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1]) / 2
        )
        assert (angle - theta + 90) % 180 == pytest.approx(90, abs=0.5)


def test_a_wide_picture_stretches_the_ellipse() -> None:
    ellipse = Ellipse(500, 500, 400, 100, 30)
    points = ellipse.points((100, 300))
    np.testing.assert_allclose(points, ellipse.points((100, 100)) * [3, 1])
    mask = ellipse.mask((100, 300))
    assert mask.shape == (100, 300)
    assert mask.sum() == pytest.approx(math.pi * 40 * 10 * 3, rel=0.02)


def test_a_box_is_outlined_at_its_place_and_its_inside_is_left_alone() -> None:
    image = grey(150, 150)
    value = bbox.parse("square (200, 300, 600, 900)")
    drawn = bbox.draw(image, value)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 128).all()
    for row, column in ((45, 60), (135, 60), (90, 30), (90, 90)):
        near = drawn[row - 1 : row + 1, column - 1 : column + 1].reshape(-1, 3).astype(int)
        # Red on grey with a white casing: only the line itself is redder than green by so much.
        assert (near[:, 0] - near[:, 1]).max() > 100, (row, column)
    assert (drawn[50:130, 35:85] == 128).all()
    assert (drawn[:40] == 128).all()
    np.testing.assert_array_equal(drawn, bbox.draw(image, value))


def test_each_phrase_has_its_colour_in_picture_and_legend() -> None:
    value = bbox.parse(STRINGS["bbox"])
    spans = bbox.spans(value)
    assert [s.text for s in spans] == ["a red square", "above a blue disc", "."]
    assert [s.colour for s in spans] == [
        drawing.object_colour(0),
        drawing.object_colour(1),
        drawing.INK,
    ]
    assert [s.glued for s in spans] == [False, False, True]
    legend = drawing.prose(spans, 400)
    for span in spans[:2]:
        assert (legend == span.colour).all(axis=2).any()
    drawn = bbox.draw(grey(400, 400), value)
    for index in (0, 1):
        assert (drawn == drawing.object_colour(index)).all(axis=2).sum() > 300
    assert not (drawn == drawing.object_colour(2)).all(axis=2).any()


def test_labels_only_where_they_can_be_read() -> None:
    value = bbox.parse("square (300, 300, 700, 700)")
    small = bbox.draw(grey(drawing.LABEL_FROM - 1, drawing.LABEL_FROM - 1), value)
    large = bbox.draw(grey(320, 320), value)

    def rows_above(image: np.ndarray) -> int:
        return int((image[: int(image.shape[0] * 0.28)] != 128).any(axis=(1, 2)).sum())

    assert rows_above(small) == 0
    assert rows_above(large) > 5


def test_shortened_words_fit() -> None:
    font = ImageFont.load_default(12)
    for room in (20, 60, 200):
        for words in ("a", "a very long label of many words", "W" * 8000):
            short = drawing.shorten(words, font, room)
            assert short == words or short.endswith("...")
            assert font.getlength(short) <= max(room, font.getlength("W..."))
    assert drawing.shorten("abc", font, 200) == "abc"


def test_the_mosaic_shows_ids_row_by_row() -> None:
    ids = voken.parse(VOKENS)
    image = grey(16, 64)
    drawn = voken.draw(image, ids)
    assert drawn.shape[1] == 64
    np.testing.assert_array_equal(drawn[:16], image)
    strip = drawn[16:]
    tall = strip.shape[0] // 4
    for number, identity in enumerate(ids):
        row, column = divmod(number, 8)
        cell = strip[row * tall : (row + 1) * tall, column * 8 : (column + 1) * 8]
        assert (cell == voken.colour(identity)).all(), number
    assert len({voken.colour(i) for i in range(8192)}) > 8000
    # Wide cells carry their numbers.
    wide = drawing.mosaic(ids, [(255, 255, 255)] * 32, (4, 8), 400)
    assert (wide[:30, :50] != 255).any()


def test_words_are_wrapped_and_bounded() -> None:
    one = drawing.prose([drawing.Span("word")], 320)
    many = drawing.prose([drawing.Span("word " * 40)], 320)
    endless = drawing.prose([drawing.Span("word " * 800), drawing.Span("tail")], 320)
    unbroken = drawing.prose([drawing.Span("W" * 4000)], 320)
    assert one.shape[1] == many.shape[1] == endless.shape[1] == 320
    assert one.shape[0] < many.shape[0] < endless.shape[0] == unbroken.shape[0]
    for strip in (one, many, endless, unbroken):
        assert (strip[:, -3:] == 255).all()  # nothing runs over the edge
        assert (strip != 255).any()
    below = text.draw(grey(20, 320), "word")
    np.testing.assert_array_equal(below, np.concatenate([grey(20, 320), one]))


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (32, 32), (64, 64), (200, 320)])
def test_every_latent_is_drawn_at_any_size(size: tuple[int, int]) -> None:
    image = grey(*size)
    for name, latent in LATENTS.items():
        drawn = latent.draw(image, latent.parse(STRINGS[name]))
        assert drawn.dtype == np.uint8
        assert drawn.shape[1:] == (size[1], 3)
        assert drawn.shape[0] == size[0] if latent.overlay else drawn.shape[0] > size[0]
        assert (drawn[: size[0]] != image).any() == (latent.overlay or name == "combined"), name


def test_panel_enlarges_draws_and_writes() -> None:
    image = grey(32, 32)
    values = {name: STRINGS[name] for name in ("text", "bbox", "voken")}
    drawn = panel(image, values)
    assert drawn.dtype == np.uint8
    assert drawn.shape[1] == 320
    assert drawn.shape[0] > 320 + 96 + 20
    assert (drawn[330:340, 5:35] == voken.colour(0)).all(axis=2).any()
    # The same whether the latents come singly or combined; the missing are left out.
    np.testing.assert_array_equal(drawn, panel(image, {"combined": STRINGS["combined"]}))
    np.testing.assert_array_equal(drawn, panel(image, {**values, "blob": ""}))
    assert panel(image, {}, 4).shape == (128, 128, 3)
    assert panel(image, {"blob": STRINGS["blob"]}, 3).shape[1] == 96
    np.testing.assert_array_equal(panel(image, {}, 1), image)


def test_panel_shows_what_is_not_valid_instead_of_failing() -> None:
    image = grey(32, 32)
    for name in LATENTS:
        drawn = panel(image, {name: "Dog (1, 2, 3)\n\x00\ud800" + "x" * 10_000})
        assert drawn.shape[0] > 340
        assert (drawn[320:] == drawing.ALARM).all(axis=2).any()
        assert (drawn[:320] == 128).all()


def test_panel_refuses_misuse() -> None:
    with pytest.raises(LatentTypeError, match="did you mean bbox"):
        panel(grey(8, 8), {"bbbox": "a"})
    for scale in (0, -1, 600):
        with pytest.raises(LatentTypeError, match=r"not in 1\.\.512"):
            panel(grey(8, 8), {}, scale)
    for wrong in (
        np.zeros((8, 8, 3)),
        np.zeros((8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        7,
    ):
        with pytest.raises(LatentTypeError, match="uint8 array"):
            panel(wrong, {})
        for latent, string in STRINGS.items():
            with pytest.raises(LatentTypeError):
                LATENTS[latent].draw(wrong, LATENTS[latent].parse(string))
