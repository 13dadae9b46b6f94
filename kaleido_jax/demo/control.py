"""Whether pictures show what was written: each picture is held against its own latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.data import shapes_detector as detector
from kaleido_jax.data.shapes_text import read_grounded
from kaleido_jax.latents import LatentDocument, bbox

# What blind guessing among the modes would reach; boxes that miss share nothing.
CHANCE = {"background": 1 / 5, "layout": 1 / 4, "shade": 1 / 3, "shape": 1 / 4, "box IoU": 0.0}


def followed(
    images: UInt8[np.ndarray, "n size size 3"], documents: Sequence[LatentDocument]
) -> Mapping[str, float]:
    """How well pictures follow the grounded captions they were drawn from.

    Returns:
      A value in 0..1 for each name of CHANCE: the share of pictures with the written background
      and, where both objects are seen, the written layout; the share of seen objects of the
      written shade and shape; the mean overlap of written boxes with the objects of their hues, 0
      for an object that is not seen. NaN where nothing was written or seen.
    """
    found: dict[str, list[float]] = {name: [] for name in CHANCE}
    for image, document in zip(images, documents, strict=True):
        if "bbox" not in document.latents:  # the model wrote nothing valid
            continue
        claims, layout, background = read_grounded(bbox.parse(document.latents["bbox"]))
        reading = detector.read(image)
        if background is not None:
            found["background"].append(reading.background == background)
        hues = [claim.hue for claim in claims]
        if layout is not None and len(hues) > 1 and None not in hues[:2]:
            seen = reading.layout(hues[0], hues[1])
            if seen is not None:
                found["layout"].append(seen == layout)
        for claim in claims:
            item = None if claim.hue is None else reading.by_hue(claim.hue)
            overlap = 0.0 if item is None else float(detector.box_iou(item.box, _corners(claim)))
            found["box IoU"].append(overlap)
            if item is not None:
                found["shade"].append(item.shade == claim.shade)
                found["shape"].append(item.shape == claim.shape)
    return {
        name: float(np.mean(values)) if values else float("nan") for name, values in found.items()
    }


def _corners(claim) -> tuple[int, int, int, int]:
    box = claim.figure
    return box.x1, box.y1, box.x2, box.y2
