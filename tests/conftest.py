"""What holds for every test: a CPU seen as eight devices, quick compilation, a shared cache.

Set before the first import of jax, in every pytest-xdist worker.
"""

from __future__ import annotations

import os
import pathlib

import pytest

# Tests compile much and compute little: without LLVM's optimisations the suite takes half the time.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()


def pytest_configure(config: pytest.Config) -> None:
    """Runs on the CPU unless the tests for an accelerator were asked for."""
    if "gpu" not in config.getoption("-m").replace("not gpu", ""):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cache = pathlib.Path(config.rootpath) / ".pytest_cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
