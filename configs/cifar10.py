"""CIFAR-10 at 32 pixels, class captions, visual tokens as latents; CPU sized.

Needs --config.data.source.path=FOLDER with the webdataset shards.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.latents = ("voken",)
    c.data.source = ConfigDict(dict(name="webdataset", path="../shared/data/cifar10_10k"))
    c.data.caption_length = 16
    c.data.latent_length = 33
    c.vocabulary.num_vokens = 1000  # the patch tokenizer of the package
    c.model.latent_decoder = shapes.small_t5(vocab_size=2560)
    c.train.num_steps = 10_000
    return c
