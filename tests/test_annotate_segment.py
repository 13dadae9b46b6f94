"""The stage `blob`: SAM and SAM 2 of the real classes, box prompts, rejections."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from kaleido_jax.annotate.engines import make_engine
from kaleido_jax.annotate.protocols import Example, Mask
from kaleido_jax.annotate.segment import BlobEngine, HfSegmenter, prepare
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox, blob
from tests import tiny_annotators as tiny

torch = pytest.importorskip("torch", reason="needs the extra `annotate`")
pytest.importorskip("transformers", reason="needs the extra `annotate`")
torch.set_num_threads(1)  # models this small only wait for each other\'s threads

from kaleido_jax.annotate.models import ModelSource  # noqa: E402

SIDE = 64


@pytest.fixture(scope="module", params=["sam", "sam2"])
def model(request, tmp_path_factory):
    return tiny.sam(tmp_path_factory.mktemp("models") / request.param, request.param)


def pictures(count: int) -> list[np.ndarray]:
    source = ShapesSource(count, seed=3, size=SIDE)
    return [source[i]["image"] for i in range(count)]


BOXES = [[(4.0, 4.0, 40.0, 50.0)], [(0, 0, 64, 64), (8, 8, 30, 60), (10, 2, 60, 20)]]


def test_ragged_boxes_are_as_alone(model):
    segmenter = HfSegmenter(ModelSource(str(model)))
    images = pictures(2)
    together = segmenter.segment(images, BOXES)
    assert [len(masks) for masks in together] == [1, 3]
    for image, boxes, masks in zip(images, BOXES, together, strict=True):
        alone = segmenter.segment([image], [boxes])[0]
        for one, other in zip(masks, alone, strict=True):
            assert one.pixels.shape == (SIDE, SIDE) and one.pixels.dtype == bool
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert (one.pixels != other.pixels).mean() < 0.01


def test_the_best_of_three_masks_is_taken(model):
    """Against the model asked directly."""
    segmenter = HfSegmenter(ModelSource(str(model)))
    image, boxes = pictures(1)[0], BOXES[1]
    with torch.inference_mode():
        out = segmenter._model(
            pixel_values=prepare(image, SIDE)[None],
            input_boxes=torch.tensor([boxes], dtype=torch.float32),
            multimask_output=True,
        )
    assert out.iou_scores.shape == (1, 3, 3)
    for number, mask in enumerate(segmenter.segment([image], [boxes])[0]):
        best = int(out.iou_scores[0, number].argmax())
        assert mask.score == pytest.approx(float(out.iou_scores[0, number].max()), abs=1e-6)
        small = out.pred_masks[0, number, best].numpy()
        assert ((cv2.resize(small, (SIDE, SIDE)) > 0) != mask.pixels).mean() < 0.002


def test_preparation_is_that_of_transformers():
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamImageProcessorPil(
        size={"longest_edge": 96}, pad_size={"height": 96, "width": 96}, do_pad=True
    )
    for image in pictures(3):
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert (prepare(image, 96) - theirs).abs().mean() < 0.01
        assert (prepare(image, 96) - theirs).abs().max() < 0.1


def test_the_engine_runs_a_real_model(model):
    """A random model's masks are of no use; every answer is a latent or says why not."""
    options = {"min_iou": -10.0, "min_inside": 0.0, "batch_size": 2}
    engine = pickle.loads(pickle.dumps(make_engine("blob", f"hf:{model}", options)))
    assert engine.provenance["parameters"] == options
    engine.setup()
    caption = "a thing (62, 62, 625, 781) beside others (0, 0, 1000, 1000) (125, 125, 469, 938)"
    examples = [Example(f"k{i}", im, bbox=caption) for i, im in enumerate(pictures(3))]
    results = engine.annotate(examples, seed=0)
    for result in results:
        assert result.status in ("ok", "repaired", "rejected")
        if result.latent:
            assert blob.write(blob.parse(result.latent)) == result.latent
    alone = [engine.annotate([example], seed=1)[0].status for example in examples]
    assert alone == [r.status for r in results]


# ---- what becomes of masks, with masks that are known --------------------------------------------


class Drawn:
    """A segmenter whose masks are given: for what follows the model."""

    def __init__(self, masks):
        self.masks, self.calls = masks, []

    def segment(self, images, boxes):
        self.calls.append([len(b) for b in boxes])
        if any((image == 7).all() for image in images):
            raise RuntimeError("out of memory")
        return [[self.masks[i] for i in range(len(b))] for b in boxes]


def ellipse_mask(*numbers) -> np.ndarray:
    return blob.Ellipse(*numbers).mask((SIDE, SIDE))


GOOD = ellipse_mask(300, 300, 200, 100, 30)


def run(masks, caption, image=None, **how):
    engine = BlobEngine(lambda: Drawn(masks), {"engine": "drawn"}, **how)
    image = np.zeros((SIDE, SIDE, 3), np.uint8) if image is None else image
    return engine.annotate([Example("k", image, bbox=caption)], seed=0)[0]


