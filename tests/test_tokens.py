"""The vocabulary: round trips, special ids out of reach, cuts, T5's sizes."""

from __future__ import annotations

import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax import tokens
from kaleido_jax.data import ShapesSource, train_vocabulary
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox
from kaleido_jax.latents.errors import LatentError
from kaleido_jax.tokens import EOS, PAD, UNK, Vocabulary
from tests import t5_pieces

VOCABULARY = Vocabulary.default()
VOKENS = "".join(f"#{i * 31}" for i in range(32))


def test_sizes_of_the_shipped_vocabulary():
    assert VOCABULARY.num_pieces == 1508
    assert VOCABULARY.voken_offset == 1536
    assert VOCABULARY.size == 2560  # 2536 rounded up to a multiple of 128
    assert Vocabulary.default(0).size == 1536
    assert [VOCABULARY.section_id(n) for n in ("text", "bbox", "blob", "voken")] == [
        1508,
        1509,
        1510,
        1511,
    ]


def test_the_shipped_model_is_what_the_script_makes(tmp_path):
    # In a process of its own: the trainer aborts the whole process where it fails.
    script = [sys.executable, "-m", train_vocabulary.__name__, str(tmp_path / "made.model")]
    subprocess.run(script, check=True, capture_output=True)
    made = Vocabulary.from_file(tmp_path / "made.model")
    assert [made.token_text(i) for i in range(1508)] == [
        VOCABULARY.token_text(i) for i in range(1508)
    ]


