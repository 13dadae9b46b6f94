"""One writer at a time for a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from kaleido_jax.errors import UserError


class BusyError(UserError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path, command: str) -> Iterator[None]:
    """Makes a folder and keeps other writers out of it until the block, or the process, ends.

    Args:
      folder: made with its parents; the lock is its file `.lock`, which stays.
      command: who writes, for the message.

    Raises:
      UserError: the folder cannot be written.
      BusyError: another process is writing to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another `{command}` is writing to {folder}") from error
        yield
