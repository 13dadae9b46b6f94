"""The embedded shapes with all of Section 3.2 in one sequence: description, boxes, vokens.

It goes on from the weights of a `shapes` run: --config.init_from=WORKDIR. After it pictures follow
true latents, but those of the decoder are poor: docs/reproduction.md has a second run for them.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from kaleido_jax.configs import shapes


def get_config() -> ConfigDict:
    c = shapes.get_config()
    c.latents = ("text", "bbox", "voken")
    c.data.latent_length = 138
    c.vocabulary.num_vokens = 1000  # the patch tokenizer's
    c.model.latent_decoder.vocab_size = 2560
    c.model.section_tokens = (1508, 4)
    c.train.num_steps = 4_000
    c.train.noisy_steps = 1_200
    return c
