"""The UNet denoiser of MDM (App. B.1), with text condition and micro-conditioning.

`Trunk` is what every resolution of a nested network has; `Model` adds the middle and the
condition's encoder, which only the innermost resolution has. Fields of `Config` against
ml-mdm's: the lists `resolution_channels`, `num_resnets_per_resolution` are tuples;
`attention_levels` and `num_attention_layers` are one tuple, `num_attention_layers`, with 0 at
a level without attention; `micro_conditioning` "scale:64" is (("scale", 64.0),);
`num_groups_norm` and `use_attention_ffn` come out of its ResNetConfig; the 32 groups and
8 heads of its attention are `num_groups_attention` and `num_heads`; `nesting` and
`skip_cond_emb` follow from the place in a nested network. The rest bear ml-mdm's names.
`channels`, `patch_size`, `dtype`, `param_dtype`, `remat_policy` and `attention` are ours.
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
from kaleido_jax.types import Pyramid

Micro = Mapping[str, Float[Array, "b"]]
Condition = tuple[Tokens, Mask, Vector]
SCALE = "scale"  # the one micro-condition that is not multiplied by 1000


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """What every resolution has.

    Attributes:
      channels: channels of the image, in and out.
      resolution_channels: channels of each level, from the image downwards.
      num_resnets_per_resolution: residual blocks of each level on the way down (up: one more).
      num_attention_layers: attention blocks after each residual block of a level; 0 = none.
      num_heads: heads of every attention.
      use_attention_ffn: whether attention blocks have an MLP.
      temporal_dim: width of the time embedding; None is 4 x the first level's channels (in a
        nested network: the inner network's width).
      micro_conditioning: (name, default) of each number the network may be told, or a mapping.
      num_groups_norm: groups of residual and output norms.
      num_groups_attention: groups of the norms in attention blocks.
      dropout: rate inside residual blocks.
      patch_size: p x p pixels of the image become one position with p*p times the channels.
      position_features: sinusoids of row and of column that the stem reads beside the image; 0 as
        in ml-mdm, whose networks know places from their zero padding alone and learn them slowly.
      dtype: of computation. param_dtype: of parameters.
      remat_policy: what the backward pass recomputes, per block: 'none', 'minimal' or 'full'.
      attention: how attention is computed, one of layers.ATTENTIONS.
    """

    channels: int = 3
    resolution_channels: tuple[int, ...] = (256, 512, 768)
    num_resnets_per_resolution: tuple[int, ...] = (2, 2, 2)
    num_attention_layers: tuple[int, ...] = (0, 1, 5)
    num_heads: int = 8
    use_attention_ffn: bool = False
    temporal_dim: int | None = None
    micro_conditioning: tuple[tuple[str, float], ...] = ()
    num_groups_norm: int = 32
    num_groups_attention: int = 32
    dropout: float = 0.0
    patch_size: int = 1
    position_features: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat_policy: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        for name in ("resolution_channels", "num_resnets_per_resolution", "num_attention_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        micro = self.micro_conditioning or ()
        pairs = micro.items() if isinstance(micro, Mapping) else micro
        pairs = tuple((str(name), float(default)) for name, default in pairs)
        object.__setattr__(self, "micro_conditioning", pairs)
        self._check()

    def _check(self) -> None:
        levels = len(self.resolution_channels)
        for name in ("num_resnets_per_resolution", "num_attention_layers"):
            if len(getattr(self, name)) != levels:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it needs one number for each of the "
                    f"{levels} levels of resolution_channels {self.resolution_channels}"
                )
        if not levels or min(self.num_resnets_per_resolution) < 1:
            raise UserError("a UNet needs a level and one residual block on each")
        for width, attention in zip(
            self.resolution_channels, self.num_attention_layers, strict=True
        ):
            self._divides("num_groups_norm", self.num_groups_norm, width)
            if attention:
                self._divides("num_heads", self.num_heads, width)
                self._divides("num_groups_attention", self.num_groups_attention, width)
        if self.time_width % 8:
            raise UserError(f"temporal_dim is {self.time_width}; it must be a multiple of 8")
        for name, known in (
            ("remat_policy", layers.REMAT_POLICIES),
            ("attention", layers.ATTENTIONS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}; one of {', '.join(known)}")

    def _divides(self, name: str, part: int, width: int) -> None:
        if width % part:
            raise UserError(f"{name} is {part}; it must divide the {width} channels of its level")

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.temporal_dim or 4 * self.resolution_channels[0]

    @property
    def shrink(self) -> int:
        """Side of the image over the side of the lowest level's features."""
        return self.patch_size * 2 ** (len(self.resolution_channels) - 1)

    @property
    def micro_names(self) -> frozenset[str]:
        """Names of the micro-conditions that the network reads."""
        return frozenset(name for name, _ in self.micro_conditioning)

    @property
    def dtypes(self) -> Mapping[str, Any]:
        """Keyword arguments that give a flax layer its types."""
        return flax.core.freeze(
            dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
        )


