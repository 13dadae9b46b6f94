"""98 COCO photographs at 64 pixels with their true boxes: proof on real data, CPU sized.

Needs --config.data.source.path=FOLDER with the webdataset shards.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.latents = ("bbox",)
    c.vocabulary.num_vokens = 1000  # the patch tokenizer of the package, for z with vokens
    c.model.latent_decoder = shapes.small_t5(vocab_size=2560)
    c.data.source = ConfigDict(dict(name="webdataset", path="../shared/data/coco100"))
    c.data.image_size = 64
    c.data.caption_length = 64
    c.data.latent_length = 288  # text, boxes and vokens together take 269 at most
    c.model.denoiser = ConfigDict(
        dict(
            name="nested_unet",
            resolution_channels=(16, 32, 32),
            num_resnets_per_resolution=(1, 1, 1),
            num_attention_layers=(0, 0, 0),
            num_groups_norm=16,
            num_groups_attention=16,
            dtype="float32",
            remat_policy="none",
            skip_normalization=True,
            inner=dict(
                resolution_channels=(32, 64),
                num_resnets_per_resolution=(1, 1),
                num_attention_layers=(0, 1),
                num_heads=4,
                use_attention_ffn=True,
                temporal_dim=256,
                num_groups_norm=16,
                num_groups_attention=16,
                patch_size=2,
                conditioning_feature_dim=96,
            ),
        )
    )
    c.train.batch_size = 8
    c.train.num_steps = 2_000
    c.train.log_every = 20
    c.train.checkpoint_every = 200
    return c
