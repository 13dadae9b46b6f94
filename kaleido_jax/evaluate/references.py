"""Features of the data, computed once and kept under a hash of (data, feature, resize, number).

REFERENCES/HASH/000000.npy ...   features
REFERENCES/HASH/statistics.npz   mean and covariance of all
REFERENCES/HASH/manifest.json    what they are, and a SHA-256 per file
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from kaleido_jax import checkpoint
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.data import Data
from kaleido_jax.evaluate.features import Feature
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

    Raises:
      UserError: more pictures than there are, too many unreadable, the folder cannot be written.
    """
    if count > len(data):
        raise UserError(f"{count} references asked for; the data hold {len(data)}")
    count = count or len(data)
    what = {
        "version": 1,
        "data": data.describe(),
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


def _make(
    place: pathlib.Path, what: dict, data: Data, feature: Feature, count: int, tick: Tick
) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        pictures = data.references(count)
        for part in itertools.count():
            images = list(itertools.islice(pictures, _PART))
            if not images:
                break
            features, _ = feature.compute(np.stack(images))
            np.save(temporary / f"{part:06d}.npy", features, allow_pickle=False)
            tick(len(images))
        moments = frechet.moments(Rows(sorted(temporary.glob("*.npy"))))
        np.savez(temporary / "statistics.npz", **dataclasses.asdict(moments))
        manifest = what | {"files": checkpoint.hash_files(temporary)}
        checkpoint.write_json(temporary / "manifest.json", manifest)
        try:
            os.replace(temporary, place)
        except OSError:
            if not place.exists():  # another evaluation was first with the same
                raise
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
