"""A model to use: config, parameters and vocabulary, from a workdir, checkpoint or export.

An export is one folder: config.json, model.safetensors, tokenizer.model, README.md (the model card)
and manifest.json. An import of other weights is such a folder too, perhaps of some parts only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util as traverse
import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import beside, checkpoint, lora, quantize, tensor_files, trainable
from kaleido_jax import config as config_lib
from kaleido_jax.errors import UserError
from kaleido_jax.model_card import model_card
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.trainable import Trainable
from kaleido_jax.types import Params

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.model", "model.safetensors"
CARD, MANIFEST = "README.md", "manifest.json"
DTYPES = ("float32", "bfloat16", "float16")
# Files of an export that decide what the model does; people may edit the card.
ESSENTIAL = (CONFIG, TOKENIZER, WEIGHTS)

# Fields that a run may change when it goes on: none of them moves the numbers of past steps.
FREE_FIELDS = (
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.num_samples",
    "train.max_bad_steps",
    "train.watchdog_",
    "train.accumulate",
    "mesh.",
    "sample.",
)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Config, parameters (averaged, where they come from training), vocabulary and their hash.

    `step` is that of the training's checkpoint, None for an export.
    """

    config: ConfigDict
    params: Params
    vocabulary: Vocabulary
    fingerprint: str
    step: int | None = None


def make_vocabulary(config: ConfigDict) -> Vocabulary:
    """The vocabulary that `config.vocabulary` names."""
    v = config.vocabulary
    if v.path:
        return Vocabulary.from_file(v.path, num_vokens=v.num_vokens)
    return Vocabulary.default(num_vokens=v.num_vokens)


def check_workdir(
    workdir: pathlib.Path,
    config: ConfigDict,
    vocabulary: Vocabulary,
    allow_change: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Holds config and tokenizer against those that a workdir has, if it has them.

    Args:
      allow_change: take a config that differs in other fields than FREE_FIELDS too.
      say: gets a line for each field that is taken with another value.

    Raises:
      UserError: the workdir was made by another config.
    """
    path, tokenizer = workdir / CONFIG, workdir / TOKENIZER
    if not path.exists():
        return
    old = config_lib.from_json(path.read_text(), str(path))
    changed = config_lib.differences(old, config)
    # The file that `vocabulary.path` names may have become another one.
    if tokenizer.exists() and tokenizer.read_bytes() != vocabulary.model:
        changed.append((TOKENIZER, "its own", config.vocabulary.path or "the package's"))
    refused = [c for c in changed if not c[0].startswith(FREE_FIELDS)]
    if refused and not allow_change:
        told = "; ".join(f"{key}: {before!r} -> {now!r}" for key, before, now in refused)
        raise UserError(
            f"{workdir} was made by another config ({told}); use a new workdir or the old "
            "values, or go on with the new ones by --allow-config-change"
        )
    for key, before, now in changed:
        line = f"config changed: {key}: {before!r} -> {now!r}"
        if key == "train.num_steps" and config.optim.decay == "cosine":
            line += "; the learning rate now falls to 0 there, and jumps where the run goes on"
        say(line)


def start_workdir(workdir: pathlib.Path, config: ConfigDict, vocabulary: Vocabulary) -> None:
    """Writes config and tokenizer into a workdir; UserError where it cannot be written."""
    try:
        beside.write_bytes(workdir / CONFIG, config_lib.to_json(config).encode())
        beside.write_bytes(workdir / TOKENIZER, vocabulary.model)
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill beside `folder`, renamed to it at the end, or removed if anything fails.

    Raises:
      UserError: if `folder` already exists, or cannot be made.
    """
    folder = pathlib.Path(folder)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} already exists; name a new folder")
    try:
        with beside.new_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot write {folder}: {reason}") from error


def save(
    folder: str | os.PathLike,
    bundle: Bundle,
    dtype: str = "float32",
    tick: Callable[[int], None] = lambda size: None,
) -> pathlib.Path:
    """Writes an export folder beside its place and renames it, one tensor in memory at a time.

    Args:
      dtype: of the weights in the file, of DTYPES.
      tick: called with the bytes of each tensor that is written.

    Raises:
      UserError: if `folder` already exists.
    """
    tensors = traverse.flatten_dict(dict(bundle.params), sep="/")
    vocabulary, made_from = bundle.vocabulary, bundle.fingerprint
    return write_export(folder, bundle.config, vocabulary, tensors, dtype, made_from, tick)


def write_export(
    folder: str | os.PathLike,
    config: ConfigDict,
    vocabulary: Vocabulary | None,
    tensors: tensor_files.Tensors,
    dtype: str | None,
    made_from: str,
    tick: Callable[[int], None] = lambda size: None,
    extra: Mapping[str, bytes] | None = None,
) -> pathlib.Path:
    """Writes an export folder of tensors that may be read one by one; arguments as `save`.

    Args:
      vocabulary: None where it is not known; the folder then serves training alone.
      tensors: by our names, 'denoiser/trunk/..'.
      dtype: of the weights in the file; None is their own.
      made_from: what the model card and the manifest say of where they come from.
      extra: content of further files by name.
    """
    if dtype not in (*DTYPES, None):
        raise UserError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)}")
    parts: dict[str, int] = {}
    for name, value in tensors.items():
        part = name.partition("/")[0]
        parts[part] = parts.get(part, 0) + math.prod(value.shape)
    with new_folder(folder) as temporary:
        tensor_files.write(temporary / WEIGHTS, tensors, dtype, tick)
        (temporary / CONFIG).write_text(config_lib.to_json(config))
        if vocabulary is not None:
            (temporary / TOKENIZER).write_bytes(vocabulary.model)
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
        card = model_card(config, parts, made_from, dtype or "as imported")
        (temporary / CARD).write_text(card, "utf-8")
        manifest = {"version": 1, "made_from": made_from, "parts": parts}
        manifest["files"] = checkpoint.hash_files(temporary)
        checkpoint.write_json(temporary / MANIFEST, manifest)
    return pathlib.Path(folder)


