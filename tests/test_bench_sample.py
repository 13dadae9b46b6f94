"""The measurement of sampling: stages, shares, pictures written."""

from __future__ import annotations

import json

import pytest

from kaleido_jax import bundle, cli
from tests.test_generate import _bundle, _config


@pytest.mark.slow
@pytest.mark.parametrize("latents", [("text",), ()], ids=["kaleido", "baseline"])
def test_figures_of_a_checkpoint(tmp_path, capsys, latents):
    config = _config(latents)
    config.data.latent_length = 16
    folder = bundle.save(tmp_path / "model", _bundle(config))
    words = ["bench", "sample", "--checkpoint", str(folder), "--batch-size", "8", "--repeats", "1"]
    assert cli.main([*words, "--setting", "num_steps=2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["batch_size"], made["steps"], made["latents"]) == (8, 2, list(latents))
    parts = ["encode", "decode", "diffusion"] if latents else ["encode", "diffusion"]
    assert list(made["seconds"]) == list(made["share"]) == list(made["flops_per_image"]) == parts
    assert sum(made["share"].values()) == pytest.approx(1, abs=1e-3)
    assert made["images_per_second"] == pytest.approx(8 / sum(made["seconds"].values()), rel=1e-2)
    assert made["written_images_per_second"] > 0 and made["memory"]["estimated_bytes"] > 1000
    assert made["first_seconds"] > sum(made["seconds"].values())
    # Guided: two evaluations a step, so twice the steps are twice the work but for the condition.
    assert cli.main([*words, "--setting", "num_steps=4"]) == 0
    twice = json.loads(capsys.readouterr().out)["flops_per_image"]["diffusion"]
    once = made["flops_per_image"]["diffusion"]
    assert 1.2 * once < twice <= 2 * once
