"""Sequences of edits, latents drawn anew beside kept ones, and sets of diverse latents."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from kaleido_jax import diverse, editing, generate, resampling, stages
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, bbox, latent_type
from tests.test_constrained import COMBINED, PROMPT, pipeline

VOKENS = "".join(f"#{i}" for i in range(32))
DOCUMENT = LatentDocument(
    caption="a dog",
    latents={
        "text": "A red dog.",
        "bbox": "Red dog (1, 2, 300, 400) and cat (500, 2, 700, 400).",
        "voken": VOKENS,
    },
    seed=3,
)
LONG = 96


def test_a_step_makes_its_edits_in_order():
    step = [
        ("word", "red=blue"),
        ("move", "dog=10,-2"),
        ("resize", "cat=0.5"),
        ("add", "a cup=1,2,3,4"),
        ("remove", "cat"),
        ("voken", "3=9"),
        ("set", "caption=a blue dog"),
    ]
    got = editing.apply(DOCUMENT, step)
    assert got.caption == "a blue dog" and got.log_prob is None
    assert got.latents["text"] == "A blue dog."
    assert got.latents["bbox"] == "Blue dog (11, 0, 310, 398) a cup (1, 2, 3, 4)."
    assert got.latents["voken"] == VOKENS.replace("#3#", "#9#", 1)
    only = editing.apply(DOCUMENT, [("word", "text:red=green"), ("place", "bbox:cat=1,2,3,4")])
    assert only.latents["text"] == "A green dog."
    assert only.latents["bbox"] == "Red dog (1, 2, 300, 400) and cat (1, 2, 3, 4)."


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ([("mvoe", "dog=1,2")], "unknown edit 'mvoe'; did you mean 'move'"),
        ([("move", "dog")], "must be OBJECT=DX,DY"),
        ([("move", "dog=1")], "2 numbers are needed, not 1"),
        ([("move", "dog=a,b")], "whole numbers"),
        ([("move", "horse=1,2")], "no object 'horse'"),
        ([("move", "dog=-10,0")], "--move dog=-10,0: .*x1 = -9"),
        ([("resize", "dog=big")], "must be a number"),
        ([("place", "dog=1,2,3")], "a box has 4 numbers"),
        ([("place", "dog=1,2,3,4,5")], "none of blob"),
        ([("set", "blob=x")], "the document has caption, text, bbox, voken"),
        ([("set", "bbox=x")], "there is no box"),
        ([("word", "horse=dog")], "'horse' does not occur"),
        ([("voken", "32=1")], r"place 32 is not in 0\.\.31"),
    ],
)
def test_edits_that_cannot_be_made_are_refused(step, words):
    with pytest.raises(UserError, match=words):
        editing.apply(DOCUMENT, step)


def test_keep_and_resample_name_the_free_latents():
    free = editing.free_latents
    assert free([("keep", "text")], COMBINED) == ["bbox", "voken"]
    assert free([("resample", "voken,text")], COMBINED) == ["text", "voken"]
    assert free([("word", "a=b")], COMBINED) == []
    for step, words in (
        ([("keep", "text"), ("resample", "bbox")], "two ways"),
        ([("keep", "blob")], "latents are text, bbox, voken"),
        ([("keep", "text,bbox,voken")], "nothing is left"),
    ):
        with pytest.raises(UserError, match=words):
            free(step, COMBINED)


def test_steps_are_read_from_jsonl(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"word": ["red=blue", "a=b"], "move": "dog=1,2"}\n\n{"keep": "text"}\n')
    assert editing.read_steps(path) == [
        [("word", "red=blue"), ("word", "a=b"), ("move", "dog=1,2")],
        [("keep", "text")],
    ]
    for text, words in (
        ("{", "line 1: not JSON"),
        ("[1]", "a step is an object"),
        ('{"wrod": "a=b"}', "did you mean 'word'"),
        ('{"word": 1}', "string or a list"),
        ("", "0 steps"),
        ("{}", "step 1 has no edit"),
        ('{"keep": "a"}\n' * 65, "65 steps"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            editing.read_steps(path)
    with pytest.raises(UserError, match="No such file"):
        editing.read_steps(tmp_path / "none")


def document(latents=None):
    latents = latents or {
        "text": "a red disc",
        "bbox": "red disc (1, 2, 300, 400)",
        "voken": VOKENS,
    }
    return LatentDocument(caption=PROMPT, latents=latents, seed=3, sample_index=2)


def check(made, kept, free, before):
    assert list(made.latents) == list(COMBINED)
    for name in kept:
        assert made.latents[name] == before.latents[name]
    for name in free:
        assert made.latents[name] != before.latents[name]
        latent_type(name).parse(made.latents[name])
    assert made.decoding["resampled"] == list(free)
    assert np.isfinite(made.log_prob)


@pytest.mark.parametrize(
    "free",
    [list(c) for n in (1, 2, 3) for c in itertools.combinations(COMBINED, n)],
    ids="+".join,
)
def test_free_latents_are_drawn_and_kept_ones_stay(free):
    pipe = pipeline(COMBINED, LONG)
    before = document()
    made = pipe.resample(before, free, seed=1, candidates=3, batch_size=3)
    check(made, [name for name in COMBINED if name not in free], free, before)
    # One draw is exact where nothing kept follows; otherwise several are weighed.
    last_kept = max((COMBINED.index(n) for n in COMBINED if n not in free), default=-1)
    wanted = 1 if COMBINED.index(free[0]) > last_kept else 3
    assert made.decoding["candidates"] == wanted
    assert 1.0 <= made.decoding["effective_candidates"] <= wanted


def test_draws_are_a_function_of_seed_and_step():
    pipe = pipeline(COMBINED, LONG)

    def draw(**options):
        return pipe.resample(document(), ["voken"], batch_size=3, **options).latents["voken"]

    assert draw(seed=1) == draw(seed=1)
    assert len({draw(seed=1), draw(seed=2), draw(seed=1, step=1)}) == 3


def test_later_latents_are_drawn_from_the_prior_given_the_earlier():
    """With the latents of a first draw kept, vokens follow the decoder's own distribution."""
    pipe = pipeline(("text", "voken"), 40)
    before = document({"text": "a red disc", "voken": VOKENS})
    vocabulary = pipe._vocabulary
    prefix = [*vocabulary.encode_latents(before.latents, COMBINED, 40)]
    prefix = prefix[: prefix.index(vocabulary.section_id("voken")) + 1]
    drawn = [
        pipe.resample(before, ["voken"], seed=s, batch_size=1).latents["voken"] for s in range(150)
    ]
    counts = np.bincount([int(d.split("#")[1]) for d in drawn], minlength=64)
    ids = np.zeros((1, 40), np.int32)
    ids[0, : len(prefix)] = prefix
    runner, states = pipe.runner, pipe.runner.encode(pipe._caption_tokens([PROMPT]))
    log_p = []
    for code in range(64):
        ids[0, len(prefix)] = vocabulary.voken_offset + code
        log_p.append(runner.score(states, np.zeros(1, int), ids, 1)[0, len(prefix)])
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    # Pearson's statistic over the codes, 63 degrees of freedom: 4 deviations above its mean.
    statistic = ((counts - 150 * p) ** 2 / (150 * p)).sum()
    assert statistic < 63 + 4 * np.sqrt(2 * 63)


