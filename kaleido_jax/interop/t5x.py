"""T5 checkpoints of t5x: version 3 and Orbax layouts, scanned and unscanned.

Version 3 is a msgpack file `checkpoint` whose leaves are arrays or point to zarr arrays beside it.
Orbax layouts are a folder of zarr arrays (t5x's own setting) or an OCDBT database of them, mostly
under `state/`. Nothing is read before it is asked for.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import tensorstore

from kaleido_jax.errors import UserError
from kaleido_jax.tensor_files import Tensor, as_tensor

VERSION = 3
Path = tuple[str, ...]
# Where the parameters lie in the trees that t5x and its kin save; a state's moments lie elsewhere.
ROOTS = ("target", "optimizer.target", "state.target", "params.params", "params")
SCAN_AXIS = 1


def read_t5x(folder: str | pathlib.Path) -> dict[str, Any]:
    """Parameters of a t5x checkpoint, unscanned, as numpy arrays of the type that is on disk.

    Arguments and errors as `open_t5x`.
    """
    tensors = open_t5x(folder)
    return flax.traverse_util.unflatten_dict({k: np.asarray(v) for k, v in tensors.items()})


def open_t5x(folder: str | pathlib.Path) -> dict[Path, Tensor]:
    """Parameters of a t5x checkpoint by their paths, unscanned, none of them read yet.

    Args:
      folder: `checkpoint_N`, or a folder of such, of which the highest N is opened.

    Raises:
      UserError: for a folder, file or entry that is missing, damaged, of another version or driver,
        or that points outside the folder. A missing chunk is an error when read, never zeros.
    """
    folder = _checkpoint_folder(pathlib.Path(folder))
    file = folder / "checkpoint"
    found = _open_version_3(file) if file.is_file() else _open_orbax(folder)
    return _unscanned(found, str(folder))


def _checkpoint_folder(folder: pathlib.Path) -> pathlib.Path:
    if _is_checkpoint(folder):
        return folder
    steps = {
        int(match[1]): child
        for child in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint_(\d+)", child.name)) and _is_checkpoint(child)
    }
    if not steps:
        raise UserError(f"{folder}: neither a t5x checkpoint folder nor a folder of checkpoint_N")
    return steps[max(steps)]


def _is_checkpoint(folder: pathlib.Path) -> bool:
    return (folder / "checkpoint").is_file() or _orbax_root(folder) is not None


# Version 3


def _open_version_3(file: pathlib.Path) -> dict[Path, Tensor]:
    try:
        content = flax.serialization.msgpack_restore(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except Exception as error:  # msgpack raises its own, struct's and ValueError on damaged bytes
        raise UserError(f"{file}: not a t5x checkpoint: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"{file}: version is {version!r}, only version {VERSION} is read")
    optimizer = content.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict):
        raise UserError(f"{file}: has no optimizer/target")
    flat = flax.traverse_util.flatten_dict(target, is_leaf=lambda _, node: _is_spec(node))
    # Every array is opened before the first is waited for: their headers are read at once.
    found: dict[Path, Any] = {}
    for path, leaf in flat.items():
        name = "/".join(map(str, path))
        if _is_spec(leaf):
            found[path] = _opening(_zarr_spec(leaf, file.parent, name))
        elif isinstance(leaf, (np.ndarray, np.generic)) and not leaf.dtype.hasobject:
            found[path] = leaf
        else:
            raise UserError(f"{file}: {name} is neither an array nor a TensorStore spec")
    return {
        path: _opened("/".join(path), *entry) if isinstance(entry, tuple) else as_tensor(entry)
        for path, entry in found.items()
    }


def _is_spec(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("driver"), str)


def _zarr_spec(leaf: Mapping[str, Any], folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A new spec with nothing of the checkpoint's own but the place, made safe.

    Copies from buckets name other key-value drivers, and old checkpoints put `path` at the top.
    """
    if leaf["driver"] != "zarr":
        raise UserError(f"{folder}: {name} has driver {leaf['driver']!r}, only zarr is read")
    store = leaf.get("kvstore")
    place = store.get("path") if isinstance(store, dict) else None
    place = leaf.get("path") if place is None else place
    if not isinstance(place, str) or not place.strip("/."):
        raise UserError(f"{folder}: {name} names no array folder: {place!r}")
    array = (folder / place).resolve()
    outside = place.startswith("/") or ".." in re.split(r"[/\\]", place)
    if outside or not _inside(array, folder.resolve()):
        raise UserError(f"{folder}: {name} points outside the checkpoint: {place!r}")
    if not (array / ".zarray").is_file():
        raise UserError(f"{folder}: {name} has no array at {place!r}")
    _refuse_links(array, folder, name)
    return _file_spec("zarr", f"{array}/")


def _refuse_links(array: pathlib.Path, folder: pathlib.Path, name: str) -> None:
    root = folder.resolve()
    for entry in array.rglob("*"):
        if not _inside(entry.resolve(), root):
            raise UserError(f"{folder}: {name} holds a link out of the checkpoint: {entry.name!r}")


def _inside(path: pathlib.Path, root: pathlib.Path) -> bool:
    return path.is_relative_to(root) and path != root


