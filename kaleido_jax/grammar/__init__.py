"""Grammar-constrained decoding: every latent that the decoder writes parses."""

from __future__ import annotations

from kaleido_jax.grammar.compiler import Tables, compile_tables
from kaleido_jax.grammar.mask import State, advance, allowed, start

__all__ = ["State", "Tables", "advance", "allowed", "compile_tables", "start"]
