"""A failed save in one line: its reason in words, and no tracebacks of orbax and tensorstore."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def reason(error: Exception) -> str:
    """Why a save failed, in one line: the system's words, if they are in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    return f"{type(error).__name__}: {text[:300]}"


def told_elsewhere(record: logging.LogRecord) -> bool:
    """Lets all records pass but the traceback of a failed save: `wait` tells it in one line."""
    return not (record.exc_info and "orbax" in record.pathname)


def not_of_orbax(record: logging.LogRecord) -> bool:
    """Lets all records pass but those of arrays whose write failed and that nobody waits for.

    Orbax raises the first error of a save, which `wait` tells; asyncio's collector writes a
    traceback for each of the others, perhaps long after.
    """
    text = record.getMessage()
    return not ("was never retrieved" in text and "OCDBT" in text)


class _QuietHook:
    """`sys.unraisablehook` as it was before, but for callbacks of a closed event loop."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, raised: Any) -> None:
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(raised.exc_traceback)]
        closed = isinstance(raised.exc_value, RuntimeError) and "closed" in str(raised.exc_value)
        if not (closed and raised.object is None and all("asyncio" in name for name in frames)):
            self._before(raised)


def quiet_about_closed_loops() -> None:
    """Keeps tensorstore's threads from printing a traceback for each array written too late.

    Orbax closes its event loop at the first error of a save; writes that end afterwards find it
    closed, and what their callbacks raise goes to `sys.unraisablehook`. Twice is as once.
    """
    if not isinstance(sys.unraisablehook, _QuietHook):
        sys.unraisablehook = _QuietHook(sys.unraisablehook)
