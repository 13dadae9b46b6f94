"""CC12M at 64 pixels: the first 400,000 steps of the paper's text-to-image model (App. B.2).

The denoiser is the inner UNet of base.py alone; `cc12m_256.py` goes on from its workdir. Needs
--config.data.source.path=FOLDER of `kaleido build cc12m --size 64` and
--config.vocabulary.path=FILE, T5's SentencePiece model. What is not set here is base.py's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.latents = ("text", "bbox", "voken")  # App. B.3: combined; the others one at a time
    c.data.source = ConfigDict(dict(name="task", task="cc12m_64_combined", path="records"))
    c.data.image_size = 64  # App. B.2: "progressive training at 64 x 64 resolution"
    # App. B.1, inner_config: channels 256, 512, 768, 2 blocks each, attention 0, 1, 5, 8 heads.
    c.model.denoiser = ConfigDict(dict(name="unet") | base.unet())
    c.train.batch_size = 512  # App. B.2
    c.train.num_steps = 400_000  # App. B.2: "an additional 400k steps"
    base.for_many_devices(c)
    return c
