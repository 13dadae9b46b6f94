"""Latents for pictures that lack them: engines by string, and the pipeline that runs them."""

from __future__ import annotations
