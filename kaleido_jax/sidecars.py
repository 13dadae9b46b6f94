"""Sidecars: what annotation says of each example, one Parquet file per stage and input shard.

    OUT/manifest.json                       what made each stage, its shards and its counts
    OUT/STAGE/SHARD.HASH8.parquet           columns key, latent, status, issues; in shard order
    OUT/STAGE/SHARD.HASH8.done.json         written last: counts and the Parquet file's SHA-256
    OUT/STAGE/SHARD.HASH8.dead.jsonl        dead letters, if there are any

STAGE is a latent's name, SHARD the stem of the input shard and HASH8 the first eight digits of the
hash of everything that decides the stage's output. Keys are those of the source: `SHARD/KEY`.
A file without its `.done.json` is not there. The same rows give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kaleido_jax import beside
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS, LatentError

MANIFEST = "manifest.json"
VERSION = 1
# What became of an example: its latent as the engine gave it, or mended; nothing to say; output
# that cannot be used; an error or an unreadable picture. The last three have no latent.
STATUSES = ("ok", "repaired", "empty", "rejected", "failed")
_IN_MANIFEST = ("source", "records", "counts", "dead_letters", "sha256")
MAX_RAW = 2000  # characters of raw output that a dead letter keeps


class Row(NamedTuple):
    """One example of one stage.

    Attributes:
      key: the example's key in the source.
      latent: a string that the latent's strict parser reads, or "".
      status: one of STATUSES.
      issues: what was mended or wrong, in words.
    """

    key: str
    latent: str
    status: str
    issues: tuple[str, ...] = ()


def count(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each status; every status is named."""
    counts = dict.fromkeys(STATUSES, 0)
    for row in rows:
        counts[row.status] += 1
    return counts


def file_names(stage: str, shard: str, config_hash: str) -> tuple[str, str, str]:
    """A sidecar's Parquet file, dead letters and `.done.json`, relative to OUT.

    Raises:
      UserError: a name that would lead out of the folder.
    """
    for name in (stage, shard, config_hash):
        if not name or {"/", "\\"} & set(name) or name.startswith("."):
            raise UserError(f"{name!r} cannot be part of a sidecar's name")
    base = f"{stage}/{shard}.{config_hash[:8]}"
    return f"{base}.parquet", f"{base}.dead.jsonl", f"{base}.done.json"


def write_sidecar(
    folder: str | os.PathLike,
    stage: str,
    shard: str,
    config_hash: str,
    rows: Sequence[Row],
    dead_letters: Sequence[Mapping[str, Any]] = (),
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a shard's rows, its dead letters and, last, its `.done.json`.

    Args:
      folder: OUT.
      stage: the latent's name.
      shard: stem of the input shard.
      config_hash: hexadecimal hash of everything that decides the output, at least 8 digits.
      rows: in the order of the shard.
      dead_letters: JSON objects {key, stage, error, raw, attempt}.
      source: JSON that tells the input shard from another of its name.

    Returns:
      What the `.done.json` holds: stage, shard, config_hash, source, records, counts,
      dead_letters, sha256.

    Raises:
      UserError: pyarrow is missing, the folder cannot be written.
      ValueError: a repeated key, an unknown status, a latent that its grammar does not hold or
        that does not go with its status.
    """
    pa, pq = _pyarrow()
    _check(stage, rows)
    table = pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.string()),
            "latent": pa.array([row.latent for row in rows], pa.string()),
            "status": pa.array([row.status for row in rows], pa.string()),
            "issues": pa.array([list(row.issues) for row in rows], pa.list_(pa.string())),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    done = {
        "stage": stage,
        "shard": shard,
        "config_hash": config_hash,
        "source": dict(source or {}),
        "records": len(rows),
        "counts": count(rows),
        "dead_letters": len(dead_letters),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    parquet, dead, finished = _paths(folder, stage, shard, config_hash)
    _write(parquet, data)
    if dead_letters:
        lines = [json.dumps(dict(letter), ensure_ascii=True) + "\n" for letter in dead_letters]
        _write(dead, "".join(lines).encode())
    else:
        dead.unlink(missing_ok=True)
    _write(finished, _json(done))
    return done


def read_done(
    folder: str | os.PathLike, stage: str, shard: str, config_hash: str, verify: bool = True
) -> dict[str, Any] | None:
    """What `write_sidecar` returned; None unless the shard is finished and its files are whole.

    Without `verify`, the `.done.json` alone is read.
    """
    parquet, _, finished = _paths(folder, stage, shard, config_hash)
    try:
        done = json.loads(finished.read_bytes())
        if (done["stage"], done["shard"], done["config_hash"]) != (stage, shard, config_hash):
            return None
        if verify:
            if done["sha256"] != hashlib.sha256(parquet.read_bytes()).hexdigest():
                return None
            if done["dead_letters"] != len(read_dead_letters(folder, stage, shard, config_hash)):
                return None
        return done
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_dead_letters(
    folder: str | os.PathLike, stage: str, shard: str, config_hash: str
) -> list[dict[str, Any]]:
    """The dead letters of a shard, [] without any. Raises ValueError for a broken file."""
    _, dead, _ = _paths(folder, stage, shard, config_hash)
    if not dead.is_file():
        return []
    return [json.loads(line) for line in dead.read_bytes().splitlines()]


def read_sidecar(folder: str | os.PathLike, stage: str, shard: str, config_hash: str) -> list[Row]:
    """The rows of a finished shard, in its order.

    Raises:
      UserError: pyarrow is missing, or the shard is not finished, or its file is damaged.
    """
    pa, pq = _pyarrow()
    path, _, _ = _paths(folder, stage, shard, config_hash)
    if read_done(folder, stage, shard, config_hash) is None:
        raise UserError(f"{path} is missing or damaged; run `kaleido annotate` again")
    try:
        columns = pq.read_table(pa.BufferReader(path.read_bytes())).to_pydict()
        rows = zip(*(columns[name] for name in Row._fields), strict=True)
        return [Row(key, latent, status, tuple(issues)) for key, latent, status, issues in rows]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a sidecar: {error}") from error


# ---- whole stages -----------------------------------------------------------------------------


def write_manifest(folder: str | os.PathLike, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes OUT/manifest.json with totals.

    Args:
      folder: OUT.
      stages: for each stage what made it, with at least `config_hash` and `shards`, a mapping
        from shard to what `write_sidecar` returned. Counts and records are added up here.

    Raises:
      UserError: the folder cannot be written.
    """
    from kaleido_jax import __version__

    written, totals = {}, dict.fromkeys(STATUSES, 0)
    for name, stage in stages.items():
        shards = {
            shard: {key: done[key] for key in _IN_MANIFEST}
            for shard, done in stage["shards"].items()
        }
        counts = {s: sum(done["counts"][s] for done in shards.values()) for s in STATUSES}
        totals = {s: totals[s] + counts[s] for s in STATUSES}
        written[name] = {
            **stage,
            "shards": shards,
            "counts": counts,
            "records": sum(done["records"] for done in shards.values()),
        }
    manifest = {
        "version": VERSION,
        "made_by": f"kaleido_jax {__version__}",
        "stages": written,
        "totals": {"records": sum(totals.values()), "counts": totals},
    }
    _write(pathlib.Path(folder) / MANIFEST, _json(manifest))


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """OUT/manifest.json.

    Raises:
      UserError: there is none (annotation has not finished), or it is not one of ours.
    """
    path = pathlib.Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: `kaleido annotate` has not finished there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} is not an annotation manifest of version {VERSION}")
    for name, stage in stages.items():
        wanted = {"shards": dict, "config_hash": str, "counts": dict, "records": int}
        if not isinstance(stage, dict) or not all(
            isinstance(stage.get(key), kind) for key, kind in wanted.items()
        ):
            raise UserError(f"{path}: stage {name!r} has no {', '.join(wanted)}")
    return manifest


