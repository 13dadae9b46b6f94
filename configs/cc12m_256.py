"""CC12M at 256 pixels: the paper's text-to-image model, which starts from its 64-pixel one.

Needs --config.init_from=WORKDIR of `cc12m_64.py`, --config.data.source.path=FOLDER of
`kaleido build cc12m --size 256` and --config.vocabulary.path=FILE, T5's SentencePiece model. What
is not set here is base.py's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.latents = ("text", "bbox", "voken")  # App. B.3: combined; the others one at a time
    c.data.source = ConfigDict(dict(name="task", task="cc12m_256_combined", path="records"))
    c.data.image_size = 256  # Sec. 4.1
    c.train.batch_size = 512  # App. B.2: 8 on each of 64 GPUs
    c.train.num_steps = 400_000  # App. B.2: after those at 64 pixels
    base.for_many_devices(c)
    return c
