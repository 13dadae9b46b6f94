"""The page: people read and edit latents and see the picture change (`kaleido serve`)."""

from __future__ import annotations
