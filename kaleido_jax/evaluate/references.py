"""Features of the data, computed once and kept under a hash of (data, feature, resize, number).

REFERENCES/HASH/000000.npy ...   features
REFERENCES/HASH/statistics.npz   mean and covariance of all
REFERENCES/HASH/manifest.json    what they are, and a SHA-256 per file
REFERENCES/.HASH.partial/...     the same while it is made, kept when that is stopped
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from kaleido_jax import checkpoint
from kaleido_jax.data import RecordError
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.features import Feature
from kaleido_jax.evaluate.pictures import write_array
from kaleido_jax.metrics import frechet
from kaleido_jax.metrics.rows import Rows

_PART = 1000
Tick = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class References:
    """Features of `count` true pictures, their moments, and the hash of both."""

    features: Rows
    moments: frechet.Moments
    hash: str
    count: int


def open_references(
    folder: pathlib.Path,
    data: Data,
    feature: Feature,
    count: int,
    tick: Tick = lambda count: None,
) -> References:
    """The references of some data, from `folder` or computed and put there.

    Args:
      folder: of all references.
      count: training pictures; 0 is all of them.
      tick: is told the number of pictures of each part.

    What was stopped goes on where it stopped; a process waits while another makes the same.

    Raises:
      UserError: more pictures than there are, too many unreadable, the folder cannot be written.
    """
    count = checked_count(count, data)
    what = {
        "version": 1,
        "data": {name: data.describe()[name] for name in ("source", "size")},
        "fingerprint": data.fingerprint(),
        "feature": feature.describe(),
        "count": count,
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / key
    problem = checkpoint.manifest_problem(place) if place.exists() else None
    if problem:
        raise UserError(f"references {place} are damaged: {problem}; delete the folder")
    if not place.exists():
        _make(place, what, data, feature, count, tick)
    with np.load(place / "statistics.npz", allow_pickle=False) as file:
        moments = frechet.Moments(int(file["count"]), file["mean"], file["covariance"])
    rows = Rows(sorted(place.glob("*.npy")))
    return References(rows, moments, checkpoint.manifest_hash(place), len(rows))


def checked_count(count: int, data: Data) -> int:
    """The number of references, 0 being all; UserError where the data hold fewer."""
    if count > len(data):
        raise UserError(f"{count} references asked for; the data hold {len(data)}")
    return count or len(data)


def _read(
    data: Data, numbers: range
) -> tuple[list[UInt8[np.ndarray, "h w 3"]], RecordError | None]:
    """The references that can be read, and the last error."""
    images, last = [], None
    for number in numbers:
        try:
            images.append(data.reference(number))
        except RecordError as error:
            last = error
    return images, last


def _check_bad(data: Data, bad: int, count: int, last: RecordError | None) -> None:
    if last is not None and bad > max(1, data.max_bad_fraction * count):
        raise UserError(
            f"{bad} of {count} records cannot be read; the last: {last.where}: {last}"
        ) from last


def _make(
    place: pathlib.Path, what: dict, data: Data, feature: Feature, count: int, tick: Tick
) -> None:
    partial = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(f".{place.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if place.exists():  # another evaluation was first with the same
                return
            for left in partial.glob(".*.tmp"):  # of a killed write
                left.unlink()
            bad = 0
            for first in range(0, count, _PART):
                path = partial / f"{first // _PART:06d}.npy"
                numbers = range(first, min(first + _PART, count))
                if not path.exists():
                    images, error = _read(data, numbers)
                    bad += len(numbers) - len(images)
                    _check_bad(data, bad, count, error)
                    if not images:  # the last part may be one record that cannot be read
                        continue
                    write_array(path, feature.compute(np.stack(images))[0])
                else:
                    bad += len(numbers) - len(np.load(path, mmap_mode="r", allow_pickle=False))
                tick(len(numbers))
            if count - bad < 2:
                raise UserError(f"{count - bad} references can be read; at least 2 are needed")
            moments = frechet.moments(Rows(sorted(partial.glob("*.npy"))))
            np.savez(partial / "statistics.npz", **dataclasses.asdict(moments))
            manifest = what | {"files": checkpoint.hash_files(partial)}
            checkpoint.write_json(partial / "manifest.json", manifest)
            os.replace(partial, place)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror or error}") from error