def load(folder: str | os.PathLike, step: int | None = None) -> Bundle:
    """Opens a workdir (its newest whole checkpoint, or `step`) or an export folder.

    Parameters come as numpy arrays: the running average where there is one. Those of an export
    in float32 or bfloat16 stay on disk, mapped into memory, until something reads them; float16
    becomes float32.

    Raises:
      UserError: nothing is there, or what is there is damaged.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    folder, step = _step_of(folder, step)
    config = read_config(folder)
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        hint = "import it with --tokenizer" if (folder / WEIGHTS).is_file() else "give another"
        raise UserError(f"{folder} cannot be sampled: it has no {TOKENIZER}; {hint}")
    vocabulary = Vocabulary.from_file(str(tokenizer), num_vokens=config.vocabulary.num_vokens)
    if (folder / WEIGHTS).is_file():
        params = traverse.unflatten_dict(read_tensors(folder), sep="/")
        params, fingerprint, step = _as_computed(params), checkpoint.manifest_hash(folder), None
    else:
        params, fingerprint, step = _read_checkpoint(folder, step)
        config, params = plain_model(config, params)
    return Bundle(config, params, vocabulary, fingerprint, step)


def plain_model(config: ConfigDict, params: Params) -> tuple[ConfigDict, Params]:
    """Config and parameters of the model that training makes, its adapters merged into kernels."""
    if not Trainable.from_config(config).rank:
        return config, params
    params = lora.merge(params, config.model.lora_alpha)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.train_decoder = "all"
    return config, params


def starting_point(folder: pathlib.Path, average: bool) -> tuple[ConfigDict, dict[str, Any]]:
    """Config and parameters by our names, for training to start from; without adapters.

    Args:
      folder: an export or import, of all parts or some; a workdir or a step of one.
      average: of a workdir, its running average, where it has one; else what it was training.

    Raises:
      UserError: nothing is there, or what is there is damaged.
    """
    place, step = _step_of(folder, None)
    config = read_config(place)
    if (place / WEIGHTS).is_file():
        return config, read_tensors(place)
    config, params = plain_model(config, _read_checkpoint(place, step, average)[0])
    return config, traverse.flatten_dict(params, sep="/")


def tokenizer_of(folder: pathlib.Path) -> bytes | None:
    """The SentencePiece model of a folder that `starting_point` reads, None where it has none."""
    path = _step_of(folder, None)[0] / TOKENIZER
    return path.read_bytes() if path.is_file() else None


def _step_of(folder: pathlib.Path, step: int | None) -> tuple[pathlib.Path, int | None]:
    """The workdir and step of WORKDIR/checkpoints/step_N; any other folder as it is."""
    if folder.parent.name != "checkpoints" or not folder.name.startswith("step_"):
        return folder, step
    digits = folder.name.removeprefix("step_")
    if not digits.isdigit():
        raise UserError(f"checkpoint folder {folder} is not named step_ and a number")
    return folder.parent.parent, int(digits)


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The config of a workdir or export; UserError where there is none or it is no config."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a workdir or export: it has no {CONFIG}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    config = config_lib.from_json(text, str(path))
    config_lib.check_kept(config, str(path))
    return config


def read_tensors(folder: pathlib.Path) -> dict[str, tensor_files.Tensor]:
    """The tensors of a whole export by our names; UserError where it is damaged."""
    problem = checkpoint.manifest_problem(folder, ESSENTIAL)
    if problem:
        raise UserError(f"export {folder} is damaged: {problem}")
    tensors = tensor_files.read(folder / WEIGHTS)
    paths = [name.split("/") for name in tensors]
    groups = {"/".join(path[:i]) for path in paths for i in range(1, len(path))}
    for name, path in zip(tensors, paths, strict=True):
        if name in groups or "" in path:
            raise UserError(f"{folder / WEIGHTS}: {name!r} is not the name of a parameter")
    return tensors


def _as_computed(tree: Any) -> Any:
    """Arrays of the tensors in a tree; no network of ours computes in float16."""
    if isinstance(tree, Mapping):
        return {name: _as_computed(value) for name, value in tree.items()}
    return np.asarray(tree, np.float32 if tree.dtype == np.float16 else None)


def _read_checkpoint(
    folder: pathlib.Path, step: int | None, average: bool = True
) -> tuple[dict[str, Any], str, int]:
    checkpoints = checkpoint.Checkpoints(folder)
    if step is None:
        step = checkpoints.newest_whole()
        if step is None:
            raise UserError(f"{folder} holds no whole checkpoint and no {WEIGHTS}")
    elif problem := checkpoint.manifest_problem(checkpoints.step_folder(step)):
        raise UserError(f"checkpoint {checkpoints.step_folder(step)} is damaged: {problem}")
    shapes = checkpoints.saved_shapes(step)
    trained = "ema" if average else "params"
    state = checkpoints.restore(step, {name: shapes[name] for name in (trained, "frozen")})
    fingerprint = checkpoint.manifest_hash(checkpoints.step_folder(step))
    return trainable.merge(state[trained], quantize.restore(state["frozen"])), fingerprint, step