@dataclasses.dataclass(frozen=True)
class Config(TrunkConfig):
    """A UNet by itself, or the innermost of a nested one.

    Attributes:
      conditioning_feature_dim: width of the condition's states; 0 = no condition.
      conditioning_feature_proj_dim: width to which they are projected; 0 = not projected.
      num_lm_head_layers: learned self-attention blocks over the projected states.
      masked_cross_attention: False attends to padding too, as some released models do (with
        learned layers the mean that conditions the time embedding is then unmasked as well).
      skip_mid_blocks: leave the middle out.
    """

    conditioning_feature_dim: int = 0
    conditioning_feature_proj_dim: int = 0
    num_lm_head_layers: int = 0
    masked_cross_attention: bool = True
    skip_mid_blocks: bool = False

    def _check(self) -> None:
        super()._check()
        if not self.skip_mid_blocks:
            width = self.resolution_channels[-1]
            self._divides("num_heads", self.num_heads, width)
            self._divides("num_groups_attention", self.num_groups_attention, width)
        if self.conditioning_feature_dim == 0 and (
            self.conditioning_feature_proj_dim or self.num_lm_head_layers
        ):
            raise UserError(
                "conditioning_feature_dim is 0 (no condition); conditioning_feature_proj_dim and "
                "num_lm_head_layers must then be 0 too"
            )
        if self.num_lm_head_layers and self.condition_width % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}; it must divide the {self.condition_width} "
                "channels of the projected condition"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From a mapping of fields; raises UserError at an unknown one, naming the nearest."""
        return layers.from_mapping(cls, values, "the UNet config")

    @property
    def ratios(self) -> tuple[int, ...]:
        """Side of each resolution's image over the innermost's, highest first."""
        return (1,)

    @property
    def condition_dim(self) -> int:
        """Width of the states that the network is given; 0 = no condition."""
        return self.conditioning_feature_dim

    @property
    def condition_width(self) -> int:
        """Width of the states that attention reads; 0 = no condition."""
        return self.conditioning_feature_proj_dim or self.conditioning_feature_dim


def check_micro(micro: Micro | None, names: frozenset[str]) -> None:
    """Raises UserError at a micro-condition that no resolution reads."""
    for name in micro or {}:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise UserError(f"unknown micro-condition {name!r}; the network reads: {known}")


class Level(nn.Module):
    """One level of a trunk: residual blocks, each followed by its attention, then resampling."""

    config: TrunkConfig
    width: int
    num_resnets: int
    num_attention: int
    cross: bool
    resample: str = "none"  # 'none', 'down' or 'up'

    @nn.compact
    def __call__(
        self,
        x: Features,
        emb: Vector,
        states: Tokens | None,
        mask: Mask | None,
        train: bool,
        skips: tuple[Features, ...] = (),
    ) -> tuple[Features, ...]:
        """Features after each block and after resampling; `skips` are concatenated, last first."""
        c = self.config
        residual = layers.checkpointed(layers.ResidualBlock, c.remat_policy, (3,))
        attention = layers.checkpointed(layers.AttentionBlock, c.remat_policy)
        done = []
        for i in range(self.num_resnets):
            if skips:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            block = residual(self.width, c.num_groups_norm, c.dropout, c.dtypes, name=f"resnet_{i}")
            x = block(x, emb, train)
            for j in range(self.num_attention):
                block = attention(
                    c.num_heads,
                    c.num_groups_attention,
                    self.cross,
                    c.use_attention_ffn,
                    c.dtypes,
                    c.attention,
                    name=f"attention_{i}_{j}",
                )
                x = block(x, states, mask)
            done.append(x)
        if self.resample == "down":
            done.append(layers.conv(self.width, c.dtypes, stride=2, name="resample")(x))
        elif self.resample == "up":
            done.append(layers.UpConv(self.width, **c.dtypes, name="resample")(x))
        return tuple(done)


class Trunk(nn.Module):
    """One resolution: embedding of time, the way down, the way up, the prediction."""

    config: TrunkConfig
    cross: bool  # whether attention reads the condition

    def setup(self):
        c = self.config
        last = len(c.resolution_channels) - 1
        self.time = layers.SinusoidMLP(c.time_width, c.dtypes)
        self.micro = {
            name: layers.SinusoidMLP(c.time_width, c.dtypes, zero=True)
            for name, _ in c.micro_conditioning
        }
        self.stem = layers.conv(c.resolution_channels[0], c.dtypes, axes=(None, "conv_out"))
        shapes = list(
            zip(
                c.resolution_channels,
                c.num_resnets_per_resolution,
                c.num_attention_layers,
                strict=True,
            )
        )
        self.down = [
            Level(c, width, resnets, attention, self.cross, "none" if i == last else "down")
            for i, (width, resnets, attention) in enumerate(shapes)
        ]
        self.up = [
            Level(c, width, resnets + 1, attention, self.cross, "none" if i == 0 else "up")
            for i, (width, resnets, attention) in enumerate(shapes)
        ]
        self.head_norm = layers.GroupNorm(c.num_groups_norm, **c.dtypes)
        self.head_conv = layers.conv(
            c.channels * c.patch_size**2, c.dtypes, zero=True, axes=("conv_in", None)
        )

    def embed(self, time_index: Float[Array, "b"], vector: Vector, micro: Micro | None) -> Vector:
        """Embedding of the time, the condition's vector and the micro-conditions."""
        emb = self.time(time_index) + vector
        for name, default in self.config.micro_conditioning:
            value = (micro or {}).get(name, jnp.full(time_index.shape, default, jnp.float32))
            # A picture larger than the network's own is as good as the network's own.
            value = jnp.minimum(value, default) if name == SCALE else value * 1000
            emb = emb + self.micro[name](value)
        return emb

    def descend(
        self,
        image: Features,
        emb: Vector,
        states: Tokens | None,
        mask: Mask | None,
        train: bool,
        features: Features | None = None,
    ) -> tuple[Features, tuple[Features, ...]]:
        """From the image to the lowest level: (features, skips); adds an outer net's features."""
        x = layers.space_to_depth(image, self.config.patch_size)
        x = self.stem(layers.with_positions(x, self.config.position_features))
        if features is not None:
            x = x + features
        skips = (layers.constrain(x),)
        for level in self.down:
            skips += level(skips[-1], emb, states, mask, train)
        return skips[-1], skips

    def ascend(
        self,
        x: Features,
        skips: tuple[Features, ...],
        emb: Vector,
        states: Tokens | None,
        mask: Mask | None,
        train: bool,
    ) -> Features:
        """From the lowest level back to the image's, each skip after the current features."""
        for level in reversed(self.up):
            used = level.num_resnets
            x = level(x, emb, states, mask, train, skips[-used:])[-1]
            skips = skips[:-used]
        return x

    def head(self, x: Features) -> Features:
        """The float32 prediction."""
        x = self.head_conv(nn.silu(self.head_norm(x)))
        return layers.depth_to_space(x, self.config.patch_size).astype(jnp.float32)


