"""Where models come from: a name on the hub with a revision, or a folder; and how they load."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_jax.errors import UserError

_WHOLE = 16 * 2**20  # bytes up to which a file is hashed whole
_ENDS = 2**20


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
      name: hub name or folder.
      revision: branch, tag or commit; None for a folder.
      digest: of a folder's files, "" for a hub name.
    """

    name: str
    revision: str | None = None
    digest: str = ""

    @classmethod
    def parse(cls, engine: str, argument: str) -> ModelSource:
        """From `MODEL`, `MODEL@REVISION` or a folder.

        Raises:
          UserError: nothing named, a folder without config.json, or a file.
        """
        if not argument:
            raise UserError(f"engine '{engine}' needs a model: {engine}:MODEL or {engine}:FOLDER")
        path = Path(argument)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(f"{argument} is no model: it has no config.json")
            return cls(argument, None, folder_digest(path))
        if path.exists() or argument.startswith((".", "/", "~")):
            raise UserError(f"{argument} is no folder with a model")
        name, _, revision = argument.partition("@")
        return cls(name, revision or "main")

    @property
    def provenance(self) -> dict[str, Any]:
        """Model and revision, or the folder's name and digest, wherever the folder lies."""
        if self.digest:
            return {"model": Path(self.name).name, "sha256": self.digest}
        return {"model": self.name, "revision": self.revision}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {} if self.revision is None else {"revision": self.revision}

    def model_type(self) -> str | None:
        """`model_type` of a folder's config.json; None for a hub name, which is not looked up."""
        if not self.digest:
            return None
        try:
            config = json.loads((Path(self.name) / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}/config.json cannot be read: {error}") from error
        kind = config.get("model_type") if isinstance(config, dict) else None
        return kind if isinstance(kind, str) else None


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names, sizes and contents of a folder's files.

    Of files over 16 MiB only both ends are read: weights of many gigabytes must not delay a start.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix()}\n{size}\n".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                total.update(file.read())
            else:
                total.update(file.read(_ENDS))
                file.seek(-_ENDS, 2)
                total.update(file.read())
    return total.hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def loading(source: ModelSource, load: Any, *arguments: Any, **keywords: Any) -> Any:
    """Calls a loader of transformers; its errors become one line that names the model.

    Raises:
      UserError: the model is missing, unreadable or of another kind.
    """
    try:
        return load(*arguments, **keywords)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {source.name} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error


def require(*libraries: str) -> None:
    """Raises UserError where a library of the extra `annotate` is not installed."""
    import importlib.util

    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"this engine needs {library}: install with pip install 'kaleido_jax[annotate]'"
            )


@functools.cache
def device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
