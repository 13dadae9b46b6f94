"""Python functions within tf.data, such that the interpreter can still exit.

tf.data goes on calling from its own threads as long as an iterator lives, which may be until the
interpreter is taken apart; a call that is under way then waits for ever, and the process with it.
So calls end before that: once the interpreter starts to exit, data sets end, and what is under way
is waited for.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

_QUIET, _LONGEST = 0.05, 5.0  # seconds without a call; seconds to wait at most


class _Calls:
    def __init__(self):
        self._lock = threading.Lock()
        self._active = self._total = 0
        self._closing = False

    def guard(self, function: Callable) -> Callable:
        """The function, counted; when the interpreter exits it ends the data set instead."""

        def call(*args: Any) -> Any:
            with self._lock:
                self._total += 1
                if self._closing:
                    raise StopIteration
                self._active += 1
            try:
                return function(*args)
            finally:
                with self._lock:
                    self._active -= 1

        return call

    def close(self) -> None:
        """No call from now on; returns when none has come or run for a while."""
        self._closing = True
        before, deadline = -1, time.monotonic() + _LONGEST
        while (self._active or self._total != before) and time.monotonic() < deadline:
            before = self._total
            time.sleep(_QUIET)


_CALLS = _Calls()
atexit.register(_CALLS.close)


def python_call(function: Callable, inputs: Sequence[tf.Tensor], kinds: Any) -> Any:
    """tf.numpy_function for stateless functions, ended before the interpreter is."""
    return tf.numpy_function(_CALLS.guard(function), inputs, kinds, stateful=False)
