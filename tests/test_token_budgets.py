"""Token budgets on T5's real pieces, and no unknown token in any latent."""

from __future__ import annotations

import pathlib
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax.data import ShapesSource, WebDatasetSource
from kaleido_jax.latents import bbox, blob, spelling, text
from kaleido_jax.latents.errors import LatentError
from kaleido_jax.tokens import EOS, UNK, Vocabulary
from tests import t5_pieces

COCO = pathlib.Path(__file__).parents[2] / "shared" / "data" / "coco100"
SHIPPED = Vocabulary.default(8192)
LENGTHS = {"text": 128, "bbox": 112, "blob": 128, "voken": 33}  # with EOS
COMBINED = 288
GRAMMARS = {"text": text, "bbox": bbox, "blob": blob}
# What annotators write, 80 words each.
DESCRIPTIONS = [
    "A brown dog rests its head on the lap of a person who sits on a worn leather sofa. Warm light "
    "from a window on the left falls across the room and leaves the far corner dark. On the low "
    "table stand two white cups, one of them half full, beside an open newspaper. The person wears "
    "blue jeans and a grey knitted jumper; only the hands and knees can be seen. The mood is "
    "quiet, as on Sunday mornings.",
    "Three red and white fishing boats lie on a pebble beach under a cloudy evening sky. Nets, "
    "ropes and plastic boxes are piled around them, and a man in yellow boots bends over the "
    "nearest engine. Behind the boats the sea is calm and almost silver, with a lighthouse on the "
    "horizon. Gulls stand along the water's edge. The picture is taken from a low angle with a "
    "wide lens, so the bows look large and the figure looks small.",
]


def random_box(draw: random.Random) -> tuple[int, ...]:
    x, y = (sorted(draw.sample(range(1001), 2)) for _ in range(2))
    return x[0], y[0], x[1], y[1]


def random_blob(draw: random.Random) -> tuple[int, ...]:
    major = draw.randrange(10, 700)
    return (
        draw.randrange(1001),
        draw.randrange(1001),
        major,
        draw.randrange(5, major + 1),
        draw.randrange(180),
    )


def lengths(vocabulary: Vocabulary, make, count: int) -> list[int]:
    """Tokens that a random shape adds to a phrase."""
    draw = random.Random(0)
    phrase = len(vocabulary.encode_text("dog"))
    return [
        len(vocabulary.encode_text(f"dog ({', '.join(map(str, make(draw)))})")) - phrase
        for _ in range(count)
    ]


@t5_pieces.needs_table
def test_shapes_and_vokens_cost_what_the_budgets_say():
    t5 = t5_pieces.vocabulary()
    boxes, blobs = lengths(t5, random_box, 3000), lengths(t5, random_blob, 3000)
    assert statistics.mean(boxes) == pytest.approx(10.8, abs=0.1)
    assert max(boxes) <= 12
    assert statistics.mean(blobs) == pytest.approx(13, abs=0.2)
    assert max(blobs) <= 15
    draw = random.Random(0)
    vokens = ["".join(f"#{draw.randrange(8192)}" for _ in range(32)) for _ in range(300)]
    written = [len(t5.encode_text(value)) for value in vokens]
    assert statistics.mean(written) == pytest.approx(95, abs=1)
    for value in vokens:
        assert len(t5.encode_latents({"voken": value}, ("voken",), 33)) == 33


@t5_pieces.needs_table
def test_descriptions_cost_what_the_budgets_say():
    t5 = t5_pieces.vocabulary()
    for description in DESCRIPTIONS:
        assert len(description.split()) == 80
        tokens = t5.encode_text(description)
        assert len(tokens) == pytest.approx(104, abs=8)
        assert len(tokens) < LENGTHS["text"]


def full(draw: random.Random) -> dict[str, str]:
    """Latents as long as the budgets foresee: 80 words, six objects, 32 vokens."""
    names = ["Brown dog", "white cup", "window", "person's hands", "sofa", "open newspaper"]
    boxes = [bbox.Segment(n, (bbox.Box(*random_box(draw)),)) for n in names]
    blobs = [blob.Segment(n, (blob.Ellipse(*random_blob(draw)),)) for n in names]
    return {
        "text": draw.choice(DESCRIPTIONS),
        "bbox": bbox.write(boxes),
        "blob": blob.write(blobs),
        "voken": "".join(f"#{draw.randrange(8192)}" for _ in range(32)),
    }


@t5_pieces.needs_table
def test_six_objects_and_eighty_words_are_not_cut():
    t5 = t5_pieces.vocabulary()
    draw = random.Random(1)
    for _ in range(50):
        latents = full(draw)
        for name, limit in LENGTHS.items():
            ids = t5.encode_latents(latents, (name,), limit)
            assert t5.decode_latents(ids, (name,)) == {name: latents[name]}
        names = ("text", "bbox", "voken")
        ids = t5.encode_latents(latents, names, COMBINED)
        assert t5.decode_latents(ids, names) == {name: latents[name] for name in names}


