"""The grammars of text, voken and combined, the table of latents, and cleaning."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_jax.latents import (
    LATENTS,
    LatentCharacterError,
    LatentError,
    LatentRangeError,
    LatentSizeError,
    LatentSyntaxError,
    LatentTypeError,
    combined,
    latent_type,
    text,
    voken,
)
from kaleido_jax.latents.characters import clean

PUG = (
    "In the image, a small pug dog is sitting on top of a dog house that resembles a pink book. "
    "The book is open and the dog appears to be reading it."
)
FIGURE_14 = (
    "#1872#680#2888#2619#680#3445#6930#124#6073#2157#2157#6073#6073#6930#124#124#2157#3445#2157"
    "#3526#6073#6073#6930#2157#6930#3526#5178#2517#6498#2619#6187#4863"
)
FIGURE_14_EDITED = (
    "#3078#2157#3294#1579#680#2560#3294#7216#7914#2315#2315#1579#7914#3294#2401#7216#2315#430#2315"
    "#2811#3294#1579#3294#2315#4671#1579#2811#2811#3294#7914#1131#5120"
)
BBOX = "Dog (1, 33, 995, 995) on a laptop (39, 336, 999, 972)."
COMBINED = f"[text] {PUG} [bbox] {BBOX} [voken] {FIGURE_14}"

quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(quick, max_examples=10_000)


def test_text_is_its_own_value() -> None:
    for string in (PUG, "x", "a (1, 2, 3, 4) b", "<extra_id_0> [bbox] ~ {}", "犬 🐕", "x" * 4096):
        assert text.parse(string) == string
        assert text.write(string) == string
        assert text.parts(string) == string


@pytest.mark.parametrize(
    ("string", "error", "position"),
    [
        ("", LatentSizeError, None),
        ("x" * 4097, LatentSizeError, None),
        ("a\tb", LatentCharacterError, 1),
        ("a\x1b[2Jb", LatentCharacterError, 1),
        ("a\u2028b", LatentCharacterError, 1),
        ("a\ufeff", LatentCharacterError, 1),
        ("ab\ud800", LatentCharacterError, 2),
        ("a  b", LatentCharacterError, 1),
        (" a", LatentCharacterError, 0),
        ("a ", LatentCharacterError, 1),
        (" ", LatentCharacterError, 0),
        (b"a", LatentTypeError, None),
        (["a"], LatentTypeError, None),
    ],
)
def test_refused_texts(string: object, error: type, position: int | None) -> None:
    for function in (text.parse, text.write, text.validate, text.spans):
        with pytest.raises(LatentError) as caught:
            function(string)
        assert type(caught.value) is error
        assert caught.value.position == position


def test_cleaning() -> None:
    assert clean(" a\n\tb\u00a0 c\u00ad\u200b\x00d\ud800 ") == "a b c d"
    assert clean("one two three", 9) == "one two"
    assert clean("one two three", 7) == "one two"
    assert clean("unbroken", 3) == "unb"
    assert clean("\n\u200b") == ""


@quick
@given(
    st.text(st.one_of(st.characters(), st.sampled_from(" \n\x00\ud800\u200b"))), st.integers(1, 9)
)
def test_what_is_cleaned_is_valid_or_nothing(raw: str, limit: int) -> None:
    for string in (clean(raw), clean(raw, limit)):
        assert string == "" or text.parse(string) == string
        assert clean(string) == string
    assert len(clean(raw, limit)) <= limit


@pytest.mark.parametrize("string", [FIGURE_14, FIGURE_14_EDITED])
def test_vokens_of_figure_14(string: str) -> None:
    ids = voken.parse(string, codebook_size=8192)
    assert len(ids) == 32
    assert ids[:2] == tuple(map(int, string.split("#")[1:3]))
    assert voken.write(ids) == string
    assert voken.parts(ids) == list(ids)


def test_vokens_as_the_appendix_writes_them() -> None:
    ids = voken.parse(FIGURE_14.removeprefix("#"))
    assert ids == voken.parse(FIGURE_14)
    assert voken.write(ids) == FIGURE_14


@pytest.mark.parametrize(
    ("string", "error", "position"),
    [
        ("#1" * 31, LatentSizeError, None),
        ("#1" * 33, LatentSizeError, None),
        ("#1" * 1_000_000, LatentSizeError, None),
        ("#5", LatentSizeError, None),
        ("#1" * 31 + "#99999", LatentRangeError, 63),
        ("#65536" + "#1" * 31, LatentRangeError, 1),
        ("#1" * 31 + "#100000", LatentRangeError, 63),
        ("#1" * 30 + "#01#2", LatentSyntaxError, 61),
        ("#1" * 31 + "#-1", LatentSyntaxError, 63),
        ("#1" * 31 + "#", LatentSyntaxError, 63),
        ("#1" * 31 + "#٣", LatentSyntaxError, 63),
        ("#1" * 32 + "#", LatentSyntaxError, 65),
        ("##1" + "#1" * 31, LatentSyntaxError, 1),
        ("#1 " * 31 + "#1", LatentSyntaxError, 1),
        ("#", LatentSyntaxError, 1),
        ("", LatentSizeError, None),
        ("#1\n" * 32, LatentCharacterError, 2),
        (b"#1" * 32, LatentTypeError, None),
        (None, LatentTypeError, None),
    ],
)
def test_refused_vokens(string: object, error: type, position: int | None) -> None:
    with pytest.raises(LatentError) as caught:
        voken.parse(string)
    assert type(caught.value) is error
    assert caught.value.position == position
    assert len(str(caught.value)) < 200


def test_the_codebook_bounds_vokens() -> None:
    string = "#7" * 31 + "#1000"
    assert voken.parse(string, codebook_size=1001)[-1] == 1000
    with pytest.raises(
        LatentRangeError, match=r"id 32 = 1000 is not in 0..999 \(at character 63\)"
    ):
        voken.parse(string, codebook_size=1000)
    with pytest.raises(LatentRangeError):
        voken.write([1000] * 32, codebook_size=1000)


def test_values_of_vokens() -> None:
    assert voken.write(np.arange(32)) == voken.write(list(range(32)))
    assert all(type(v) is int for v in voken.validate(np.arange(32)))
    for value, error in (
        (range(31), LatentSizeError),
        (np.zeros((32, 2), int), LatentTypeError),
        ([0.0] * 32, LatentTypeError),
        ([True] * 32, LatentTypeError),
        ([-1] * 32, LatentRangeError),
        ("1" * 32, LatentTypeError),
        ({i: i for i in range(32)}, LatentTypeError),
        (None, LatentTypeError),
    ):
        with pytest.raises(LatentError) as caught:
            voken.write(value)
        assert type(caught.value) is error, value


def test_combined_reads_and_writes_back() -> None:
    value = combined.parse(COMBINED)
    assert value.text == PUG
    assert [s.phrase for s in value.bbox] == ["Dog", "on a laptop", "."]
    assert value.voken[:2] == (1872, 680)
    assert combined.write(value) == COMBINED
    sections = {"text": PUG, "bbox": BBOX, "voken": FIGURE_14}
    assert combined.split(COMBINED) == sections
    assert combined.join(sections) == COMBINED
    assert list(combined.parts(value)) == ["text", "bbox", "voken"]
    assert combined.write(combined.parse(COMBINED.replace("[voken] #", "[voken] "))) == COMBINED


@pytest.mark.parametrize(
    ("string", "error", "position"),
    [
        (PUG, LatentSyntaxError, 0),
        (f"[text] {PUG}", LatentSyntaxError, 7),
        (f"[text] a [voken] {FIGURE_14}", LatentSyntaxError, 7),
        (f"[text] a [voken] {FIGURE_14} [bbox] {BBOX}", LatentSyntaxError, None),
        (f"[bbox] {BBOX} [text] a [voken] {FIGURE_14}", LatentSyntaxError, 0),
        (f"x [text] a [bbox] {BBOX} [voken] {FIGURE_14}", LatentSyntaxError, 0),
        (f"[text] a [text] b [bbox] {BBOX} [voken] {FIGURE_14}", LatentSyntaxError, 9),
        (f"[text] a [bbox] {BBOX} [bbox] {BBOX} [voken] {FIGURE_14}", LatentSyntaxError, None),
        (f"[text] a[bbox] b [bbox] {BBOX} [voken] {FIGURE_14}", LatentSyntaxError, 8),
        (f"[text] [bbox] {BBOX} [voken] {FIGURE_14}", LatentSyntaxError, 7),
        (f"[text] a [bbox] Dog (1, 2, 3) [voken] {FIGURE_14}", LatentSyntaxError, 20),
        (f"[text] a [bbox] Dog (1, 2, 1, 4) [voken] {FIGURE_14}", LatentRangeError, 20),
        (f"[text] a [bbox] {BBOX} [voken] #1#2", LatentSizeError, 79),
        (f"[text] a [bbox] {BBOX} [voken] x", LatentSyntaxError, 79),
        ("[text]  [bbox]", LatentCharacterError, 6),
        ("[text] " * 1_000_000, LatentSizeError, None),
        (None, LatentTypeError, None),
    ],
)
def test_refused_combined(string: object, error: type, position: int | None) -> None:
    with pytest.raises(LatentError) as caught:
        combined.parse(string)
    assert type(caught.value) is error
    if position is not None:
        assert caught.value.position == position
    assert "\n" not in str(caught.value)


def test_values_that_combined_cannot_write() -> None:
    whole = combined.parse(COMBINED)
    with pytest.raises(LatentSyntaxError, match="marker"):
        combined.Combined("a [voken] b", whole.bbox, whole.voken)
    with pytest.raises(LatentSyntaxError, match="marker"):
        combined.Combined("a", combined.bbox.parse("x[text] (1, 2, 3, 4)"), whole.voken)
    with pytest.raises(LatentTypeError):
        combined.Combined("a", BBOX, whole.voken)
    for wrong in (None, COMBINED, ("a", whole.bbox, whole.voken)):
        with pytest.raises(LatentTypeError):
            combined.write(wrong)
    for wrong in ({"text": PUG}, None, {"text": PUG, "bbox": BBOX, "voken": FIGURE_14, "x": "y"}):
        with pytest.raises(LatentTypeError):
            combined.join(wrong)


def test_the_table_agrees_with_the_modules() -> None:
    assert list(LATENTS) == ["text", "bbox", "blob", "voken", "combined"]
    examples = {
        "text": PUG,
        "bbox": BBOX,
        "blob": "Dog (498, 514, 480, 310, 82)",
        "voken": FIGURE_14,
        "combined": COMBINED,
    }
    for name, latent in LATENTS.items():
        assert latent.name == name
        assert latent is latent_type(name)
        value = latent.parse(examples[name])
        assert latent.write(value) == examples[name]
        assert latent.validate(value) == value
        assert len(examples[name]) <= latent.max_chars
        with pytest.raises(LatentSizeError):
            latent.parse("1" * (latent.max_chars + 1))
    with pytest.raises(LatentTypeError, match=r"'bboxes'; did you mean bbox\?"):
        latent_type("bboxes")
    with pytest.raises(LatentTypeError, match="there are text, bbox"):
        latent_type(7)


identifiers = st.lists(st.integers(0, voken.MAX_CODES - 1), min_size=32, max_size=32)


@quick
@given(identifiers)
def test_voken_round_trip(ids: list[int]) -> None:
    string = voken.write(ids)
    assert voken.parse(string) == tuple(ids) == voken.parse(string[1:])
    assert len(string) <= voken.MAX_CHARS


def check_nothing_else_escapes(data: st.DataObject) -> None:
    """For every latent: noise, and a valid string with a slice changed."""
    name = data.draw(st.sampled_from(["text", "voken", "combined"]))
    noise = st.text(st.one_of(st.characters(), st.sampled_from("#[]() 0129\udce4")), max_size=30)
    whole = data.draw(st.sampled_from([COMBINED, FIGURE_14, PUG, ""]))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 9)))
    string = whole[:start] + data.draw(noise) + whole[end:]
    latent = LATENTS[name]
    try:
        value = latent.parse(string)
    except LatentError:
        return
    assert latent.parse(latent.write(value)) == value


@quick
@given(st.data())
def test_nothing_else_escapes(data: st.DataObject) -> None:
    check_nothing_else_escapes(data)


@pytest.mark.long
@pytest.mark.timeout(1800)
@thorough
@given(st.data())
def test_nothing_else_escapes_thoroughly(data: st.DataObject) -> None:
    check_nothing_else_escapes(data)


def test_ten_million_characters_are_refused_at_once() -> None:
    begin = time.process_time()
    for unit in ("#1", "(", "((", "a (1, 2, 3, 4) ", "[text] ", " ", "\ud800", "é"):
        string = unit * (10_000_000 // len(unit))
        for latent in LATENTS.values():
            with pytest.raises(LatentSizeError):
                latent.parse(string)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "unit", ["(", ")", "((", "a (", "1, ", "#", "#1", "[text] a ", "a [bbox] "]
)
def test_the_longest_nonsense_is_refused_quickly(unit: str) -> None:
    begin = time.process_time()
    for latent in LATENTS.values():
        string = (unit * latent.max_chars)[: latent.max_chars].strip()
        if latent.name != "text":
            with pytest.raises(LatentError):
                latent.parse(string)
    assert time.process_time() - begin < 2
