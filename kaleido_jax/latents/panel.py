"""One picture with all its latents: shapes on it, mosaic and words below."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kaleido_jax.latents import combined, drawing
from kaleido_jax.latents.errors import LatentError, LatentTypeError
from kaleido_jax.latents.table import latent_type

READABLE = 320  # px: words and numbered cells need about this width
LARGEST = 4096


def panel(
    image: UInt8[np.ndarray, "height width 3"], values: dict[str, str], scale: int | None = None
) -> UInt8[np.ndarray, "taller wider 3"]:
    """An enlarged copy of the picture with its latents drawn on and under it.

    Args:
      image: uint8 [H, W, 3].
      values: latent strings by name, as in records; "" (missing) is left out. A string that its
        grammar does not hold is shown as it is, with the reason, in red.
      scale: whole factor of enlargement; None: as much as makes the words readable.

    Returns:
      uint8 [scale * H + strips, scale * W, 3].

    Raises:
      LatentTypeError: no picture, an unknown latent, a scale under 1 or beyond 4,096 pixels.
    """
    height, width = drawing.check_picture(image).shape[:2]
    if scale is None:
        scale = max(1, min(math.ceil(READABLE / width), LARGEST // max(height, width)))
    if scale < 1 or (scale > 1 and scale * max(height, width) > LARGEST):
        raise LatentTypeError(f"scale {scale} is not in 1..{max(1, LARGEST // max(height, width))}")
    enlarged = Image.fromarray(image).resize(
        (width * scale, height * scale), Image.Resampling.BICUBIC
    )
    picture = np.asarray(enlarged).copy()
    words: list[list[drawing.Span]] = []
    strips = []
    for name, string in _sections(values).items():
        latent = latent_type(name)
        if not string:
            continue
        heading = drawing.Span(name, drawing.GREY)
        try:
            value = latent.parse(string)
        except LatentError as error:
            reason = drawing.Span(f"not valid, {error}:", drawing.ALARM)
            words.append([heading, reason, drawing.Span(str(string)[:400])])
            continue
        if latent.overlay:
            picture = latent.draw(picture, value)
            words.append([heading, *latent.spans(value)])
        elif latent.spans(value):
            words.append([heading, *latent.spans(value)])
        else:
            strips.append((latent, value))
    for latent, value in strips:
        picture = latent.draw(picture, value)
    for spans in words:
        picture = drawing.below(picture, drawing.prose(spans, picture.shape[1]))
    return picture


def _sections(values: dict[str, str]) -> dict[str, str]:
    """The values with a valid `combined` replaced by its sections."""
    try:
        found = combined.split(values["combined"])
    except (KeyError, LatentError):
        return values
    return {**found, **{name: string for name, string in values.items() if name != "combined"}}
