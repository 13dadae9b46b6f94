"""What a build was asked for, checked, and the hash of all that decides its records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaleido_jax import sidecars
from kaleido_jax.data.build_inputs import Unit
from kaleido_jax.data.datasets import DataSet
from kaleido_jax.data.record_source import LATENT_NAMES
from kaleido_jax.errors import UserError

FORMAT = 1  # of the records; another one is another data set
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SPLIT = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Build:
    """What `kaleido build` was asked for.

    Attributes:
      dataset: what is built.
      out: ROOT.
      images: split -> shards as `find_units` takes them.
      annotations: split -> folder of sidecars; a split without one gets empty latents.
      size: side of the pictures.
      encoding, quality: of the pictures.
      file_format: "array_record" or "tfrecord".
      version: of the data set, three numbers.
      class_names: label -> caption, or None.
      max_bad_fraction: share of examples that may be skipped or lost.
      data_dir: TFDS's folder.
      flags: Beam's own.
    """

    dataset: DataSet
    out: str
    images: Mapping[str, str]
    annotations: Mapping[str, str] = field(default_factory=dict)
    size: int = 256
    encoding: str = "jpeg"
    quality: int = 95
    file_format: str = "array_record"
    version: str = "1.0.0"
    class_names: Mapping[str, str] | None = None
    max_bad_fraction: float = 0.02
    data_dir: str = ""
    flags: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """The folder of the version."""
        return Path(self.out) / self.dataset.name / str(self.size) / self.version


def check(settings: Build) -> None:
    """Raises UserError for settings that do not fit each other."""
    if not _VERSION.fullmatch(settings.version):
        raise UserError(f"--version {settings.version!r}: three numbers are needed, such as 1.0.0")
    if not settings.images:
        raise UserError("build: no --images")
    for place in (settings.out, *settings.images.values(), *settings.annotations.values()):
        if "://" in place:
            raise UserError(
                f"build: {place} is not on a file system of this machine; mount the bucket or copy "
                "what it holds"
            )
    for split in (*settings.images, *settings.annotations):
        if not _SPLIT.fullmatch(split) or split == "all":
            raise UserError(f"build: {split!r} cannot name a split; 'train' could")
    for split, folder in settings.annotations.items():
        if split not in settings.images:
            raise UserError(f"build: latents for split {split!r}, which has no --images")
        if not set(sidecars.stage_names(folder)) & set(LATENT_NAMES):
            raise UserError(f"{folder} has none of the stages {', '.join(LATENT_NAMES)}")


def summary(settings: Build) -> dict[str, Any]:
    """What decides the records beside the input; in the hash and in the manifest."""
    return {
        "size": settings.size,
        "crop": "largest centred square, after the EXIF turn",
        "encoding": settings.encoding,
        "quality": settings.quality if settings.encoding == "jpeg" else None,
        "file_format": settings.file_format,
        "class_names": settings.class_names and len(settings.class_names),
    }


def config_hash(settings: Build, units: Sequence[Unit]) -> str:
    """Of everything that decides the records, paths aside."""
    sidecar_hashes = {}
    for split, folder in settings.annotations.items():
        stages = sidecars.read_manifest(folder)["stages"]
        sidecar_hashes[split] = {
            name: {shard: done.get("sha256") for shard, done in stages[name]["shards"].items()}
            for name in LATENT_NAMES
            if name in stages
        }
    whole = {
        "format": FORMAT,
        "name": settings.dataset.name,
        "settings": summary(settings),
        "class_names": settings.class_names and dict(settings.class_names),
        "units": [[unit.split, unit.name, dict(unit.source)] for unit in units],
        "sidecars": sidecar_hashes,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
