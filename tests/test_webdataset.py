"""Shards of pictures: pictures and coordinates through crop and turn, true latents, real data."""

from __future__ import annotations

import io
import json
import math
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from kaleido_jax.data import Loader, WebDatasetSource, make_source, oracle
from kaleido_jax.data.transforms import (
    Frame,
    decode_image,
    ellipse_axes,
    orient,
    square_picture,
    training_picture,
)
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox, blob
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse
from kaleido_jax.tokens import Vocabulary

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


def encoded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_shard(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def record(key: str, number: int = 0, objects: list | None = None) -> dict[str, bytes]:
    picture = np.full((40, 60, 3), number, np.uint8)
    metadata = {"key": key, "objects": objects or []}
    return {
        f"{key}.png": encoded(picture),
        f"{key}.txt": f"picture {number}\n".encode(),
        f"{key}.json": json.dumps(metadata).encode(),
    }


# ---- coordinates ------------------------------------------------------------------------------


def marked(width: int, height: int, box: Box) -> np.ndarray:
    """A black picture with a white box (thousandths)."""
    picture = np.zeros((height, width, 3), np.uint8)
    x1, x2 = round(box.x1 * width / 1000), round(box.x2 * width / 1000)
    y1, y2 = round(box.y1 * height / 1000), round(box.y2 * height / 1000)
    picture[y1:y2, x1:x2] = 255
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (200, 200)])
def test_boxes_follow_turn_crop_and_resize(orientation, width, height):
    box = Box(300, 350, 500, 450)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(marked(width, height, box), exif=exif)
    picture, frame, stored = training_picture(data, 100)
    assert stored == (width, height)
    white = np.argwhere(picture[..., 0] > 127)
    (y1, x1), (y2, x2) = white.min(0), white.max(0) + 1
    seen = frame.box(box)
    np.testing.assert_allclose(
        [seen.x1, seen.y1, seen.x2, seen.y2], np.array([x1, y1, x2, y2]) * 10, atol=10
    )


def test_turning_agrees_with_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    methods = Image.Transpose
    turns = {
        2: methods.FLIP_LEFT_RIGHT,
        3: methods.ROTATE_180,
        4: methods.FLIP_TOP_BOTTOM,
        5: methods.TRANSPOSE,
        6: methods.ROTATE_270,
        7: methods.TRANSVERSE,
        8: methods.ROTATE_90,
    }
    for orientation, method in turns.items():
        want = np.asarray(Image.fromarray(pixels).transpose(method))
        np.testing.assert_array_equal(orient(pixels, orientation), want)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_ellipses_follow(orientation):
    ellipse = Ellipse(480, 520, 300, 120, 30)
    frame = Frame.oriented(orientation).then(
        Frame.square_crop(*((300, 200) if orientation in (1, 3) else (200, 300)))
    )
    moved = frame.ellipse(ellipse)
    # Against the moments of the moved points of the outline.
    turn = np.linspace(0, 2 * math.pi, 2000, endpoint=False)
    angle = math.radians(30)
    u, v = 300 * np.cos(turn), 120 * np.sin(turn)
    x = 480 + u * math.cos(angle) - v * math.sin(angle)
    y = 520 - u * math.sin(angle) - v * math.cos(angle)
    points = frame.points(np.stack([x, y], 1))
    outline = np.cov(points.T, bias=True) * 2  # along an ellipse the variance is r^2 / 2
    np.testing.assert_allclose(
        [moved.xc, moved.yc, moved.r_major, moved.r_minor, moved.theta],
        [*points.mean(0), *ellipse_axes(outline)],
        atol=1.01,
    )


def test_what_the_crop_cuts_off_goes():
    frame = Frame.square_crop(300, 200)  # keeps x in 167..833
    assert frame.box(Box(0, 0, 160, 500)) is None
    assert frame.box(Box(0, 0, 168, 500)) is None
    assert frame.box(Box(100, 0, 500, 1000)) == Box(0, 0, 500, 1000)
    assert frame.ellipse(Ellipse(100, 500, 50, 40, 0)) is None


