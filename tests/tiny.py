"""Small configurations of the real code: the config of shapes, shrunk until a CPU is quick."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from kaleido_jax import config as config_lib

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"

SMALL = dict(
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1
)


def tiny_config(*overrides: str, name: str = "shapes", nested: bool = False) -> ConfigDict:
    """The named config with tiny networks and a batch of 8; `overrides` as on the command line.

    `nested` puts the UNet inside an outer one, so that there are two resolutions.
    """
    settings = [
        *(
            f"model.{part}.{k}={v}"
            for part in ("text_encoder", "latent_decoder")
            for k, v in SMALL.items()
        ),
        "train.batch_size=8",
        "train.num_steps=4",
        "train.log_every=1",
        "train.checkpoint_every=2",
        "train.sample_every=0",
        "optim.warmup_steps=2",
        "sample.steps=3",
    ]
    config = config_lib.load_config(str(CONFIGS / f"{name}.py"), settings)
    with config.unlocked():
        if name == "toy":
            config.model.denoiser.update(width=16, num_blocks=1, conditioning_feature_dim=16)
        else:
            inner = dict(
                resolution_channels=(8, 8),
                num_resnets_per_resolution=(1, 1),
                num_attention_layers=(0, 1),
                num_heads=2,
                temporal_dim=16,
                patch_size=2,
                num_groups_norm=4,
                num_groups_attention=4,
                conditioning_feature_dim=16,
            )
            if nested:
                config.model.denoiser = ConfigDict(
                    dict(
                        name="nested_unet",
                        resolution_channels=(8, 8, 8),
                        num_resnets_per_resolution=(1, 1, 1),
                        num_attention_layers=(0, 0, 0),
                        num_groups_norm=4,
                        skip_normalization=True,
                        inner=inner,
                    )
                )
            else:
                config.model.denoiser = ConfigDict(dict(name="unet") | inner)
        for override in overrides:
            config_lib.apply_override(config, override)
    config_lib.check(config)
    return config.lock()
