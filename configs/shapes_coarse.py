"""The shapes in coarse patches: where a small network learns first that boxes say where things lie.

It draws no edges; `configs/shapes.py` goes on from it (docs/reproduction.md).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.model.denoiser.patch_size = 4
    c.model.denoiser.resolution_channels = (64,)
    c.model.denoiser.num_resnets_per_resolution = (1,)
    c.model.denoiser.num_attention_layers = (1,)
    c.train.num_steps = 9_500
    c.train.noisy_share = 1.0
    return c
