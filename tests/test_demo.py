"""The demo: its numbers, pictures and page on made-up input, and a quick run from end to end."""

from __future__ import annotations

import html.parser
import json
import pathlib

import jax
import numpy as np
import pytest

from kaleido_jax import demo
from kaleido_jax.data import ShapesSource, shapes_modes
from kaleido_jax.data import toy as toy_data
from kaleido_jax.demo import (
    configs,
    control,
    coverage,
    folder,
    markup,
    page,
    scratch,
    scratch_figure,
    shapes,
    shapes_figure,
    toy,
    toy_figure,
)
from kaleido_jax.demo.checks import Check
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.results import plain
from kaleido_jax.figures import grids, tables
from kaleido_jax.latents import LatentDocument
from kaleido_jax.train import Trainer

EACH = 60  # made-up pictures of each caption


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text that it shows."""

    def __init__(self, source: str):
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data):
        self.words += data


def points(near_share: float, count: int = 100) -> np.ndarray:
    """`count` points of each class, that share of them in its near mode."""
    modes = (np.arange(count) < near_share * count).astype(int)
    return toy_data.CENTRES[:, modes] + 0.01


def made_toy(baseline=(0.35, 0.2, 0.01, 0.0), kaleido=0.35) -> toy.Toy:
    samples = {
        "baseline": {w: points(s) for w, s in zip(toy.WEIGHTS, baseline, strict=True)},
        "kaleido": {w: points(kaleido) for w in toy.WEIGHTS},
    }
    return toy.Toy(points(0.35), samples, steps=10, batch_size=4)


def made_shapes(unreadable: int = 0) -> shapes.Shapes:
    """Kaleido draws the data's modes at every weight, the baseline ideal guidance's."""
    generator = np.random.default_rng(0)
    captions = shapes.CAPTIONS

    def drawn(model: str, weight: float) -> shapes.Drawn:
        gamma = 1.0 if model == "kaleido" else weight
        count = EACH * len(captions)

        def pick(factor: str, places: int = 1) -> np.ndarray:
            rows = []
            for caption in captions:
                p = coverage.probabilities(caption, factor, gamma)
                rows.append(generator.choice(len(p), (EACH, places), p=p))
            return np.concatenate(rows)

        joint = pick(coverage.JOINT)[:, 0]
        modes = {
            "hue": np.full(count, 2),
            "count": np.full(count, 2),
            "background": joint % 5,
            "layout": joint // 5,
            "shape": pick("shape", 3),
            "shade": pick("shade", 3),
        }
        if model == "baseline":
            modes["layout"][:unreadable] = -1
            modes["hue"][:unreadable] = 1
        latents = {"bbox": "a <b>red</b> disc (1, 2, 30, 40)"} if model == "kaleido" else {}
        documents = [LatentDocument(c, latents) for c in captions for _ in range(EACH)]
        images = generator.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        return shapes.Drawn(images, documents, modes)

    found = {m: {w: drawn(m, w) for w in shapes.WEIGHTS} for m in shapes.MODELS}
    settings = {"samples_per_caption": EACH, "num_steps": 3, "sampler": "ddim"}
    settings["trained_alike"] = True
    models = {model: {"checkpoint": "<1>"} for model in shapes.MODELS}
    return shapes.Shapes(captions, found, settings | {"models": models})


def made_scratch(steps=6, stop=3, same=True) -> scratch.Scratch:
    losses = [
        {"step": s, "loss": 2 / s, "loss_dm": 1 / s, "loss_ar": 3 / s} for s in range(1, steps + 1)
    ]
    again = (
        losses[stop:] if same else [row | {"loss": row["loss"] * 1.001} for row in losses[stop:]]
    )
    images = np.zeros((len(shapes.CAPTIONS), 8, 8, 3), np.uint8)
    return scratch.Scratch(steps, stop, losses, again, 1.0 if same else 0.5, images)


def verdicts(checks: list[Check]) -> list[bool]:
    return [check.passed for check in checks]


# ---- claims ---------------------------------------------------------------------------------


def test_toy_claims_follow_the_points():
    assert verdicts(toy.checks(made_toy())) == [True, True, True]
    assert verdicts(toy.checks(made_toy(baseline=(0.35, 0.3, 0.2, 0.1)))) == [False, False, True]
    assert verdicts(toy.checks(made_toy(kaleido=0.1))) == [True, True, False]


def test_one_class_that_keeps_its_weaker_mode_is_no_collapse():
    result = made_toy()
    result.samples["baseline"][8.0][1] = points(0.3)[1]
    assert verdicts(toy.checks(result)) == [True, False, True]


def test_toy_shares_of_modes():
    np.testing.assert_allclose(toy.mode_shares(points(0.2)), [[0.8, 0.2]] * 2)
    found = toy.true_points(400, seed=3)
    np.testing.assert_allclose(toy.mode_shares(found), [toy_data.WEIGHTS] * 2, atol=0.08)
    table = toy.rows(made_toy())
    assert len(table) == 4 * (1 + 2 * len(toy.WEIGHTS))
    assert {row["guidance"] for row in table if row["model"] == "data"} == {None}


def test_scratch_claims_follow_the_losses():
    assert verdicts(scratch.checks(made_scratch())) == [True, True, True]
    assert verdicts(scratch.checks(made_scratch(same=False))) == [True, False, False]


def test_a_check_that_has_no_number_does_not_hold():
    assert not Check("x", float("nan"), ">=", 1.0).passed
    assert not Check("x", float("nan"), "<", 1.0).passed
    assert Check("x", 0.031, "<", 0.05, True).line() == "PASS  x: 3.1%, wanted < 5%"
    with pytest.raises(ValueError, match="relation"):
        Check("x", 1.0, "=", 1.0)


# ---- mode coverage --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(), scratch.QUICK])
def test_the_short_training_has_a_model_that_can_be_built(changes):
    config = configs.load("shapes", (*scratch.CHANGES, *changes))
    state = Trainer(config).abstract_state()
    assert {"denoiser", "latent_decoder"} <= set(state.params)


def test_table_finds_what_was_drawn():
    rows = shapes.table(made_shapes())
    assert len(rows) == len(coverage.FACTORS) * len(shapes.WEIGHTS)
    for row in rows:
        assert row["size"] == EACH
        # Kaleido was drawn from the data, the baseline from the theory: within sampling error.
        assert abs(row["kaleido"] - row["data"]) < max(4 * row["kaleido_error"], 0.15), row
        assert abs(row["baseline"] - row["theory"]) < max(4 * row["baseline_error"], 0.15), row
        assert row["data"] <= row["true"] + 0.05
    last = {row["factor"]: row for row in rows if row["guidance"] == 8.0}
    assert last[coverage.HEADLINE]["ratio"] > shapes.EXPECTED_RATIO
    assert abs(last["shade"]["ratio"] - 1) < 0.05
    assert verdicts(shapes.checks(rows)) == [True]


def test_unreadable_pictures_make_every_subset_smaller():
    whole, broken = made_shapes(), made_shapes(unreadable=20)
    sizes = {row["factor"]: row["size"] for row in shapes.table(broken)}
    assert sizes["layout"] == sizes[coverage.JOINT] == EACH - 20
    assert sizes["background"] == EACH
    share = {(r["model"], r["guidance"]): r["readable"] for r in shapes.readable(broken)}
    assert share["kaleido", 1.0] == 1.0
    assert share["baseline", 1.0] == pytest.approx(1 - 20 / len(broken.captions) / EACH)
    assert {row["readable"] for row in shapes.readable(whole)} == {1.0}


def test_a_caption_hardly_read_is_left_out_for_both_models():
    rows = shapes.table(made_shapes(unreadable=EACH - 1))
    layout = next(row for row in rows if row["factor"] == "layout")
    assert (layout["size"], layout["places"]) == (EACH, len(shapes.CAPTIONS) - 1)


def test_nothing_read_gives_no_number_and_no_verdict():
    result = made_shapes()
    for drawn in result.drawn["baseline"].values():
        drawn.modes["layout"][:] = drawn.modes["background"][:] = -1
    rows = shapes.table(result)
    assert all(np.isnan(r["ratio"]) for r in rows if r["factor"] == coverage.JOINT)
    assert verdicts(shapes.checks(rows)) == [False]


def test_small_subsets_show_fewer_modes():
    few, many = (coverage.expected(shapes.CAPTIONS, "layout", 1.0, n).effective for n in (5, 500))
    true = coverage.true_modes(shapes.CAPTIONS, "layout", 1.0)
    assert few < many - 0.5
    assert many == pytest.approx(true, abs=0.02)
    assert true == pytest.approx(shapes_modes.effective_modes([0.4, 0.3, 0.2, 0.1]))


def test_guided_joint_agrees_with_its_marginals():
    caption = shapes.CAPTIONS[1]
    joint = shapes_modes.guided_joint(caption, ("layout", "background"), 4.0)
    assert joint.shape == (4, 5)
    np.testing.assert_allclose(
        joint.sum(0), shapes_modes.guided_probabilities(caption, "background", 4.0)
    )
    swapped = shapes_modes.guided_joint(caption, ("background", "layout"), 4.0)
    np.testing.assert_allclose(swapped, joint.T)
    with pytest.raises(UserError, match="alone"):
        shapes_modes.guided_joint(caption, ("shade", "layout"), 4.0)


def test_true_pictures_follow_their_latents_and_swapped_ones_do_not():
    source = ShapesSource(size=32, num_objects=(2, 2), semi_axis=(130, 190))
    examples = [source[i] for i in range(40)]
    documents = [LatentDocument(e["caption"], {"bbox": e["latents"]["bbox"]}) for e in examples]
    images = np.stack([e["image"] for e in examples])
    true = control.followed(images, documents)
    assert all(true[name] > 0.95 for name in ("background", "layout", "shade", "shape"))
    assert true["box IoU"] > 0.8
    swapped = control.followed(np.roll(images, 1, axis=0), documents)
    assert all(swapped[name] < 0.5 for name in control.CHANCE)
    other = [LatentDocument("x", {"bbox": "a dog (1, 2, 30, 40)"}), LatentDocument("x", {})]
    nothing = control.followed(images[:2], other)
    assert nothing.pop("box IoU") == 0.0
    assert all(np.isnan(value) for value in nothing.values())


# ---- pictures and page ----------------------------------------------------------------------


def results_of(points, pictures, short, quick=False) -> tuple[dict, list[Check]]:
    coverage_rows = shapes.table(pictures)
    checks = [*toy.checks(points), *shapes.checks(coverage_rows), *scratch.checks(short)]
    results = {
        "quick": quick,
        "command": "kaleido demo",
        "seconds": {"toy": 1.0},
        "machine": {"cores": 2},
        "versions": {"jax": "<script>alert(1)</script>"},
        "toy": {
            "weights": toy.WEIGHTS,
            "steps": 10,
            "batch_size": 4,
            "samples": 100,
            "shares": toy.rows(points),
        },
        "shapes": {
            "weights": shapes.WEIGHTS,
            "captions": pictures.captions,
            "settings": pictures.settings,
            "factors": list(coverage.FACTORS),
            "table": coverage_rows,
            "readable": shapes.readable(pictures),
            "followed": shapes.followed(pictures),
            "panel_weight": 4.0,
        },
        "scratch": {"steps": short.steps, "stop": short.stop},
    }
    return results, checks


def test_page_and_pictures(tmp_path):
    points, pictures, short = made_toy(), made_shapes(), made_scratch()
    toy_figure.write(points, tmp_path)
    panels = shapes_figure.write(pictures, shapes.table(pictures), tmp_path)
    scratch_figure.write(short, tmp_path)
    results, checks = results_of(points, pictures, short)
    source = page.build(results, checks, panels)
    found = Page(source)

    assert not found.tags & {"script", "iframe", "link", "b2"}
    assert "<script>" in found.words  # shown as words, not run
    assert all(image["alt"].strip() for image in found.images)
    assert any("a <b>red</b> disc" in image["alt"] for image in found.images)
    later = {"toy.csv", "coverage.csv", "scratch.csv", "results.json"}
    for reference in set(found.references) - later:
        assert (tmp_path / reference).is_file(), reference
    assert found.words.count("holds") == len(checks)
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source
    assert page.NOT_ALIKE not in found.words
    results["shapes"]["settings"]["trained_alike"] = False
    assert page.NOT_ALIKE in Page(page.build(results, checks, panels)).words
    # Without a judge in a quick run.
    quick = Page(page.build(results | {"quick": True}, checks, panels)).words
    assert "no claim is judged" in quick
    assert "holds" not in quick


def test_page_tells_of_claims_that_fail():
    results, _ = results_of(made_toy(kaleido=0.0), made_shapes(), made_scratch())
    checks = toy.checks(made_toy(kaleido=0.0))
    words = Page(page.build(results, checks, [])).words
    assert "does not hold · toy: at guidance 8 Kaleido keeps all four modes: 0.0%" in words


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        toy_figure.write(made_toy(), tmp_path / name)
    for file in ("toy.png", "toy.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_panels_show_each_caption_in_turn(tmp_path):
    panels = shapes_figure.panels(made_shapes(), tmp_path)
    captions = [shapes.CAPTIONS[i] for i in shapes_figure.PANEL_CAPTIONS]
    each = shapes_figure.PANELS_EACH
    assert [p["caption"] for p in panels] == [c for c in captions for _ in range(each)]
    assert {p["file"] for p in panels} == {f"panels/{i}.png" for i in range(len(panels))}


def test_mosaic_leaves_missing_places_white():
    sheet = grids.mosaic(np.zeros((3, 8, 8, 3), np.uint8), 2, 2)
    assert sheet[10, 10].tolist() == [0, 0, 0]
    assert sheet[-10, 10].tolist() == [0, 0, 0]
    assert sheet[-10, -10].tolist() == [255, 255, 255]


def test_files_of_numbers(tmp_path):
    tables.write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": None}, {"a": 2, "b": 'x,"y'}])
    assert (tmp_path / "x.csv").read_text() == 'a,b\n0.333333,\n2,"x,""y"\n'
    value = plain({"a": (float("nan"), 1 / 3), 2.0: "x"}, digits=6)
    assert value == {"a": [None, 0.333333], "2.0": "x"}


def test_markup_escapes():
    hostile = "<i>\"'&"
    for piece in (
        markup.paragraph(hostile),
        markup.heading(hostile),
        markup.links(hostile, [hostile]),
        markup.picture(hostile, hostile, 10, hostile),
        markup.panels([(hostile, hostile, hostile)]),
        markup.table(hostile, [hostile] * 3, [(hostile, [(hostile, [hostile], True)])]),
        markup.pairs([(hostile, hostile)]),
    ):
        assert "i" not in Page(piece).tags
        assert hostile in Page(piece).words + str(Page(piece).references)


# ---- the whole ------------------------------------------------------------------------------


def test_compiled_programs_are_kept_only_meanwhile(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with scratch.compilation_cache(tmp_path):
        assert jax.config.jax_compilation_cache_dir == (before or str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == before


def holds_together(out: pathlib.Path, lines: list[str], quick: bool) -> dict:
    """Checks a finished folder and what was said; returns its results."""
    results = json.loads((out / "results.json").read_text())
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {*results["files"], "results.json"}
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    for reference in Page((out / "index.html").read_text()).references:
        assert (out / reference).is_file(), reference
    assert set(results["seconds"]) == {"toy", "shapes", "scratch", "page", "all"}
    assert results["quick"] == quick
    judged = [line for line in lines if line.startswith(("PASS", "FAIL"))]
    assert len(judged) == (0 if quick else len(results["checks"]))
    assert any("left" in line for line in lines)
    assert str(out / "index.html") in lines[-1]
    folder.check(out)  # may be replaced by the next
    return results


def test_the_parts_become_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "run", lambda folder, *_: (folder.mkdir(parents=True), made_toy())[1])
    monkeypatch.setattr(shapes, "open_models", lambda folders: None)
    monkeypatch.setattr(shapes, "run", lambda *_: made_shapes())
    monkeypatch.setattr(scratch, "run", lambda *_: made_scratch(same=False))
    lines: list[str] = []
    demo.run(tmp_path / "demo", say=lines.append)
    results = holds_together(tmp_path / "demo", lines, quick=False)
    assert [c["passed"] for c in results["checks"]] == [True] * 5 + [False] * 2
    assert sum(line.startswith("FAIL") for line in lines) == 2


def test_a_demo_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "open_models", lambda folders: None)
    monkeypatch.setattr(toy, "run", lambda folder, *_: folder.mkdir(parents=True))
    monkeypatch.setattr(toy_figure, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run(tmp_path / "demo", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long  # .ci/run runs the same as a command
def test_quick_demo_from_end_to_end(tmp_path):
    lines: list[str] = []
    out = tmp_path / "demo"
    assert demo.run(out, quick=True, seed=3, say=lines.append) == out / "index.html"
    results = holds_together(out, lines, quick=True)
    assert results["seed"] == 3
    assert results["scratch"]["resumed"] == results["scratch"]["losses"][scratch.QUICK_STOP :]
    assert len(results["shapes"]["table"]) == len(coverage.FACTORS) * len(shapes.WEIGHTS)