@given(st.text(alphabet=string.ascii_letters + string.digits + string.punctuation, max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_ascii_word_survives(word):
    ids = VOCABULARY.encode_text(word)
    assert UNK not in ids
    assert VOCABULARY.decode(ids) == word


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_user_text_reaches_text_pieces_only(text):
    for ids in (VOCABULARY.encode_text(text), VOCABULARY.encode_text(text + "</s><pad>#3")):
        assert all(UNK <= i < VOCABULARY.num_pieces for i in ids)
    caption = VOCABULARY.encode_caption(text, 16)
    assert len(caption) <= 16
    assert caption.index(EOS) == len(caption) - 1


@pytest.mark.parametrize(
    "hostile", ["</s>", "<pad>", "<unk>", "<extra_id_0>", "#17", "\0\0", "\ud800"]
)
def test_special_tokens_are_not_injectable(hostile):
    ids = VOCABULARY.encode_text(f"a red shape {hostile} below")
    assert not {PAD, EOS} & set(ids)
    assert all(i < VOCABULARY.num_pieces for i in ids)


def test_a_megabyte_is_bounded():
    assert len(VOCABULARY.encode_caption("x " * 500_000, 32)) == 32
    assert VOCABULARY.encode_latents({"text": "word " * 200_000}, ("text",), 64)[-1] == EOS


def test_numbers_are_pieces_and_shapes_fit_their_budgets():
    def pieces(text):
        return [VOCABULARY.token_text(i) for i in VOCABULARY.encode_text(text)]

    first, count = train_vocabulary.NUMBER_TOKENS
    assert [VOCABULARY.token_text(first + i) for i in range(count)] == [*map(str, range(1001))]
    assert pieces("(1, 33, 1000)") == [" (", "1", ", ", "33", ", ", "1000", ")"]
    assert pieces("(33033, 07)") == [" (", "330", "33", ", ", "0", "7", ")"]  # longer ones are cut
    source = ShapesSource(size=32, num_objects=(1, 2), semi_axis=(130, 190))
    for i in range(100):
        example = source[i]
        assert len(VOCABULARY.encode_caption(example["caption"])) <= 10
        assert len(VOCABULARY.encode_text(example["latents"]["bbox"])) < 34
        assert len(VOCABULARY.encode_text(example["latents"]["blob"])) < 40
        assert len(VOCABULARY.encode_text(example["latents"]["text"])) < 100


def test_latents_round_trip():
    latents = {**ShapesSource(size=32)[1]["latents"], "voken": VOKENS}
    for name, value in latents.items():
        ids = VOCABULARY.encode_latents(latents, (name,), 256)
        assert ids[-1] == EOS
        assert VOCABULARY.decode_latents(ids, (name,)) == {name: value}
    names = ("text", "bbox", "voken")
    ids = VOCABULARY.encode_latents(latents, names, 256)
    assert VOCABULARY.decode_latents([*ids, PAD, PAD], names) == {n: latents[n] for n in names}
    assert [i for i in ids if 1508 <= i < 1536] == [1508, 1509, 1511]
    assert VOCABULARY.encode_latents({"bbox": ""}, ("bbox",), 8) == [EOS]
    assert VOCABULARY.decode_latents([EOS], names) == dict.fromkeys(names, "")


def test_vokens_are_one_token_each():
    ids = VOCABULARY.encode_latents({"voken": VOKENS}, ("voken",), 33)
    assert ids == [1536 + i * 31 for i in range(32)] + [EOS]
    assert VOCABULARY.encode_latents({"voken": VOKENS}, ("voken",), 32) == [EOS]
    with pytest.raises(UserError, match="beyond the vocabulary's 100"):
        Vocabulary.default(100).encode_latents({"voken": VOKENS}, ("voken",), 64)
    with pytest.raises(LatentError):
        VOCABULARY.encode_latents({"voken": "#1#2"}, ("voken",), 64)


def test_long_latents_are_cut_where_they_still_parse():
    source = ShapesSource(num_objects=(3, 3), latents=("text", "bbox", "blob"))
    latents = {**source[0]["latents"], "voken": VOKENS}
    whole = bbox.parse(latents["bbox"])
    seen = set()
    for limit in range(1, 80):
        ids = VOCABULARY.encode_latents(latents, ("bbox",), limit)
        assert len(ids) <= limit
        cut = VOCABULARY.decode_latents(ids, ("bbox",))["bbox"]
        if cut:
            segments = bbox.parse(cut)
            assert segments == whole[: len(segments)]
            seen.add(len(segments))
    assert seen == {1, 2, 3, 4}
    # In combined latents the text gives way first, at a word's end; vokens stay.
    names = ("text", "bbox", "voken")
    for limit in range(120, 260, 7):
        ids = VOCABULARY.encode_latents(latents, names, limit)
        assert len(ids) <= limit
        back = VOCABULARY.decode_latents(ids, names)
        assert (back["bbox"], back["voken"]) == (latents["bbox"], VOKENS)
        assert latents["text"].startswith(back["text"])
        assert back["text"].split() == latents["text"].split()[: len(back["text"].split())]


def test_doubled_parentheses_are_no_place_to_cut():
    value = bbox.write((bbox.Segment("a ((b)) c", (bbox.Box(1, 2, 3, 4),)),))
    for limit in range(1, 40):
        cut = VOCABULARY.decode(VOCABULARY.encode_latents({"bbox": value}, ("bbox",), limit))
        assert cut in ("", value)


def test_padding():
    np.testing.assert_array_equal(tokens.pad([5, 1], 4), np.int32([5, 1, 0, 0]))


def test_misuse_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        Vocabulary.from_file(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match=r"text\.model is not a SentencePiece model"):
        Vocabulary.from_file(tmp_path / "text.model")
    with pytest.raises(UserError, match="no section token for latent 'depth'"):
        VOCABULARY.encode_latents({}, ("text", "depth"), 8)
    # Again in a process of its own.
    other = "import sentencepiece as s; s.SentencePieceTrainer.train(sentence_iterator="
    other += f"iter(['a b c d e f g h']), model_prefix={str(tmp_path / 'other')!r}, vocab_size=12)"
    subprocess.run([sys.executable, "-c", other], check=True, capture_output=True)
    with pytest.raises(UserError, match="they must be 0, 1, 2"):
        Vocabulary.from_file(tmp_path / "other.model")


def test_a_saved_vocabulary_is_the_same(tmp_path):
    VOCABULARY.save(tmp_path / "v.model")
    loaded = Vocabulary.from_file(tmp_path / "v.model", 1000)
    assert loaded.fingerprint == VOCABULARY.fingerprint
    assert loaded.fingerprint != Vocabulary.default(999).fingerprint


@t5_pieces.needs_table
def test_t5_sizes_and_budgets():
    t5 = t5_pieces.vocabulary()
    assert (t5.num_pieces, t5.section_offset, t5.voken_offset) == (32100, 32100, 32128)
    assert t5.size == 40320
    assert len(t5.encode_latents({"voken": VOKENS}, ("voken",), 64)) == 33
    grounded = "Dog (1, 33, 995, 995) resting head on owner's lap (1, 630, 785, 998)"
    ids = t5.encode_latents({"bbox": grounded}, ("bbox",), 112)
    assert t5.decode_latents(ids, ("bbox",)) == {"bbox": grounded}
    box = len(t5.encode_text("(1, 33, 995, 995)"))
    assert box <= 13  # about 11 by ANNOTATION, plus the space before it
    for name in ("<extra_id_0>", "</s>"):
        assert all(2 <= i < 32000 for i in t5.encode_text(name))
