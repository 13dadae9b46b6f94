"""The latents: one grammar per module, their table, documents and drawings."""

from __future__ import annotations

from kaleido_jax.latents.document import (
    LatentDocument,
    load_document,
    png_bytes,
    read_png,
    save_document,
    save_png,
)
from kaleido_jax.latents.errors import (
    DocumentError,
    LatentCharacterError,
    LatentError,
    LatentRangeError,
    LatentSizeError,
    LatentSyntaxError,
    LatentTypeError,
)
from kaleido_jax.latents.panel import panel
from kaleido_jax.latents.table import LATENTS, LatentType, latent_type

__all__ = [
    "LATENTS",
    "DocumentError",
    "LatentCharacterError",
    "LatentDocument",
    "LatentError",
    "LatentRangeError",
    "LatentSizeError",
    "LatentSyntaxError",
    "LatentType",
    "LatentTypeError",
    "latent_type",
    "load_document",
    "panel",
    "png_bytes",
    "read_png",
    "save_document",
    "save_png",
]