def test_importance_resampling_prefers_what_explains_the_kept():
    chosen = [resampling._resample(np.log([0.05, 0.15, 0.8]), seed, 0)[0] for seed in range(200)]
    frequency = np.bincount(chosen, minlength=3) / 200
    np.testing.assert_allclose(frequency, [0.05, 0.15, 0.8], atol=0.1)
    assert resampling._resample(np.array([0.0, 0.0, -1e9]), 0, 0)[1] == pytest.approx(2.0)


def test_kept_latents_must_leave_room():
    pipe = pipeline(COMBINED, 64)
    long = dataclasses.replace(
        document(), latents={**document().latents, "text": " ".join(["a"] * 22)}
    )
    with pytest.raises(UserError, match=r"no room for the others: .* the model writes 64"):
        pipe.resample(long, ["bbox"])
    for free, words in ((["blob"], "no latent 'blob'"), ([], "nothing to draw")):
        with pytest.raises(UserError, match=words):
            pipe.resample(document(), free)
    with pytest.raises(UserError, match="candidates is 257"):
        pipe.resample(document(), ["text"], candidates=257)


def test_a_sequence_of_edits_becomes_pictures_and_a_sheet(tmp_path):
    pipe = pipeline(COMBINED, LONG)
    steps = [
        [("word", "red=blue")],
        [("move", "disc=100,50"), ("resample", "voken")],
        [("set", "caption=a blue disc")],
    ]
    out = pipe.edit(document(), steps)
    assert [d.latents["text"] for d in out.documents] == ["a red disc"] + ["a blue disc"] * 3
    assert bbox.parse(out.documents[2].latents["bbox"])[0].boxes[0] == bbox.Box(101, 52, 400, 450)
    assert len({d.latents["voken"] for d in out.documents}) == 2
    assert {(d.seed, d.sample_index) for d in out.documents} == {(3, 2)}
    assert out.documents[3].caption == "a blue disc"
    for before, after in itertools.pairwise(out.samples):
        assert np.abs(before - after).max() > 1e-4
    same = pipe.render(document(), batch_size=4)
    np.testing.assert_allclose(same.samples[0], out.samples[0], atol=2e-5)
    sheet = editing.contact_sheet(out, steps)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 4 * (320 + 4)
    folder = generate.write_outputs(out, tmp_path / "out", {"sheet.png": sheet})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "sheet.png" in manifest["files"] and manifest["pictures"] == 4


