"""LATENTS: every latent by name. A new one is a module like `text.py` and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from kaleido_jax.latents import bbox, blob, combined, drawing, text, voken
from kaleido_jax.latents.errors import LatentTypeError, excerpt


@dataclass(frozen=True)
class LatentType:
    """One kind of latent.

    Attributes:
      name: its key in records, configs and documents.
      parse: str -> value; raises LatentError, nothing else, whatever the input.
      write: value -> str, parse(write(x)) == x; raises LatentError for an invalid value.
      validate: value -> value, normalised; raises LatentError.
      parts: value -> what documents hold as parsed parts (JSON).
      spans: value -> coloured words for a legend, [] where a picture tells more.
      draw: (image uint8 [H, W, 3], value) -> uint8 [H', W, 3].
      overlay: draw marks the picture itself (H' == H); otherwise it adds a strip below.
      max_chars: no valid string is longer.
    """

    name: str
    parse: Callable[[str], Any]
    write: Callable[[Any], str]
    validate: Callable[[Any], Any]
    parts: Callable[[Any], Any]
    spans: Callable[[Any], list[drawing.Span]]
    draw: Callable[[np.ndarray, Any], np.ndarray]
    overlay: bool
    max_chars: int


def _latent(module: ModuleType) -> LatentType:
    return LatentType(
        module.NAME,
        module.parse,
        module.write,
        module.validate,
        module.parts,
        module.spans,
        module.draw,
        module.OVERLAY,
        module.MAX_CHARS,
    )


LATENTS: dict[str, LatentType] = {
    "text": _latent(text),
    "bbox": _latent(bbox),
    "blob": _latent(blob),
    "voken": _latent(voken),
    "combined": _latent(combined),
}


def latent_type(name: str) -> LatentType:
    """The latent of this name. Raises LatentTypeError naming the nearest."""
    if isinstance(name, str) and name in LATENTS:
        return LATENTS[name]
    near = difflib.get_close_matches(name[:40], LATENTS, 1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LATENTS)}"
    raise LatentTypeError(f"there is no latent {excerpt(name)}; {hint}")
