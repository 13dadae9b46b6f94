"""A folder of pictures that host threads write while the device draws the next ones."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

import kaleido_jax
from kaleido_jax import checkpoint, locks
from kaleido_jax.errors import UserError
from kaleido_jax.outputs import GRID_PICTURES, Output, check_folder, grid, write_picture

REQUEST, MANIFEST = "request.json", "manifest.json"
_THREADS = 4
_PICTURE = re.compile(r"(\d{6,})\.png")


def check(folder: str | os.PathLike, resume: bool) -> bool:
    """Whether a run was begun in a folder that is to go on; False for a new or empty one.

    Raises:
      UserError: it holds anything else, or a run that is not to go on.
    """
    begun = (pathlib.Path(folder) / REQUEST).is_file()
    if begun and not resume:
        raise UserError(f"{folder} already holds files; name a new folder, or --resume to go on")
    if not begun:
        check_folder(folder, but=(".lock",))
    return begun


class PictureFolder(contextlib.AbstractContextManager):
    """Writes pictures one by one, each whole or not at all, and at the end what sums them up.

        request.json       what was asked for; a run that goes on must ask for the same
        000000.json, panels/000000.png, 000000.png    in this order: a picture is done with its PNG
        grid.png, manifest.json                       at the end

    At most two batches are held: one that is written while the next is drawn.

    Attributes:
      done: numbers of the pictures that an earlier run wrote.
      finished: whether an earlier run wrote them all.
    """

    def __init__(self, folder: str | os.PathLike, asked: Mapping[str, Any], resume: bool = False):
        """Opens a new or empty folder, or with `resume` one that was begun with the same `asked`.

        Raises:
          UserError: the folder holds something else, cannot be written, or another process writes.
        """
        self.folder = pathlib.Path(folder)
        check(self.folder, resume)  # before the lock, whose file would make a folder
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(locks.sole_writer(self.folder, "kaleido sample"))
        try:
            self._open(dict(asked), check(self.folder, resume))
        except BaseException:
            self._stack.close()
            raise
        self._pool = ThreadPoolExecutor(_THREADS, "kaleido-write")
        self._pending: list[Future] = []
        self._samples: dict[int, np.ndarray] = {}

    def _open(self, asked: dict[str, Any], begun: bool) -> None:
        path = self.folder / REQUEST
        if begun:
            _check_same(path, asked)
            for left in (*self.folder.glob(".*.tmp"), *self.folder.glob("panels/.*.tmp")):
                left.unlink(missing_ok=True)
        else:
            try:
                checkpoint.write_json(path, asked)
            except OSError as error:
                raise _cannot(self.folder, error) from error
        names = (_PICTURE.fullmatch(path.name) for path in self.folder.iterdir())
        self.done = frozenset(int(name[1]) for name in names if name)
        self.finished = begun and (self.folder / MANIFEST).is_file()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Lets what is being written end; cancels the rest where the block failed."""
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        self._stack.close()

    def add(self, numbers: Sequence[int], output: Output) -> None:
        """Hands pictures to the threads; waits until those of the call before are on disk.

        Raises:
          UserError: one of the pictures before could not be written.
        """
        self._wait()
        for row, number in enumerate(numbers):
            if output.images.shape[-1] != 3:
                self._samples[number] = output.samples[row]
            self._pending.append(
                self._pool.submit(
                    write_picture,
                    self.folder,
                    number,
                    output.images[row],
                    output.documents[row],
                )
            )

    def finish(self, columns: int | None = None) -> None:
        """Writes grid (or samples.npy, where the data are not pictures) and the manifest.

        Args:
          columns: of the grid; about square by default.
        """
        self._wait()
        try:
            self._sum_up(columns)
        except OSError as error:
            raise _cannot(self.folder, error) from error

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            try:
                future.result()
            except OSError as error:
                raise _cannot(self.folder, error) from error

    def _sum_up(self, columns: int | None) -> None:
        documents = sorted(self.folder.glob("[0-9]*.json"))
        pictures = sorted(self.folder.glob("[0-9]*.png"))
        if self._samples:
            samples = np.stack([self._samples[number] for number in sorted(self._samples)])
            np.save(self.folder / "samples.npy", samples, allow_pickle=False)
        else:
            images = [np.asarray(Image.open(path)) for path in pictures[:GRID_PICTURES]]
            Image.fromarray(grid(np.stack(images), columns)).save(self.folder / "grid.png")
        first, warnings = None, []
        for path in documents:
            said = json.loads(path.read_text("utf-8"))
            first = first or said
            if problems := said["decoding"].get("problems"):
                warnings.append(f"picture {path.stem}: latents not valid: {'; '.join(problems)}")
        manifest = {
            "version": 1,
            "made_by": f"kaleido_jax {kaleido_jax.__version__}",
            "model_config_hash": first["model_config_hash"],
            "checkpoint_hash": first["checkpoint_hash"],
            "pictures": len(documents),
            "warnings": warnings,
            "files": {
                name: entry
                for name, entry in checkpoint.hash_files(self.folder).items()
                if name != ".lock"
            },
        }
        checkpoint.write_json(self.folder / MANIFEST, manifest)


def _check_same(path: pathlib.Path, asked: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, unless a run was begun with the same request."""
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    now = json.loads(json.dumps(asked))
    for name in sorted(now.keys() | set(before)):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{path.parent} was begun with {name} {before.get(name)!r}, not {now.get(name)!r}; "
                "give the same command, or another folder"
            )


def _cannot(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written: {error.strerror or error}")