def near(latent, *numbers):
    ellipse = blob.parse(latent)[0].ellipses[0]
    found = (ellipse.xc, ellipse.yc, ellipse.r_major, ellipse.r_minor, ellipse.theta)
    return all(abs(a - b) <= 8 for a, b in zip(found, numbers, strict=True))


def test_masks_become_ellipses():
    result = run([Mask(GOOD, 0.9)], "a leaf (100, 150, 500, 450) on a table")
    assert result.status == "ok" and result.issues == ()
    assert result.latent.startswith("a leaf (") and result.latent.endswith(") on a table")
    assert near(result.latent, 300, 300, 200, 100, 30)


@pytest.mark.parametrize(
    ("mask", "issue"),
    [
        (Mask(GOOD, 0.49), "predicted IoU 0.49 is under 0.5"),
        (Mask(ellipse_mask(800, 800, 150, 100, 0), 0.9), "0% of the mask lies in it"),
        (Mask(np.zeros((SIDE, SIDE), bool), 0.9), "under 16 pixels"),
    ],
)
def test_bad_masks_are_rejected_and_phrases_stay(mask, issue):
    caption = "a cup (100, 150, 500, 450) near a leaf (100, 150, 500, 450)."
    result = run([mask, Mask(GOOD, 0.9)], caption)
    assert result.status == "repaired" and issue in result.issues[0]
    assert result.latent.startswith("a cup near a leaf (") and result.latent.endswith(").")
    alone = run([mask], "a cup (100, 150, 500, 450)")
    assert (alone.status, alone.latent) == ("rejected", "")
    assert alone.issues[-1] == "no usable mask"


def test_doubtful_masks_are_marked():
    cut = ellipse_mask(0, 300, 300, 200, 0)
    result = run([Mask(cut, 0.9)], "a cup (0, 100, 300, 500)")
    assert result.status == "ok"
    assert result.issues == ("note: box (0, 100, 300, 500): cut by the border",)


def test_pictures_without_boxes_and_bad_strings():
    for nothing in (None, ""):
        assert run([], nothing).status == "empty"
    failed = run([], "a cup (1, 2, 3)")
    assert failed.status == "failed" and "LatentSyntaxError" in failed.issues[0]


def test_one_bad_picture_does_not_cost_the_others():
    drawn = Drawn([Mask(GOOD, 0.9)])
    engine = BlobEngine(lambda: drawn, {"engine": "drawn"}, batch_size=4)
    black, bad = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 7, np.uint8)
    caption = "a leaf (100, 150, 500, 450)"
    images = [black, bad, black]
    results = engine.annotate([Example(str(i), im, bbox=caption) for i, im in enumerate(images)], 0)
    assert [r.status for r in results] == ["ok", "failed", "ok"]
    assert results[1].issues == ("RuntimeError: out of memory",)
    assert drawn.calls == [[1, 1, 1], [1], [1], [1]]


def test_the_true_boxes_of_shapes_and_their_true_masks():
    """From the oracle's boxes and masks painted by hue, the oracle's own blobs."""
    source = ShapesSource(12, seed=4, size=SIDE, latents=("bbox", "blob"))
    exact = 0
    for index in range(12):
        record, scene = source[index], source.scene(index)
        grey = record["image"].max(-1).astype(int) - record["image"].min(-1) < 40
        masks = []
        for segment in bbox.parse(record["latents"]["bbox"]):
            for box in segment.boxes:
                x1, y1, x2, y2 = (round(v) for v in box.pixels((SIDE, SIDE)))
                mask = np.zeros((SIDE, SIDE), bool)
                mask[y1:y2, x1:x2] = ~grey[y1:y2, x1:x2]
                masks.append(Mask(mask, 1.0))
        result = run(masks, record["latents"]["bbox"], record["image"])
        assert result.status == "ok", (index, scene, result)
        truth = [e for s in blob.parse(record["latents"]["blob"]) for e in s.ellipses]
        found = [e for s in blob.parse(result.latent) for e in s.ellipses]
        for true, ours in zip(truth, found, strict=True):
            assert abs(true.xc - ours.xc) < 40 and abs(true.yc - ours.yc) < 40
            exact += abs(true.r_major - ours.r_major) < 30
    assert exact >= 12


def test_models_of_another_kind_are_refused(tmp_path):
    folder = tiny.backbone(tmp_path / "siglip")
    engine = make_engine("blob", f"hf:{folder}")
    with pytest.raises(UserError, match="of type siglip; blobs need SAM or SAM 2"):
        engine.setup()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        make_engine("blob", f"hf:{tmp_path / 'broken'}").setup()
    segmenter = HfSegmenter(ModelSource(str(tiny.sam(tmp_path / "sam"))))
    with pytest.raises(ValueError, match="square"):
        segmenter.segment([np.zeros((4, 5, 3), np.uint8)], [[(0, 0, 1, 1)]])
