"""Checkpoints: orbax state, metadata, and a manifest of hashes written last.

A step is whole only when its manifest is there and every file bears the hash that it names;
anything else is never "latest" and never silently used. Orbax itself is imported where a state is
written or read: an export needs the hashes alone.

    WORKDIR/checkpoints/step_00001000/{state/, meta.json, manifest.json}
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from kaleido_jax.errors import UserError

_STEP = re.compile(r"step_(\d{8,})")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON beside `path` and renames, so that no reader sees half of it."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes bytes beside `path`, flushes them to disk and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_files(
    folder: pathlib.Path, only: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file under `folder` except its manifest, by relative path.

    Args:
      only: relative paths of the files that count; all by default.
    """
    result = {}
    paths = folder.rglob("*") if only is None else (folder / name for name in only)
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json":
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            result[name] = {"sha256": digest, "bytes": path.stat().st_size}
    return result


def manifest_problem(folder: pathlib.Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a step or export folder against its manifest; None if it is whole.

    Args:
      only: names to which the comparison is limited; every file by default.
    """
    try:
        wanted = dict(json.loads((folder / "manifest.json").read_text())["files"])
        wanted = {name: str(entry["sha256"]) for name, entry in wanted.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "its manifest.json is missing or unreadable"
    found = hash_files(folder, only)
    if only is not None:
        wanted = {name: digest for name, digest in wanted.items() if name in only}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is not in the manifest"
        if found[name]["sha256"] != wanted[name]:
            return f"{name} differs from the manifest"
    return None


def manifest_hash(folder: pathlib.Path) -> str:
    """A short name for the exact content of a whole folder: the hash of its manifest."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:16]


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | os.PathLike, keep: int = 3):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.keep = keep

    def step_folder(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; their files are not verified yet."""
        found = []
        for path in self.folder.glob("step_*"):
            match = _STEP.fullmatch(path.name)
            if match and (path / "manifest.json").is_file():
                found.append(int(match[1]))
        return sorted(found)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> pathlib.Path:
        """Saves a tree of arrays with JSON metadata, then deletes all but the newest `keep`."""
        folder = self.step_folder(step)
        if folder.exists():
            # Only a step that was interrupted before its manifest can be in the way.
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        ocp = _orbax()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(dict(state)))
        write_json(folder / "meta.json", dict(meta))
        write_json(folder / "manifest.json", {"version": 1, "files": hash_files(folder)})
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.step_folder(old))
        return folder

    def newest_whole(self, say: Callable[[str], None] = warnings.warn) -> int | None:
        """The newest step that verifies; says which newer ones it passes over, and why."""
        for step in reversed(self.steps()):
            problem = manifest_problem(self.step_folder(step))
            if problem is None:
                return step
            say(f"checkpoint {self.step_folder(step)} is damaged: {problem}; trying an older one")
        return None

    def restore(self, step: int, template: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the parts of the state that `template` names.

        Args:
          step: a step that verified.
          template: tree of `jax.ShapeDtypeStruct`, with shardings where a device should hold
            the result, else numpy arrays are given. Any mesh restores what any mesh saved.

        Raises:
          UserError: if the saved tree does not have the template's names or shapes.
        """
        ocp = _orbax()

        def restore_args(leaf):
            if getattr(leaf, "sharding", None) is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )

        path = self.step_folder(step) / "state"
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(
                    path,
                    args=ocp.args.PyTreeRestore(
                        item=dict(template),
                        restore_args=jax.tree.map(restore_args, dict(template)),
                        partial_restore=True,
                    ),
                )
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {path} does not fit this config: {reason}") from error
        # A partial restore leaves what it did not find as it was in the template.
        missing = [
            jax.tree_util.keystr(where, simple=True, separator="/")
            for where, leaf in jax.tree_util.tree_leaves_with_path(restored)
            if isinstance(leaf, jax.ShapeDtypeStruct)
        ]
        if missing:
            raise UserError(
                f"checkpoint {path} does not fit this config: it lacks {', '.join(missing)}"
            )
        return restored

    def saved_shapes(self, step: int) -> dict[str, Any]:
        """The saved tree with `jax.ShapeDtypeStruct` leaves, as nested dictionaries."""
        ocp = _orbax()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(self.step_folder(step) / "state")
        tree = getattr(metadata, "item_metadata", metadata)
        tree = getattr(tree, "tree", tree)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), tree)

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata that was saved with `step`."""
        return json.loads((self.step_folder(step) / "meta.json").read_text())
