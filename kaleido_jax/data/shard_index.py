"""Where the records of a webdataset shard lie: read from its headers once, then kept on disk.

Only regular files are ever read: a shard with links or names that lead out of it is refused. Of a
key that comes twice the first record counts. The index of a large shard is kept in the user's
cache folder, not beside the shard, and holds as long as the shard's size and time of change do.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from kaleido_jax import beside
from kaleido_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 8 * 2**20
CACHE_FROM = 1000  # members; smaller shards are as quickly read again
_VERSION = 1
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class ShardRecord:
    """One key of a shard and where its members lie: extension -> (offset, size)."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class Lost(NamedTuple):
    """What an index leaves out: a record by its key (as far as it can be printed), or, with key
    "", what lies behind the point where the shard cannot be read."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """The whole records of a shard in its order, and what was left out.

    Attributes:
      whole: False where the shard is missing, truncated or broken: more may be lost than is known.
    """

    records: list[ShardRecord]
    lost: list[Lost]
    whole: bool


def index_shard(shard: Path) -> ShardIndex:
    """The index of a shard, from the cache if that is still true.

    Args:
      shard: a .tar; a missing one gives an index without records.

    Raises:
      UserError: links, devices, sparse files or names that lead out of the shard.
    """
    try:
        state = shard.stat()
        kept = _cache_path(shard)
        found = _read_cache(kept, shard, state)
        if found is None:
            found = _read_headers(shard)
            if sum(len(record.members) for record in found[0]) >= CACHE_FROM:
                _write_cache(kept, state, found)
    except OSError as error:
        return ShardIndex([], [Lost("", error.strerror or str(error))], False)
    records, lost, broken = found
    whole = []
    for record in records:
        problem = _problem(record, state.st_size)
        if problem is None:
            whole.append(record)
        else:
            lost = [*lost, Lost(printable(record.key), problem)]
    if broken:
        lost = [*lost, Lost("", broken)]
    return ShardIndex(whole, lost, not broken)


def list_shards(path: str) -> list[Path]:
    """The shards that a path names, in order; those of a range whether they exist or not.

    Args:
      path: a folder of .tar files, one .tar, names with a range such as
        `data/{00000..00004}.tar`, or a pattern such as `data/*.tar`; several separated by commas.

    Raises:
      UserError: nothing of that name, an empty folder or pattern, a range that is none, a name
        that is not UTF-8, two shards of one name (keys are SHARD/KEY).
    """
    if not path:
        raise UserError("config key 'data.source.path' is empty; it must name a folder of shards")
    shards: list[Path] = []
    for part in path.split(","):
        match = _RANGE.search(part)
        if match:
            first, last = match[1], match[2]
            if int(last) < int(first) or int(last) - int(first) > 10**6:
                raise UserError(f"{part}: the range must rise, by at most a million")
            shards += [
                Path(part[: match.start()] + str(n).zfill(len(first)) + part[match.end() :])
                for n in range(int(first), int(last) + 1)
            ]
        elif Path(part).is_dir():
            # Hidden files are not shards: macOS lays a "._NAME.tar" beside what it copies.
            found = sorted(p for p in Path(part).glob("*.tar") if not p.name.startswith("."))
            if not found:
                raise UserError(f"the folder {part} holds no .tar shards")
            shards += found
        elif Path(part).is_file():
            shards.append(Path(part))
        elif glob.has_magic(part):
            found = sorted(Path(name) for name in glob.glob(part))
            if not found:
                raise UserError(f"no shard matches {part}")
            shards += found
        else:
            raise UserError(f"no such folder or shard: {part}")
    seen: dict[str, Path] = {}
    for shard in shards:
        if printable(shard.name) != shard.name:
            raise UserError(
                f"the shard {printable(str(shard))} has a name that is not UTF-8; rename it, keys "
                "are SHARD/KEY"
            )
        other = seen.setdefault(shard.stem, shard)
        if other is not shard:
            raise UserError(
                f"{other} and {shard} have the same name; keys are SHARD/KEY, so names must differ"
            )
    return shards


def printable(name: str) -> str:
    """A tar member's name with bytes that are not UTF-8 written as \\xNN."""
    data = name.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "backslashreplace")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/kaleido_jax/shards`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kaleido_jax" / "shards"


# ---- headers ----------------------------------------------------------------------------------

_Found = tuple[list[ShardRecord], list[Lost], str]


def _read_headers(shard: Path) -> _Found:
    """All records, what came twice, and what is wrong with the shard's end ("" if nothing)."""
    records: dict[str, ShardRecord] = {}
    again: dict[str, Lost] = {}
    length = shard.stat().st_size
    broken, end = "", 0
    try:
        with tarfile.open(shard, "r:", encoding="utf-8") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                if not member.isreg() or member.issparse():
                    raise UserError(f"{shard}: {member.name!r} is not a regular file; refused")
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{shard}: {member.name!r} leads out of the shard; refused")
                stem, _, extension = name.name.partition(".")
                extension = extension.lower()
                if extension not in IMAGES + TEXTS or not stem:
                    continue
                key = str(name.parent / stem)
                record = records.setdefault(key, ShardRecord(shard, key))
                if extension in record.members:
                    reason = "the key comes again in the shard; the first record is kept"
                    again[key] = Lost(f"{printable(key)} (again)", reason)
                else:
                    record.members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        # tarfile lets the last two through for extended headers whose numbers are none.
        broken = f"not a whole tar file: {str(error)[:200]}"
    if not broken:
        # tarfile takes a broken header for the end; a whole shard ends with a block of zeros.
        with open(shard, "rb") as file:
            mark = os.pread(file.fileno(), 512, end)
        if mark != bytes(512):
            broken = f"truncated or broken after {end} of {length} bytes"
    return list(records.values()), list(again.values()), broken


def _problem(record: ShardRecord, length: int) -> str | None:
    """Why a record cannot be used, as far as its headers tell."""
    if printable(record.key) != record.key:
        return "the name is not UTF-8"
    if not any(name in record.members for name in IMAGES):
        return f"no picture ({', '.join('.' + name for name in IMAGES)})"
    for extension, (offset, size) in record.members.items():
        limit = MAX_TEXT_BYTES if extension in TEXTS else MAX_IMAGE_BYTES
        if size > limit:
            return f".{extension} has {size} bytes, more than {limit}"
        if offset + size > length:
            return f"the shard ends within .{extension}"
    return None


# ---- kept indices -----------------------------------------------------------------------------


def _cache_path(shard: Path) -> Path:
    place = hashlib.blake2b(os.fsencode(shard.resolve()), digest_size=16).hexdigest()
    return cache_folder() / f"{place}.json"


def _read_cache(path: Path, shard: Path, state: os.stat_result) -> _Found | None:
    """The kept index; None where there is none, it is of another state, or it is damaged."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["state"] != _state(state):
            return None
        records = [
            ShardRecord(
                shard,
                str(key),
                {name: _span(span) for name, span in members.items() if name in IMAGES + TEXTS},
            )
            for key, members in kept["records"]
        ]
        return records, [Lost(str(key), str(why)) for key, why in kept["lost"]], str(kept["broken"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _span(span: Any) -> tuple[int, int]:
    offset, size = span
    if not (isinstance(offset, int) and isinstance(size, int) and offset >= 0 and size >= 0):
        raise ValueError(f"no offset and size: {span!r}")
    return offset, size


def _write_cache(path: Path, state: os.stat_result, found: _Found) -> None:
    """Writes beside and renames; a cache that cannot be written is done without."""
    records, lost, broken = found
    kept = {
        "state": _state(state),
        "records": [[record.key, record.members] for record in records],
        "lost": lost,
        "broken": broken,
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.new_file(path) as temporary:
            temporary.write_text(json.dumps(kept), "ascii")


def _state(state: os.stat_result) -> list[int]:
    return [_VERSION, state.st_size, state.st_mtime_ns]
