"""One unit of a build: an input shard and its sidecars, joined by key into one file of records.

Runs in Beam's workers. What is left in the folder says everything: the file of records, beside it
`.done.json` (written last), or `.refused.json` where the user has to mend something.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kaleido_jax import beside, sidecars
from kaleido_jax.data import tf_example
from kaleido_jax.data.build_inputs import Content, Skipped, Stored, Unit, open_unit
from kaleido_jax.data.record_source import LATENT_NAMES
from kaleido_jax.data.transforms import ImageError, training_picture
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS, LatentError

ABSENT = "absent"  # the status of a latent that no stage has written
_NAMED = 5  # keys that an error names


@dataclass(frozen=True)
class Job:
    """What every unit of a build has in common.

    Attributes:
      folder: where files are laid down until the build is whole.
      size: side of the pictures.
      encoding: "jpeg" or "png".
      quality: of JPEG, 1 to 100.
      file_format: "array_record" or "tfrecord".
      annotations: split -> folder of sidecars, for splits that have one.
      class_names: label -> caption; None keeps the captions of the input.
    """

    folder: str
    size: int
    encoding: str
    quality: int
    file_format: str
    annotations: Mapping[str, str]
    class_names: Mapping[str, str] | None


@dataclass(frozen=True)
class Done:
    """What became of a unit.

    Attributes:
      records: in the file; without any there is no file.
      bytes, sha256: of the file.
      statuses: latent -> status -> records.
      skipped: what is not in the file, and why.
      unlisted: keys known from the sidecars that a broken shard no longer lists.
      whole: whether the shard could be listed to its end.
    """

    records: int
    bytes: int
    sha256: str
    statuses: dict[str, dict[str, int]]
    skipped: list[Skipped]
    unlisted: int
    whole: bool


def build_unit(job: Job, unit: Unit) -> None:
    """Writes a unit's file and `.done.json`, unless they are there; or `.refused.json`."""
    if read_done(job, unit) is not None:
        return
    refused = refused_path(job, unit)
    try:
        _build(job, unit)
    except UserError as error:
        _write(refused, {"error": str(error)})


def unit_path(job: Job, unit: Unit) -> Path:
    """The unit's file of records, until the build is whole."""
    return Path(job.folder) / f"{unit.split}.{unit.name}.{job.file_format}"


def refused_path(job: Job, unit: Unit) -> Path:
    """The file that says why a unit cannot be built."""
    return Path(job.folder) / f"{unit.split}.{unit.name}.refused.json"


def read_done(job: Job, unit: Unit) -> Done | None:
    """What became of a unit; None unless it is finished and its file is whole."""
    try:
        found = json.loads(_done_path(job, unit).read_bytes())
        skipped = [Skipped(*item) for item in found.pop("skipped")]
        done = Done(**found, skipped=skipped)
        if done.records and hash_file(unit_path(job, unit)) != done.sha256:
            return None
        return done
    except (OSError, ValueError, TypeError, KeyError):
        return None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_picture(pixels: UInt8[np.ndarray, "h w 3"], encoding: str, quality: int) -> bytes:
    """The picture as JPEG or PNG.

    Colour is stored at full resolution up to 128 pixels a side, above at half: small pictures
    would lose visibly.
    """
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if encoding == "png":
        picture.save(buffer, "PNG")
    else:
        halved = 2 if max(picture.size) > 128 else 0
        picture.save(buffer, "JPEG", quality=quality, subsampling=halved, optimize=True)
    return buffer.getvalue()


# ---- one unit ---------------------------------------------------------------------------------


def _build(job: Job, unit: Unit) -> None:
    from tensorflow_datasets.core import file_adapters

    content = open_unit(unit, job.size)
    rows = _join(job, unit, content)
    skipped = list(content.lost)
    statuses = {name: Counter() for name in LATENT_NAMES}
    path = unit_path(job, unit)
    temporary = beside.hidden(path)
    written = 0

    def examples() -> Iterator[tuple[int, bytes]]:
        nonlocal written
        for stored in content.examples:
            record = stored if isinstance(stored, Skipped) else _record(job, stored, rows)
            if isinstance(record, Skipped):
                skipped.append(record)
                continue
            features, found = record
            for name, status in found.items():
                statuses[name][status] += 1
            yield written, tf_example.write(features)
            written += 1

    writer = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat(job.file_format)]
    try:
        writer.write_examples(temporary, examples())
        if written:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    known = set(content.keys) | {item.key for item in content.lost}
    done = Done(
        records=written,
        bytes=path.stat().st_size if written else 0,
        sha256=hash_file(path) if written else "",
        statuses={name: dict(sorted(counts.items())) for name, counts in statuses.items()},
        skipped=skipped,
        unlisted=len(set().union(*rows.values()) - known) if rows else 0,
        whole=content.whole,
    )
    _write(_done_path(job, unit), dataclasses.asdict(done))


