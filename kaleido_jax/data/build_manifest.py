"""What a build came to: its counts, judged and written down."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kaleido_jax
from kaleido_jax import sidecars
from kaleido_jax.data import build_settings, build_unit
from kaleido_jax.data.build_inputs import KINDS, Skipped, Unit
from kaleido_jax.data.build_settings import Build
from kaleido_jax.data.build_unit import Done
from kaleido_jax.data.record_source import LATENT_NAMES
from kaleido_jax.errors import UserError

MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"


def judge(settings: Build, staging: Path, units: Sequence[Unit], dones: Sequence[Done]) -> None:
    """Raises UserError where nothing is left or too much is lost."""
    lost = sum(len(_named(done)) for done in dones) + sum(_unnamed(units, dones))
    records = sum(done.records for done in dones)
    if lost <= settings.max_bad_fraction * (lost + records) and records:
        for split in settings.images:
            if not sum(done.records for unit, done in zip(units, dones) if unit.split == split):
                raise UserError(f"build: split {split!r} holds no usable example")
        return
    if not lost:
        raise UserError(f"build: no example in {units[0].place} or any other shard")
    write_quarantine(staging, units, dones)
    unit, first = next((u, d.skipped[0]) for u, d in zip(units, dones) if d.skipped)
    raise UserError(
        f"about {lost} of {lost + records} examples cannot be used, more than the share of "
        f"{settings.max_bad_fraction:g} allowed; the first: {unit.place}: "
        f"{first.key or 'the shard'}: {first.reason}; all: {staging / QUARANTINE}"
    )


def _named(done: Done) -> list[Skipped]:
    return [item for item in done.skipped if item.key]


def _unnamed(units: Sequence[Unit], dones: Sequence[Done]) -> list[int]:
    """Per unit, how many examples a broken shard has lost that its index does not name.

    The sidecars know; else it is judged by what the split's whole shards hold.
    """
    out = []
    for unit, done in zip(units, dones):
        listed = [
            other.records + len(_named(other))
            for near, other in zip(units, dones)
            if near.split == unit.split and other.whole
        ]
        usual = round(sum(listed) / len(listed)) if listed else 0
        guess = max(1, usual - done.records - len(_named(done)))
        out.append(0 if done.whole else done.unlisted or guess)
    return out


def make_manifest(
    settings: Build, config_hash: str, units: Sequence[Unit], dones: Sequence[Done]
) -> dict[str, Any]:
    """What the data set is made of. Per split: listed = records + skipped; statuses of each
    latent add up to records; files' records add up to records."""
    splits, files = {}, {}
    for split, images in settings.images.items():
        mine = [(u, d) for u, d in zip(units, dones) if u.split == split]
        unnamed = _unnamed(*zip(*mine))
        name = f"{settings.dataset.name}-{split}.{settings.file_format}"
        count = sum(1 for _, done in mine if done.records)
        shards: dict[str, Any] = {}
        number = 0
        for (unit, done), lost in zip(mine, unnamed):
            shards[unit.name] = {
                "source": dict(unit.source),
                "records": done.records,
                "skipped": _kinds(done),
                "lost": lost,
                "file": None,
            }
            if done.records:
                file = f"{name}-{number:05d}-of-{count:05d}"
                number += 1
                shards[unit.name]["file"] = file
                files[file] = {
                    "records": done.records,
                    "bytes": done.bytes,
                    "sha256": done.sha256,
                }
        records = sum(done.records for _, done in mine)
        skipped = {kind: sum(_kinds(done)[kind] for _, done in mine) for kind in KINDS}
        splits[split] = {
            "images": images,
            "annotation": _annotation(settings.annotations.get(split)),
            "listed": records + sum(skipped.values()),
            "records": records,
            "skipped": skipped,
            "lost": sum(unnamed),
            "latents": {name: _statuses(name, [done for _, done in mine]) for name in LATENT_NAMES},
            "shards": shards,
        }
    return {
        "format": build_settings.FORMAT,
        "made_by": f"kaleido_jax {kaleido_jax.__version__}",
        "with": {p: importlib.metadata.version(p) for p in ("pillow", "tensorflow-datasets")},
        "config_hash": config_hash,
        "name": settings.dataset.name,
        "version": settings.version,
        "settings": build_settings.summary(settings),
        "splits": splits,
        "totals": {
            "listed": sum(s["listed"] for s in splits.values()),
            "records": sum(s["records"] for s in splits.values()),
            "skipped": sum(sum(s["skipped"].values()) for s in splits.values()),
            "lost": sum(s["lost"] for s in splits.values()),
        },
        "files": files,
    }


def _kinds(done: Done) -> dict[str, int]:
    return {kind: sum(item.kind == kind for item in _named(done)) for kind in KINDS}


def _statuses(name: str, dones: Sequence[Done]) -> dict[str, int]:
    return {
        status: sum(done.statuses[name].get(status, 0) for done in dones)
        for status in (*sidecars.STATUSES, build_unit.ABSENT)
    }


def _annotation(folder: str | None) -> dict[str, Any] | None:
    """Which annotation the latents come from: engines and configuration of each stage."""
    if folder is None:
        return None
    stages = sidecars.read_manifest(folder)["stages"]
    return {
        "folder": folder,
        "stages": {
            name: {"engine": stage.get("engine"), "config_hash": stage["config_hash"]}
            for name, stage in stages.items()
            if name in LATENT_NAMES
        },
    }


def write_quarantine(folder: Path, units: Sequence[Unit], dones: Sequence[Done]) -> None:
    """One line per skipped example or broken shard; no file without any."""
    lines = [
        json.dumps({"split": unit.split, "shard": unit.name, **item._asdict()}) + "\n"
        for unit, done in zip(units, dones)
        for item in done.skipped
    ]
    if lines:
        (folder / QUARANTINE).write_text("".join(lines), "utf-8")
