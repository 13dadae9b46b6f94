"""Sources of examples, and the loader that makes batches of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kaleido_jax.data.loader import Loader
from kaleido_jax.data.record_source import RecordSource
from kaleido_jax.data.sources import RecordError, ShapesSource, Source
from kaleido_jax.data.task_table import task_source
from kaleido_jax.data.toy import ToySource
from kaleido_jax.data.webdataset import WebDatasetSource
from kaleido_jax.errors import UserError

__all__ = [
    "Loader",
    "RecordError",
    "RecordSource",
    "ShapesSource",
    "Source",
    "ToySource",
    "WebDatasetSource",
    "make_source",
]

SOURCES = {
    "records": RecordSource,
    "shapes": ShapesSource,
    "task": task_source,
    "toy": ToySource,
    "webdataset": WebDatasetSource,
}


def make_source(
    config: Mapping[str, Any], image_size: int | None = None, latents: Sequence[str] = ()
) -> Source:
    """The source that a config names: {"name": one of SOURCES, its settings}.

    Settings are the arguments of the source's class. `image_size` and `latents` (those that z
    needs) serve as `size` and `latents` where the config does not say.

    Raises:
      UserError: an unknown name or setting, a missing folder, a value out of range.
    """
    settings = {key: _plain(value) for key, value in config.items() if key != "name"}
    name = config.get("name", "")
    if name not in SOURCES:
        raise UserError(
            f"config key 'data.source.name' is {name!r}; it must be one of {', '.join(SOURCES)}"
        )
    known = inspect.signature(SOURCES[name]).parameters
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(known)})"
            raise UserError(f"unknown config key 'data.source.{key}' for {name}{hint}")
    if image_size is not None and "size" in known:
        settings.setdefault("size", image_size)
    if latents and "latents" in known:
        settings.setdefault("latents", tuple(latents))
    return SOURCES[name](**settings)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
