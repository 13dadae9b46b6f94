"""Compiled programs on disk, so that a second start of the same command compiles nothing."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import tempfile

import jax
import jaxlib

VARIABLE = "KALEIDO_CACHE"
# Programs that compile faster are not worth a file.
_MIN_SECONDS = 0.2


def default_folder() -> pathlib.Path:
    """$KALEIDO_CACHE, or kaleido_jax/compiled under $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(VARIABLE):
        return pathlib.Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    # The standard wants a path that is not absolute ignored.
    root = pathlib.Path(base) if base and os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "kaleido_jax" / "compiled"


def keep(folder: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Lets this process read and write compiled programs in a folder; for commands, at the start.

    What was compiled on another kind of processor, or by another jaxlib, lies in another subfolder
    and is never run here. A folder that jax was given otherwise ($JAX_COMPILATION_CACHE_DIR) stays.

    Args:
      folder: `default_folder()` by default.

    Returns:
      The folder in use; None where it cannot be written, and everything is compiled as without.
    """
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    try:
        place = (default_folder() if folder is None else pathlib.Path(folder)) / machine()
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    return place


def machine() -> str:
    """A name of what compiled code depends on besides the program: processor and jaxlib."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = platform.processor()
    # One processor's lines; frequencies and the like change from moment to moment.
    lines = re.findall(r"^(?:vendor_id|cpu family|model|flags|Features)\b.*$", text, re.M)
    seen = "\n".join([platform.machine(), *sorted(set(lines))])
    return f"{jaxlib.__version__}-{hashlib.sha256(seen.encode()).hexdigest()[:12]}"
