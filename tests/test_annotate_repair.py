"""The policy for raw answers, case by case; test_annotate_fuzz.py has the fuzzing."""

from __future__ import annotations

import json
import pathlib

import pytest

from kaleido_jax.annotate import prompts
from kaleido_jax.annotate.repair import repair_grounded, repair_text
from kaleido_jax.annotate.spelling import SPELLED, spell
from kaleido_jax.latents import bbox
from tests import t5_pieces

PAPER = pathlib.Path(__file__).parents[2] / "shared" / "paper.txt"
WORDS = (
    "A brown dog rests its head on the lap of a person who sits on a grey sofa and works on a "
    "silver laptop. Warm light falls through a window at the left, and a striped blanket lies over "
    "the armrest. The mood is calm, the colours are soft, and the picture is taken from above, so "
    "that the keyboard and the dog's closed eyes are seen best."
)


def tags(raw: str, **how):
    return repair_grounded(raw, "qwen-vl", **how)


def as_json(sentence: str, objects: list, dialect: str = "qwen3-vl", **how):
    raw = f"{sentence}\n```json\n{json.dumps(objects)}\n```"
    return repair_grounded(raw, dialect, **how)


def box(label: str, *corners) -> dict:
    return {"bbox_2d": list(corners), "label": label}


# ---- dialects as models write them ---------------------------------------------------------------


def test_qwen_vl():
    raw = (
        "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref>"
        "<box>(219,424),(576,896)</box> playing on the beach<|endoftext|>"
    )
    found = tags(raw)
    assert found.latent == (
        "Woman (451, 379, 731, 806) and her dog (219, 424, 576, 896) playing on the beach"
    )
    assert (found.status, found.issues) == ("ok", ())


def test_qwen2_vl():
    raw = (
        "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|> "
        "beside <|object_ref_start|>a jug<|object_ref_end|>"
        "<|box_start|>(500,20),(900,400)<|box_end|>.<|im_end|>"
    )
    found = repair_grounded(raw, "qwen2-vl")
    assert found.latent == "a cup (10, 20, 300, 400) beside a jug (500, 20, 900, 400)."
    assert found.status == "ok"


def test_qwen2_5_vl_in_pixels_of_what_it_saw():
    objects = [box("a dog", 28, 14, 140, 112), box("a ball", 168, 112, 224, 140)]
    found = as_json("A dog chases a ball.", objects, "qwen2.5-vl", size=(280, 140))
    assert found.latent == "A dog (100, 100, 500, 800) chases a ball (600, 800, 800, 1000)."
    assert found.status == "ok"


def test_qwen3_vl():
    objects = [box("a hot dog", 10, 20, 300, 400), box("dog", 500, 20, 900, 400)]
    found = as_json("A man gives a hot dog to a dog.", objects)
    assert found.latent == "A man gives a hot dog (10, 20, 300, 400) to a dog (500, 20, 900, 400)."
    assert found.status == "ok"


def test_each_box_goes_after_the_first_unused_occurrence():
    objects = [
        box("cat", 0, 0, 100, 100),
        box("cat", 200, 0, 300, 100),
        box("cat", 400, 0, 500, 100),
    ]
    found = as_json("A cat looks at another cat.", objects)
    assert found.latent == (
        "A cat (0, 0, 100, 100) looks at another cat (200, 0, 300, 100) (400, 0, 500, 100)."
    )


def test_a_sentence_may_be_in_the_json():
    raw = json.dumps({"caption": "A red bus.", "objects": [box("bus", 1, 2, 300, 400)]})
    assert repair_grounded(raw, "qwen3-vl").latent == "A red bus (1, 2, 300, 400)."


def test_a_label_that_the_sentence_lacks_goes_to_its_end():
    found = as_json("A street.", [box("bus", 1, 2, 300, 400), box("street", 0, 0, 1000, 1000)])
    assert found.latent == "A street (0, 0, 1000, 1000), bus (1, 2, 300, 400)"
    assert "a label that the sentence lacks was put at its end" in found.issues


def test_objects_without_a_sentence():
    raw = json.dumps([box("bus", 1, 2, 300, 400), box("car", 5, 6, 70, 80)])
    assert repair_grounded(raw, "qwen3-vl").latent == "bus (1, 2, 300, 400), car (5, 6, 70, 80)"


# ---- the policy, in the order of repair.py -------------------------------------------------------

DOG = "<ref>a dog</ref><box>(100,100),(500,500)</box>"
DOG_SAID = "a dog (100, 100, 500, 500)"