@pytest.mark.parametrize("theta", [0, 30, 90, 135, 170])
@pytest.mark.parametrize("major", [12, 60, 300])
def test_ellipses_of_polygons(theta, major):
    truth = Ellipse(480, 510, major, major // 2, theta)
    item = {"label": "x", "bbox_xyxy": [100, 100, 900, 900]}
    item["polygon"] = truth.points((1000, 1000), 400).ravel().tolist()
    (seen,) = oracle.read_objects({"objects": [item]}, Frame.square_crop(64, 64), (64, 64))
    found = seen.ellipse
    # What pixels of the outline add to the radii must not be seen even on the smallest.
    assert abs(found.xc - 480) <= 1 and abs(found.yc - 510) <= 1
    assert abs(found.r_major - major) <= 1 and abs(found.r_minor - major // 2) <= 1
    assert abs((found.theta - theta + 90) % 180 - 90) <= 1


def test_ellipses_of_what_the_picture_shows():
    def ellipse(polygon):
        item = {"label": "x", "bbox_xyxy": [100, 100, 900, 900], "polygon": polygon}
        (seen,) = oracle.read_objects({"objects": [item]}, Frame.square_crop(300, 200), (300, 200))
        return seen.ellipse

    # The crop keeps x in 167..833: of this square the right half is seen, 250 x 500 there.
    half = ellipse(square(0, 250, 333, 750))
    assert (half.xc, half.yc, half.theta) == pytest.approx((125, 500, 90), abs=1)
    assert (half.r_major, half.r_minor) == pytest.approx((500 / 12**0.5 * 2, 250 / 3**0.5), abs=1)
    assert ellipse(square(0, 250, 160, 750)) is None  # outside
    assert ellipse(square(500, 500, 504, 504)) is None  # 4 x 6 thousandths: too small to see
    assert ellipse([500, 500, 600, 600, 700, 700]) is None  # no area
    assert ellipse([500, 500] * 3) is None


def test_resizing():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(square_picture(pixels, 40), pixels[:, 10:50])
    half = square_picture(pixels, 20)
    want = pixels[:, 10:50].reshape(20, 2, 20, 2, 3).mean((1, 3))
    np.testing.assert_allclose(half, want, atol=1)
    assert square_picture(pixels, 96).shape == (96, 96, 3)


# ---- true latents -----------------------------------------------------------------------------


def square(x1: int, y1: int, x2: int, y2: int) -> list[int]:
    return [x1, y1, x2, y1, x2, y2, x1, y2, x1, y1]


def test_latents_of_a_record():
    objects = [
        {"label": "cup", "bbox_xyxy": [400, 400, 450, 500], "polygon": square(400, 400, 450, 500)},
        {"label": "dog", "bbox_xyxy": [200, 100, 800, 700], "polygon": square(200, 100, 800, 700)},
        {"label": "cup", "bbox_xyxy": [500, 700, 600, 900], "polygon": square(500, 700, 600, 900)},
        {"label": "bird", "bbox_xyxy": [0, 0, 100, 100]},  # outside of the crop
    ]
    seen = oracle.read_objects({"objects": objects}, Frame.square_crop(300, 200), (300, 200))
    assert [s.label for s in seen] == ["dog", "cup", "cup"]
    grounded = bbox.parse(oracle.grounded_caption(seen))
    assert [(s.phrase, len(s.boxes)) for s in grounded] == [("dog", 1), ("cup", 2)]
    assert grounded[0].boxes[0] == Box(50, 100, 950, 700)
    ellipses = blob.parse(oracle.blobs(seen))
    # A rectangle's moments: radius = side / sqrt(3).
    dog = ellipses[0].ellipses[0]
    assert (dog.r_major, dog.r_minor) == pytest.approx((900 / 3**0.5, 600 / 3**0.5), rel=0.02)
    assert dog.theta == 0
    text = oracle.description(seen)
    assert text.startswith("There is a large dog at the middle centre.")
    assert oracle.grounded_caption([]) == oracle.blobs([]) == oracle.description([]) == ""


def test_polygons_of_several_parts_have_no_bridge():
    parts = square(100, 450, 300, 550) + square(700, 400, 900, 600)
    item = {"label": "x", "bbox_xyxy": [100, 400, 900, 600], "polygon": parts}
    (seen,) = oracle.read_objects({"objects": [item]}, Frame.square_crop(64, 64), (64, 64))
    # The largest part alone counts.
    assert (seen.ellipse.xc, seen.ellipse.yc) == pytest.approx((800, 500), abs=3)


def test_coordinates_of_the_picture_as_shown():
    item = {"label": "x", "bbox_xyxy": [400, 300, 600, 400]}
    stored = (300, 200)
    frame = Frame.oriented(6).then(Frame.square_crop(200, 300))
    turned = oracle.read_objects({"objects": [item]}, frame, stored)[0].box
    shown = {"objects": [item], "width": 200, "height": 300}
    assert oracle.read_objects(shown, frame, stored)[0].box == Box(400, 200, 600, 350)
    assert turned != Box(400, 200, 600, 350)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox_xyxy": [1, 2, 3]}, "3 numbers"),
        ({"bbox_xyxy": [1, 2, math.nan, 4]}, "out of range"),
        ({"bbox_xyxy": [300, 2, 100, 400]}, "reversed"),
        ({"bbox_xyxy": [0, 0, 1001, 400]}, r"beyond 0\.\.1000"),
        ({"bbox_xyxy": "1234"}, "list of numbers"),
        ({"bbox_xyxy": [0, 0, True, 400]}, "list of numbers"),
        ({"polygon": [1, 2, 3]}, "pairs"),
        ({"polygon": [1, 2, 3, 4, 5, 1e9]}, "out of range"),
        ({"label": ""}, "empty"),
        ({"label": 7}, "label"),
    ],
)
def test_malformed_objects_are_told(change, reason):
    item = {"label": "dog", "bbox_xyxy": [100, 100, 500, 500], **change}
    with pytest.raises(oracle.AnnotationError, match=reason):
        oracle.read_objects({"objects": [item]}, Frame.square_crop(64, 64), (64, 64))


