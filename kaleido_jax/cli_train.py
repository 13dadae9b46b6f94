"""What `kaleido train` adds to training: sample grids.

Training never imports generation; the two meet here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from kaleido_jax import bundle, generate, mesh
from kaleido_jax.data import RecordError, Source, make_source
from kaleido_jax.errors import UserError
from kaleido_jax.prompts import clean_prompt


def sample_hook(
    config: ConfigDict,
) -> Callable[[int, bundle.Bundle], UInt8[np.ndarray, "h w 3"] | None]:
    """The function that draws the sample grid of a step: the first captions of the data.

    The same captions and random numbers at every step. It gives None where the data are not
    pictures (the two-dimensional toy).

    Raises:
      UserError: the data cannot be read, or hold no caption to sample.
    """
    source = make_source(config.data.source)
    captions = first_captions(source, config.train.num_samples)
    if not captions:
        raise UserError("the data hold no caption to sample; set --config.train.sample_every=0")

    def draw(step: int, model: bundle.Bundle) -> UInt8[np.ndarray, "h w 3"] | None:
        del step
        if config.data.channels != 3:
            return None
        # Of several processes one draws, on its own devices.
        devices = mesh.make_mesh(devices=jax.local_devices())
        output = generate.Pipeline(model, devices)(captions, num_images=1, seed=config.seed)
        return generate.grid(output.images)

    return draw


def first_captions(source: Source, count: int) -> list[str]:
    """Up to `count` usable captions, of the first 4 * count examples."""
    found: list[str] = []
    for index in range(min(len(source), 4 * count)):
        if len(found) == count:
            break
        try:
            found.append(clean_prompt(source[index]["caption"]))
        except (RecordError, UserError):
            continue  # the loader counts and names bad records; a grid can do without them
    return found
