"""Thresholding of clean-image predictions: guidance must not leave the range of pictures."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

DYNAMIC_QUANTILE = 0.995
DYNAMIC_MAX = 100.0


def clip(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Static thresholding: clips the clean-image prediction to [-1, 1]."""
    return jnp.clip(x0, -1.0, 1.0)


def dynamic(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Dynamic thresholding (Saharia et al. 2022, Sec. 2.3) with ml-mdm's constants.

    Each picture is clipped to [-s, s] and divided by s, the 0.995 quantile of its absolute
    values, kept within [1, 100].
    """
    magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
    s = jnp.clip(jnp.quantile(magnitude, DYNAMIC_QUANTILE, axis=1), 1.0, DYNAMIC_MAX)
    s = s[:, None, None, None]
    return jnp.clip(x0, -s, s) / s


def _unbounded(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return x0


# 'none' is for data that is not a picture, such as the 2-D toy.
THRESHOLDS = {"clip": clip, "dynamic": dynamic, "none": _unbounded}
