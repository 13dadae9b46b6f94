"""Visual tokens by finite scalar quantisation (Mentzer et al. 2023), fitted without training.

The patches of the embedded tokenizer (models/voken_tokenizer.py), their first principal
components, and each component rounded to its own few levels. Its normal distribution squashes a
component first, so that the levels are used about equally. (16, 8, 8, 8) levels give 8192 codes;
nothing is learnt but mean, components and deviations. Coarser than k-means: an example of the
kind, and the form in which a trained encoder would come.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int, UInt8

from kaleido_jax.annotate.models import file_sha256
from kaleido_jax.annotate.visual_tokens import VokenEngine
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models.voken_tokenizer import (
    all_patches,
    principal_components,
    read_codebook,
)

LEVELS = (16, 8, 8, 8)  # the first component, which varies most, has the most


class FsqTokenizer:
    """Patches to ids, component by component.

    Attributes:
      mean: [V] mean patch, basis: [K, V] components, scale: [K] their deviations.
      levels: [K] how many levels each has; their product is the number of codes.

    Raises:
      UserError: arrays that do not fit together, or too many codes.
    """

    def __init__(
        self,
        mean: Float[np.ndarray, " v"],
        basis: Float[np.ndarray, "k v"],
        scale: Float[np.ndarray, " k"],
        levels: Sequence[int],
    ):
        self.mean, self.basis, self.scale = (
            np.asarray(a, np.float32) for a in (mean, basis, scale)
        )
        self.levels = tuple(int(level) for level in levels)
        fits = (
            self.basis.shape == (len(self.levels), len(self.mean))
            and self.scale.shape == (len(self.levels),)
            and all(np.isfinite(a).all() for a in (self.mean, self.basis, self.scale))
            and (self.scale > 0).all()
            and min(self.levels) >= 2
        )
        if not fits or self.num_codes > voken.MAX_CODES:
            raise UserError(
                "the FSQ codebook's arrays do not fit together, or it has too many codes"
            )

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return math.prod(self.levels)

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, "n 32"]:
        """Ids of square pictures, patches row by row."""
        from scipy.special import ndtr  # the normal distribution; needed here only

        values = (all_patches(images) - self.mean) @ self.basis.T / self.scale
        levels = np.array(self.levels)
        digits = np.minimum((ndtr(values) * levels).astype(np.int64), levels - 1)
        places = np.cumprod([1, *self.levels[:-1]])
        return (digits * places).sum(1).reshape(len(images), voken.COUNT)

    def save(self, path: str | Path | BinaryIO) -> None:
        """Write as .npz, to a path that ends so or to a file."""
        np.savez_compressed(
            path, mean=self.mean, basis=self.basis, scale=self.scale, levels=np.array(self.levels)
        )

    @classmethod
    def load(cls, path: str | Path) -> FsqTokenizer:
        """Read what `save` wrote. Raises UserError where it is missing or is no such file."""
        mean, basis, scale, levels = read_codebook(path, "mean", "basis", "scale", "levels")
        if levels.ndim != 1 or levels.dtype.kind != "i" or not len(levels):
            raise UserError(f"{path} is not an FSQ codebook: 'levels' must be whole numbers")
        return cls(mean, basis, scale, levels.tolist())


def fit(images: UInt8[np.ndarray, "n h w 3"], levels: Sequence[int] = LEVELS) -> FsqTokenizer:
    """Mean, components and deviations of the patches of square pictures.

    Raises:
      UserError: patches without variance, or bad levels.
    """
    rows = all_patches(images)
    mean, basis = principal_components(rows, len(levels))
    return FsqTokenizer(mean, basis, ((rows - mean) @ basis.T).std(0), levels)


def fsq_engine(stage: str, argument: str, batch_size: int = 64) -> VokenEngine:
    """Engine `fsq:FILE.npz` for voken.

    Args:
      stage, argument: as `make_engine`; the codebook that `fit` made.
      batch_size: pictures at once.

    Raises:
      UserError: no such file, or no codebook.
    """
    if not argument:
        raise UserError("engine 'fsq' needs a codebook: fsq:FILE.npz")
    provenance = {
        "engine": "fsq",
        "model": Path(argument).name,
        "sha256": file_sha256(argument),
        "parameters": {"levels": list(FsqTokenizer.load(argument).levels)},
    }
    return VokenEngine(functools.partial(FsqTokenizer.load, argument), provenance, batch_size)
