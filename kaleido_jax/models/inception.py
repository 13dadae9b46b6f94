"""The Inception network of FID, as torch-fidelity's `inception-v3-compat` computes it.

Layers bear the names of its weights file. It differs from other Inception v3 networks in its
pooling (borders are not counted in averages, the last block takes maxima), its 1,008 classes, and
its resizing, which is TensorFlow 1's.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

SIDE = 299
RESIZE = f"bilinear to {SIDE} as TensorFlow 1 (torch-fidelity)"
WIDTHS = ("64", "192", "768", "2048", "logits_unbiased", "logits")
CLASSES = 1008
_PRECISION = jax.lax.Precision.HIGHEST
Pair = tuple[int, int]


def resize(images: Float[Array, "b h w c"], side: int = SIDE) -> Float[Array, "b side side c"]:
    """Bilinear, the corner of pixel (0, 0) kept in place: out[i] is read at i * in / out.

    No smoothing when it shrinks, and the last pixel repeats: as TensorFlow 1 did.
    """

    def along(images: Float[Array, "b h w c"], axis: int) -> Float[Array, "b h w c"]:
        size = images.shape[axis]
        place = jnp.arange(side, dtype=jnp.float32) * jnp.float32(size / side)
        low = jnp.floor(place).astype(jnp.int32)
        high = jnp.minimum(low + 1, size - 1)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        first, second = jnp.take(images, low, axis), jnp.take(images, high, axis)
        return first + (second - first) * share

    return along(along(images, 2), 1)


class Conv(nn.Module):
    """Convolution without bias, normalisation by stored statistics (epsilon 1e-3), ReLU."""

    channels: int
    kernel: Pair
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 channels"]:
        x = nn.Conv(
            self.channels,
            self.kernel,
            (self.stride, self.stride),
            padding=self.padding,
            use_bias=False,
            precision=_PRECISION,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _max_pool(x: Float[Array, "b h w c"], stride: int, padding: str) -> Float[Array, "b h2 w2 c"]:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


# A branch is a chain of (name, channels, kernel); a list at its end are layers side by side.
_ONE, _THREE, _FIVE, _WIDE, _TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class Mixed(nn.Module):
    """Branches side by side, then the pooled input, along channels.

    Attributes:
      branches: chains of layers. pool: channels of the layer after the pooling, 0 for none.
      maximum: the pooling takes maxima, not means.
      stride: 2 halves the sides: the last layer of each chain and the pooling step by 2.
    """

    branches: Sequence[Sequence]
    pool: int = 0
    maximum: bool = False
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        found = []
        for chain in self.branches:
            y = x
            for i, layer in enumerate(chain):
                last = self.stride == 2 and i == len(chain) - 1
                step = (2, "VALID") if last else (1, "SAME")
                if isinstance(layer[0], str):
                    name, channels, kernel = layer
                    y = Conv(channels, kernel, *step, name=name)(y)
                else:
                    y = jnp.concatenate([Conv(c, k, name=n)(y) for n, c, k in layer], -1)
            found.append(y)
        if self.stride == 2:
            pooled = _max_pool(x, 2, "VALID")
        else:
            pooled = _max_pool(x, 1, "SAME") if self.maximum else _mean_pool(x)
        if self.pool:
            pooled = Conv(self.pool, _ONE, name="branch_pool")(pooled)
        return jnp.concatenate([*found, pooled], -1)


def _early(pool: int) -> dict:
    return dict(
        branches=(
            (("branch1x1", 64, _ONE),),
            (("branch5x5_1", 48, _ONE), ("branch5x5_2", 64, _FIVE)),
            (
                ("branch3x3dbl_1", 64, _ONE),
                ("branch3x3dbl_2", 96, _THREE),
                ("branch3x3dbl_3", 96, _THREE),
            ),
        ),
        pool=pool,
    )


def _middle(width: int) -> dict:
    return dict(
        branches=(
            (("branch1x1", 192, _ONE),),
            (
                ("branch7x7_1", width, _ONE),
                ("branch7x7_2", width, _WIDE),
                ("branch7x7_3", 192, _TALL),
            ),
            (
                ("branch7x7dbl_1", width, _ONE),
                ("branch7x7dbl_2", width, _TALL),
                ("branch7x7dbl_3", width, _WIDE),
                ("branch7x7dbl_4", width, _TALL),
                ("branch7x7dbl_5", 192, _WIDE),
            ),
        ),
        pool=192,
    )


def _late(maximum: bool) -> dict:
    def split(name: str) -> tuple:
        return ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))

    return dict(
        branches=(
            (("branch1x1", 320, _ONE),),
            (("branch3x3_1", 384, _ONE), split("branch3x3_2")),
            (
                ("branch3x3dbl_1", 448, _ONE),
                ("branch3x3dbl_2", 384, _THREE),
                split("branch3x3dbl_3"),
            ),
        ),
        pool=192,
        maximum=maximum,
    )


_HALVE_6A = dict(
    branches=(
        (("branch3x3", 384, _THREE),),
        (
            ("branch3x3dbl_1", 64, _ONE),
            ("branch3x3dbl_2", 96, _THREE),
            ("branch3x3dbl_3", 96, _THREE),
        ),
    ),
    stride=2,
)
_HALVE_7A = dict(
    branches=(
        (("branch3x3_1", 192, _ONE), ("branch3x3_2", 320, _THREE)),
        (
            ("branch7x7x3_1", 192, _ONE),
            ("branch7x7x3_2", 192, _WIDE),
            ("branch7x7x3_3", 192, _TALL),
            ("branch7x7x3_4", 192, _THREE),
        ),
    ),
    stride=2,
)
_TO_768 = {
    "Mixed_5b": _early(32),
    "Mixed_5c": _early(64),
    "Mixed_5d": _early(64),
    "Mixed_6a": _HALVE_6A,
    "Mixed_6b": _middle(128),
    "Mixed_6c": _middle(160),
    "Mixed_6d": _middle(160),
    "Mixed_6e": _middle(192),
}
_TO_2048 = {"Mixed_7a": _HALVE_7A, "Mixed_7b": _late(False), "Mixed_7c": _late(True)}


class Inception(nn.Module):
    """Features of uint8 pictures of any size."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b d"]]:
        """The means over pixels of four stages, and logits without and with biases (WIDTHS)."""
        x = (resize(images.astype(jnp.float32)) - 128) / 128
        x = Conv(32, _THREE, 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, _THREE, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _max_pool(Conv(64, _THREE, name="Conv2d_2b_3x3")(x), 2, "VALID")
        found = {"64": x.mean((1, 2))}
        x = Conv(80, _ONE, name="Conv2d_3b_1x1")(x)
        x = _max_pool(Conv(192, _THREE, 1, "VALID", name="Conv2d_4a_3x3")(x), 2, "VALID")
        found["192"] = x.mean((1, 2))
        for stage, blocks in (("768", _TO_768), ("2048", _TO_2048)):
            for name, settings in blocks.items():
                x = Mixed(**settings, name=name)(x)
            found[stage] = x.mean((1, 2))
        fc = nn.Dense(CLASSES, precision=_PRECISION, name="fc")
        found["logits"] = fc(found["2048"])
        bias = fc.variables["params"]["bias"]
        found["logits_unbiased"] = found["logits"] - bias
        return found