def test_an_edit_that_cannot_be_made_costs_nothing(monkeypatch):
    pipe = pipeline(COMBINED, LONG)
    monkeypatch.setattr(type(pipe.runner), "render", lambda *_: pytest.fail("rendered"))
    with pytest.raises(UserError, match="horse"):
        pipe.edit(document(), [[("word", "red=blue")], [("remove", "horse")]])


def layout(*boxes):
    string = bbox.write([bbox.Segment("dog", (bbox.Box(*box),)) for box in boxes])
    return LatentDocument(caption="a", latents={"bbox": string})


def test_the_most_diverse_are_kept():
    left, right, top = (0, 0, 200, 1000), (800, 0, 1000, 1000), (300, 0, 700, 200)
    drawn = [layout(left), layout((0, 0, 210, 1000)), layout(left), layout(right), layout(top)]
    assert diverse.most_diverse(drawn, 3) == [0, 3, 4]
    assert diverse.most_diverse(drawn, 5) == [0, 1, 2, 3, 4]
    similar = diverse.kernel(drawn)
    assert similar[0, 2] == pytest.approx(1.0) and similar[0, 3] < similar[0, 1]
    assert (np.linalg.eigvalsh(similar) > -1e-9).all()


def test_greedy_choice_has_nearly_the_largest_determinant():
    generator = np.random.default_rng(0)
    for _ in range(20):
        rows = generator.standard_normal((9, 5))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        similar = rows @ rows.T
        chosen = diverse.greedy_map(similar, 3)

        def determinant(items, similar=similar):
            return np.linalg.det(similar[np.ix_(items, items)] + 1e-3 * np.eye(len(items)))

        # Each step takes the best there is.
        for step in (1, 2):
            first = chosen[:step]
            best = max(determinant([*first, i]) for i in range(9) if i not in first)
            assert determinant(chosen[: step + 1]) == pytest.approx(best)


def test_a_diverse_set_is_of_what_was_drawn():
    pipe = pipeline(("bbox",))
    prompts = [PROMPT, "dusk: a blue shape"]
    kept = pipe.draw_diverse(prompts, 2, 6, seed=4, batch_size=12)
    drawn = pipe.draw_latents(prompts, 6, seed=4, batch_size=12)
    assert [d.caption for d in kept] == [PROMPT] * 2 + ["dusk: a blue shape"] * 2
    assert all(d in drawn for d in kept) and len({d.latents["bbox"] for d in kept}) == 4
    with pytest.raises(UserError, match="num_images is 7"):
        pipe.draw_diverse(PROMPT, 7, 6)


def test_the_encoder_runs_once_for_all_samples_of_a_caption(monkeypatch):
    pipe, encode, rows = pipeline(("bbox",)), stages.encode, []

    def count(model, params, captions):
        rows.append(len(captions))
        return encode(model, params, captions)

    monkeypatch.setattr(stages, "encode", count)
    captions = ["night: a grey shape", "night: a green shape"]
    documents = pipe.draw_latents(captions, 5, batch_size=10)
    assert sum(rows) == 2
    pipe.render(documents[:2], batch_size=10)
    assert sum(rows) == 2