def test_captions_of_the_json():
    assert oracle.caption({"caption": " a dog "}) == "a dog"
    assert oracle.caption({"label": "airplane"}) == "a photo of an airplane"
    with pytest.raises(oracle.AnnotationError, match="no caption"):
        oracle.caption({})


# ---- shards -----------------------------------------------------------------------------------


def test_records_of_several_shards(tmp_path):
    for shard in range(2):
        members = {}
        for number in range(3):
            members |= record(f"k{number}", 10 * shard + number)
        write_shard(tmp_path / f"0{shard}.tar", members)
    source = WebDatasetSource(str(tmp_path), size=32)
    assert len(source) == 6
    examples = [source[i] for i in (5, 0, 3)]
    assert [e["key"] for e in examples] == ["01/k2", "00/k0", "01/k0"]
    assert [e["caption"] for e in examples] == ["picture 12", "picture 0", "picture 10"]
    assert examples[0]["image"].shape == (32, 32, 3)
    assert np.all(examples[0]["image"] == 12)
    assert examples[0]["latents"] == {"text": "", "bbox": "", "blob": ""}
    one = make_source({"name": "webdataset", "path": str(tmp_path / "01.tar")}, 16, ("bbox",))
    assert (len(one), one[0]["image"].shape, one[0]["latents"]) == (3, (16, 16, 3), {"bbox": ""})
    ranged = WebDatasetSource(str(tmp_path / "{00..01}.tar"), size=32)
    assert len(ranged) == 6


def test_misuse_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no such folder or shard: .*none"):
        make_source({"name": "webdataset", "path": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"holds no \.tar"):
        make_source({"name": "webdataset", "path": str(tmp_path)})
    with pytest.raises(UserError, match="path' is empty"):
        make_source({"name": "webdataset", "path": ""})
    with pytest.raises(UserError, match="no latent 'depth'"):
        make_source({"name": "webdataset", "path": ""}, latents=("depth",))
    with pytest.raises(UserError, match="cannot read the vokens"):
        make_source({"name": "webdataset", "path": "", "vokens": "none.npz"}, latents=("voken",))


@pytest.mark.skipif(not (SHARED / "coco100").exists(), reason="no ../shared/data/coco100")
def test_real_photographs():
    source = make_source({"name": "webdataset", "path": str(SHARED / "coco100")}, 64)
    assert len(source) == 98
    named = 0
    for i in range(0, 98, 4):
        example = source[i]
        assert example["image"].shape == (64, 64, 3)
        segments = bbox.parse(example["latents"]["bbox"])
        ellipses = blob.parse(example["latents"]["blob"])
        boxes = [b for s in segments for b in s.boxes]
        named += len(boxes)
        for segment in ellipses:
            for e in segment.ellipses:
                # Some box holds the ellipse's centre.
                assert any(
                    b.x1 - 5 <= e.xc <= b.x2 + 5 and b.y1 - 5 <= e.yc <= b.y2 + 5 for b in boxes
                )
    assert named > 50


@pytest.mark.skipif(not (SHARED / "cifar10_10k").exists(), reason="no ../shared/data/cifar10_10k")
def test_real_small_pictures():
    source = WebDatasetSource(str(SHARED / "cifar10_10k" / "00000.tar"), 32, ())
    assert len(source) == 2000
    loader = Loader(
        source,
        Vocabulary.default(),
        latents=(),
        caption_length=16,
        latent_length=0,
        image_size=32,
        batch_size=16,
    )
    batch = loader.batch(0)
    assert batch.image.std() > 30
    assert not loader.bad
    captions = [Vocabulary.default().decode(row) for row in batch.caption_tokens]
    assert all(c.startswith("a photo of a") for c in captions)
    assert len(set(captions)) > 3


def test_decoding_kinds_of_pictures():
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:] = (200, 100, 50)
    for form in ("PNG", "WEBP", "JPEG"):
        pixels, orientation = decode_image(encoded(colour, form))
        assert orientation == 1
        np.testing.assert_allclose(pixels[8, 8], (200, 100, 50), atol=6)
    grey = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    pixels, _ = decode_image(encoded(grey))
    np.testing.assert_allclose(pixels[..., 1], grey >> 8, atol=1)
    buffer = io.BytesIO()
    Image.fromarray(colour).convert("CMYK").save(buffer, "JPEG", quality=95)
    np.testing.assert_allclose(decode_image(buffer.getvalue())[0][8, 8], (200, 100, 50), atol=12)
    clear = np.dstack([colour, np.zeros((16, 16), np.uint8)])
    assert np.all(decode_image(encoded(clear))[0] == 255)
    palette = Image.fromarray(colour).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert decode_image(buffer.getvalue())[0].shape == (16, 16, 3)