class ConditionEncoder(nn.Module):
    """Projection, learned self-attention, and the vector for the time embedding."""

    config: Config

    @nn.compact
    def __call__(self, states: Tokens, mask: Mask) -> Condition:
        c = self.config
        mask = mask.astype(bool)
        if c.conditioning_feature_proj_dim:
            project = layers.dense(c.condition_width, (None, "embed"), c.dtypes, name="project")
            states = project(states)
        read = mask if c.masked_cross_attention else jnp.ones_like(mask)
        block = layers.checkpointed(layers.TokenBlock, c.remat_policy)
        for i in range(c.num_lm_head_layers):
            states = block(c.num_heads, c.dtypes, c.attention, name=f"layer_{i}")(states, read)
        pooled = layers.masked_mean(states, read if c.num_lm_head_layers else mask)
        vector = layers.dense(
            c.time_width, ("embed", "time_embed"), c.dtypes, use_bias=False, name="vector"
        )
        return states, read, vector(pooled)


class Model(nn.Module):
    """UNet: `__call__` is `encode_condition` followed by `denoise`."""

    config: Config

    def setup(self):
        c = self.config
        cross = c.condition_width > 0
        self.trunk = Trunk(c, cross)
        if cross:
            self.condition = ConditionEncoder(c)
        if not c.skip_mid_blocks:
            width = c.resolution_channels[-1]
            self.middle = [Level(c, width, 1, 1, cross), Level(c, width, 1, 0, cross)]

    def encode_condition(self, states: Tokens, mask: Mask) -> Condition:
        """States to attend to, the mask to attend with, and a vector [B, time width].

        It does not depend on time or image: sampling runs it once. Without a condition
        (`conditioning_feature_dim` 0) the vector is 0 and nothing is attended to.
        """
        if self.config.condition_width:
            return self.condition(states, mask)
        width = self.config.time_width
        return states, mask, jnp.zeros((states.shape[0], width), self.config.dtype)

    def run(
        self,
        images: Pyramid,
        time_index: Float[Array, "b"],
        condition: Condition,
        micro: Micro | None,
        train: bool,
        features: Features | None = None,
    ) -> tuple[Pyramid, Features]:
        """(predictions, last features before the head); `features` come from an outer network."""
        if len(images) != 1:
            raise UserError(f"a UNet takes one image, not a pyramid of {len(images)}")
        states, mask, vector = condition
        emb = self.trunk.embed(time_index, vector, micro)
        x, skips = self.trunk.descend(images[0], emb, states, mask, train, features)
        if not self.config.skip_mid_blocks:
            for level in self.middle:
                x = level(x, emb, states, mask, train)[-1]
        x = self.trunk.ascend(x, skips, emb, states, mask, train)
        return (self.trunk.head(x),), x

    def denoise(
        self,
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
        condition: Condition,
        micro: Micro | None = None,
        train: bool = False,
    ) -> Pyramid:
        """Predictions for the noisy images, float32, shapes as given.

        Args:
          pyramid: noisy images, highest resolution first (here one).
          time_index: what the sinusoid embeds, 0..999.
          condition: what `encode_condition` returned.
          micro: values of micro-conditions; missing ones take their defaults.
          train: whether dropout is on (it draws from the 'dropout' stream).
        """
        check_micro(micro, self.config.micro_names)
        return self.run(pyramid, time_index, condition, micro, train)[0]

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
