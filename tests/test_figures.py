"""Figures from results and models: what is drawn is what the CSV says."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from kaleido_jax import bundle, cli
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import results
from kaleido_jax.figures import grids, guidance, pictures, results_table, style
from kaleido_jax.latents import LatentDocument
from tests.test_generate import _bundle, _config


def result(name: str, weight: float | None, seed: int, value: float, **more) -> dict:
    subject = "model" if name not in ("truth", "theory") else name
    return {
        "id": f"{name}{weight}{seed}{sorted(more)}{more.get('step')}",
        "name": name if subject == "model" else "",
        "subject": subject,
        "guidance_weight": weight,
        "seed": seed,
        "samples": 10,
        "settings": {"guidance_weight": weight, "num_steps": 25, "cads_scale": 0.0},
        "protocol": {"name": "quick", "samples": 10},
        "feature": {"name": "shapes"},
        "references": {"hash": "x"},
        "metrics": {"fid": results.entry(value, (value - 1, value + 1), 10)},
        "adherence": {"hue": results.entry(0.9, (0.8, 1.0), 10)},
    } | more


def results_file(folder, *more):
    path = folder / "results.jsonl"
    for seed in (0, 1):
        for weight in (1.0, 8.0):
            results.append(path, result("baseline", weight, seed, 5 + weight + seed))
            results.append(path, result("kaleido", weight, seed, 4.0 + seed))
        results.append(path, result("theory", 8.0, seed, 9.0))
    results.append(path, result("truth", None, 0, 1.0))
    for line in more:
        results.append(path, line)
    return path


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_guidance_curves_hold_the_results(tmp_path, capsys):
    path = results_file(tmp_path)
    words = f"figures guidance --results {path} --metrics fid,hue --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    written = capsys.readouterr().out.split()
    assert [line.rsplit(".")[-1] for line in written] == ["csv", "png", "svg"]
    rows = read(tmp_path / "out" / "guidance.csv")
    found = {(row["metric"], row["model"], row["guidance"]): row for row in rows}
    one = found["fid", "baseline", "8"]
    # Seeds 13 and 14, each one up and down.
    assert (one["value"], one["low"], one["high"], one["seeds"]) == ("13.5", "12", "15", "0 1")
    assert found["fid", "truth", ""]["value"] == "1"
    assert found["hue", "kaleido", "1"]["value"] == "0.9"
    figure = guidance.draw(guidance.rows([path], ("fid",)))
    (axes,) = figure.axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert drawn["baseline"].lines[0].get_ydata().tolist() == [6.5, 13.5]
    svg = (tmp_path / "out" / "guidance.svg").read_text()
    assert svg.startswith("<?xml") and Image.open(tmp_path / "out" / "guidance.png").size[0] > 500
    # Again: the same bytes.
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert cli.main(words.split()) == 0
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"feature": {"name": "pixels"}}, "features"),
        ({"protocol": {"name": "quick", "samples": 11}}, "protocols"),
        ({"settings": {"num_steps": 50}}, "settings"),
        ({"references": {"hash": "y"}}, "references"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, change, what):
    path = results_file(tmp_path, result("third", 2.0, 0, 1.0, **change))
    with pytest.raises(UserError, match=f"different {what}"):
        guidance.rows([path], ("fid",))


def test_a_point_is_of_one_checkpoint_and_each_seed_once(tmp_path):
    """Measured again for another metric, or read twice: the same pictures, counted once."""
    path = results_file(tmp_path, result("kaleido", 8.0, 0, 4.0, other=1))
    whole = guidance.rows([path, path], ("fid",))
    (one,) = [r for r in whole if (r["model"], r["guidance"]) == ("kaleido", 8.0)]
    assert (one["value"], one["seeds"]) == (4.5, "0 1")
    (row,) = [
        r
        for r in results_table.rows([path, path], ("fid",))
        if (r["model"], r["guidance_weight"]) == ("kaleido", 8.0)
    ]
    assert (row["fid"], row["seeds"]) == (4.5, "0 1")
    path = results_file(tmp_path / "two", result("kaleido", 8.0, 0, 7.0, other=1))
    with pytest.raises(UserError, match="'kaleido' has two values of fid for seed 0 and guidance"):
        guidance.rows([path], ("fid",))
    more = [result("third", w, 0, 1.0, checkpoint_hash=f"h{w:g}") for w in (1.0, 8.0)]
    path = results_file(tmp_path / "hashes", *more)
    with pytest.raises(UserError, match=r"named 'third' are of several checkpoints .h1 and h8."):
        guidance.rows([path], ("fid",))


def test_measures_of_other_detectors_are_not_compared(tmp_path):
    """Nor by `table`; what another latent is judged by does not matter."""
    shapes, patch = {"judges": "objects", "name": "shapes"}, {"judges": "vokens", "name": "patch"}
    path = tmp_path / "results.jsonl"
    results.append(path, result("one", 8.0, 0, 1.0, detectors=[shapes]))
    results.append(path, result("two", 8.0, 0, 1.0, detectors=[shapes, patch]))
    assert len(guidance.rows([path], ("hue",))) == len(results_table.rows([path], ("hue",))) == 2
    other = {"judges": "objects", "name": "hf"}
    results.append(path, result("three", 8.0, 0, 1.0, detectors=[other, patch]))
    assert len(guidance.rows([path], ("fid",))) == 3
    for module in (guidance, results_table):
        with pytest.raises(UserError, match="different detectors for hue"):
            module.rows([path], ("hue",))


def test_steps_are_a_line_for_each_guidance(tmp_path):
    path = results_file(
        tmp_path,
        *(
            result("kaleido", weight, 7, step / weight, step=step)
            for weight in (2.0, 8.0)
            for step in (1000, 500)
        ),
    )
    table = guidance.rows([path], ("fid",), "step")
    # What names no step is left out, but for the ceiling.
    assert [(r["model"], r["guidance"], r["step"], r["value"]) for r in table] == [
        ("kaleido", 2.0, 500, 250.0),
        ("kaleido", 2.0, 1000, 500.0),
        ("kaleido", 8.0, 500, 62.5),
        ("kaleido", 8.0, 1000, 125.0),
        ("truth", None, None, 1.0),
    ]
    (axes,) = guidance.draw(table, "step").axes
    drawn = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in axes.containers}
    assert drawn == {"kaleido, guidance 2": [500, 1000], "kaleido, guidance 8": [500, 1000]}
    # A colour for each model, the same in all panels, and a mark for each weight.
    figure = guidance.draw(guidance.rows([path], ("fid", "hue"), "step"), "step")
    looks = {
        (bars.get_label(), bars.lines[0].get_color(), bars.lines[0].get_marker())
        for axes in figure.axes
        for bars in axes.containers
    }
    assert len(looks) == 2 and len({colour for _, colour, _ in looks}) == 1
    assert len({mark for _, _, mark in looks}) == 2
    # Along guidance each step is a line of its own.
    (axes,) = guidance.draw(guidance.rows([path], ("fid",))).axes
    drawn = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in axes.containers}
    assert drawn["kaleido, step 500"] == drawn["kaleido, step 1000"] == [2, 8]
    words = f"figures steps --results {path} --metrics hue --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    assert {row["step"] for row in read(tmp_path / "out" / "steps.csv")} == {"500", "1000", ""}


def test_table_shows_what_differs(tmp_path, capsys):
    """Results of other settings stand in one table; equal settings are not shown."""
    other = {"guidance_weight": 8.0, "num_steps": 25, "cads_scale": 0.1}
    more = result("kaleido", 8.0, 5, 2.0, settings=other, samples=20)
    path = results_file(tmp_path, more)
    words = f"figures table --results {path} --metrics fid,hue --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "table.md").read_text()
    assert printed.startswith(text)
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert found[0] == ["model", "guidance_weight", "cads_scale", "seeds", "samples", "fid", "hue"]
    assert found[3] == ["kaleido", "1", "0", "0 1", "10", "4.5 (3 to 6)", "0.9 (0.8 to 1)"]
    assert found[-1][:6] == ["kaleido", "8", "0.1", "5", "20", "2 (1 to 3)"]
    row = read(tmp_path / "out" / "table.csv")[1]
    assert (row["fid"], row["fid_low"], row["fid_high"]) == ("4.5", "3", "6")


@pytest.mark.parametrize(
    "change",
    [
        {"step": 500},
        {"per_latent": 3},
        {"true_latents": True},
        {"checkpoint_hash": "other"},
        {"protocol": {"name": "quick", "samples": 10, "neighbours": 7}},
        {"captions": {"source": {"seed": 3}}},
    ],
)
def test_what_is_no_other_seed_has_a_row_of_its_own(tmp_path, change):
    given = {"checkpoint_hash": "one", "captions": {"source": {"seed": 0}}}
    given["protocol"] = {"name": "quick", "samples": 10, "neighbours": 5}
    path = tmp_path / "results.jsonl"
    for seed in (0, 1):
        results.append(path, result("kaleido", 2.0, seed, 1.0, **given))
    results.append(path, result("kaleido", 2.0, 2, 5.0, **(given | change)))
    table = results_table.rows([path], ("fid",))
    assert [(row["seeds"], row["fid"]) for row in table] == [("0 1", 1.0), ("2", 5.0)]
    assert table[0].keys() - {"guidance_weight"} != {"model", "seeds", "samples", "fid"}


def test_values_without_an_interval(tmp_path):
    """As of a factor that few pictures show: a resample may hold none of them."""
    bare = {"fid": {"value": 3.0, "low": None, "high": None, "samples": 10}}
    path = tmp_path / "results.jsonl"
    results.append(path, result("kaleido", 2.0, 0, 1.0))
    results.append(path, result("kaleido", 2.0, 1, 1.0, metrics=bare))
    results.append(path, result("kaleido", 8.0, 0, 1.0, metrics=bare))
    table = guidance.rows([path], ("fid",))
    assert [(row["value"], row["low"], row["high"]) for row in table] == [
        (2, 0, 2),
        (3, None, None),
    ]
    assert len(guidance.draw(table).axes) == 1
    text = results_table.markdown(results_table.rows([path], ("fid",)), ("fid",))
    assert "| 2 (0 to 2) |" in text and "| 3 |" in text


def test_misuse_of_figures(tmp_path, capsys):
    path = results_file(tmp_path)
    for words, line in (
        (f"guidance --results {path} --metrics recal", "no result has the metric 'recal'"),
        ("guidance", "name results with --results"),
        ("table", "figures table: name results with --results"),
        (f"table --results {path} --metrics recal", "no result has the metric 'recal'"),
        ("toy --num 3", "--num has no meaning"),
        (f"steps --results {path}", "no result names its training step"),
        ("control", "--checkpoint DIR is needed"),
        (f"guidance --results {tmp_path / 'none'}", "no results of"),
    ):
        assert cli.main(["figures", *words.split(), "--out", str(tmp_path / "out")]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    many = f"guidance --results {path} --results {tmp_path / 'none'} --out {tmp_path / 'out'}"
    assert cli.main(["figures", *many.split()]) == 2
    assert f"{tmp_path / 'none'}: no results of" in capsys.readouterr().err
    # Before models are opened and pictures drawn.
    assert cli.main(["figures", "toy", "--out", str(path)]) == 2
    assert f"{path} cannot be written" in capsys.readouterr().err


def test_words_between_dollars_are_no_formula(tmp_path):
    caption = "a $5_ and a $6 note"
    picture = np.zeros((4, 4, 3), np.uint8)
    figure = grids.panels([picture], [caption], 1)
    style.save(figure, tmp_path, "words")
    assert figure.axes[0].get_title() == style.plain(caption) and (tmp_path / "words.svg").exists()


@pytest.mark.slow
def test_pictures_of_models(tmp_path):
    """Diversity, control and editing from a small model, with a row for each picture."""
    config = _config()
    config.data.image_size = 16
    model = bundle.save(tmp_path / "model", _bundle(config))
    out, few = tmp_path / "out", "--setting num_steps=1 --prompt=dawn --prompt=noon"
    words = f"figures control --checkpoint {model} --num 2 --out {out} {few}"
    assert cli.main(words.split()) == 0
    rows = read(out / "control.csv")
    assert [(row["caption"], row["index"]) for row in rows] == [
        ("dawn", "0"),
        ("dawn", "1"),
        ("noon", "2"),
        ("noon", "3"),
    ]
    words = f"figures diversity --checkpoint {model} --baseline {model} --guidance 1,3 --out {out}"
    assert cli.main([*words.split(), *few.split()]) == 0
    rows = read(out / "diversity.csv")
    each = pictures.COLUMNS * pictures.ROWS
    assert len(rows) == 2 * 2 * 2 * each
    assert {row["guidance"] for row in rows} == {"1", "3"}
    script = tmp_path / "edits.jsonl"
    script.write_text('{"set": "text=red"}\n{"set": "text=blue"}\n')
    words = f"figures editing --checkpoint {model} --script {script} --out {out} {few}"
    assert cli.main(words.split()) == 0
    rows = read(out / "editing.csv")
    assert [row["edits"] for row in rows] == ["before", "set text=red", "set text=blue"]
    assert np.asarray(Image.open(out / "editing.png")).std() > 0


def test_default_edits_can_be_made():
    from kaleido_jax import editing
    from kaleido_jax.data.shapes import HUE_NAMES

    source = ShapesSource(latents=("bbox", "blob"))
    for number in range(20):
        example = source[number]
        for name in ("bbox", "blob"):
            document = LatentDocument(example["caption"], {name: example["latents"][name]})
            steps = pictures.default_steps(document, HUE_NAMES)
            assert len(steps) == 3
            for step in steps:
                changed = editing.apply(document, step)
                assert changed.latents != document.latents
    wide = LatentDocument("a dog", {"bbox": "red Dog (1, 33, 995, 995)"})
    kinds = [kind for step in pictures.default_steps(wide, HUE_NAMES) for kind, _ in step]
    assert kinds == ["move", "resize", "word"]
    for step in pictures.default_steps(wide, HUE_NAMES):
        editing.apply(wide, step)
    assert len(pictures.default_steps(wide, ("red",))) == 2  # no other hue
    with pytest.raises(UserError, match="--script"):
        pictures.default_steps(LatentDocument("a cat", {"text": "a cat"}), HUE_NAMES)
