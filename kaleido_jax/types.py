"""Shared vocabulary of arrays: what travels between data, model, training and generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Shaped

# A tuple of images [B, h, w, C] of one picture batch, highest resolution first.
Pyramid = tuple[Float[Array, "b h w c"], ...]
# A nested dictionary of arrays.
Params = Mapping[str, Any]


@flax.struct.dataclass
class Batch:
    """One batch as the loader gives it: host-local numpy, or global device arrays in a step.

    Attributes:
      caption_tokens: caption c, EOS included, 0 = padding.
      latent_tokens: latents z, EOS included, 0 = padding; Lz = 0 without latents.
      image: uint8 pixels; floating point images pass unnormalised (the 2-D toy).
      key_hash: uint32 hash of each record's key, for logs and tests of order.
    """

    caption_tokens: Int[Array, "b lc"]
    latent_tokens: Int[Array, "b lz"]
    image: Shaped[Array, "b h w c"]
    key_hash: Int[Array, "b"]


@flax.struct.dataclass
class Conditioning:
    """What the denoiser reads of text: encoder states and decoder states along length (Fig. 2).

    Attributes:
      states: encoder states followed by decoder states after the final norm.
      mask: True where a position is real.
    """

    states: Float[Array, "b l d"]
    mask: Bool[Array, "b l"]