def stage_names(folder: str | os.PathLike) -> list[str]:
    """The stages that are finished. Raises UserError as `read_manifest`."""
    return list(read_manifest(folder)["stages"])


def shard_names(folder: str | os.PathLike, stage: str) -> list[str]:
    """The shards of a stage, in order. Raises UserError as `iterate_stage`."""
    return list(_stage(folder, stage)["shards"])


def iterate_stage(folder: str | os.PathLike, stage: str) -> Iterator[Row]:
    """All rows of a stage, shard by shard, each file checked against its hash.

    Raises:
      UserError: no such stage, a missing or damaged file.
    """
    config_hash = _stage(folder, stage)["config_hash"]
    for shard in shard_names(folder, stage):
        yield from read_sidecar(folder, stage, shard, config_hash)


def read_shard(folder: str | os.PathLike, stage: str, shard: str) -> list[Row]:
    """The rows of one shard of a finished stage.

    Raises:
      UserError: no such stage or shard, a missing or damaged file.
    """
    found = _stage(folder, stage)
    if shard not in found["shards"]:
        raise UserError(f"{folder}: stage {stage} has no shard {shard!r}")
    return read_sidecar(folder, stage, shard, found["config_hash"])


def read_stage(folder: str | os.PathLike, stage: str) -> dict[str, tuple[str, str]]:
    """key -> (latent, status) of a whole stage, in order.

    Raises:
      UserError: no such stage, a missing or damaged file, a key in two shards.
    """
    found: dict[str, tuple[str, str]] = {}
    for row in iterate_stage(folder, stage):
        if row.key in found:
            raise UserError(f"{folder}: stage {stage} has the key {row.key!r} twice")
        found[row.key] = (row.latent, row.status)
    return found


def _stage(folder: str | os.PathLike, stage: str) -> dict[str, Any]:
    stages = read_manifest(folder)["stages"]
    if stage not in stages:
        raise UserError(f"{folder} has no stage {stage!r} (there are {', '.join(stages)})")
    return stages[stage]


# ---- files ------------------------------------------------------------------------------------


def _check(stage: str, rows: Sequence[Row]) -> None:
    keys = set()
    for row in rows:
        if row.key in keys:
            raise ValueError(f"key {row.key!r} comes twice")
        keys.add(row.key)
        if row.status not in STATUSES:
            raise ValueError(f"{row.key}: no status {row.status!r}")
        if (row.latent != "") != (row.status in ("ok", "repaired")):
            raise ValueError(f"{row.key}: status {row.status} with latent {row.latent[:40]!r}")
        if row.latent:
            try:
                LATENTS[stage].parse(row.latent)
            except LatentError as error:
                raise ValueError(f"{row.key}: {error}") from error


def _paths(
    folder: str | os.PathLike, stage: str, shard: str, config_hash: str
) -> list[pathlib.Path]:
    return [pathlib.Path(folder, name) for name in file_names(stage, shard, config_hash)]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode()


def _write(path: pathlib.Path, data: bytes) -> None:
    try:
        beside.write_bytes(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "sidecars need pyarrow: pip install 'kaleido_jax[annotate]' or 'kaleido_jax[data]'"
        ) from error
    return pyarrow, pyarrow.parquet