@t5_pieces.needs_table
@pytest.mark.skipif(not COCO.exists(), reason="the photographs of coco100 are not here")
def test_photographs_fit_and_hold_nothing_unknown():
    t5 = t5_pieces.vocabulary()
    source = WebDatasetSource(str(COCO), size=32, latents=("text", "bbox", "blob"))
    for i in range(len(source)):
        example = source[i]
        assert UNK not in t5.encode_caption(example["caption"])
        for name in ("text", "bbox", "blob"):
            ids = t5.encode_latents(example["latents"], (name,), LENGTHS[name])
            assert UNK not in ids
            assert t5.decode_latents(ids, (name,)) == {name: example["latents"][name]}


def vocabularies() -> list[Vocabulary]:
    return [SHIPPED, *([t5_pieces.vocabulary()] if t5_pieces.TABLE.exists() else [])]


def test_what_the_grammars_themselves_write_is_known():
    source = ShapesSource(size=32, latents=("text", "bbox", "blob"))
    grammar = "0123456789()[]#, ."
    for vocabulary in vocabularies():
        assert all(map(vocabulary.knows, grammar))
        for i in range(50):
            for name, value in source[i]["latents"].items():
                assert vocabulary.spell(name, value) == value
                assert UNK not in vocabulary.encode_text(value)


WORDS = st.text(min_size=1, max_size=30)


@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_no_latent_holds_an_unknown_token(words, seed):
    """Whatever prose a latent is made of: no UNK, still its grammar, and nothing else changed."""
    draw = random.Random(seed)
    values = {}
    for name, make in (
        ("text", lambda: text.write(" ".join(words))),
        (
            "bbox",
            lambda: bbox.write([bbox.Segment(w, [bbox.Box(*random_box(draw))]) for w in words]),
        ),
        (
            "blob",
            lambda: blob.write(
                [blob.Segment(w, [blob.Ellipse(*random_blob(draw))]) for w in words]
            ),
        ),
    ):
        try:
            values[name] = make()
        except LatentError:  # prose that the grammar refuses: no canonical string
            continue
    for vocabulary in vocabularies():
        for name, value in values.items():
            ids = vocabulary.encode_latents(values, (name,), 4096)
            assert UNK not in ids
            back = vocabulary.decode_latents(ids, (name,))[name]
            if name == "text" and ids == [EOS]:
                continue
            parsed = GRAMMARS[name].parse(back)
            if name == "bbox":
                assert [s.boxes for s in parsed] == [s.boxes for s in bbox.parse(value)]
            if name == "blob":
                assert [s.ellipses for s in parsed] == [s.ellipses for s in blob.parse(value)]


def test_the_mark_that_stands_for_a_space_is_left_out():
    """SentencePiece writes spaces as U+2581: read back, ' \u2581:' would be no caption any more."""
    value = "\u2581a (1, 2, 3, 4) \u2581: b (5, 6, 7, 8)"
    for vocabulary in vocabularies():
        ids = vocabulary.encode_latents({"bbox": value}, ("bbox",), 100)
        back = vocabulary.decode_latents(ids, ("bbox",))["bbox"]
        assert back == "a (1, 2, 3, 4): b (5, 6, 7, 8)"
        bbox.parse(back)


@pytest.mark.parametrize(
    ("name", "value", "spelled"),
    [
        ("text", "a {b} ~c <d> \N{LATIN SMALL LETTER E WITH ACUTE}", "a b c d e"),
        ("text", "\u65e5\u672c", ""),
        ("bbox", "\u65e5 (1, 2, 3, 4) {x} (5, 6, 7, 8)", "object (1, 2, 3, 4) x (5, 6, 7, 8)"),
        ("bbox", "a \u2474 ((b)) (1, 2, 3, 4)", "a ((b)) (1, 2, 3, 4)"),
        ("bbox", "dog (1, 2, 3, 4) \u65e5", "dog (1, 2, 3, 4)"),
        ("bbox", "dog (1, 2, 3, 4), \u65e5", "dog (1, 2, 3, 4),"),
        ("blob", "cr\u00e8me (1, 2, 30, 4, 5)", "creme (1, 2, 30, 4, 5)"),
    ],
)  # fmt: skip
def test_unknown_characters_are_spelled_plainly(name, value, spelled):
    """With ASCII known but for some of it, as in T5."""
    known = "".join(map(chr, range(33, 127))).translate(dict.fromkeys(map(ord, "{}<>~^\\`")))
    assert spelling.spell(name, value, known.__contains__) == spelled
    with pytest.raises(LatentError):
        spelling.spell("bbox", "no box {", known.__contains__)
