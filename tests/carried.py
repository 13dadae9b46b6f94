"""Reference weights carried through our files before `tests.parity --through` compares them."""

from __future__ import annotations

import contextlib
import contextvars
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax import tensor_files
from kaleido_jax.checkpoint import Checkpoints

WAYS = ("checkpoint", "export")
_WAY: contextvars.ContextVar[str | None] = contextvars.ContextVar("way", default=None)


@contextlib.contextmanager
def through(way: str | None) -> Iterator[None]:
    """Within it `carry` writes parameters in one of WAYS and reads them back."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def carry(params: Any) -> Any:
    """The parameters as they come back from disk, or as they are."""
    if _WAY.get() is None:
        return params
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if _WAY.get() == "export":
            tensor_files.write(folder / "x", traverse.flatten_dict(params, sep="/"))
            found = {name: np.array(t) for name, t in tensor_files.read(folder / "x").items()}
            return traverse.unflatten_dict(found, sep="/")
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, jax.tree.map(jnp.asarray, params), {})
        checkpoints.wait()
        return checkpoints.restore(1, checkpoints.saved_shapes(1))
