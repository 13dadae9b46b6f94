"""The toy with tiny networks as a config file, for processes that tests start."""

from __future__ import annotations

from ml_collections import ConfigDict

from tests.tiny import tiny_config


def get_config() -> ConfigDict:
    """A constant rate: the program does not depend on the number of steps."""
    return tiny_config("optim.decay=constant", name="toy")
