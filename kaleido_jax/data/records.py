"""`kaleido build`: records of pictures, captions and latents, as a TFDS data set.

    ROOT/NAME/SIZE/VERSION/NAME-SPLIT.array_record-00000-of-00005    tf.train.Examples
    ROOT/NAME/SIZE/VERSION/{dataset_info,features}.json              TFDS' metadata
    ROOT/NAME/SIZE/VERSION/manifest.json                             sources, counts, hashes
    ROOT/NAME/SIZE/VERSION/quarantine.jsonl                          what was skipped, and why

Every input shard becomes one file, in the shard's order; Beam gives shards to workers, which write
into a hidden folder beside VERSION. Stopped, a build goes on with the shards that are not done; the
folder of the version appears at once and whole. The same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder

from kaleido_jax import locks
from kaleido_jax.data import build_manifest, build_settings, build_unit
from kaleido_jax.data.build_inputs import Unit, find_units
from kaleido_jax.data.build_manifest import MANIFEST
from kaleido_jax.data.build_settings import Build
from kaleido_jax.data.build_unit import Done, Job
from kaleido_jax.data.record_source import LATENT_NAMES
from kaleido_jax.errors import UserError

Watch = Callable[[Path, int], contextlib.AbstractContextManager[None]]


def unwatched(folder: Path, total: int) -> contextlib.AbstractContextManager[None]:
    """Shows nothing."""
    del folder, total
    return contextlib.nullcontext()


def build(settings: Build, watch: Watch = unwatched) -> dict[str, Any]:
    """Builds a data set, or finds that it is there.

    Args:
      settings: what to build.
      watch: called with (folder, number of units); a context in which the units are made.

    Returns:
      The manifest.

    Raises:
      UserError: wrong settings, unreadable input, keys that do not match, too much lost, another
        build in the same folder, a version that was built from something else.
    """
    build_settings.check(settings)
    units = [
        unit
        for split, images in settings.images.items()
        for unit in find_units(images, split, settings.data_dir)
    ]
    config_hash = build_settings.config_hash(settings, units)
    parent = settings.folder.parent
    with locks.sole_writer(parent, "kaleido build"):
        if settings.folder.exists():
            return _read_manifest(settings.folder, config_hash)
        staging = parent / f".building-{settings.version}-{config_hash[:8]}"
        _clear(parent, settings.version, staging)
        with _quiet():
            builder = Records(settings, units, config_hash, staging, watch)
            builder.download_and_prepare(
                download_dir=str(staging),
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format=settings.file_format,
            )
        shutil.rmtree(staging, ignore_errors=True)
        return _read_manifest(settings.folder, config_hash)


class Records(dataset_builder.FileReaderBuilder, skip_registration=True):
    """The TFDS builder: Beam makes a file per unit, this gathers them and writes metadata."""

    # Nothing is downloaded, so TFDS need not look for checksums beside this file (for which it
    # would need importlib_resources, and does not ask for it).
    code_path = None

    def __init__(
        self, settings: Build, units: Sequence[Unit], config_hash: str, staging: Path, watch: Watch
    ):
        self.name = settings.dataset.name
        self._settings, self._units, self._hash = settings, list(units), config_hash
        self._staging, self._watch = staging, watch
        config = tfds.core.BuilderConfig(
            name=str(settings.size),
            version=tfds.core.Version(settings.version),
            description=f"{settings.size} x {settings.size} pixels",
        )
        super().__init__(data_dir=settings.out, config=config, file_format=settings.file_format)

    def _info(self) -> tfds.core.DatasetInfo:
        data = self._settings.dataset
        return _Info(
            builder=self,
            description=data.about,
            homepage=data.homepage or None,
            features=features(self._settings.size, self._settings.encoding),
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        del dl_manager, download_config
        settings, units = self._settings, self._units
        job = Job(
            folder=str(self._staging),
            size=settings.size,
            encoding=settings.encoding,
            quality=settings.quality,
            file_format=settings.file_format,
            annotations=dict(settings.annotations),
            class_names=settings.class_names,
        )
        todo = [unit for unit in units if build_unit.read_done(job, unit) is None]
        if todo:
            with self._watch(self._staging, len(units)):
                _run_units(job, todo, settings.flags)
        dones = _gather(job, units)
        manifest = build_manifest.make_manifest(settings, self._hash, units, dones)
        build_manifest.judge(settings, self._staging, units, dones)
        self.info.set_splits(self._move(job, dones, manifest))
        build_manifest.write_quarantine(Path(self.data_dir), units, dones)
        _write_json(Path(self.data_dir) / MANIFEST, manifest)

    def _move(
        self, job: Job, dones: Sequence[Done], manifest: Mapping[str, Any]
    ) -> tfds.core.splits.SplitDict:
        """Renames the units' files to where TFDS looks for them."""
        infos = []
        for split in self._settings.images:
            template = self._get_filename_template(split_name=split)
            mine = [
                (unit, done)
                for unit, done in zip(self._units, dones)
                if unit.split == split and done.records
            ]
            for number, (unit, _) in enumerate(mine):
                target = template.sharded_filepath(shard_index=number, num_shards=len(mine))
                if Path(target).name not in manifest["files"]:
                    raise RuntimeError(f"TFDS calls a file {Path(target).name}")
                os.replace(build_unit.unit_path(job, unit), target)
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[done.records for _, done in mine],
                    num_bytes=sum(done.bytes for _, done in mine),
                    filename_template=template,
                )
            )
        return tfds.core.splits.SplitDict(infos)


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """TFDS would ask its bucket on the network for metadata; none of ours lies there."""