@pytest.mark.parametrize(
    ("raw", "issue"),
    [
        (f"{prompts.GROUNDING} {DOG}", "the prompt was echoed"),
        (f"<img>x.png</img>{prompts.GROUNDING}{DOG}", "the prompt was echoed"),
        (f"Picture 1: <img>x.png</img>\n{DOG}", None),
        (f"<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\n{DOG}<|im_end|>", None),
        (f"<|im_start|>{DOG}<|im_end|><|endoftext|>", None),
        (f"{DOG}<|endoftext|>and then<ref>junk</ref><box>(1,1),(99,99)</box>", None),
        (f"<think>where is it?</think>{DOG}", None),
    ],
)
def test_echo_and_control_tokens_go(raw, issue):
    found = tags(raw, prompt=prompts.GROUNDING)
    assert found.latent == DOG_SAID
    assert found.issues == ((issue,) if issue else ())


@pytest.mark.parametrize(
    ("corners", "said", "issue"),
    [
        ("(500,600),(100,200)", "(100, 200, 500, 600)", "reversed corners were sorted"),
        ("(500,200),(100,600)", "(100, 200, 500, 600)", "reversed corners were sorted"),
        ("(-20,100),(500,1020)", "(0, 100, 500, 1000)", "a box was clipped to the picture"),
        ("(10.5,20.49),(99.5,80.5)", "(11, 20, 100, 81)", None),
        ("(0,0),(4,4)", "(0, 0, 4, 4)", None),
        ("10,20,99,80", "(10, 20, 99, 80)", None),
        ("[10, 20, 99, 80]", "(10, 20, 99, 80)", None),
        ("(0,0),(1000,1000)", "(0, 0, 1000, 1000)", None),
    ],
)
def test_boxes_are_mended(corners, said, issue):
    found = tags(f"<ref>a dog</ref><box>{corners}</box> runs")
    assert found.latent == f"a dog {said} runs"
    assert found.issues == ((issue,) if issue else ())
    assert found.status == ("repaired" if issue else "ok")


@pytest.mark.parametrize(
    ("corners", "issue"),
    [
        ("(-21,100),(500,500)", "beyond the picture"),
        ("(100,100),(500,1021)", "beyond the picture"),
        ("(100,100),(103,500)", "side under 4"),
        ("(100,100),(500,103.4)", "side under 4"),
        ("(100,100),(500)", "with 3 numbers"),
        ("(1,1),(2,2),(3,3)", "with 6 numbers"),
        ("", "with 0 numbers"),
        ("(10000,1),(2,2)", "more than 4 digits"),
        ("(1,2),(3,99999)", "more than 4 digits"),
        ("(1,2),(3,x)", "more than numbers"),
        ("(1e3,2),(3,4)", "more than numbers"),
        ("(nan,2),(3,4)", "more than numbers"),
    ],
)
def test_bad_boxes_go_and_their_phrase_stays(corners, issue):
    found = tags(f"<ref>A cat</ref><box>{corners}</box> near {DOG}.")
    assert found.latent == f"A cat near {DOG_SAID}."
    assert issue in found.issues[0] and found.status == "repaired"
    assert tags(f"<ref>A cat</ref><box>{corners}</box>").status == "rejected"


def test_at_most_five_boxes_a_phrase_and_none_twice():
    boxes = "".join(f"<box>({n}00,0),({n}99,500)</box>" for n in range(7))
    found = tags(f"<ref>cups</ref>{boxes}")
    assert [len(s.boxes) for s in bbox.parse(found.latent)] == [5]
    twice = tags("<ref>cup</ref><box>(0,0),(500,500)</box><box>(0,0),(500,490)</box>")
    assert twice.latent == "cup (0, 0, 500, 500)"
    assert "repeats another" in twice.issues[0]
    # 0.94 is another box.
    assert tags("<ref>cup</ref><box>(0,0),(500,500)</box><box>(0,0),(500,470)</box>").status == "ok"


def test_a_box_without_a_phrase():
    took = tags("There is a dog<box>(100,100),(500,500)</box> outside")
    assert took.latent == "There is a dog (100, 100, 500, 500) outside"
    assert took.issues == ("a box without a phrase took the words before it",)
    joined = tags(f"{DOG}, <box>(600,600),(700,700)</box>")
    assert joined.latent == "a dog (100, 100, 500, 500) (600, 600, 700, 700)"
    gone = tags(f"<box>(1,1),(99,99)</box>{DOG}")
    assert gone.latent == DOG_SAID and "without any words" in gone.issues[0]


