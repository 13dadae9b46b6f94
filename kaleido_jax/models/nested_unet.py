"""The nested UNet of MDM (App. B.1): a UNet whose middle is another network at low resolution.

The inner network may be nested again, so any number of resolutions is one recursion. The inner
network sees its own noisy image; features go in and come back through zero-initialised
convolutions, so at the start every resolution is by itself. The innermost makes the condition.
`skip_cond_emb` of ml-mdm is always true for an outer network here, as in its released models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kaleido_jax import diffusion
from kaleido_jax.errors import UserError
from kaleido_jax.models import layers, unet
from kaleido_jax.models.layers import Features, Mask, Tokens
from kaleido_jax.models.unet import Condition, Micro
from kaleido_jax.types import Pyramid

INHERITED = ("channels", "dtype", "param_dtype", "remat_policy", "attention")


@dataclasses.dataclass(frozen=True)
class Config(unet.TrunkConfig):
    """An outer network and what it contains.

    Attributes:
      inner: config of the next lower resolution: a UNet's, or a nested one's again.
      cross_attention: whether attention of this resolution (released models have none here)
        also reads the condition.
      skip_inner_unet_input: give the inner network no features, only its own image.
      skip_normalization: do not divide the image by its standard deviation.
    """

    resolution_channels: tuple[int, ...] = (64, 128, 256)
    num_resnets_per_resolution: tuple[int, ...] = (2, 2, 1)
    num_attention_layers: tuple[int, ...] = (0, 0, 0)
    inner: unet.Config | Config = dataclasses.field(default_factory=unet.Config)
    cross_attention: bool = False
    skip_inner_unet_input: bool = False
    skip_normalization: bool = False

    def _check(self) -> None:
        super()._check()
        if self.time_width != self.inner.time_width:
            raise UserError(
                f"temporal_dim is {self.time_width} outside and {self.inner.time_width} inside; "
                "both add the same vector of the condition, so they must be equal"
            )
        if self.channels != self.inner.channels:
            raise UserError(
                f"channels is {self.channels} outside and {self.inner.channels} inside; "
                "both see the same images, so they must be equal"
            )
        if self.shrink % self.inner.patch_size:
            raise UserError(
                f"patch_size {self.inner.patch_size} of the inner network must divide the outer "
                f"network's factor {self.shrink}"
            )
        if self.cross_attention and not self.condition_width:
            raise UserError("cross_attention needs an inner network with a condition")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From a mapping of fields, `inner` a mapping too (nested if it has `inner` itself).

        The inner network takes channels, dtype, param_dtype, remat_policy and attention from
        the outer one unless it states its own.

        Raises:
          UserError: an unknown field, naming the nearest; no `inner`; sizes that do not fit.
        """
        values = dict(values)
        inner = values.get("inner")
        if isinstance(inner, Mapping):
            inner = {k: values[k] for k in INHERITED if k in values} | dict(inner)
            kind = cls if "inner" in inner else unet.Config
            values["inner"] = kind.from_dict(inner)
        elif not isinstance(inner, (unet.Config, Config)):
            raise UserError("the nested UNet config needs the key 'inner', a group of fields")
        return layers.from_mapping(cls, values, "the nested UNet config")

    @property
    def time_width(self) -> int:
        """Width of the time embedding, the inner network's unless given."""
        return self.temporal_dim or self.inner.time_width

    @property
    def condition_dim(self) -> int:
        """Width of the states that the network is given; 0 = no condition."""
        return self.inner.condition_dim

    @property
    def condition_width(self) -> int:
        """Width of the states that the innermost network makes."""
        return self.inner.condition_width

    @property
    def ratios(self) -> tuple[int, ...]:
        """Side of each resolution's image over the innermost's, highest first."""
        inner = self.inner.ratios
        return (inner[0] * self.shrink // self.inner.patch_size, *inner)

    @property
    def micro_names(self) -> frozenset[str]:
        """Names of the micro-conditions that any resolution reads."""
        return super().micro_names | self.inner.micro_names


def build(config: unet.Config | Config) -> nn.Module:
    """The network of a config, nested or not."""
    return Model(config) if isinstance(config, Config) else unet.Model(config)


def standardise(image: Features) -> Features:
    """Divides each image by its (unbiased) standard deviation over pixels and channels."""
    return image / jnp.std(image, axis=(1, 2, 3), ddof=1, keepdims=True)


class Model(nn.Module):
    """Nested UNet of any depth; the interface is that of `unet.Model`."""

    config: Config

    def setup(self):
        c = self.config
        self.outer = unet.Trunk(c, c.cross_attention)
        self.inner = build(c.inner)
        if not c.skip_inner_unet_input:
            self.to_inner = layers.conv(c.inner.resolution_channels[0], c.dtypes, zero=True)
        self.from_inner = layers.conv(c.resolution_channels[-1], c.dtypes, zero=True)

    def encode_condition(self, states: Tokens, mask: Mask) -> Condition:
        """As `unet.Model.encode_condition`, by the innermost network."""
        return self.inner.encode_condition(states, mask)

    def run(
        self,
        images: Pyramid,
        time_index: Float[Array, "b"],
        condition: Condition,
        micro: Micro | None,
        train: bool,
        features: Features | None = None,
    ) -> tuple[Pyramid, Features]:
        """(predictions, last features before the head); `features` come from an outer network.

        Images of higher resolutions may have fewer rows, as `diffusion.first_rows` takes them: the
        other rows run through the inner network alone, which then gets no features for them.
        """
        c = self.config
        self._check_sides(images)
        own = diffusion.rows_of_highest((time_index, condition, micro), images)
        own_time, (states, mask, vector), own_micro = own
        emb = self.outer.embed(own_time, vector, own_micro)
        image = images[0] if c.skip_normalization else standardise(images[0])
        x, skips = self.outer.descend(image, emb, states, mask, train, features)
        inside = None
        if not c.skip_inner_unet_input:
            inside = diffusion.spread_rows(self.to_inner(x), images[1].shape[0])
        lower, inside = self.inner.run(images[1:], time_index, condition, micro, train, inside)
        back = self.from_inner(diffusion.first_rows(inside, x.shape[0]))
        x = self.outer.ascend(x + back, skips, emb, states, mask, train)
        return (self.outer.head(x), *lower), x

    def _check_sides(self, images: Pyramid) -> None:
        ratios = self.config.ratios
        sides = [image.shape[1] for image in images]
        if len(sides) != len(ratios) or any(
            side != sides[-1] * ratio for side, ratio in zip(sides, ratios, strict=True)
        ):
            raise UserError(f"images of sides {sides} given; they must be as {list(ratios)}")

    def denoise(
        self,
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
        condition: Condition,
        micro: Micro | None = None,
        train: bool = False,
    ) -> Pyramid:
        """As `unet.Model.denoise`, one prediction per resolution, highest first."""
        unet.check_micro(micro, self.config.micro_names)
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
