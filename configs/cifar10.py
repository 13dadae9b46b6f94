"""CIFAR-10 at 32 pixels, class captions, visual tokens as latents; CPU sized.

Needs --config.data.source.path=FOLDER with the webdataset shards. The tokens of the package know
drawn shapes; --config.data.source.vokens=FILE names others, of `kaleido annotate fit-vokens`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.latents = ("voken",)
    c.data.source = ConfigDict(
        dict(name="webdataset", path="../shared/data/cifar10_10k", vokens="")
    )
    c.data.caption_length = 16
    c.data.latent_length = 33
    c.vocabulary.num_vokens = 1000  # the patch tokenizer's
    c.model.latent_decoder = shapes.small_t5(vocab_size=2560, logits_via_embedding=True)
    c.train.num_steps = 10_000
    c.train.noisy_steps = 0  # visual tokens decide much of a picture at all times
    c.train.cond_drop_rate = 0.1
    return c
