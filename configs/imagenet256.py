"""ImageNet at 256 pixels, class names as captions: the paper's class-to-image model.

Needs --config.data.source.path=FOLDER of `kaleido build imagenet` and
--config.vocabulary.path=FILE, T5's SentencePiece model. What is not set here is base.py's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    # App. B.3: "We also trained models on ImageNet using combined latents".
    c.latents = ("text", "bbox", "voken")
    c.data.source = ConfigDict(dict(name="task", task="imagenet_256_combined", path="records"))
    c.data.image_size = 256  # Sec. 4.1
    # App. B.2: "we train the entire model from scratch directly at 256 x 256 for ImageNet".
    c.init_from = ()
    c.train.batch_size = 512  # App. B.2
    c.train.num_steps = 400_000  # App. B.2
    base.for_many_devices(c)
    return c