def _join(job: Job, unit: Unit, content: Content) -> dict[str, dict[str, sidecars.Row]]:
    """Latent -> key -> row of the unit's sidecars, {} without annotation.

    Raises:
      UserError: a shard that was not annotated, or not as it is now; keys that do not match.
    """
    folder = job.annotations.get(unit.split)
    if folder is None:
        return {}
    stages = sidecars.read_manifest(folder)["stages"]
    rows = {}
    for name in LATENT_NAMES:
        if name not in stages:
            continue
        shard = stages[name]["shards"].get(unit.name)
        if shard is None:
            raise UserError(
                f"{folder}: stage {name} has no shard {unit.name!r}; annotate the same shards that "
                "are built"
            )
        for what, value in shard.get("source", {}).items():
            now = dict(unit.source).get(what, value)
            if what != "whole" and now != value and content.whole:
                raise UserError(
                    f"{unit.place} has {now} {what}, but had {value} when stage {name} was "
                    "annotated; run `kaleido annotate` again"
                )
        rows[name] = {row.key: row for row in sidecars.read_shard(folder, name, unit.name)}
        _compare(folder, name, unit, content, rows[name])
    return rows


def _compare(
    folder: str, stage: str, unit: Unit, content: Content, rows: Mapping[str, sidecars.Row]
) -> None:
    """Keys of a shard and of its sidecar must be the same.

    A key that the index leaves out may be annotated or not; of a shard that ends early, more may
    have been annotated than can be read now.
    """
    listed = set(content.keys)
    left_out = {item.key for item in content.lost}
    bare = [key for key in content.keys if key not in rows]
    stray = [key for key in rows if key not in listed and key not in left_out]
    if bare:
        raise UserError(
            f"{folder}: stage {stage} says nothing of {_some(bare)} in {unit.place}; annotate the "
            "same shards that are built"
        )
    if stray and content.whole:
        raise UserError(
            f"{folder}: stage {stage} has keys that are not in {unit.place}: {_some(stray)}; "
            "annotate the same shards that are built"
        )


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _record(
    job: Job, stored: Stored, rows: Mapping[str, Mapping[str, sidecars.Row]]
) -> tuple[dict[str, Any], dict[str, str]] | Skipped:
    """The features of an example and the status of each latent, or why it is skipped."""
    latents, statuses = {}, {}
    for name in LATENT_NAMES:
        if stored.latents is not None:
            latents[name] = stored.latents.get(name, "")
            statuses[name] = "ok" if latents[name] else "empty"
        elif name in rows:
            row = rows[name][stored.key]
            latents[name], statuses[name] = row.latent, row.status
        else:
            latents[name], statuses[name] = "", ABSENT
        try:
            if latents[name]:
                LATENTS[name].parse(latents[name])
        except LatentError as error:
            return Skipped(stored.key, "latent", f"{name}: {error}")
    caption = stored.caption
    if job.class_names is not None:
        label = stored.metadata.get("label")
        if label not in job.class_names:
            raise UserError(f"{stored.key}: there is no name for its class {label!r}")
        caption = job.class_names[label]
    try:
        pixels = stored.image
        if isinstance(pixels, bytes):
            pixels, _, _ = training_picture(pixels, job.size)
    except ImageError as error:
        return Skipped(stored.key, "picture", str(error))
    texts = {"key": stored.key, "caption": caption, **latents}
    try:
        features: dict[str, Any] = {name: [text.encode()] for name, text in texts.items()}
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return Skipped(stored.key, "record", "the caption is not text that UTF-8 can hold")
    features["image"] = [encode_picture(pixels, job.encoding, job.quality)]
    features["height"] = features["width"] = [job.size]
    return features, statuses


def _done_path(job: Job, unit: Unit) -> Path:
    return Path(job.folder) / f"{unit.split}.{unit.name}.done.json"


def _write(path: Path, value: Any) -> None:
    with beside.new_file(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")
