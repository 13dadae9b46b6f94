"""Exports on a model hub, through `huggingface_hub` where it is installed.

A name has the form owner/name or owner/name@revision. What was downloaded once opens offline.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from kaleido_jax import bundle
from kaleido_jax.errors import UserError

FILES = (*bundle.ESSENTIAL, bundle.CARD, bundle.MANIFEST)
_NAME = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?")


def is_name(text: str | os.PathLike) -> bool:
    """Whether a text that names no folder can be a model on a hub."""
    return isinstance(text, str) and bool(_NAME.fullmatch(text)) and ".." not in text


def download(name: str) -> pathlib.Path:
    """The folder of a model, from the cache where it is there or the hub cannot be reached.

    Args:
      name: owner/name or owner/name@revision.

    Raises:
      UserError: huggingface_hub is missing, or the model is neither on the hub nor in the cache.
    """
    library = _library(name)
    match = _NAME.fullmatch(name)
    errors = library.errors
    try:
        folder = library.snapshot_download(match[1], revision=match[2], allow_patterns=list(FILES))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{name} is neither a folder here nor in the cache: {_line(error)}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"cannot download {name}: {_line(error)}") from error
    return pathlib.Path(folder)


def upload(folder: pathlib.Path, name: str, private: bool, message: str) -> str:
    """Pushes an export folder, made public only where `private` is False; returns its address.

    Raises:
      UserError: huggingface_hub is missing, no permission, or the hub cannot be reached.
    """
    if not is_name(name) or "@" in name:
        raise UserError(f"{name!r} is not the name of a model on a hub; write owner/name")
    library = _library(name)
    errors = library.errors
    try:
        api = library.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"cannot push to {name}: {_line(error)}") from error
    return f"{api.endpoint}/{name}"


def _library(name: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"there is no folder {name}, and a hub needs huggingface_hub: pip install it"
        ) from error
    return huggingface_hub


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
