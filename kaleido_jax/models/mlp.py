"""A residual MLP over points, for the two-dimensional toy of Figure 3.

A point is an image [B, 1, 1, 2]; every position of a larger image would be treated by itself.
The condition acts only through one vector (the mean of its real states), added to the time
embedding, which scales and shifts every block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kaleido_jax.errors import UserError
from kaleido_jax.models import layers
from kaleido_jax.models.layers import Features, Mask, Tokens, Vector
from kaleido_jax.models.unet import Condition, Micro, check_micro
from kaleido_jax.types import Pyramid


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network.

    Attributes:
      channels: numbers of a point.
      width: of the residual stream and of the embedding; a multiple of 8.
      num_blocks: residual blocks.
      expansion: width of a block's hidden layer over `width`.
      conditioning_feature_dim: width of the condition's states; 0 = no condition.
      dtype: of computation. param_dtype: of parameters.
    """

    channels: int = 2
    width: int = 128
    num_blocks: int = 4
    expansion: int = 2
    conditioning_feature_dim: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.width % 8 or self.width < 8:
            raise UserError(f"width is {self.width}; it must be a multiple of 8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From a mapping of fields; raises UserError at an unknown one, naming the nearest."""
        return layers.from_mapping(cls, values, "the MLP config")

    @property
    def ratios(self) -> tuple[int, ...]:
        """Side of each resolution's image over the innermost's: there is one."""
        return (1,)

    @property
    def condition_dim(self) -> int:
        """Width of the states that the network is given; 0 = no condition."""
        return self.conditioning_feature_dim

    @property
    def dtypes(self) -> Mapping[str, Any]:
        """Keyword arguments that give a flax layer its types."""
        return flax.core.freeze(
            dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        )


class Block(nn.Module):
    """LayerNorm, scale and shift from the embedding, SiLU MLP with a zero-initialised end."""

    config: Config

    @nn.compact
    def __call__(self, x: Features, emb: Vector) -> Features:
        c = self.config
        film = layers.dense(2 * c.width, ("time_embed", "embed"), c.dtypes, name="film")
        scale, shift = jnp.split(film(nn.silu(emb))[:, None, None, :], 2, axis=-1)
        h = layers.layer_norm(c.dtypes, name="norm")(x) * (1 + scale) + shift
        h = layers.dense(c.expansion * c.width, ("embed", "mlp"), c.dtypes, name="mlp_in")(h)
        h = layers.dense(c.width, ("mlp", "embed"), c.dtypes, zero=True, name="mlp_out")(nn.silu(h))
        return x + h


class Model(nn.Module):
    """Denoiser of points; the interface is that of `unet.Model`."""

    config: Config

    def setup(self):
        c = self.config
        self.time = layers.SinusoidMLP(c.width, c.dtypes)
        if c.conditioning_feature_dim:
            self.condition_norm = layers.layer_norm(c.dtypes)
            self.condition_in = layers.dense(c.width, (None, "mlp"), c.dtypes)
            self.condition_out = layers.dense(c.width, ("mlp", "time_embed"), c.dtypes)
        self.stem = layers.dense(c.width, (None, "embed"), c.dtypes)
        self.blocks = [Block(c) for _ in range(c.num_blocks)]
        self.head_norm = layers.layer_norm(c.dtypes)
        self.head = layers.dense(c.channels, ("embed", None), c.dtypes, zero=True)

    def encode_condition(self, states: Tokens, mask: Mask) -> Condition:
        """The states and mask as they are, and the vector [B, width] of their masked mean."""
        if not self.config.conditioning_feature_dim:
            width = self.config.width
            return states, mask, jnp.zeros((states.shape[0], width), self.config.dtype)
        pooled = self.condition_norm(layers.masked_mean(states, mask))
        return states, mask, self.condition_out(nn.silu(self.condition_in(pooled)))

    def denoise(
        self,
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
        condition: Condition,
        micro: Micro | None = None,
        train: bool = False,
    ) -> Pyramid:
        """As `unet.Model.denoise`; there are no micro-conditions and no dropout."""
        check_micro(micro, frozenset())
        if len(pyramid) != 1:
            raise UserError(f"the MLP takes one image, not a pyramid of {len(pyramid)}")
        emb = self.time(time_index) + condition[2]
        x = self.stem(pyramid[0])
        for block in self.blocks:
            x = block(x, emb)
        return (self.head(nn.silu(self.head_norm(x))).astype(jnp.float32),)

    def __call__(
        self,
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
        states: Tokens,
        mask: Mask,
        micro: Micro | None = None,
        train: bool = False,
    ) -> Pyramid:
        """`denoise` with the condition encoded: states [B, L, D], mask [B, L]."""
        condition = self.encode_condition(states, mask)
        return self.denoise(pyramid, time_index, condition, micro, train)
