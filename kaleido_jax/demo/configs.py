"""The configs that the demo trains, on whatever devices there are."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from kaleido_jax import config as config_lib


def load(name: str, changes: Iterable[str]) -> ConfigDict:
    """An installed config with overrides, its batch rounded up to what all devices can share."""
    changes = tuple(changes)
    size = config_lib.load_config(name, changes).train.batch_size
    devices = jax.device_count()
    whole = f"train.batch_size={-(-size // devices) * devices}"
    return config_lib.load_config(name, (*changes, whole))
