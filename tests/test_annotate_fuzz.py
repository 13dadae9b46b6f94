"""Raw answers that no one foresaw: no exception, and a strict latent or none."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax.annotate import prompts
from kaleido_jax.annotate.dialects import DIALECTS
from kaleido_jax.annotate.repair import repair_grounded, repair_text
from kaleido_jax.annotate.spelling import SPELLED
from kaleido_jax.latents import bbox, text

TAGGED = (
    "In a garden <ref>a dog</ref><box>(100,100),(500,500)</box> plays with <ref>a ball</ref>"
    "<box>(1,2),(300,400)</box> while the sun sets behind the hills.<|im_end|>"
)
LISTED = (
    "A dog and a ball.\n```json\n"
    '[{"bbox_2d": [10, 20, 300, 400], "label": "a dog"}, '
    '{"bbox_2d": [500, 20, 900, 400], "label": "ball"}]\n```'
)

_PIECES = [
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<|box_start|>", "<|box_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|im_end|>", "<|im_start|>assistant\n",
    "(1,2),(300,400)", "(900,-15),(2,1010)", "(1,2)", "1e9", "12345", "(", ")", "((", "{", "}", "[",
    "]", '"bbox_2d":', "[1, 2, 300, 400]", '"label": "dog"', '"label":', ",", ":", "```json", "'",
    '{"bbox_2d": [1, 2, 300, 400], "label": "dog"}', '{"caption": "a dog", "objects": [', "a dog",
    "and", " ", "\n", "\t", "dog", "the dog runs after a red ball over the lawn ", ".", "!", "’s",
    "犬", "é", "\u200b", "\x00", "\ud800", "🐕", "<", ">", "|", "\\", prompts.GROUNDING, "<think>",
    "</think>", "<img>", "</img>", "Infinity", "null", "-", "0.5", "...", "“", "”", "1.", "**",
]  # fmt: skip


def check(raw: str, truncated: bool) -> None:
    """No exception, and a strict latent or none."""
    for dialect in DIALECTS:
        found = repair_grounded(raw, dialect, (280, 140), prompts.GROUNDING, truncated)
        assert bool(found.latent) == (found.status in ("ok", "repaired"))
        assert found.status in ("ok", "repaired", "empty", "rejected")
        if found.latent:
            parsed = bbox.parse(found.latent)
            assert bbox.write(parsed) == found.latent
            assert all(len(s.boxes) <= 5 for s in parsed) and set(found.latent) <= SPELLED
            assert all(min(b.x2 - b.x1, b.y2 - b.y1) >= 4 for s in parsed for b in s.boxes)
    found = repair_text(raw, prompts.GROUNDING, truncated)
    if found.latent:
        assert text.parse(found.latent) == found.latent and set(found.latent) <= SPELLED


fuzzed = given(
    raw=st.one_of(
        st.lists(st.sampled_from(_PIECES), max_size=40).map("".join),
        st.lists(st.sampled_from(_PIECES) | st.text(max_size=8), max_size=25).map(" ".join),
        st.text(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["dog", "a"]),
            lambda inner: (
                st.lists(inner, max_size=5)
                | st.dictionaries(
                    st.sampled_from(["bbox_2d", "label", "caption", "objects", "x"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: "A dog runs. " + json.dumps(value)),
    ),
    truncated=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@fuzzed
def test_fuzzed_answers(raw, truncated):
    check(raw, truncated)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@fuzzed
def test_ten_thousand_fuzzed_answers(raw, truncated):
    check(raw, truncated)


@pytest.mark.parametrize("number", range(40))
def test_damaged_answers(number):
    """Good answers with characters lost, doubled or moved."""
    draw = random.Random(number)
    good = draw.choice([TAGGED, LISTED])
    for _ in range(10):
        raw = list(good)
        for _ in range(draw.randint(1, 12)):
            place = draw.randrange(len(raw))
            raw[place : place + draw.randint(0, 3)] = draw.choice([[], raw[place : place + 9]])
            raw = raw or list(good)
        check("".join(raw), draw.random() < 0.5)


@pytest.mark.parametrize("piece", ["{", '{"a":', "[", "<ref>", "<box>", "(", '{"bbox_2d":[', "a "])
def test_long_answers_take_no_long_time(piece):
    check(piece * 100_000, True)
