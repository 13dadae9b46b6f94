"""What helps a narrow decoder to tell numbers: `number_tokens` of T5 and `model.read_tokens`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.models.t5 import LatentDecoder, T5Config
from kaleido_jax.train import Trainer, make_loader
from tests.tiny import tiny_config

SMALL = T5Config(
    vocab_size=64, emb_dim=24, num_heads=2, head_dim=8, mlp_dim=16, num_decoder_layers=1
)


def test_rows_of_numbers_start_as_sinusoids():
    numbers, plain = (
        np.asarray(
            LatentDecoder(dataclasses.replace(SMALL, number_tokens=rows))
            .init(
                jax.random.key(0),
                jnp.array([[5, 9, 1], [8, 1, 0]]),
                jnp.zeros((2, 5, 24)),
                jnp.ones((2, 5), bool),
            )["params"]["token_embedder"]["embedding"]
            .unbox()
        )
        for rows in ((4, 40), ())
    )
    np.testing.assert_array_equal(numbers[:4], plain[:4])
    np.testing.assert_array_equal(numbers[44:], plain[44:])
    rows = numbers[4:44]
    np.testing.assert_allclose((rows**2).mean(1), 1.0, rtol=1e-5)  # as long as the random ones
    near, far = (np.square(rows[n:] - rows[:-n]).mean() for n in (1, 20))
    assert near < far / 2
    for wrong in ((4,), (4, 61), (-1, 3), (4, 0)):
        with pytest.raises(UserError, match="number_tokens"):
            dataclasses.replace(SMALL, number_tokens=wrong)


def test_states_gain_the_token_and_its_place_and_logits_stay():
    config = tiny_config()
    params = Trainer(config).init().params
    caption = jnp.array([[5, 6, 1]])
    found = {}
    for reads in (False, True):
        config.model.read_tokens = reads
        model = Kaleido(KaleidoConfig.from_config(config))

        def states(z, model=model):
            encoded = model.apply({"params": params}, caption, method="encode")
            return model.apply({"params": params}, jnp.array([z]), encoded, method="latent_states")

        found[reads] = [states(z) for z in ([7, 8, 8, 1], [9, 8, 1])]
    table = params["latent_decoder"]["token_embedder"]["embedding"]
    gains = []
    for (plain, logits, _), (reading, same, _) in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(logits, same)
        gains.append(np.asarray(reading - plain)[0])
    read = np.asarray(table)[np.array([0, 7, 8, 8, 1])]
    places = gains[0] - read
    # The same token at two places is told apart; a place is the same in a shorter z.
    assert np.abs(places[2] - places[3]).max() > 0.5
    np.testing.assert_allclose(
        gains[1] - np.asarray(table)[np.array([0, 9, 8, 1])], places[:4], atol=1e-5
    )


def test_places_count_from_the_token_that_opened_the_section():
    """A box then reads the same after a text of any length."""
    config = tiny_config()
    config.model.read_tokens, config.model.section_tokens = True, (1508, 4)
    params = Trainer(config).init().params
    model = Kaleido(KaleidoConfig.from_config(config))
    caption = jnp.array([[5, 6, 1]])
    table = np.asarray(params["latent_decoder"]["token_embedder"]["embedding"])

    def places(cfg, z):
        model = Kaleido(cfg)
        encoded = model.apply({"params": params}, caption, method="encode")
        arguments = ({"params": params}, jnp.array([z]), encoded)
        plain = Kaleido(dataclasses.replace(cfg, read_tokens=False))
        reading, same = (m.apply(*arguments, method="latent_states")[0] for m in (model, plain))
        return np.asarray(reading - same)[0] - table[np.array([0, *z])]

    counted = places(model.cfg, [1508, 7, 8, 9, 1509, 7, 8, 1])
    np.testing.assert_allclose(counted[2:5], counted[6:9], atol=1e-5)
    np.testing.assert_allclose(counted[[0, 0]], counted[[1, 5]], atol=1e-5)
    from_start = places(
        dataclasses.replace(model.cfg, section_tokens=()), [1508, 7, 8, 9, 1509, 7, 8, 1]
    )
    np.testing.assert_allclose(counted[2:5], from_start[1:4], atol=1e-5)
    assert np.abs(from_start[2:5] - from_start[6:9]).max() > 0.5


@pytest.mark.parametrize("wrong", [(1508,), ("a", "b"), (-1, 3), (1508, 0), (99_999, 4)])
def test_section_tokens_are_within_the_vocabulary(wrong):
    config = tiny_config()
    config.model.section_tokens = wrong
    with pytest.raises(UserError, match=r"model.section_tokens.*first id, count"):
        KaleidoConfig.from_config(config)


def test_section_tokens_are_those_of_the_vocabulary():
    config = tiny_config()
    config.model.section_tokens = (1507, 4)
    with pytest.raises(UserError, match=r"section_tokens' is \(1507, 4\); .* are \(1508, 4\)"):
        make_loader(config, bundle.make_vocabulary(config))
