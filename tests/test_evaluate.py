"""Evaluation of pictures whose truth is known: adherence, modes, features, references, results."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from kaleido_jax import cli, config
from kaleido_jax.data import ShapesSource, shapes, shapes_detector, shapes_modes, shapes_text
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import adherence, measure, modes, results
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.features import make_feature
from kaleido_jax.evaluate.pictures import Pictures
from kaleido_jax.evaluate.protocols import Protocol
from kaleido_jax.evaluate.references import open_references
from kaleido_jax.evaluate.subjects import Theory, Truth
from kaleido_jax.latents import LatentDocument, bbox, blob
from kaleido_jax.metrics import bootstrap

COUNT = 60


def data(*overrides: str, latents=("bbox", "blob", "voken")) -> Data:
    return Data(config.load_config("shapes", overrides), latents)


@pytest.fixture(scope="module")
def truth():
    """True pictures and their documents."""
    return Truth(data(), ("bbox", "blob", "voken"), 0).draw(range(COUNT))


def means(found: adherence.Found) -> dict[str, float]:
    return {name: float(np.mean([value for _, value in of])) for name, of in found.items()}


def test_true_pictures_follow_their_latents(truth):
    found = means(adherence.ShapesDetector().judge(*truth))
    # What the detector of 32-pixel shapes can tell: the ceilings.
    assert found["box_iou"] > 0.87 and found["blob_iou"] > 0.8
    assert found["box_success"] == found["hue"] == found["layout"] == found["background"] == 1
    assert found["shade"] > 0.98 and found["shape"] > 0.97
    assert found["angle"] < 2
    assert means(adherence.make_detector("patch").judge(*truth)) == {"voken": 1.0}


def test_pictures_of_other_latents_do_not(truth):
    images, documents = truth
    turned = np.roll(images, 1, axis=0)
    found = means(adherence.ShapesDetector().judge(turned, documents))
    assert found["box_iou"] < 0.1 and found["hue"] < 0.4
    assert means(adherence.make_detector("patch").judge(turned, documents))["voken"] < 0.5


def test_each_measure_sees_its_own_error():
    source = ShapesSource(latents=("bbox", "blob"), num_objects=(1, 1), size=64)
    example = source[3]
    item = source.scene(3).objects[0]

    def judged(latents: dict[str, str]) -> dict[str, float]:
        document = LatentDocument(example["caption"], latents)
        return means(adherence.ShapesDetector().judge(example["image"][None], [document]))

    (segment, _) = blob.parse(example["latents"]["blob"])
    ellipse = segment.ellipses[0]
    wrong = blob.Ellipse(
        ellipse.xc, ellipse.yc, ellipse.r_major, ellipse.r_minor, (ellipse.theta + 40) % 180
    )
    shade, other = shapes.SHADE_NAMES[item.shade], shapes.SHADE_NAMES[(item.shade + 1) % 3]
    phrase = segment.phrase.replace(shade, other)
    found = judged({"blob": blob.write([blob.Segment(phrase, (wrong,))])})
    assert found["angle"] == pytest.approx(40, abs=4)
    assert found["shade"] == 0 and found["shape"] == found["hue"] == 1
    box = bbox.parse(example["latents"]["bbox"])[0].boxes[0]
    half = bbox.Box(box.x1, box.y1, (box.x1 + box.x2) // 2, box.y2)
    name = shapes_text.name_of(item)
    found = judged({"bbox": bbox.write([bbox.Segment(f"a {name}", (half,))])})
    assert found["box_iou"] == pytest.approx(0.5, abs=0.06)
    # The words of a description count where there is no figure.
    assert judged({"text": f"There is a {name}, large and level."}) == dict(hue=1, shade=1, shape=1)


def test_grounding_engines_are_held_against_boxes():
    written = "a dog (0, 0, 500, 500) near the cat (600, 600, 1000, 1000)"
    seen = "the brown dog (0, 0, 500, 250) a bird (600, 600, 1000, 1000)"
    detector = adherence.GroundingDetector(lambda images, captions: [seen] * len(images), {})
    images = np.zeros((2, 8, 8, 3), np.uint8)
    documents = [LatentDocument("a dog", {"bbox": written}), LatentDocument("a dog", {})]
    found = detector.judge(images, documents)
    wanted = {"found": [1, 0], "box_iou": [0.5, 0], "box_success": [1, 0]}
    assert found == {name: [(0, value) for value in of] for name, of in wanted.items()}
    later = {name: [(9, value) for value in of] for name, of in wanted.items()}
    together = adherence.merge([(0, found), (9, found)])
    assert together == {name: found[name] + later[name] for name in wanted}


def test_modes_of_true_pictures_are_the_tables():
    scenes = [shapes.make_scene(5, i, (1, 2), (130, 190)) for i in range(600)]
    images = np.stack([shapes.render(scene, 32) for scene in scenes])
    captions = [shapes_text.caption(scene) for scene in scenes]
    read = shapes_detector.read_modes(images, captions)
    found, tables = modes.measure(read, captions, 8.0, 20, 0, 1, results.entry)
    assert found["readable"]["value"] > 0.99
    assert found["tv"]["value"] < 0.1  # 150 pictures of a theme
    assert found["theory_background"]["value"] > 0.3  # far from collapse
    assert found["tv_layout"]["low"] < found["tv_layout"]["value"] < found["tv_layout"]["high"]
    assert np.array(tables["shape"]["found"]).shape == (4, 4)
    # All pictures of the first background: the distance is what its tables leave.
    collapsed = {**read, "background": np.zeros(len(scenes), int)}
    value = modes.measure(collapsed, captions, 8.0, 5, 0, 1, results.entry)[0]["tv_background"]
    assert value["value"] == pytest.approx(np.mean(1 - shapes.TABLES["background"][:, 0]))


def test_modes_as_z_states_them():
    """Of true latents they are those of the scenes; what z does not say is left out."""
    source = ShapesSource(40, seed=5, size=64, num_objects=(1, 2), latents=("bbox", "blob"))
    examples = [source[i] for i in range(40)]
    captions = [example["caption"] for example in examples]
    seen = shapes_detector.read_modes(np.stack([e["image"] for e in examples]), captions)
    for name in ("bbox", "blob"):
        read = modes.written(
            [LatentDocument(e["caption"], {name: e["latents"][name]}) for e in examples]
        )
        for factor in ("background", "layout", "shape", "shade"):
            np.testing.assert_array_equal(read[factor], seen[factor], err_msg=f"{name} {factor}")
    half = "a red disc (100, 100, 400, 400)"
    read = modes.written([LatentDocument("dawn: a red shape", {"bbox": half})])
    assert read["shape"].tolist() == [[shapes.SHAPES.index("disc"), -1, -1]]
    assert (read["shade"] == -1).all() and (read["background"] == -1).all()
    # Objects in the order of the caption, also where z has them the other way round.
    swapped = "a dark blue disc (1, 1, 9, 9) left of a pale red disc (20, 1, 29, 9) on white"
    for caption, layout in (
        ("dawn: a red shape and a blue shape", shapes.LAYOUTS.index("right of")),
        ("dawn: a blue shape and a red shape", shapes.LAYOUTS.index("left of")),
        ("dawn: a green shape and a red shape", -1),
        ("dawn: a red shape", -1),
    ):
        read = modes.written([LatentDocument(caption, {"bbox": swapped})])
        assert read["layout"].tolist() == [layout], caption
    # Of what has no boxes nothing is known.
    read = modes.written([LatentDocument(caption, {"text": "red"}), LatentDocument(caption, {})])
    assert all((values == -1).all() for values in read.values())


def test_theory_draws_what_the_formula_says():
    """Accepted scenes are distributed as Eq. 6 has it, joint over all factors."""
    source, weight = data().held_out_source, 4.0
    draw = np.random.default_rng(0)
    caption, counts, tries = "noon: a red shape", np.zeros(4), 0
    scenes = (shapes.make_scene(11, i, (1, 1), (130, 190)) for i in range(20_000))
    for scene in scenes:
        if scene.theme == 1:
            tries += 1
            if draw.random() < shapes_modes.acceptance(scene, weight):
                counts[scene.objects[0].shape] += 1
    want = shapes_modes.guided_probabilities(caption, "shape", weight)
    error = np.sqrt(want * (1 - want) / counts.sum())
    assert counts.sum() > 500
    assert (np.abs(counts / counts.sum() - want) < 4 * error + 1e-9).all()
    # And the subject draws them for the themes of the captions that models get.
    images, documents = Theory(data(), weight, 0).draw(range(6))
    again, _ = Theory(data(), weight, 0).draw([5])
    assert images.shape == (6, 32, 32, 3)
    assert np.array_equal(images[5], again[0])
    themes = [shapes_text.parse_caption(document.caption)[0] for document in documents]
    assert themes == [source.scene(i).theme for i in range(6)]


@pytest.mark.parametrize(
    "name", ["shapes", "random", pytest.param("pixels", marks=pytest.mark.slow)]
)
def test_features_tell_true_pictures_from_spoiled_ones(name, tmp_path):
    shapes_data, feature = data(latents=()), make_feature(name)
    references = open_references(tmp_path, shapes_data, feature, 400)
    true, _ = Truth(shapes_data, (), 0).draw(range(300))
    spoiled = np.stack([cv2.GaussianBlur(255 - image, (7, 7), 2) for image in true])
    protocol = Protocol(300, 400, 0, 1, 5)

    def fid(images):
        rows, _ = feature.compute(images)
        found = measure.by_features(
            ("fid", "precision", "recall"), measure.Rows([rows]), measure.Rows([]), (), references,
            protocol, 1, 0, lambda line: None,
        )  # fmt: skip
        return found

    good, bad = fid(true), fid(spoiled)
    assert bad["fid"]["value"] > 3 * good["fid"]["value"]
    # Squares of pixels only lose contrast by a blur, which leads into the midst of the true ones.
    if name != "pixels":
        assert bad["precision_3"]["value"] < good["precision_3"]["value"]
    assert good["recall_3"]["value"] > 0.7
    assert good["fid"]["low"] < good["fid"]["value"] < good["fid"]["high"]
    assert feature.compute(true[:7])[0] == pytest.approx(feature.compute(true)[0][:7], abs=1e-5)


def test_references_are_computed_once_and_checked(tmp_path, monkeypatch):
    shapes_data, feature = data(latents=()), make_feature("pixels")
    first = open_references(tmp_path, shapes_data, feature, 30)
    with monkeypatch.context() as patch:
        patch.setattr(Data, "reference", lambda self, number: pytest.fail("read again"))
        again = open_references(tmp_path, shapes_data, feature, 30)
    assert again.hash == first.hash
    assert open_references(tmp_path, shapes_data, feature, 31).hash != first.hash
    other = data("data.source.seed=1", latents=())
    assert open_references(tmp_path, other, feature, 30).hash != first.hash
    for path in tmp_path.glob("*/000000.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        open_references(tmp_path, shapes_data, feature, 30)


def test_held_out_pictures_are_no_training_pictures():
    shapes_data = data(latents=())
    training = {shapes_data.reference(i).tobytes() for i in range(50)}
    held_out = {shapes_data.held_out(i)["image"].tobytes() for i in range(50)}
    assert len(held_out) == 50 and not training & held_out


def test_results_grow_by_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, {"id": "a", "metrics": {}, "x": float("nan")})
    results.append(path, {"id": "a", "metrics": {}, "x": 2})  # known: not again
    results.append(path, {"id": "b", "metrics": {"fid": results.entry(1.5, (1, 2), 3)}})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"id": "a", "metrics": {}, "x": None}
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]
    assert results.read_results(path)[1]["metrics"]["fid"]["high"] == 2
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no result"):
        results.read_results(path)


def test_pictures_of_another_subject_are_refused(tmp_path):
    shapes_data = data(latents=())
    Pictures(tmp_path / "run", Truth(shapes_data, (), 0), 10, 5)
    with pytest.raises(UserError, match="holds other pictures"):
        Pictures(tmp_path / "run", Truth(shapes_data, (), 1), 10, 5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--feature inseption:x", "did you mean 'inception'"),
        ("--feature inception:/nowhere", "holds no inception.safetensors"),
        ("--metrics fid,recal", "no metric 'recal'"),
        ("--metrics is", "feature 'shapes' has no classes"),
        ("--detector shape", "did you mean 'shapes'"),
        ("--seeds 1,1", "names a value twice"),
        ("--shard 2/2", "is not I/N"),
        ("--data sise=3", "did you mean 'size'"),
        ("--references 2000000", "the data hold 1000000"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, words, line):
    from kaleido_jax.demo.shapes import shipped

    command = f"evaluate --checkpoint {shipped('baseline')} --out {tmp_path} --samples 6 --steps 1"
    status = cli.main([*command.split(), *"--batch-size 8 --bootstrap 2".split(), *words.split()])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert line in lines[-1]


def test_intervals_draw_captions_with_all_their_pictures():
    """24 pictures of 6 captions, in parts that cut through a caption's."""
    images, documents = Truth(data(), ("bbox",), 0).draw(range(6))
    turned = [1, 0, 2, 3, 4, 5]  # the first two captions' pictures are each other's
    images, documents = images[turned].repeat(4, 0), [d for d in documents for _ in range(4)]
    parts = [(images[i : i + 10], documents[i : i + 10]) for i in range(0, 24, 10)]
    detector = adherence.ShapesDetector()
    found, followed, _, _ = measure.by_reading(
        ("tv", "adherence"), parts, [detector], 2.0, 50, 4, 0
    )
    once = detector.judge(images[::4], documents[::4])
    rows, values = (np.array(column) for column in zip(*once["box_success"], strict=True))
    _, (low, high) = bootstrap.of_mean(values, 50, 0, rows)
    entry = followed["box_success"]
    assert entry["samples"] == 4 * len(values)
    assert (entry["low"], entry["high"]) == (pytest.approx(low), pytest.approx(high))
    assert low < values.mean() < high
    shown = shapes_detector.read_modes(images, [d.caption for d in documents])
    shown = (np.asarray(shown["hue"]) == np.asarray(shown["count"]))[::4]
    _, (low, high) = bootstrap.of_mean(shown, 50, 0)
    entry = found["readable"]
    assert (entry["low"], entry["high"]) == (pytest.approx(low), pytest.approx(high))
    alone = measure.by_reading(("tv",), parts, [], 2.0, 50, 1, 0)[0]["tv"]
    assert found["tv"]["high"] - found["tv"]["low"] > alone["high"] - alone["low"]
