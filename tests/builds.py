"""Shards, sidecars and builds for tests of `kaleido build`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_jax import sidecars
from kaleido_jax.data import datasets
from tests.test_webdataset import encoded, write_shard

HASH = "0123456789abcdef"


def photograph(number: int, width: int = 60, height: int = 40) -> np.ndarray:
    """A picture of noise of its own, uint8 [height, width, 3]."""
    noise = np.random.default_rng(number)
    return noise.integers(0, 256, (height, width, 3), np.uint8)


def members(number: int, picture: bytes | None = None) -> dict[str, bytes]:
    """The members of record `kNNN`."""
    key = f"k{number:03d}"
    return {
        f"{key}.png": encoded(photograph(number)) if picture is None else picture,
        f"{key}.txt": f"picture {number}".encode(),
        f"{key}.json": json.dumps({"number": number}).encode(),
    }


def write_shards(folder: Path, shards: int = 2, records: int = 4, extra=()) -> list[Path]:
    """Shards of numbered records; `extra` pairs (shard, members) go to their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        held: dict[str, bytes] = {}
        for number in range(shard * records, (shard + 1) * records):
            held |= members(number)
        for where, more in extra:
            if where == shard:
                held |= more
        paths.append(write_shard(folder / f"{shard:05d}.tar", held))
    return paths


def box(key: str) -> str:
    """The latent `bbox` that `annotate` writes of a key."""
    return f"thing ({int(key[-3:])}, 10, 999, 600)"


def annotate(
    folder: Path, rows: Mapping[str, Sequence[sidecars.Row]], stage: str = "bbox", **source: Any
) -> str:
    """Sidecars of one stage, shard -> rows, beside those that are there; the folder as a string."""
    stages = {}
    if (folder / sidecars.MANIFEST).exists():
        stages = dict(sidecars.read_manifest(folder)["stages"])
    done = {
        shard: sidecars.write_sidecar(folder, stage, shard, HASH, held, (), source)
        for shard, held in rows.items()
    }
    stages[stage] = {"engine": "hand", "config_hash": HASH, "shards": done}
    sidecars.write_manifest(folder, stages)
    return str(folder)


def rows(shard: str, keys: Sequence[str]) -> list[sidecars.Row]:
    """A row of a box for each key of a shard."""
    return [sidecars.Row(f"{shard}/{key}", box(key), "ok") for key in keys]


def annotate_shards(folder: Path, shards: int = 2, records: int = 4) -> str:
    """The sidecars of `write_shards`."""
    return annotate(
        folder,
        {
            f"{s:05d}": rows(
                f"{s:05d}", [f"k{n:03d}" for n in range(s * records, (s + 1) * records)]
            )
            for s in range(shards)
        },
    )


def settings(out: Path, images: str | Mapping[str, str], **more: Any):
    """A small build of the data set `tiny`: PNG, 16 pixels."""
    from kaleido_jax.data.build_settings import Build

    given = {"size": 16, "encoding": "png", **more}
    split = {"train": images} if isinstance(images, str) else images
    return Build(dataset=datasets.dataset("tiny"), out=str(out), images=split, **given)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too -> SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
