"""Constrained decoding: whatever the decoder would like to write, every latent parses in time."""

from __future__ import annotations

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import decode, grammar, rng, tokens
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.grammar import compiler, numbers, sections
from kaleido_jax.latents import bbox, blob, combined, latent_type
from kaleido_jax.tokens import EOS, Vocabulary
from tests import t5_pieces
from tests.test_token_budgets import random_blob, random_box

COMBINED = ("text", "bbox", "voken")
KINDS = [("text",), ("bbox",), ("blob",), ("voken",), COMBINED]
VOCABULARY = Vocabulary.default(64)


@functools.cache
def tables(names, which="shipped"):
    vocabulary = VOCABULARY if which == "shipped" else t5_pieces.vocabulary(64)
    return vocabulary, grammar.compile_tables(vocabulary, names, vocabulary.size)


def liking(vocabulary, kind):
    """Logits of a decoder that likes everything alike, or the grammars' own characters."""
    bias = np.zeros(vocabulary.size, np.float32)
    if kind == "structure":
        for token in range(vocabulary.num_pieces):
            text = vocabulary.token_text(token)
            if text and set(text) <= set("0123456789(), #.;[]"):
                bias[token] = 6.0
        bias[EOS] = -20.0
    return bias


def draw(vocabulary, laid, lengths, bias, count, seed=0):
    """`count` sequences from random logits, each of one of the lengths at most."""
    length = max(lengths)
    limit = jnp.asarray(np.resize(lengths, count))
    plan = decode.whole(count, length, len(laid.starts))._replace(limit=limit)

    def step(cache, token):
        key = jax.random.fold_in(jax.random.key(seed), cache)
        return jnp.asarray(bias) + jax.random.normal(key, (count, vocabulary.size)), cache + 1

    keys = rng.per_sample(rng.stream(seed, "decode"), jnp.arange(count))
    run = jax.jit(
        lambda laid: decode.sample_tokens(
            step, jnp.int32(0), keys, length, grammar=laid, plan=plan
        )[0]
    )
    ids = np.asarray(run(laid))
    assert ((ids > 0).sum(1) <= limit).all()
    return ids


def check(vocabulary, names, ids):
    """Every sequence ends, holds every latent, and each parses."""
    for row in ids:
        assert EOS in row and not row[np.argmax(row == EOS) + 1 :].any()
        latents = vocabulary.decode_latents(row, names)
        assert list(latents) == list(names)
        for name, string in latents.items():
            latent_type(name).parse(string)
        if names == COMBINED:
            combined.parse(combined.join(latents))
        # The vocabulary can spell it again.
        again = vocabulary.encode_latents(latents, names, 10_000)
        assert vocabulary.decode_latents(again, names) == latents


@pytest.mark.parametrize("names", KINDS, ids="+".join)
@pytest.mark.parametrize("kind", ["flat", "structure"])
def test_every_latent_parses_whatever_the_length(names, kind):
    vocabulary, laid = tables(names)
    lengths = (laid.shortest, laid.shortest + 1, laid.shortest + 6, 72)
    check(vocabulary, names, draw(vocabulary, laid, lengths, liking(vocabulary, kind), 100))


@t5_pieces.needs_table
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind == KINDS[-1] else pytest.mark.long)
        for kind in KINDS
    ],
    ids="+".join,
)
def test_t5_pieces_too(names):
    vocabulary, laid = tables(names, "t5")
    lengths = (laid.shortest, laid.shortest + 4, 64)
    for kind in ("flat", "structure"):
        check(vocabulary, names, draw(vocabulary, laid, lengths, liking(vocabulary, kind), 21))


@t5_pieces.needs_table
def test_tables_stay_small():
    for names in KINDS:
        _, laid = tables(names, "t5")
        assert sum(np.asarray(array).nbytes for array in laid) < 4 * 2**20
        assert laid.next.shape[0] <= 120 and laid.next.shape[1] <= 800


def strings(names):
    """Valid latents with everything that a grammar knows."""
    generator = random.Random(0)
    words = ["dog", "A ((red)) cup", ", and", "it's ((", "3 cats", "x)) y", "; #4", "(1"]
    source = ShapesSource(size=32, latents=("text", "bbox", "blob"))
    for index in range(40):
        values = dict(source[index]["latents"])
        chosen = [w.replace("((", "(").replace("))", ")") for w in generator.sample(words, 3)]
        shapes = [
            [bbox.Box(*random_box(generator)) for _ in range(generator.randrange(1, 3))]
            for _ in chosen
        ]
        if index % 2:
            values["bbox"] = bbox.write(list(map(bbox.Segment, chosen, shapes)))
            ellipse = blob.Ellipse(*random_blob(generator))
            values["blob"] = blob.write([blob.Segment(chosen[0], (ellipse,))])
        values["voken"] = "".join(f"#{generator.randrange(64)}" for _ in range(32))
        yield {name: values[name] for name in names}


@pytest.mark.parametrize("which", ["shipped", pytest.param("t5", marks=t5_pieces.needs_table)])
def test_what_the_data_holds_may_be_written_in_just_its_length(which):
    """The grammar forbids nothing that training teaches, and needs no spare room for it."""
    names = ("text", "bbox", "blob", "voken")
    vocabulary, laid = tables(names, which)
    rows = [vocabulary.encode_latents(values, names, 10_000) for values in strings(names)]
    length = max(map(len, rows))
    ids = jnp.asarray(np.stack([tokens.pad(row, length) for row in rows]))
    last = jnp.full(len(rows), len(names) - 1)
    limit = (ids > 0).sum(1)

    @jax.jit
    def permitted(laid):
        def step(state, column):
            index, token = column
            good = grammar.allowed(laid, state, last, limit - index)
            good = jnp.take_along_axis(good, token[:, None], axis=1)[:, 0]
            return grammar.advance(laid, state, last, token), good

        begin = grammar.start(laid, jnp.full(len(rows), -1), last)
        return jax.lax.scan(step, begin, (jnp.arange(length), ids.T))[1].T

    wrong = np.argwhere(~np.asarray(permitted(laid)) & (np.asarray(ids) > 0))
    assert not len(wrong), [vocabulary.decode(rows[i][: j + 1]) for i, j in wrong[:3]]