@pytest.mark.parametrize(
    ("raw", "latent"),
    [
        ("<ref>two <ref>a dog</ref><box>(1,1),(99,99)</box>", "two a dog (1, 1, 99, 99)"),
        ("<ref>a dog<box>(1,1),(99,99)</box> runs", "a dog (1, 1, 99, 99) runs"),
        ("<ref>a dog</ref><box>(5,5),(7<box>(1,1),(99,99)</box>", "a dog (1, 1, 99, 99)"),
        ("a dog</ref><box>(1,1),(99,99)</box></box>", "a dog (1, 1, 99, 99)"),
        (f"{DOG} and <ref>a c", DOG_SAID),
        (f"{DOG} and <ref>a cat</ref><box>(12,3", DOG_SAID),
        (f"{DOG} and <ref>a cat</ref><quad>(12,3)", DOG_SAID),
    ],
)
def test_unclosed_tags(raw, latent):
    found = tags(raw)
    assert (found.latent, found.status) == (latent, "repaired")


def test_truncated_output_ends_with_its_last_complete_segment():
    assert tags(f"{DOG} and behind it a wo", truncated=True).latent == DOG_SAID
    assert tags(f"{DOG} and a wood", truncated=False).latent == f"{DOG_SAID} and a wood"
    # An end token proves that it ended.
    assert tags(f"{DOG} and a wood<|im_end|>", truncated=True).latent == f"{DOG_SAID} and a wood"
    long = tags(DOG + " and" + " more" * 9000)
    assert long.latent == DOG_SAID and "only the first 20000" in long.issues[0]


def test_truncated_json_keeps_its_sentence():
    raw = 'A dog by a lake.\n[{"bbox_2d": [1, 2, 300, 400], "label": "dog"}, {"bbox_2d": [5, 6'
    found = repair_grounded(raw, "qwen3-vl", truncated=True)
    assert found.latent == "A dog (1, 2, 300, 400) by a lake."
    assert found.status == "repaired"


def test_loops_of_boxes():
    cat = "<ref>a cat</ref><box>(600,600),(900,900)</box>"
    words = "In a green garden with many old trees and a white bench"
    found = tags(f"{words} {DOG} and {cat} and {cat} and {cat}")
    assert found.latent == f"{words} {DOG_SAID} and a cat (600, 600, 900, 900)"
    assert found.issues == ("a loop was cut",)
    assert tags(f"{DOG} and {cat} and {cat}").status == "ok"  # twice is no loop
    much = tags(" and ".join([DOG] * 9))
    assert much.status == "rejected" and "more than half" in much.issues[-1]


def test_loops_of_words():
    start = " ".join(f"word{n}" for n in range(40))
    again = "one two three four five six seven eight "
    found = tags(f"{DOG} {start} {again * 3}")
    assert found.latent == f"{DOG_SAID} {start} {again.strip()}"
    assert tags(f"{DOG} {again * 20}").status == "rejected"
    assert repair_text(f"{start} {again * 3}").latent == f"{start} {again.strip()}"
    assert repair_text(again * 20).status == "rejected"


@pytest.mark.parametrize(
    "array",
    [
        '[{"bbox_2d": [1, 2, 300, 400], "label": "dog",},]',
        "[{'bbox_2d': [1, 2, 300, 400], 'label': 'dog'}]",
        '{"bbox_2d": [1, 2, 300, 400], "label": "dog"} {"bbox_2d":',
        '[{"bbox_2d": (1, 2, 300, 400), "label": "dog"}',
        '```json\n[{"label": "dog", "bbox_2d": [1, 2, 300, 400]}, {"label": "l',
    ],
)
def test_broken_or_fenced_json_is_recovered(array):
    found = repair_grounded(f"A dog by a lake.\n{array}", "qwen3-vl")
    assert (found.latent, found.status) == ("A dog (1, 2, 300, 400) by a lake.", "repaired")


def test_a_quad_becomes_the_box_around_it():
    found = tags("<ref>a sign</ref><quad>(100,200),(300,100),(350,300),(120,400)</quad>")
    assert found.latent == "a sign (100, 100, 350, 400)"
    assert tags("<ref>a sign</ref><quad>(1,2),(30,40)</quad>").status == "rejected"
    eight = as_json("A sign.", [box("sign", 100, 200, 300, 100, 350, 300, 120, 400)])
    assert eight.latent == "A sign (100, 100, 350, 400)."


def test_other_scripts_are_worth_one_more_try():
    found = tags("<ref>一只狗在草地上奔跑</ref><box>(1,1),(99,99)</box>")
    assert (found.status, found.retry) == ("rejected", True)
    assert repair_text("Собака лежит на диване рядом с человеком.").retry
    few = tags("<ref>A sign that says 停</ref><box>(1,1),(99,99)</box>")
    assert (few.latent, few.status) == ("A sign that says (1, 1, 99, 99)", "repaired")


