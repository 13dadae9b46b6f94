"""Checkpoints: orbax state, metadata, and a manifest of hashes written last.

A step is whole only when its manifest is there and every file bears the hash that it names;
anything else is never "latest" and never silently used. Orbax itself is imported where a state is
written or read: an export needs the hashes alone.

    WORKDIR/checkpoints/step_00001000/{state/, meta.json, manifest.json}
    WORKDIR/checkpoints/step_00002000.saving/    being written; renamed when it is whole and on disk
    WORKDIR/checkpoints/step_00002000.deleting/  half deleted
    WORKDIR/checkpoints/step_00002000.damaged/   set aside by a run that went on from an older step
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kaleido_jax import beside, save_failures
from kaleido_jax.errors import StopRun, UserError

_STEP = re.compile(r"step_(\d{8,})")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON beside `path` and renames, so that no reader sees half of it."""
    beside.write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


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


def sync_tree(folder: pathlib.Path) -> None:
    """Flushes every file and folder of a tree to disk."""
    for path in [folder, *folder.rglob("*")]:
        _sync(path)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_for_good(folder: pathlib.Path) -> None:
    """Deletes a folder until it stays away: writers that orbax no longer waits for make it anew."""
    for _ in range(20):  # for at most ten seconds
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.5)
        if not folder.exists():
            return


class Checkpoints:
    """The checkpoints of one workdir.

    Saving goes on beside training: `save` returns when the state is copied to the host's memory, a
    thread writes it, and `wait` tells of errors. Of several processes each writes its part of the
    state; the first one, when all have, writes the manifest and gives the folder its name.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 3):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.keep = keep
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._saving_step = 0

    def step_folder(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:08d}"

    def _beside(self, step: int, state: str) -> pathlib.Path:
        return self.folder / f"step_{step:08d}.{state}"

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; whether they are whole is not verified yet."""
        matches = (_STEP.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to save a tree of arrays with JSON metadata; all but the newest `keep` go then.

        It returns when the arrays are copied, so their memory may be reused. An earlier save is
        waited for. Every process must call it.

        Raises:
          StopRun: this save could not start, or the one before it failed; whole checkpoints stay.
        """
        self.wait()
        self._saving_step = step
        try:
            folder = self._beside(step, "saving")
            if jax.process_index() == 0:
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir(parents=True)
            self._checkpointer.save(folder / "state", args=_orbax().args.PyTreeSave(dict(state)))
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="kaleido-checkpoint")
            self._pending = self._thread.submit(self._finish, step, dict(meta))
        except Exception as error:
            raise self._failed(error) from error

    @functools.cached_property
    def _checkpointer(self) -> Any:
        ocp = _orbax()
        logging.getLogger("absl").addFilter(save_failures.told_elsewhere)
        save_failures.quiet_about_closed_loops()
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def _finish(self, step: int, meta: dict[str, Any]) -> None:
        """Waits until all processes have written, then makes the step whole."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        folder = self._beside(step, "saving")
        write_json(folder / "meta.json", meta)
        sync_tree(folder)
        # Only what is on disk may be called whole: no crash leaves a manifest of lost files.
        write_json(folder / "manifest.json", {"version": 1, "files": hash_files(folder)})
        self._delete(step)
        os.replace(folder, self.step_folder(step))
        _sync(self.folder)
        if self.keep > 0:
            older = [s for s in self.steps() if s < step]
            for old in older[: max(len(older) - self.keep + 1, 0)]:
                self._delete(old)

    def _delete(self, step: int) -> None:
        """Deletes a step's folder, if there is one; renamed first, so it never looks damaged."""
        if self.step_folder(step).exists():
            going = self._beside(step, "deleting")
            shutil.rmtree(going, ignore_errors=True)
            os.replace(self.step_folder(step), going)
            shutil.rmtree(going)

    def wait(self) -> None:
        """Waits for the save that goes on, if any.

        Raises:
          StopRun: it failed; what it wrote is removed, whole checkpoints stay.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._failed(error) from error

    def tell(self) -> None:
        """Raises StopRun as `wait` does where the save has failed by now; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _failed(self, error: Exception) -> StopRun:
        logging.getLogger("asyncio").addFilter(save_failures.not_of_orbax)
        folder = self._beside(self._saving_step, "saving")
        if jax.process_index() == 0:
            _remove_for_good(folder)
        whole = [step for step in self.steps() if step != self._saving_step]
        kept = f"step {whole[-1]} stays the newest" if whole else "there is none yet"
        return StopRun(
            f"cannot save the checkpoint of step {self._saving_step} in {self.folder}: "
            f"{save_failures.reason(error)}; of whole checkpoints {kept}"
        )

    def close(self) -> None:
        """Waits for a save that goes on and ends the threads; errors were `wait`'s to tell."""
        with contextlib.suppress(Exception):
            self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            logging.getLogger("absl").removeFilter(save_failures.told_elsewhere)

    def problems(self) -> Iterator[tuple[int, str | None]]:
        """Each step from the newest on, and what is wrong with it (None if it is whole)."""
        for step in reversed(self.steps()):
            yield step, manifest_problem(self.step_folder(step))

    def newest_whole(self, say: Callable[[str], None] = warnings.warn) -> int | None:
        """The newest step that verifies; says which newer ones it passes over, and why."""
        for step, problem in self.problems():
            if problem is None:
                return step
            say(f"checkpoint {self.step_folder(step)} is damaged: {problem}; trying an older one")
        return None

    def leftovers(self) -> list[pathlib.Path]:
        """Folders of saves and deletions that go on, or that were killed."""
        return sorted([*self.folder.glob("step_*.saving"), *self.folder.glob("step_*.deleting")])

    def set_aside(self) -> list[pathlib.Path]:
        """Folders of damaged steps that `recover` set aside."""
        return sorted(self.folder.glob("step_*.damaged"))

    def recover(self, say: Callable[[str], None], start_anew: bool = False) -> int | None:
        """The step to go on from, or None to start at 0; for the folder's only writer.

        What killed saves left behind is removed. Damaged steps that are newer than the one to go on
        from are set aside as `step_N.damaged`. Says all that it does.

        Args:
          start_anew: where steps are there but none is whole, set them all aside and start at 0.

        Raises:
          UserError: there are steps but none is whole, and `start_anew` was not given.
        """
        for leftover in self.leftovers():
            shutil.rmtree(leftover)
            say(f"removed {leftover}, left behind by a run that was killed")
        damaged: dict[int, str] = {}
        newest = None
        for step, problem in self.problems():
            if problem is None:
                newest = step
                break
            damaged[step] = problem
        if damaged and newest is None and not start_anew:
            told = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({told}); put back a copy of one, or "
                "start again at step 0 with --start-anew"
            )
        for step, problem in damaged.items():
            aside = self._beside(step, "damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.step_folder(step), aside)
            say(f"checkpoint of step {step} is damaged: {problem}; set aside as {aside}")
        return newest

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
