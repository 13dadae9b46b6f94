"""`model.read_tokens`: states of z that also carry which token was read, and where."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kaleido_jax.models.kaleido import Kaleido, KaleidoConfig
from kaleido_jax.train import Trainer
from tests.tiny import tiny_config


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