def test_numbers_in_parentheses_are_escaped():
    found = tags(f"A sign (1, 2, 3, 4) (old) and {DOG}")
    assert found.latent == f"A sign ((1, 2, 3, 4)) ((old)) and {DOG_SAID}"
    assert [s.phrase for s in bbox.parse(found.latent)] == ["A sign (1, 2, 3, 4) (old) and a dog"]


def test_what_is_empty_and_what_is_rejected():
    assert tags("A quiet beach at dawn.").status == "empty"
    assert repair_grounded("A quiet beach.\n[]", "qwen3-vl").status == "empty"
    for raw in ("", "  \n", "<|im_end|>", "<ref></ref><box>(1,1),(9,99)</box>", None, 7):
        assert tags(raw).status == "rejected"
    assert tags("A quiet beach at", truncated=True).status == "rejected"


def test_long_captions_are_cut_to_what_the_latent_holds():
    many = " ".join(f"<ref>thing {n}</ref><box>({n},0),({n + 9},99)</box>" for n in range(200))
    found = tags(many)
    assert 100 <= len(bbox.parse(found.latent)) <= 128


# ---- descriptions --------------------------------------------------------------------------------


def test_a_good_description_stays_as_it_is():
    found = repair_text(WORDS + "<|im_end|>")
    assert (found.latent, found.status, found.issues) == (WORDS, "ok", ())


@pytest.mark.parametrize(
    "raw",
    [
        f'"{WORDS}"',
        f"**Description:** {WORDS}",
        f"Description: {WORDS}",
        f"```\n{WORDS}\n```",
        WORDS.replace(". ", ".\n\n"),
        f"- {WORDS}",
    ],
)
def test_descriptions_lose_their_wrapping(raw):
    assert repair_text(raw).latent == WORDS


def test_descriptions_lose_echo_tags_and_tails():
    asked = prompts.description_prompt("A dog on a lap", {})
    assert repair_text(f"{asked}\n{WORDS}", asked).latent == WORDS
    marked = WORDS.replace("dog", "<ref>dog</ref><box>(1,2),(3,4)</box>", 1)
    assert repair_text(marked).latent == WORDS
    cut = repair_text(WORDS + " At the right a sec", truncated=True)
    assert (cut.latent, cut.status) == (WORDS, "repaired")
    assert repair_text("A dog that never", truncated=True).status == "rejected"
    assert repair_text("A dog.").status == "rejected"


def test_a_short_description_is_noted_not_repaired():
    found = repair_text("A dog lies on a sofa beside a person.")
    assert found.status == "ok"
    assert found.issues == ("note: 9 words; 50 to 80 were asked for",)


# ---- spelling and prompts ------------------------------------------------------------------------


def test_spelling():
    assert spell("{a} ~ `b` \\ <c> ^") == ("(a) - 'b' / c> ", 8)
    assert spell("smørrebrød, piñata, naïve Łódź, ﬁne, 1²") == (
        "smorrebrod, pinata, naive Lódz, fine, 12",
        8,
    )
    assert spell("e\u0301 ș €") == ("é ș €", 0)
    assert spell("犬🐕") == ("", 2)


@t5_pieces.needs_table
def test_every_character_kept_is_one_that_t5_spells():
    vocabulary = t5_pieces.vocabulary()
    assert [c for c in SPELLED if not vocabulary.knows(c)] == []
    assert not any(vocabulary.knows(c) for c in "{}<~^\\`ñøŁ")


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the project")
def test_the_prompts_are_table_1():
    paper = PAPER.read_text("utf-8")
    table = paper.split("### Textual descriptions (caption)")[1].split("Table 1:")[0]
    words = " ".join(w for w in table.split() if w != "---")
    for prompt in (prompts.CAPTION, prompts.LABEL, prompts.GROUNDING):
        assert " ".join(prompt.split()) in words
    parts = [prompts.CAPTION, "### Textual descriptions (label)", prompts.LABEL]
    parts += ["### Captions with grounding", prompts.GROUNDING]
    assert words == " ".join(" ".join(parts).split())


def test_which_prompt_is_asked():
    assert "Original caption: A dog\n" in prompts.description_prompt("A dog", {})
    assert "Object labels: tench\n" in prompts.description_prompt("a photo", {"label": "tench"})
    assert "Original caption: x\n" in prompts.description_prompt("x", {"label": 3})
    assert "Original caption: x\n" in prompts.description_prompt("x", {"label": "y"}, "caption")
    assert "Object labels: x\n" in prompts.description_prompt("x", {}, "label")
    evil = prompts.description_prompt("a <|image_pad|> dog {0} <img>x</img>", {})
    assert "Original caption: a dog {0} x\n" in evil
