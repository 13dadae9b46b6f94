"""Latents of a randomly initialised model, drawn through the pipeline: every one parses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kaleido_jax import generate, mesh, stages, written
from kaleido_jax.latents import combined, latent_type
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.tokens import EOS
from tests.test_generate import PROMPT, _bundle, _config

COMBINED = ("text", "bbox", "voken")
KINDS = [("text",), ("bbox",), ("blob",), ("voken",), COMBINED]


@functools.cache
def pipeline(names, length=64):
    config = _config(names)
    config.vocabulary.num_vokens = 64
    config.model.latent_decoder.vocab_size = 1664
    config.data.latent_length = length
    return generate.Pipeline(_bundle(config), mesh.make_mesh(devices=jax.devices()[:1]))


def check(names, count, **settings):
    documents = pipeline(names).draw_latents(PROMPT, count, batch_size=50, **settings)
    for document in documents:
        assert list(document.latents) == list(names)
        assert document.decoding["constrained"] and "problems" not in document.decoding
        assert document.decoding["draws"] == 1
        for name, string in document.latents.items():
            latent_type(name).parse(string)
        if names == COMBINED:
            combined.parse(combined.join(document.latents))
    assert len({str(document.latents) for document in documents}) > count / 2
    return documents


@pytest.mark.parametrize("names", [("bbox",), ("voken",), COMBINED], ids="+".join)
def test_a_hundred_latents_parse(names):
    documents = check(names, 100)
    # The document holds all that its picture is made from, and nothing else.
    pipe = pipeline(names)
    for document in documents[:20]:
        ids = pipe._latent_tokens(document)
        assert EOS in ids
        kept, _ = written.read_latents(pipe._vocabulary, ids, names)
        assert kept == document.latents


@pytest.mark.parametrize(
    "names",
    [
        # The longest of the grounded ones and the combination in .ci/run; all with `-m long`.
        pytest.param(
            kind, marks=pytest.mark.slow if kind in (KINDS[-1], ("blob",)) else pytest.mark.long
        )
        for kind in KINDS
    ],
    ids="+".join,
)
def test_a_thousand_latents_of_each_kind_parse(names):
    check(names, 1000)
    check(names, 200, temperature=3.0, top_p=0.5)
    check(names, 200, temperature=1.0, top_k=3)


def test_greedy_decoding_keeps_to_the_grammar_too():
    document = pipeline(("bbox",)).draw_latents(PROMPT, 2, temperature=0.0)[0]
    latent_type("bbox").parse(document.latents["bbox"])


def test_without_the_grammar_they_do_not():
    documents = pipeline(("bbox",)).draw_latents(PROMPT, 2, constrained=False)
    assert all(document.decoding["problems"] for document in documents)


def test_scores_are_those_of_decoding():
    pipe = pipeline(("voken",))
    documents = pipe.draw_latents([PROMPT, "dusk: a blue shape"], 4)
    tokens = np.stack([pipe._latent_tokens(document) for document in documents])
    states = pipe.runner.encode(pipe._caption_tokens([d.caption for d in documents]))
    scores = pipe.runner.score(states, np.arange(8), tokens, 8)
    assert (scores[:, 33:] == 0).all() and (scores[:, :33] < 0).all()
    np.testing.assert_allclose(scores.sum(1), [d.log_prob for d in documents], rtol=1e-4)


def test_own_tokens_of_a_document_are_not_believed():
    pipe = pipeline(("bbox",))
    document = next(d for d in pipe.draw_latents(PROMPT, 20) if "tokens" in d.decoding)
    own = document.decoding["tokens"]
    assert list(pipe._latent_tokens(document)[: len(own)]) == own
    edited = document.replace(bbox="a dog (1, 2, 3, 4)")
    kept, _ = written.read_latents(pipe._vocabulary, pipe._latent_tokens(edited), ("bbox",))
    assert kept == edited.latents
    for wrong in (own[:-2], [10**9], ["1"], [1.0], own * 3, "x", [True]):
        decoding = document.decoding | {"tokens": wrong}
        other = dataclasses.replace(edited, decoding=decoding)
        np.testing.assert_array_equal(pipe._latent_tokens(other), pipe._latent_tokens(edited))


def test_cached_states_are_those_of_the_teacher_forced_decoder():
    config = _config()
    config.model.read_tokens = False  # what it adds comes after the decoder
    weights = _bundle(config)
    model, variables = Kaleido(KaleidoConfig.from_config(config)), {"params": weights.params}
    encoded = stages.encode(model, weights.params, np.array([[5, 6, 7, 1], [8, 9, 1, 0]]))
    ids = np.random.default_rng(0).integers(3, 480, (2, 10))
    ids[1, 6:] = 0
    want, _, mask = model.apply(variables, ids, encoded, method="latent_states")
    _, cache = model.apply(
        variables, np.zeros((2, 11), int), encoded, method="decode_step", mutable=["cache"]
    )

    @jax.jit
    def step(cache, token):
        return model.apply(
            variables | cache, token, encoded, method="decode_step", mutable=["cache"]
        )

    inputs = np.concatenate([np.zeros((2, 1), int), ids], axis=1)
    for position in range(11):
        (states, _), cache = step(cache, inputs[:, position, None])
        rows = np.asarray(mask)[:, position]
        np.testing.assert_allclose(
            np.asarray(states)[rows, 0], np.asarray(want)[rows, position], atol=2e-5, rtol=2e-5
        )


def flops(length):
    """Of one cached step and of the teacher-forced decoder over `length` tokens."""
    config = _config()
    config.data.latent_length = length
    model = Kaleido(KaleidoConfig.from_config(config))
    params = jax.eval_shape(lambda: _bundle(config).params)
    encoded = jax.eval_shape(
        functools.partial(stages.encode, model), params, jax.ShapeDtypeStruct((2, 4), np.int32)
    )
    empty = jax.ShapeDtypeStruct((2, length), np.int32)
    token = jax.ShapeDtypeStruct((2, 1), np.int32)

    def start(params, tokens, encoded):
        return model.apply(
            {"params": params}, tokens, encoded, method="decode_step", mutable=["cache"]
        )[1]

    def step(params, cache, token, encoded):
        return model.apply(
            {"params": params} | cache, token, encoded, method="decode_step", mutable=["cache"]
        )

    def teacher(params, tokens, encoded):
        return model.apply({"params": params}, tokens, encoded, method="latent_states")

    cache = jax.eval_shape(start, params, empty, encoded)
    one = jax.jit(step).lower(params, cache, token, encoded).cost_analysis()["flops"]
    whole = jax.jit(teacher).lower(params, empty, encoded).cost_analysis()["flops"]
    return one, whole, config.model.latent_decoder


def test_decoding_costs_linear_time_in_length():
    """A step costs the same at any length, but for looking at the tokens before it."""
    (short, _, decoder), (long, whole, _) = flops(64), flops(128)
    # Per earlier token, head dimension and product 2 FLOPs, and a few of masks and softmax.
    attention = 2 * 64 * decoder.num_heads * (4 * decoder.head_dim + 16)
    assert 0 < long - short <= attention
    # All steps together cost about what one pass over the whole does, not a length times that.
    assert 128 * long < 1.5 * whole
