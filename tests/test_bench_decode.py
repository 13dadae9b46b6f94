"""The measurement of decoding: what it says, and that it measures the same work."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kaleido_jax import bundle, cli
from kaleido_jax.bench import decode
from kaleido_jax.errors import UserError
from tests.test_constrained import _bundle, _config


def test_figures_of_a_checkpoint(tmp_path, capsys):
    config = _config(("bbox",))
    config.data.latent_length = 32
    folder = bundle.save(tmp_path / "model", _bundle(config))
    words = ["bench", "decode", "--checkpoint", str(folder), "--batch-size", "4", "--repeats", "2"]
    assert cli.main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["length"], made["batch_size"], made["latents"]) == (32, 4, ["bbox"])
    assert made["overhead"] > -1.0 and made["table_bytes"] < 2**22
    assert made["decoder_parameters"] == sum(
        x.size for x in _leaves(_bundle(config).params["latent_decoder"])
    )
    for kind in ("constrained", "free"):
        rate = 4 / made["seconds_per_step"][kind]
        assert made["tokens_per_second"][kind] == pytest.approx(rate, rel=1e-2)
    assert cli.main([*words, "--latents", "text"]) == 2
    assert "has its own" in capsys.readouterr().err


def _leaves(tree):
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


def test_steps_are_those_of_the_longest_row():
    assert decode._steps(np.array([[5, 1, 0, 0], [5, 6, 1, 0]])) == 3
    assert decode._steps(np.array([[5, 1, 0, 0], [5, 6, 7, 8]])) == 4


def test_what_cannot_be_measured_is_refused():
    vocabulary = bundle.make_vocabulary(_config())
    with pytest.raises(UserError, match="no latents"):
        decode.measure(_config(()), vocabulary, decode.Settings())
    with pytest.raises(UserError, match="10 tokens; 11 are needed"):
        decode.measure(_config(("bbox",)), vocabulary, decode.Settings())
