"""The demo's folder: made beside its place, renamed at the end; what is not ours stays."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from kaleido_jax import beside
from kaleido_jax.errors import UserError

RESULTS = "results.json"
MADE_BY = "kaleido demo"


def check(out: str | os.PathLike, overwrite: bool = False) -> pathlib.Path:
    """The absolute path of a folder that may be written.

    It is new, empty, or a former demo with nothing added. With `overwrite` it may be any folder
    that the demo is not started from; the old one is kept beside it (see `replace`).

    Raises:
      UserError: anything else.
    """
    out = pathlib.Path(out).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    here = pathlib.Path.cwd()
    if out == here or out in here.parents:
        raise UserError(f"--out {out} holds the folder you are in; name a new folder, as in demo")
    problem = foreign(out)
    if problem and not overwrite:
        raise UserError(f"--out {out} {problem}; name a new folder or give --overwrite")
    return out


def foreign(folder: pathlib.Path) -> str:
    """Why a folder is not a former demo alone, or ''."""
    if not folder.exists():
        return ""
    try:
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    except OSError as error:
        raise UserError(f"--out {folder} cannot be read: {error.strerror or error}") from error
    if not found:
        return ""
    try:
        results = json.loads((folder / RESULTS).read_text("utf-8"))
        ours = {*results["files"], RESULTS} if results["made_by"] == MADE_BY else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if not ours:
        return "already holds files that are no former demo"
    extra = sorted(found - ours)
    return f"also holds {extra[0]}, which the demo did not write" if extra else ""


def begin(out: pathlib.Path) -> pathlib.Path:
    """An empty folder beside `out` to work in; raises UserError where none can be made."""
    temporary = beside.hidden(out)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return temporary


def replace(temporary: pathlib.Path, out: pathlib.Path) -> pathlib.Path | None:
    """Renames the finished folder to `out`.

    A former demo there is deleted; any other folder is renamed to `NAME.old` (or `.old2`, ...),
    whose path is returned.
    """
    aside, ours = None, True
    if out.exists():
        ours, number = not foreign(out), 1
        while (aside := out.with_name(f"{out.name}.old{number if number > 1 else ''}")).exists():
            number += 1
        os.replace(out, aside)
    os.replace(temporary, out)
    if aside is not None and ours:
        shutil.rmtree(aside)
    return None if ours else aside
