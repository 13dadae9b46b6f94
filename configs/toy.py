"""The toy of Figure 3: two classes of two modes in the plane, trained in under a minute.

Pictures are points, [1, 1, 2]; the latent is the name of the mode. The baseline is the same with
--config.latents=().
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base
from kaleido_jax.configs.shapes import small_t5


def get_config() -> ConfigDict:
    c = base.get_config()
    c.latents = ("text",)
    c.data.source = ConfigDict(dict(name="toy", seed=0, num_examples=1_000_000))
    c.data.image_size = 1
    c.data.channels = 2
    c.data.caption_length = 4
    c.data.latent_length = 7
    c.vocabulary.num_vokens = 0
    tiny = dict(emb_dim=16, num_heads=1, head_dim=16, mlp_dim=32)
    tiny |= dict(num_encoder_layers=1, num_decoder_layers=1)
    c.model.text_encoder = small_t5(**tiny)
    c.model.latent_decoder = small_t5(**tiny)
    c.model.freeze_encoder = False
    c.model.denoiser = ConfigDict(
        dict(name="mlp", channels=2, width=64, num_blocks=4, conditioning_feature_dim=16)
    )
    c.diffusion.schedule = "deepfloyd"
    c.diffusion.loss_target = "v"
    c.train.batch_size = 128
    c.train.num_steps = 1_500
    c.train.latent_weight = 0.1
    c.train.log_every = 250
    c.train.checkpoint_every = 1_500
    c.train.sample_every = 0
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.optim.decay = "cosine"
    c.optim.ema_decay = 0.999
    c.optim.ema_warmup = True
    c.sample.sampler = "ddpm"
    c.sample.steps = 100
    c.sample.guidance_weight = 1.0
    c.sample.threshold = "none"  # points are not bounded to [-1, 1]
    return c
