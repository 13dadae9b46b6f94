"""A nested UNet of 18.8M parameters at 64 pixels that a CPU steps in about a second: for
`kaleido bench train --config cpu_unet --denoiser-only`, beside other people's code. Source: ours.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base, shapes


def get_config() -> ConfigDict:
    c = base.get_config()
    c.latents = ()
    c.data.source = ConfigDict(dict(name="shapes", seed=0, size=64, num_examples=1_000_000))
    c.data.image_size = 64
    c.data.caption_length = 16
    c.vocabulary.num_vokens = 0
    small = dict(emb_dim=256, num_heads=4, head_dim=64, mlp_dim=512)
    c.model.text_encoder = shapes.small_t5(**small)
    c.model.latent_decoder = shapes.small_t5(**small)
    inner = base.unet(
        resolution_channels=(64, 128, 192),
        num_attention_layers=(0, 1, 2),
        temporal_dim=512,
        conditioning_feature_dim=256,
        conditioning_feature_proj_dim=256,
        use_attention_ffn=False,
        dtype="float32",
    )
    c.model.denoiser.update(
        resolution_channels=(32, 64, 64), temporal_dim=512, dtype="float32", inner=inner
    )
    c.train.batch_size = 8
    return c