# Orbax


def _orbax_root(folder: pathlib.Path) -> pathlib.Path | None:
    """Where the arrays of an Orbax checkpoint lie: the folder itself or the item `state`."""
    for root in (folder / "state", folder / "default", folder):
        if (root / "manifest.ocdbt").is_file():
            return root
        if root.is_dir() and any(_array_driver(child) for child in root.iterdir()):
            return root
    return None


def _array_driver(array: pathlib.Path) -> str | None:
    names = {".zarray": "zarr", "zarr.json": "zarr3"}
    return next((driver for name, driver in names.items() if (array / name).is_file()), None)


def _open_orbax(folder: pathlib.Path) -> dict[Path, Tensor]:
    root = _orbax_root(folder)
    _refuse_links(root, folder, "it")
    specs = {}
    if (root / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root.resolve()}/"}}
        try:
            keys = tensorstore.KvStore.open(store).result().list().result()
        except ValueError as error:
            raise UserError(f"{root}: not an OCDBT database: {_first(error)}") from error
        drivers = {b".zarray": "zarr", b"zarr.json": "zarr3"}
        for key in keys:
            place, _, last = key.rpartition(b"/")
            if last in drivers:
                name = place.decode("utf-8", "replace")
                spec = {"driver": drivers[last], "kvstore": {**store, "path": f"{name}/"}}
                specs[name] = {**spec, "fill_missing_data_reads": False}
    else:
        for array in sorted(root.iterdir()):
            if driver := _array_driver(array):
                specs[array.name] = _file_spec(driver, f"{array.resolve()}/")
    prefix = _prefix(specs, root)
    found = {n: _opening(s) for n, s in specs.items() if n.startswith(prefix)}
    return {
        tuple(name.removeprefix(prefix).split(".")): _opened(name, *entry)
        for name, entry in found.items()
    }


def _prefix(names: Mapping[str, Any], root: pathlib.Path) -> str:
    for prefix in ROOTS:
        if f"{prefix}.token_embedder.embedding" in names:
            return f"{prefix}."
    if "token_embedder.embedding" in names:
        return ""
    raise UserError(f"{root}: holds no T5: no token_embedder under {', '.join(ROOTS)}")


# Arrays


def _file_spec(driver: str, place: str) -> dict[str, Any]:
    store = {"driver": "file", "path": place}
    return {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}


def _opening(spec: dict[str, Any]) -> tuple[str, Any]:
    return spec["kvstore"]["path"], tensorstore.open(spec, open=True, read=True)


def _opened(name: str, where: str, future: Any) -> Tensor:
    try:
        store = future.result()
    except ValueError as error:
        raise UserError(f"{where}: cannot read {name}: {_first(error)}") from error

    def read() -> np.ndarray:
        try:
            return store.read().result()
        except ValueError as error:
            raise UserError(f"{where}: cannot read {name}: {_first(error)}") from error

    dtype = store.dtype.numpy_dtype
    if dtype.hasobject:
        raise UserError(f"{where}: {name} holds {store.dtype.name}, not numbers")
    return Tensor(tuple(store.shape), dtype, read)


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


# Scanned layers


def _unscanned(found: Mapping[Path, Tensor], where: str) -> dict[Path, Tensor]:
    """Layers stacked on axis 1 under `layers` as `layers_0..`; the rest as it is.

    Layers of one stacked array follow one another, and the last one read is kept: a writer that
    keeps the order reads each array once.
    """
    last = _LastRead()
    result: dict[Path, Tensor] = {}
    for path, tensor in found.items():
        if len(path) < 3 or path[1] != "layers":
            result[path] = tensor
            continue
        if len(tensor.shape) < 2:
            raise UserError(f"{where}: {'/'.join(path)} has shape {tensor.shape}, is not stacked")
        shape = tensor.shape[:SCAN_AXIS] + tensor.shape[SCAN_AXIS + 1 :]
        if path[2] == "relpos_bias":
            result[path[0], *path[2:]] = _shared_positions(tensor, shape, path, where)
            continue
        for i in range(tensor.shape[SCAN_AXIS]):
            read = functools.partial(last.layer, tensor, i)
            result[path[0], f"layers_{i}", *path[2:]] = Tensor(shape, tensor.dtype, read)
    return result


def _shared_positions(tensor: Tensor, shape: tuple[int, ...], path: Path, where: str) -> Tensor:
    """One table of relative positions from a stack of equal ones."""
    tables = np.asarray(tensor)
    if not (tables == np.take(tables, [0], SCAN_AXIS)).all():
        raise UserError(
            f"{where}: {'/'.join(path)} differs between layers; T5 has one table for all of them"
        )
    return Tensor(shape, tensor.dtype, lambda: np.take(tables, 0, SCAN_AXIS))


class _LastRead:
    """Keeps the array of the tensor that was read last."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._array: np.ndarray | None = None

    def layer(self, tensor: Tensor, number: int) -> np.ndarray:
        if self._tensor is not tensor:
            self._array = None  # before the next one is in memory
            self._tensor, self._array = tensor, np.asarray(tensor)
        return np.take(self._array, number, SCAN_AXIS)
