"""Decoding against transformers' filters and a decoder small enough to enumerate."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import decode, rng
from kaleido_jax import tokens as tokens_lib
from kaleido_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent / "reference" / "guidance.npz"
VOCABULARY = 6


def test_filters_match_transformers():
    with np.load(REFERENCE, allow_pickle=False) as arrays:
        logits = jnp.asarray(arrays["logits"], jnp.float32)
        names = [name for name in arrays.files if name.startswith("probabilities/")]
        assert len(names) == 3
        for name in names:
            temperature, top_k, top_p = re.fullmatch(
                r"probabilities/temperature([\d.]+)_topk(\d+)_topp([\d.]+)", name
            ).groups()
            filtered = decode.filter_logits(logits, float(temperature), int(top_k), float(top_p))
            np.testing.assert_allclose(jax.nn.softmax(filtered), arrays[name], atol=1e-5)


def test_zero_temperature_keeps_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (3, 20))
    kept = decode.filter_logits(logits, 0.0, 5, 0.5) > -jnp.inf
    np.testing.assert_array_equal(kept.sum(-1), 1)
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))


def test_neutral_settings_change_nothing():
    logits = 10 * jax.random.normal(jax.random.key(0), (3, 2000))
    np.testing.assert_array_equal(decode.filter_logits(logits), logits)


def test_forbidden_tokens_stay_forbidden():
    logits = jnp.array([[-jnp.inf, 0.0, 1.0, -jnp.inf]])
    for setting in ((1.0, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.99), (0.0, 0, 1.0)):
        filtered = decode.filter_logits(logits, *setting)
        assert np.isneginf(filtered[0, [0, 3]]).all()
        assert np.isfinite(filtered).any()


def _markov(batch):
    """A decoder whose next-token logits depend on the last token and the position only."""
    table = jax.random.normal(jax.random.key(5), (8, VOCABULARY, VOCABULARY))

    def step(cache, token):
        return table[cache, token], cache + 1

    def run(seed, ids=None, length=4, **options):
        ids = jnp.arange(batch) if ids is None else jnp.asarray(ids)
        keys = rng.per_sample(rng.stream(seed, "decode"), ids)
        return decode.sample_tokens(step, jnp.int32(0), keys, length, **options)

    return table, run


def test_log_probability_is_of_the_unmodified_model():
    table, run = _markov(50)
    allowed = jnp.arange(VOCABULARY) > 0
    tokens, log_prob = run(0, temperature=0.7, top_k=3, allowed=allowed)
    log_table = jax.nn.log_softmax(table)
    for row, got in zip(np.asarray(tokens), np.asarray(log_prob), strict=True):
        want, last = 0.0, decode.START
        for position, token in enumerate(row):
            want += log_table[position, last, token]
            last = token
            if token == tokens_lib.EOS:
                assert not row[position + 1 :].any()
                break
            assert token != 0
        np.testing.assert_allclose(got, want, rtol=1e-5)
    ended = (np.asarray(tokens) == tokens_lib.EOS).any(-1)
    assert 0 < ended.sum() < 50


def test_frequencies_follow_the_model():
    table, run = _markov(4000)
    tokens, _ = jax.jit(lambda: run(1, length=2))()
    first = np.bincount(np.asarray(tokens[:, 0]), minlength=VOCABULARY) / 4000
    want = np.asarray(jax.nn.softmax(table[0, decode.START]))
    np.testing.assert_array_less(np.abs(first - want), 5 * np.sqrt(want * (1 - want) / 4000))


def test_a_sequence_does_not_depend_on_its_batch():
    _, run = _markov(8)
    tokens, log_prob = run(3)
    for i in (0, 5):
        alone, alone_log_prob = run(3, ids=[i])
        np.testing.assert_array_equal(alone[0], tokens[i])
        np.testing.assert_allclose(alone_log_prob[0], log_prob[i], rtol=1e-6)
    assert (np.asarray(run(4)[0]) != np.asarray(tokens)).any()


def test_greedy_follows_the_maximum():
    table, run = _markov(2)
    tokens, _ = run(0, temperature=0.0)
    last = decode.START
    for position, token in enumerate(np.asarray(tokens[0])):
        assert token == int(jnp.argmax(table[position, last]))
        last = token
        if token == tokens_lib.EOS:
            break
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_loop_stops_when_all_have_ended():
    steps = []

    def step(cache, token):
        jax.debug.callback(lambda _: steps.append(1), cache)
        logits = jnp.zeros((2, VOCABULARY)).at[:, tokens_lib.EOS].set(100.0)
        return logits, cache + 1

    keys = rng.per_sample(rng.stream(0, "decode"), jnp.arange(2))
    tokens, _ = decode.sample_tokens(step, jnp.int32(0), keys, 10)
    jax.block_until_ready(tokens)
    jax.effects_barrier()
    assert len(steps) == 1
    np.testing.assert_array_equal(tokens, [[1] + [0] * 9] * 2)


@pytest.mark.parametrize(
    "setting", [(-1.0, 0, 1.0), (float("inf"), 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0)]
)
def test_bounds(setting):
    with pytest.raises(UserError):
        decode.check_filter(*setting)
