"""The grammars of bbox and blob: cases, golden strings of the paper, properties, fuzzing."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_jax.errors import UserError
from kaleido_jax.latents import (
    LatentCharacterError,
    LatentError,
    LatentRangeError,
    LatentSizeError,
    LatentSyntaxError,
    LatentTypeError,
    bbox,
    blob,
    grounding,
)
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse

PAPER = (
    "Dog (1, 33, 995, 995) resting head on owner’s lap (1, 630, 785, 998) "
    "while they work on a laptop (39, 336, 999, 972)."
)
MODULES = {"bbox": bbox, "blob": blob}
SHAPES = {"bbox": "(1, 2, 30, 40)", "blob": "(10, 20, 30, 4, 179)"}


def box(*numbers: int) -> Box:
    return Box(*numbers)


def test_paper_example_reads_and_writes_back() -> None:
    value = bbox.parse(PAPER)
    assert value == (
        bbox.Segment("Dog", (box(1, 33, 995, 995),)),
        bbox.Segment("resting head on owner’s lap", (box(1, 630, 785, 998),)),
        bbox.Segment("while they work on a laptop", (box(39, 336, 999, 972),)),
        bbox.Segment("."),
    )
    assert bbox.write(value) == PAPER


def test_blob_reads_and_writes_back() -> None:
    string = "Dog (498, 514, 480, 310, 82) resting head on owner's lap (393, 814, 390, 170, 4)"
    value = blob.parse(string)
    assert value[0] == blob.Segment("Dog", (Ellipse(498, 514, 480, 310, 82),))
    assert value[1].phrase == "resting head on owner's lap"
    assert blob.write(value) == string


CASES = {
    "several boxes": (
        "two cats (1, 2, 30, 40) (50, 2, 90, 40)",
        [("two cats", [(1, 2, 30, 40), (50, 2, 90, 40)])],
    ),
    "whole picture": ("sky (0, 0, 1000, 1000)", [("sky", [(0, 0, 1000, 1000)])]),
    "words after the last": (
        "cat (1, 2, 3, 4) on a mat",
        [("cat", [(1, 2, 3, 4)]), ("on a mat", [])],
    ),
    "attached comma": (
        "cat (1, 2, 3, 4), dog (1, 2, 3, 4)",
        [("cat", [(1, 2, 3, 4)]), (", dog", [(1, 2, 3, 4)])],
    ),
    "attached s": (
        "cat (1, 2, 3, 4)'s tail (1, 2, 3, 4)",
        [("cat", [(1, 2, 3, 4)]), ("'s tail", [(1, 2, 3, 4)])],
    ),
    "prose parentheses": (
        "cat ((grey)) (1, 2, 3, 4)",
        [("cat (grey)", [(1, 2, 3, 4)])],
    ),
    "a box in prose": (
        "cat ((1, 2, 3, 4)) (1, 2, 3, 4)",
        [("cat (1, 2, 3, 4)", [(1, 2, 3, 4)])],
    ),
    "a box inside prose parentheses": (
        "cat ((with a ball (1, 2, 3, 4) ))",
        [("cat (with a ball", [(1, 2, 3, 4)]), (")", [])],
    ),
    "opening parenthesis next to a box": (
        "x(( (1, 2, 3, 4) ((",
        [("x(", [(1, 2, 3, 4)]), ("(", [])],
    ),
    "only parentheses": ("))(( (1, 2, 3, 4)", [(")(", [(1, 2, 3, 4)])]),
    "other letters": ("собака 犬 🐕 (1, 2, 3, 4)", [("собака 犬 🐕", [(1, 2, 3, 4)])]),
    "numbers in prose": ("3 cats, 4 dogs (1, 2, 3, 4)", [("3 cats, 4 dogs", [(1, 2, 3, 4)])]),
}


@pytest.mark.parametrize(("string", "expected"), CASES.values(), ids=CASES)
def test_valid_boxes(string: str, expected: list) -> None:
    value = bbox.parse(string)
    assert value == tuple(
        bbox.Segment(phrase, tuple(Box(*b) for b in boxes)) for phrase, boxes in expected
    )
    assert bbox.write(value) == string


BAD_BOXES = {
    "three coordinates": ("Dog (1, 33, 995)", LatentSyntaxError, 4),
    "five coordinates": ("Dog (1, 33, 995, 995, 3)", LatentSyntaxError, 4),
    "NaN": ("Dog (1, NaN, 995, 995)", LatentSyntaxError, 4),
    "infinity": ("Dog (1, inf, 995, 995)", LatentSyntaxError, 4),
    "float": ("Dog (1, 2.5, 995, 995)", LatentSyntaxError, 4),
    "negative": ("Dog (-1, 33, 995, 995)", LatentRangeError, 4),
    "minus zero": ("Dog (-0, 33, 995, 995)", LatentSyntaxError, 4),
    "plus": ("Dog (+1, 33, 995, 995)", LatentSyntaxError, 4),
    "leading zero": ("Dog (01, 33, 995, 995)", LatentSyntaxError, 4),
    "exotic digits": ("Dog (١, 33, 995, 995)", LatentSyntaxError, 4),
    "reversed x": ("a Dog (995, 33, 1, 995)", LatentRangeError, 6),
    "reversed y": ("Dog (1, 995, 995, 33)", LatentRangeError, 4),
    "no width": ("Dog (5, 33, 5, 995)", LatentRangeError, 4),
    "over 1000": ("Dog (1, 33, 995, 1001)", LatentRangeError, 4),
    "a long number": ("Dog (1, 33, 995, " + "9" * 40 + ")", LatentRangeError, 4),
    "no spaces": ("Dog (1,33,995,995)", LatentSyntaxError, 4),
    "other spaces": ("Dog (1, 33, 995, 995 )", LatentSyntaxError, 4),
    "nothing inside": ("Dog ()", LatentSyntaxError, 4),
    "words inside": ("Dog (big) (1, 33, 995, 995)", LatentSyntaxError, 4),
    "unclosed": ("Dog (1, 33, 995", LatentSyntaxError, 4),
    "nested": ("Dog (1, (2, 3), 4)", LatentSyntaxError, 4),
    "endless": ("Dog (" + "1, " * 1000 + "1)", LatentSyntaxError, 4),
    "lone closing": ("Dog) (1, 33, 995, 995)", LatentSyntaxError, 3),
    "no phrase": ("(1, 33, 995, 995) Dog", LatentSyntaxError, 0),
    "no space before": ("Dog(1, 33, 995, 995)", LatentSyntaxError, 3),
    "no space between boxes": ("Dog (1, 2, 3, 4)(1, 2, 3, 4)", LatentSyntaxError, 16),
    "no space after": ("Dog (1, 2, 3, 4)and", LatentSyntaxError, 16),
    "space before the full stop": ("Dog (1, 2, 3, 4) .", LatentSyntaxError, 16),
    "no box": ("Dog on a lap", LatentSyntaxError, 12),
    "other brackets": ("Dog [1, 33, 995, 995]", LatentSyntaxError, 21),
    "empty": ("", LatentSizeError, None),
    "space at the start": (" Dog (1, 2, 3, 4)", LatentCharacterError, 0),
    "space at the end": ("Dog (1, 2, 3, 4) ", LatentCharacterError, 16),
    "double space": ("Dog  (1, 2, 3, 4)", LatentCharacterError, 3),
    "line break": ("Dog\n(1, 2, 3, 4)", LatentCharacterError, 3),
    "NUL": ("Do\0g (1, 2, 3, 4)", LatentCharacterError, 2),
    "lone surrogate": ("Dog \udce4 (1, 2, 3, 4)", LatentCharacterError, 4),
    "no-break space": ("Dog\u00a0(1, 2, 3, 4)", LatentCharacterError, 3),
    "right-to-left override": ("Dog\u202e (1, 2, 3, 4)", LatentCharacterError, 3),
    "bytes": (b"Dog (1, 2, 3, 4)", LatentTypeError, None),
    "broken UTF-8": (b"Dog \xff (1, 2, 3, 4)", LatentTypeError, None),
    "nothing": (None, LatentTypeError, None),
    "a number": (math.nan, LatentTypeError, None),
}


@pytest.mark.parametrize(("string", "error", "position"), BAD_BOXES.values(), ids=BAD_BOXES)
def test_refused_boxes(string: object, error: type, position: int | None) -> None:
    with pytest.raises(LatentError) as caught:
        bbox.parse(string)
    assert type(caught.value) is error
    assert caught.value.position == position
    assert caught.value.latent == "bbox"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


BAD_BLOBS = {
    "four numbers": ("Dog (1, 33, 995, 995)", LatentSyntaxError),
    "half turn": ("Dog (500, 500, 30, 20, 180)", LatentRangeError),
    "negative angle": ("Dog (500, 500, 30, 20, -1)", LatentRangeError),
    "minor over major": ("Dog (500, 500, 20, 30, 0)", LatentRangeError),
    "no radius": ("Dog (500, 500, 20, 0, 0)", LatentRangeError),
    "radius over 1000": ("Dog (500, 500, 1001, 20, 0)", LatentRangeError),
    "centre outside": ("Dog (1001, 500, 30, 20, 0)", LatentRangeError),
}


@pytest.mark.parametrize(("string", "error"), BAD_BLOBS.values(), ids=BAD_BLOBS)
def test_refused_blobs(string: str, error: type) -> None:
    with pytest.raises(LatentError) as caught:
        blob.parse(string)
    assert type(caught.value) is error
    assert caught.value.position == 4


@pytest.mark.parametrize("name", MODULES)
def test_limits(name: str) -> None:
    module, shape = MODULES[name], SHAPES[name]
    most = "Dog" + f" {shape}" * grounding.MAX_OBJECTS
    assert len(most) < grounding.MAX_CHARS
    assert module.write(module.parse(most)) == most
    with pytest.raises(LatentSizeError):
        module.parse(most + f" {shape}")
    longest = "a" * (grounding.MAX_CHARS - len(shape) - 1) + f" {shape}"
    value = module.parse(longest)
    assert module.write(value) == longest
    with pytest.raises(LatentSizeError):
        module.parse("a" + longest)
    # As many characters, but one is doubled in writing.
    longer = dataclasses.replace(value[0], phrase=value[0].phrase[:-1] + "(")
    with pytest.raises(LatentSizeError, match=str(grounding.MAX_CHARS + 1)):
        module.write([longer])


@pytest.mark.parametrize("name", MODULES)
def test_a_million_objects_are_refused_at_once(name: str) -> None:
    module, shape = MODULES[name], SHAPES[name]
    string = f"Dog {shape} " * 1_000_000
    segments = module.parse(f"Dog {shape}") * 1_000_000
    shapes = [grounding.read_pairs(f"Dog {shape}", module.KIND)[0][1][0]] * 1_000_000
    begin = time.process_time()
    with pytest.raises(LatentSizeError):
        module.parse(string)
    assert time.process_time() - begin < 1
    with pytest.raises(LatentSizeError):
        module.write(segments)
    with pytest.raises(LatentSizeError):
        module.Segment("Dog", shapes)
    assert time.process_time() - begin < 1


def test_values_that_no_string_spells() -> None:
    dog = bbox.Segment("Dog", (box(1, 2, 3, 4),))
    wrong = [
        ([], LatentSizeError),
        ([bbox.Segment("Dog")], LatentSizeError),
        ([bbox.Segment("A"), dog], LatentSyntaxError),
        ([blob.Segment("Dog", (Ellipse(1, 2, 3, 2, 0),))], LatentTypeError),
        (dog, LatentTypeError),
        ("Dog (1, 2, 3, 4)", LatentTypeError),
        (None, LatentTypeError),
    ]
    for value, error in wrong:
        for function in (bbox.write, bbox.validate, bbox.parts, bbox.spans):
            with pytest.raises(LatentError) as caught:
                function(value)
            assert type(caught.value) is error, value
    with pytest.raises(LatentSizeError):
        bbox.Segment("", (box(1, 2, 3, 4),))
    with pytest.raises(LatentCharacterError):
        bbox.Segment("Dog ", (box(1, 2, 3, 4),))
    with pytest.raises(LatentTypeError):
        bbox.Segment("Dog", ((1, 2, 3, 4),))
    with pytest.raises(LatentTypeError):
        bbox.Segment(7, ())


def test_numbers_of_a_box() -> None:
    assert box(*np.array([1, 2, 3, 4], np.int32)) == box(1, 2, 3, 4)
    assert type(box(*np.array([1, 2, 3, 4])).x1) is int
    for wrong in (1.0, True, "1", None, math.nan):
        with pytest.raises(LatentTypeError):
            Box(wrong, 2, 3, 4)
    with pytest.raises(LatentRangeError, match="longer number"):
        Box(10**5000, 2, 3, 4)


def test_rounding_of_boxes_and_ellipses() -> None:
    assert Box.rounded(-3.2, 0.5, 10.49, 1000.7) == box(0, 1, 10, 1000)
    with pytest.raises(LatentRangeError):
        Box.rounded(1.1, 0, 1.3, 5)
    with pytest.raises(LatentRangeError):
        Box.rounded(math.nan, 0, 1, 5)
    with pytest.raises(LatentTypeError):
        Box.rounded("1", 0, 1, 5)
    assert Ellipse.rounded(10.5, 20, 30.2, 0.1, 179.6) == Ellipse(11, 20, 30, 1, 0)
    assert Ellipse.rounded(10, 20, 5, 30, 100) == Ellipse(10, 20, 30, 5, 10)
    assert Ellipse.rounded(10, 20, 30, 5, -1) == Ellipse(10, 20, 30, 5, 179)
    with pytest.raises(LatentRangeError):
        Ellipse.rounded(10, 20, math.inf, 5, 0)


def test_errors_say_kind_and_place_and_travel_between_processes() -> None:
    with pytest.raises(LatentRangeError) as caught:
        bbox.parse("a Dog (1, 33, 995, 1001)")
    error = caught.value
    assert str(error) == "bbox: y2 = 1001 is not in 0..1000 (at character 6)"
    assert (error.kind, error.message) == ("range", "y2 = 1001 is not in 0..1000")
    assert isinstance(error, ValueError)
    assert isinstance(error, UserError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.position) == (type(error), str(error), 6)


def test_parts() -> None:
    assert bbox.parts(bbox.parse("two cats (1, 2, 3, 4) (5, 6, 7, 8).")) == [
        {"phrase": "two cats", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]},
        {"phrase": ".", "boxes": []},
    ]
    assert blob.parts(blob.parse("cat (1, 2, 4, 3, 90)")) == [
        {"phrase": "cat", "ellipses": [[1, 2, 4, 3, 90]]}
    ]


letters = st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Co", "Zs", "Zl", "Zp"))
characters = st.one_of(letters, st.sampled_from("() ,.'[]#0123456789"))
phrases = (
    st.text(characters, min_size=1, max_size=12).map(lambda s: " ".join(s.split())).filter(bool)
)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    (x1, x2), (y1, y2) = (
        sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
        for _ in range(2)
    )
    return Box(x1, y1, x2, y2)


@st.composite
def ellipses(draw: st.DrawFn) -> Ellipse:
    minor, major = sorted((draw(st.integers(1, 1000)), draw(st.integers(1, 1000))))
    centre = st.integers(0, 1000)
    return Ellipse(draw(centre), draw(centre), major, minor, draw(st.integers(0, 179)))


def captions(module: object, shapes: st.SearchStrategy) -> st.SearchStrategy:
    grounded = st.builds(
        lambda p, s: module.Segment(p, tuple(s)), phrases, st.lists(shapes, min_size=1, max_size=3)
    )
    last = st.lists(st.builds(module.Segment, phrases), max_size=1)
    return st.tuples(st.lists(grounded, min_size=1, max_size=4), last).map(
        lambda both: tuple(both[0] + both[1])
    )


STRATEGIES = {"bbox": captions(bbox, boxes()), "blob": captions(blob, ellipses())}


def check_round_trip(name: str, data: st.DataObject) -> None:
    module = MODULES[name]
    value = data.draw(STRATEGIES[name])
    string = module.write(value)
    assert module.parse(string) == value
    assert module.validate(list(value)) == value


def check_nothing_else_escapes(name: str, data: st.DataObject) -> None:
    """Any text, and valid strings with a slice torn out and another put in."""
    module = MODULES[name]
    noise = st.text(
        st.one_of(st.characters(), st.sampled_from("() ,.0123456789NaN-\udce4")), max_size=40
    )
    string = data.draw(noise)
    if data.draw(st.booleans()):
        whole = module.write(data.draw(STRATEGIES[name]))
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, min(len(whole), start + 5)))
        string = whole[:start] + string[: data.draw(st.integers(0, 3))] + whole[end:]
    try:
        value, error = module.parse(string), None
    except LatentError as caught:
        value, error = None, caught
    if error is None:
        # The other half of the bijection: what is read is written the same.
        assert module.write(value) == string
    else:
        assert error.position is None or 0 <= error.position <= len(string)
        assert "\n" not in str(error)


quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(quick, max_examples=10_000)


@pytest.mark.parametrize("name", MODULES)
@quick
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    check_round_trip(name, data)


@pytest.mark.parametrize("name", MODULES)
@quick
@given(data=st.data())
def test_nothing_else_escapes(name: str, data: st.DataObject) -> None:
    check_nothing_else_escapes(name, data)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODULES)
@thorough
@given(data=st.data())
def test_round_trip_thoroughly(name: str, data: st.DataObject) -> None:
    check_round_trip(name, data)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODULES)
@thorough
@given(data=st.data())
def test_nothing_else_escapes_thoroughly(name: str, data: st.DataObject) -> None:
    check_nothing_else_escapes(name, data)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner), st.dictionaries(st.text(), inner)),
    max_leaves=6,
)


@quick
@given(anything, anything, anything)
def test_values_of_any_type_raise_nothing_else(
    first: object, second: object, third: object
) -> None:
    attempts = (
        lambda: bbox.parse(first),
        lambda: bbox.write(first),
        lambda: blob.write(first),
        lambda: bbox.Segment(first, second),
        lambda: blob.Segment(first, second),
        lambda: Box(first, second, third, 9),
        lambda: Ellipse(first, second, third, 1, 0),
        lambda: Box.rounded(first, second, third, 9),
        lambda: Ellipse.rounded(first, second, third, 1, 0),
    )
    for attempt in attempts:
        try:
            attempt()
        except LatentError:
            continue
