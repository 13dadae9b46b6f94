"""Files and folders made beside their place and renamed to it, so that nobody finds half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def hidden(path: Path) -> Path:
    """A name beside `path` that no other run uses: `.NAME.HEX.tmp`.

    Not by the process' number: those of two containers with one folder may be equal, and a killed
    run may have left a file.
    """
    path = path.absolute()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write the file: renamed to `path` at the end, or removed if anything fails.

    Raises:
      OSError: it cannot be written or renamed.
    """
    temporary = hidden(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, made with its parents: renamed to `folder`, which may be there if empty, at
    the end, or removed if anything fails.

    Raises:
      OSError: it cannot be made or renamed.
    """
    temporary = hidden(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the file, its folders too, and flushes it to disk before it is renamed.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
