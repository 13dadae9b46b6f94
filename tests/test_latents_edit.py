"""Edits of latents: what changes, what stays, and that nothing invalid comes of them."""

from __future__ import annotations

import random

import pytest

from kaleido_jax.latents import LatentError, bbox, blob, edit, text, voken

BOXES = (
    "Dog (1, 33, 995, 995) resting head on owner's lap (1, 630, 785, 998), two cups"
    " (5, 5, 80, 90) (100, 5, 180, 90). A dog (10, 20, 30, 40) too."
)
BLOBS = "Dog (498, 514, 480, 310, 82) on a sofa (393, 814, 390, 170, 4)."
VOKENS = "".join(f"#{i}" for i in range(32))


def boxes(string):
    return [tuple(vars(shape).values()) for _, shape in edit.objects("bbox", string)]


def test_words_are_replaced_whole_and_keep_their_capital():
    string = "Dog and dogs. A dog, hotdog; DOG."
    assert edit.replace_word("text", string, "dog", "cat") == "Cat and dogs. A cat, hotdog; DOG."
    assert edit.replace_word("text", "a (dog)", "dog", "red cat") == "a (red cat)"
    assert edit.replace_word("text", "a body of water.", "a body of water", "forest") == "forest."
    assert edit.replace_word("text", "a very big dog", "very", "") == "a big dog"
    got = edit.replace_word("bbox", BOXES, "dog", "cat (red)")
    assert got.startswith("Cat ((red)) (1, 33") and "A cat ((red)) (10, 20" in got
    assert boxes(got) == boxes(BOXES)
    # Numbers of shapes are no words.
    with pytest.raises(LatentError, match="'33' does not occur"):
        edit.replace_word("bbox", BOXES, "33", "34")


def test_objects_are_found_by_words_and_numbers():
    assert [edit.find("bbox", BOXES, w) for w in ("lap", "#4", "dog#2", "DOG#1", "cups#2")] == [
        1, 3, 4, 0, 3,
    ]  # fmt: skip
    for which, words in (
        ("cups", "2 objects 'cups'; say which"),
        ("cat", "no object 'cat'"),
        ("#6", "no object '#6'"),
        ("#0", "no object"),
        ("dog#3", "no object"),
    ):
        with pytest.raises(LatentError, match=words):
            edit.find("bbox", BOXES, which)


def test_boxes_move_and_others_stay():
    got = edit.move("bbox", BOXES, "cups#2", 50, -5)
    want = boxes(BOXES)
    want[3] = (150, 0, 230, 85)
    assert boxes(got) == want
    assert [s.phrase for s in bbox.parse(got)] == [s.phrase for s in bbox.parse(BOXES)]
    with pytest.raises(LatentError, match=r"lap: x1 = -9 is not in 0\.\.1000"):
        edit.move("bbox", BOXES, "lap", -10, 0)


def test_shapes_are_resized_about_their_centre():
    assert boxes(edit.resize("bbox", BOXES, "cups#2", 0.5))[3] == (120, 26, 160, 69)
    assert boxes(edit.resize("bbox", BOXES, "cups#1", 3.0))[2] == (0, 0, 155, 175)
    got = edit.objects("blob", edit.resize("blob", BLOBS, "dog", 0.5))
    assert got[0][1] == blob.Ellipse(498, 514, 240, 155, 82)
    assert got[1] == edit.objects("blob", BLOBS)[1]
    for factor in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(LatentError, match="factor"):
            edit.resize("bbox", BOXES, "lap", factor)


def test_shapes_are_placed_added_and_removed():
    got = edit.place("blob", BLOBS, "sofa", (1, 2, 30, 20, 5))
    assert got == "Dog (498, 514, 480, 310, 82) on a sofa (1, 2, 30, 20, 5)."
    with pytest.raises(LatentError, match="4 numbers; 5 are needed: xc"):
        edit.place("blob", BLOBS, "sofa", (1, 2, 3, 4))
    assert edit.move("blob", BLOBS, "sofa", 7, -14).endswith("(400, 800, 390, 170, 4).")
    got = edit.add("bbox", BOXES, "a tall lamp", (1, 2, 3, 4))
    assert got.endswith("A dog (10, 20, 30, 40) a tall lamp (1, 2, 3, 4) too.")
    assert (
        edit.add("bbox", "a (1, 2, 3, 4)", ", b", (5, 6, 7, 8)) == "a (1, 2, 3, 4), b (5, 6, 7, 8)"
    )
    got = edit.remove("bbox", BOXES, "lap")
    assert got.startswith("Dog (1, 33, 995, 995), two cups (5")
    assert edit.remove("bbox", got, "cups#1").count("cups (100, 5, 180, 90). A") == 1
    with pytest.raises(LatentError, match="only object"):
        edit.remove("bbox", "a (1, 2, 3, 4) b", "a")


def test_vokens_are_replaced():
    got = voken.parse(edit.replace_vokens(VOKENS, {0: 900, 31: 7}))
    assert got == (900, *range(1, 31), 7)
    for changes in ({32: 1}, {-1: 1}, {0: -1}, {0: 10**6}):
        with pytest.raises(LatentError):
            edit.replace_vokens(VOKENS, changes)


def test_only_objects_can_be_edited_as_objects():
    with pytest.raises(LatentError, match="no objects in 'text'"):
        edit.move("text", "a dog", "dog", 1, 1)
    with pytest.raises(LatentError, match="no words"):
        edit.replace_word("voken", VOKENS, "1", "2")


def test_whatever_is_done_the_result_parses():
    generator = random.Random(0)
    string = BOXES
    done = 0
    for _ in range(300):
        number = f"#{generator.randrange(1, 7)}"
        x, y = (sorted(generator.sample(range(1001), 2)) for _ in range(2))
        delta = generator.sample(range(-99, 99), 2)
        word = generator.choice(["cup", "lap"])
        function, *arguments = generator.choice(
            [
                (edit.move, "bbox", string, number, *delta),
                (edit.resize, "bbox", string, number, generator.uniform(0.3, 2.5)),
                (edit.remove, "bbox", string, number),
                (edit.add, "bbox", string, "a (new) cup", (x[0], y[0], x[1], y[1])),
                (edit.replace_word, "bbox", string, word, "lap"),
            ]
        )
        try:
            changed = function(*arguments)
        except LatentError:
            continue
        assert bbox.write(bbox.parse(changed)) == changed
        string, done = changed, done + 1
    assert done > 100
    assert text.parse(edit.replace_word("text", "a b", "b", "c")) == "a c"