def follow(laid, text, vocabulary, name="bbox", remaining=100):
    """Whether a latent may begin with this text, token by token."""
    last = jnp.zeros(1, int)
    state = grammar.start(laid, jnp.full(1, -1), last)
    for token in vocabulary.encode_text(text):
        good = grammar.allowed(laid, state, last, jnp.full(1, remaining))
        if not good[0, token]:
            return False
        state = grammar.advance(laid, state, last, jnp.array([token]))
    return True


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("dog (1, 2, 3, 4", True),
        ("dog (1, 2, 3, 4)", True),
        ("dog (1, 2, 30, 4)", True),
        ("dog (999, 0, 1000, 1)", True),
        ("dog (9, 0, 1", True),  # 10 and more are still possible
        ("dog (9, 0, 1,", False),
        ("dog (9, 0, 9,", False),
        ("dog (9, 5, 10, 5)", False),
        ("dog (1000", False),  # no x2 would be above it
        ("dog (1, 2, 1001", False),
        ("dog (01", False),
        ("dog (0, 0, 0", False),
        ("dog(1", False),
        ("dog ((1, 2", True),  # prose
        ("dog (a", False),
        ("dog (1,2", False),
        ("dog (1, 2, 3, 4)cat", False),
        ("dog (1, 2, 3, 4) cat", True),
        ("dog (1, 2, 3, 4), cat", True),
        ("dog (1, 2, 3, 4) , cat", False),
        ("(1", False),
        ("a ) b", False),
    ],
)
def test_the_rules_of_boxes(text, good):
    vocabulary, laid = tables(("bbox",))
    assert follow(laid, text, vocabulary) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("dog (0, 1000, 20, 20, 179)", True),
        ("dog (0, 1000, 20, 21", False),
        ("dog (0, 1000, 20, 2, 180", False),
        ("dog (0, 1000, 0", False),
        ("dog (0, 1000, 20, 0", False),
    ],
)
def test_the_rules_of_ellipses(text, good):
    vocabulary, laid = tables(("blob",))
    assert follow(laid, text, vocabulary) is good


def test_no_section_holds_a_marker():
    section = sections.sections(COMBINED)[0]

    def reads(text):
        state = section.start
        for character in " " + text:
            step = section.step(state, character)
            if step is None:
                return False
            state = step.state
        return True

    assert reads("a [[tex] [box] t] [textt]") and reads("[bbo x]")
    for marker in combined.MARKERS.values():
        assert not reads(f"a [{marker}") and not reads(f"b[te{marker}")
    assert sections.sections(("text",))[0].markers == ()


@pytest.mark.parametrize("name", ["text", "bbox"])
def test_long_latents_end_before_their_most_characters(name, monkeypatch):
    """With limits that a short decoder reaches, by characters and by shapes."""
    monkeypatch.setattr(compiler, "sections", lambda names, spaced: (short,))
    short = sections.sections((name,))[0]
    short = type(short)(name, short.fields, 160)
    laid = compiler.compile_tables(VOCABULARY, (name,), VOCABULARY.size)
    bias = liking(VOCABULARY, "flat")
    bias[EOS] = -20.0
    ids = draw(VOCABULARY, laid, (90,), bias, 100)
    check(VOCABULARY, (name,), ids)
    lengths = [len(VOCABULARY.decode(row)) for row in ids]
    assert max(lengths) <= 160 and np.mean(lengths) > 60


@pytest.mark.slow
def test_shapes_are_counted(monkeypatch):
    monkeypatch.setattr("kaleido_jax.latents.grounding.MAX_OBJECTS", 3)
    vocabulary, laid = tables(("bbox",))
    bias = liking(vocabulary, "structure")
    ids = draw(vocabulary, laid, (400,), bias, 100)
    counts = [sum(len(s.boxes) for s in bbox.parse(vocabulary.decode(row))) for row in ids]
    assert max(counts) == 3


def test_numbers_cost_what_their_pieces_do():
    table = numbers.CostTable([*"0123456789,) ", "10", "00", " 10", "1,", " 999,"])
    box = table.fields(sections.BOX)
    assert [field.stored for field in box] == [0, 1, -1, -1]
    assert [field.register for field in box] == [-1, -1, 0, 1]
    after = table.rows[box[2].block + 500]  # x1 = 500
    assert (after[numbers.EMPTY], after[numbers.SPACE]) == (3, 1)  # "10" "00" ",", " 999,"
    assert after[numbers.NEXT] == after[numbers.SPACE]
    # 511 by "1,"; 700 by "00" and ","; 501 by "1,"; the comma alone; nothing.
    assert [after[n] for n in (51, 7, 50, 501, 500)] == [1, 2, 1, 1, numbers.NEVER]
    assert (after[2], after[numbers.WRONG]) == (numbers.NEVER, numbers.NEVER)
    assert table.rows[box[3].block + 500, numbers.SPACE] == 3  # " 10", "00", ")"


def test_a_vocabulary_without_a_piece_is_refused(monkeypatch):
    monkeypatch.setattr(Vocabulary, "knows", lambda self, character: character not in "()")
    with pytest.raises(UserError, match="cannot spell"):
        compiler.compile_tables(VOCABULARY, ("bbox",), VOCABULARY.size)
