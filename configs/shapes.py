"""The embedded shapes at 32 pixels: a Kaleido small enough for two CPU cores.

The latent is the grounded caption; the baseline is the same with --config.latents=(). What is not
the paper's is here so that a network of a million parameters learns within some thousand steps
where the boxes say that things lie: a box decides less than a tenth of what the background does,
and only while x_t is nearly noise. docs/reproduction.md begins with a run in coarser patches.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base


def small_t5(**changes) -> ConfigDict:
    """T5 1.1 small enough for a CPU, over the 1,536 rows of the shipped vocabulary."""
    fields = dict(
        vocab_size=1536,
        emb_dim=96,
        num_heads=3,
        head_dim=32,
        mlp_dim=192,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dtype="float32",
    )
    return ConfigDict(base.t5(**(fields | changes)))


def get_config() -> ConfigDict:
    c = base.get_config()
    c.latents = ("bbox",)
    c.data.source = ConfigDict(
        dict(
            name="shapes",
            seed=0,
            size=32,
            num_examples=1_000_000,
            num_objects=(1, 2),
            semi_axis=(160, 230),  # of 1000
        )
    )
    c.data.image_size = 32
    c.data.caption_length = 12
    c.data.latent_length = 34
    c.vocabulary.num_vokens = 0
    c.model.text_encoder = small_t5()
    c.model.latent_decoder = small_t5()
    for t5 in (c.model.text_encoder, c.model.latent_decoder):
        t5.logits_via_embedding = True
        t5.number_tokens = (4, 1001)  # the vocabulary has a piece for each number 0..1000
    c.model.freeze_encoder = False  # nothing pretrained to freeze
    c.model.read_tokens = True
    c.model.denoiser = ConfigDict(
        dict(
            name="unet",
            patch_size=2,
            position_features=8,
            resolution_channels=(32, 64),
            num_resnets_per_resolution=(1, 1),
            num_attention_layers=(0, 1),
            num_heads=4,
            temporal_dim=256,
            num_groups_norm=4,
            num_groups_attention=4,
            conditioning_feature_dim=96,
            conditioning_feature_proj_dim=96,
            num_lm_head_layers=2,
            use_attention_ffn=True,
            dtype="float32",
            remat_policy="none",
        )
    )
    # 'cosine' stops at logsnr -5, where the mean grey of 1,024 pixels still shows through; a
    # sampler that starts from pure noise would then favour the middle greys.
    c.diffusion.schedule = "ddpm"
    c.diffusion.loss_target = "v"
    c.train.batch_size = 32
    c.train.num_steps = 6_500
    c.train.noisy_steps = 4_500
    c.train.noisy_share = 0.5
    c.train.cond_drop_rate = 0.05
    c.train.latent_weight = 0.1
    c.train.checkpoint_every = 1_000
    c.train.sample_every = 0
    c.optim.learning_rate = 2e-3
    c.optim.text_rate = 0.1
    c.optim.warmup_steps = 150
    c.optim.decay = "cosine"
    c.optim.ema_decay = 0.999
    c.optim.ema_warmup = True
    c.sample.sampler = "ddim"
    c.sample.steps = 25
    c.sample.guidance_weight = 2.0
    return c
