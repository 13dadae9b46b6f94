"""Kaleido Diffusion in JAX: draw discrete latents first, then denoise with them.

`import kaleido_jax` loads nothing heavy; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Pipeline": "kaleido_jax.generate",
    "LatentDocument": "kaleido_jax.latents.document",
}

__all__ = ["LatentDocument", "Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads `Pipeline` or `LatentDocument` at first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'kaleido_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
