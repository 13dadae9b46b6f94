"""Files on this machine, or on a file system that Beam knows by its scheme (`gs://`, `s3://`).

What lies elsewhere is copied to a temporary folder, worked on there and copied back; a copy in a
bucket appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kaleido_jax.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(place: str) -> bool:
    """Whether a place has a scheme."""
    return "://" in place


def stem(place: str) -> str:
    """A file's name without folders and its last ending."""
    return PurePosixPath(place).stem


def list_remote(place: str) -> list[str]:
    """Shards elsewhere: a .tar, a range or a pattern of them, or a folder, in order.

    Raises:
      UserError: there are none, or Beam does not know the scheme.
    """
    found = _RANGE.search(place)
    if found:
        first, last = found[1], found[2]
        if not 0 <= int(last) - int(first) <= 10**6:
            raise UserError(f"{place}: the range must rise, by at most a million")
        return [
            place[: found.start()] + str(n).zfill(len(first)) + place[found.end() :]
            for n in range(int(first), int(last) + 1)
        ]
    pattern = place if place.endswith(".tar") else place.rstrip("/") + "/*.tar"
    names = sorted(metadata.path for metadata in _match(pattern))
    if not names:
        raise UserError(f"no shard matches {pattern}")
    return names


def size(place: str) -> int:
    """Bytes of a file; -1 where there is none."""
    if not is_remote(place):
        return os.path.getsize(place) if os.path.isfile(place) else -1
    found = _match(place)
    return found[0].size_in_bytes if found else -1


def fetch(place: str, folder: str) -> str:
    """A path on this machine: the place itself, or a copy in `folder`, absent if it is."""
    if not is_remote(place):
        return place
    path = os.path.join(folder, PurePosixPath(place).name)
    if _match(place):
        _pull(place, path)
    return path


class Folder:
    """An output folder here or elsewhere.

    Args:
      place: its path or URL.
    """

    def __init__(self, place: str):
        self.place = place.rstrip("/")
        self.remote = is_remote(place)

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """The folder itself, or a temporary one to stand for it."""
        if not self.remote:
            yield Path(self.place)
            return
        with tempfile.TemporaryDirectory(prefix="kaleido-annotate-") as name:
            yield Path(name)

    def pull(self, local: Path, *names: str) -> None:
        """Copies those of the named files that exist into the local folder."""
        for name in names if self.remote else ():
            if _match(f"{self.place}/{name}"):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                _pull(f"{self.place}/{name}", str(local / name))

    def push(self, local: Path, *names: str) -> None:
        """Copies those of the named files that exist back, in this order."""
        from apache_beam.io.filesystems import FileSystems

        for name in names if self.remote else ():
            if not (local / name).is_file():
                continue
            with (
                open(local / name, "rb") as source,
                FileSystems.create(f"{self.place}/{name}", "application/octet-stream") as target,
            ):
                shutil.copyfileobj(source, target)

    def names(self, stage: str, ending: str) -> set[str]:
        """Names of a stage's files with this ending."""
        if self.remote:
            found = _match(f"{self.place}/{stage}/*{ending}")
            return {PurePosixPath(metadata.path).name for metadata in found}
        return {path.name for path in Path(self.place, stage).glob(f"*{ending}")}


def _match(pattern: str) -> list:
    from apache_beam.io.filesystems import FileSystems

    try:
        return FileSystems.match([pattern])[0].metadata_list
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{pattern}: {reason}") from error


def _pull(place: str, path: str) -> None:
    from apache_beam.io.filesystems import FileSystems

    with FileSystems.open(place, "application/octet-stream") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)
