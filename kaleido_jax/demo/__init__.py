"""`kaleido demo`: the claim of the paper in small, made on this machine, on one page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping


def run(
    out: str | os.PathLike,
    quick: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = print,
    overwrite: bool = False,
    models: Mapping[str, str | os.PathLike] | None = None,
) -> pathlib.Path:
    """Trains the toy, samples shapes, trains shapes for a moment, and writes `out`/index.html.

    Args:
      out: new or empty folder, or that of a former demo, which is replaced.
      quick: a few steps of everything; its numbers mean nothing.
      seed: of all training and sampling, 0..2**32 - 2.
      say: receives one line at a time.
      overwrite: another folder that is in the way is renamed instead of refused.
      models: workdirs or exports of the shapes models 'baseline' and 'kaleido'; those that ship
        with the package by default.

    Returns:
      The page's path.

    Raises:
      UserError: a folder that must not be written, a model that cannot be opened.
    """
    from kaleido_jax.demo import story

    return story.run(out, quick, seed, say, overwrite, models)
