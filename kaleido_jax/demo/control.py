"""Whether pictures show what was written: each picture is held against its own latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.evaluate.adherence import ShapesDetector
from kaleido_jax.latents import LatentDocument

# What blind guessing among the modes would reach; boxes that miss share nothing.
CHANCE = {"background": 1 / 5, "layout": 1 / 4, "shade": 1 / 3, "shape": 1 / 4, "box IoU": 0.0}


def followed(
    images: UInt8[np.ndarray, "n size size 3"], documents: Sequence[LatentDocument]
) -> Mapping[str, float]:
    """How well pictures follow the grounded captions they were drawn from.

    Returns:
      The mean of each measure of adherence.ShapesDetector that CHANCE names; NaN where nothing was
      written or seen.
    """
    found = ShapesDetector().judge(images, documents)
    measures = {name: found.get(name.replace(" ", "_").lower(), []) for name in CHANCE}
    return {
        name: float(np.mean([value for _, value in values])) if values else float("nan")
        for name, values in measures.items()
    }
