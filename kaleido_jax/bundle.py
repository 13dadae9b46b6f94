"""A model to use: config, parameters and vocabulary, from a workdir, checkpoint or export.

An export is one folder: config.json, model.safetensors, tokenizer.model, manifest.json.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import flax.traverse_util as traverse
import jax
import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import checkpoint
from kaleido_jax import config as config_lib
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.types import Params

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.model", "model.safetensors"

# Fields that a run may change when it goes on: none of them moves the numbers of past steps.
FREE_FIELDS = (
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.num_samples",
    "mesh.",
    "sample.",
)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Config, parameters (averaged, where they come from training), vocabulary and their hash."""

    config: ConfigDict
    params: Params
    vocabulary: Vocabulary
    fingerprint: str


def make_vocabulary(config: ConfigDict) -> Vocabulary:
    """The vocabulary that `config.vocabulary` names."""
    v = config.vocabulary
    if v.path:
        return Vocabulary.from_file(v.path, num_vokens=v.num_vokens)
    return Vocabulary.default(num_vokens=v.num_vokens)


def start_workdir(workdir: pathlib.Path, config: ConfigDict, vocabulary: Vocabulary) -> None:
    """Writes config and tokenizer into a new workdir, or holds an old one's config against it.

    Raises:
      UserError: if the workdir was made by a config that differs in more than FREE_FIELDS.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the workdir {workdir}: {error.strerror}") from error
    path = workdir / CONFIG
    if path.exists():
        old = config_lib.from_json(path.read_text(), str(path))
        before, now = dict(config_lib.flatten(old)), dict(config_lib.flatten(config))
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE_FIELDS)
        ]
        if changed:
            raise UserError(
                f"{workdir} was made by another config; use a new workdir or the old values "
                f"({'; '.join(changed[:5])}{'; ...' if len(changed) > 5 else ''})"
            )
    checkpoint.write_bytes(path, config_lib.to_json(config).encode())
    checkpoint.write_bytes(workdir / TOKENIZER, vocabulary.model)


def save(folder: str | os.PathLike, bundle: Bundle, dtype: str = "float32") -> pathlib.Path:
    """Writes an export folder beside its place and renames it; `dtype` is of the weights.

    Raises:
      UserError: if `folder` already exists.
    """
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    if folder.exists():
        raise UserError(f"{folder} already exists; name a new folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        flat = traverse.flatten_dict(jax.device_get(bundle.params), sep="/")
        arrays = {k: np.ascontiguousarray(np.asarray(v).astype(dtype)) for k, v in flat.items()}
        save_file(arrays, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(config_lib.to_json(bundle.config))
        (temporary / TOKENIZER).write_bytes(bundle.vocabulary.model)
        manifest = {"version": 1, "made_from": bundle.fingerprint}
        manifest["files"] = checkpoint.hash_files(temporary)
        checkpoint.write_json(temporary / "manifest.json", manifest)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(folder: str | os.PathLike, step: int | None = None) -> Bundle:
    """Opens a workdir (its newest whole checkpoint, or `step`) or an export folder.

    Parameters come as numpy arrays: the running average where there is one, in float32.

    Raises:
      UserError: nothing is there, or what is there is damaged.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    if folder.parent.name == "checkpoints" and folder.name.startswith("step_"):
        digits = folder.name.removeprefix("step_")
        if not digits.isdigit():
            raise UserError(f"checkpoint folder {folder} is not named step_ and a number")
        return load(folder.parent.parent, int(digits))
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise UserError(f"{folder} is not a workdir or export: it has no {CONFIG}")
    config = config_lib.from_json(config_path.read_text(), str(config_path))
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        raise UserError(f"{folder} is not a workdir or export: it has no {TOKENIZER}")
    vocabulary = Vocabulary.from_file(str(tokenizer), num_vokens=config.vocabulary.num_vokens)
    if (folder / WEIGHTS).is_file():
        params, fingerprint = _read_export(folder)
    else:
        params, fingerprint = _read_checkpoint(folder, step)
    return Bundle(config, params, vocabulary, fingerprint)


def _read_export(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    from safetensors.numpy import load_file

    problem = checkpoint.manifest_problem(folder)
    if problem:
        raise UserError(f"export {folder} is damaged: {problem}")
    flat = load_file(folder / WEIGHTS)
    params = traverse.unflatten_dict(
        {name: np.asarray(value, np.float32) for name, value in flat.items()}, sep="/"
    )
    return params, checkpoint.manifest_hash(folder)


def _read_checkpoint(folder: pathlib.Path, step: int | None) -> tuple[dict[str, Any], str]:
    checkpoints = checkpoint.Checkpoints(folder)
    if step is None:
        step = checkpoints.newest_whole()
        if step is None:
            raise UserError(f"{folder} holds no whole checkpoint and no {WEIGHTS}")
    elif problem := checkpoint.manifest_problem(checkpoints.step_folder(step)):
        raise UserError(f"checkpoint {checkpoints.step_folder(step)} is damaged: {problem}")
    shapes = checkpoints.saved_shapes(step)
    state = checkpoints.restore(step, {name: shapes[name] for name in ("ema", "frozen")})
    fingerprint = checkpoint.manifest_hash(checkpoints.step_folder(step))
    return {**state["ema"], **state["frozen"]}, fingerprint