def features(size: int, encoding: str) -> tfds.features.FeaturesDict:
    """The schema of a record for TFDS: pictures uint8 [size, size, 3]."""
    texts = {name: tfds.features.Text() for name in ("key", "caption", *LATENT_NAMES)}
    image = tfds.features.Image(shape=(size, size, 3), encoding_format=encoding)
    sides = {name: tfds.features.Scalar(np.int64) for name in ("height", "width")}
    return tfds.features.FeaturesDict({**texts, **sides, "image": image})


# ---- the units --------------------------------------------------------------------------------


def _run_units(job: Job, units: Sequence[Unit], flags: Sequence[str]) -> None:
    """Builds units on a Beam runner, and waits. Raises UserError for flags it does not take."""
    try:
        import apache_beam as beam

        from kaleido_jax.data import beam_runs
    except ImportError as error:
        raise UserError(
            "build needs apache-beam: pip install -c constraints.txt 'kaleido_jax[annotate,data]'"
        ) from error
    pipeline = beam_runs.new_pipeline(beam_runs.read_options(flags))
    _ = (
        pipeline
        | "shards" >> beam.Create(list(units))
        | "spread" >> beam.Reshuffle()
        | "records" >> beam.Map(functools.partial(build_unit.build_unit, job))
    )
    pipeline.run().wait_until_finish()


def _gather(job: Job, units: Sequence[Unit]) -> list[Done]:
    """What became of each unit; raises UserError for the first that was refused."""
    dones = []
    for unit in units:
        refused = build_unit.refused_path(job, unit)
        if refused.exists():
            raise UserError(json.loads(refused.read_bytes())["error"])
        done = build_unit.read_done(job, unit)
        if done is None:
            raise RuntimeError(
                f"{unit.name} was not written to {job.folder}; do all workers reach that folder?"
            )
        dones.append(done)
    return dones


def _read_manifest(folder: Path, config_hash: str) -> dict[str, Any]:
    """The manifest of a built version, which must be made of the same."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        same = manifest["config_hash"] == config_hash
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} exists, but its {MANIFEST} cannot be read ({error!r}); move the folder away"
        ) from error
    if not same:
        raise UserError(
            f"{folder} was built from other input or settings; give another --version or --out"
        )
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} is missing or not whole; move the folder away and build again")
    return manifest


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# ---- the folder -------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints that it downloads, which it does not, and Beam warns of what is not used."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _clear(parent: Path, version: str, staging: Path) -> None:
    """Clears what stopped builds of the version left behind, but not what this one goes on with."""
    for path in [*parent.glob(f"incomplete.*_{version}"), *parent.glob(f".building-{version}-*")]:
        if path != staging:
            shutil.rmtree(path, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    for path in [*staging.glob(".*"), *staging.glob("*.refused.json")]:
        path.unlink()
