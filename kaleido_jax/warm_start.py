"""Training that starts from other weights: `config.init_from` names the folders that hold them.

They are imports, exports, workdirs (their newest whole checkpoint) or checkpoints. Each gives the
parts that it holds (`text_encoder`, `latent_decoder`, `denoiser`); later ones win. What reads the
condition (its projection, its learned layers, the keys and values of cross-attention) starts anew
where its size differs: a released MDM reads 2048 numbers per token, Kaleido 1024. A denoiser of
fewer resolutions becomes the inner network of one of more: so a run at 64 pixels goes on at 256.
A UNet of fewer levels becomes the coarse levels of one that has finer ones before them. These
start anew, with both ends of the network and what has another size beside them: so a run in coarse
patches goes on in finer ones. A decoder whose vocabulary has more vokens keeps its other tokens.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import numpy as np

from kaleido_jax import bundle
from kaleido_jax.errors import UserError
from kaleido_jax.models.kaleido import KaleidoConfig
from kaleido_jax.models.t5 import stack_layers, unstack_layers
from kaleido_jax.trainable import Trainable
from kaleido_jax.types import Params

PARTS = ("text_encoder", "latent_decoder", "denoiser")
# Parameters of a denoiser whose shape follows from the condition's width and learned layers.
CONDITION = re.compile(r"/(condition|cross_norm|cross_kv)/")
# An outer network, and adapters, which start at nothing, may be new.
NEW = re.compile(r"denoiser/(inner/)*(outer|to_inner|from_inner)/|.*/lora_[ab]$")
# Levels of a UNet, 0 the finest, and what is as fine as that one.
LEVEL = re.compile(r"(denoiser/trunk/(?:down|up)_)(\d+)/")
ENDS = re.compile(r"denoiser/trunk/(stem|head_norm|head_conv)/")
EMBEDDING = "latent_decoder/token_embedder/embedding"


def warm_start(
    params: Params,
    config: Any,
    folders: Iterable[str],
    say: Callable[[str], None] = lambda line: None,
    average: bool = True,
) -> Params:
    """Parameters with those of the folders in the place of their own.

    Args:
      params: of the whole model, on devices; kept where no folder has a part.
      config: the training config.
      folders: imports, exports, workdirs or checkpoints.
      say: receives a line for each part: what is taken, what starts anew.
      average: take a workdir's running average, else what it was training.

    Raises:
      UserError: a folder that is none of these, or, in one line, every parameter of a part
        that it lacks or has in another shape.
    """
    flat = traverse.flatten_dict(dict(params), sep="/")
    for folder in map(pathlib.Path, folders):
        if not folder.is_dir():
            raise UserError(f"config key 'init_from' names {folder}, which is not a folder")
        source, found = bundle.starting_point(folder, average)
        present = [part for part in PARTS if any(n.startswith(f"{part}/") for n in found)]
        wanted = [part for part in present if any(n.startswith(f"{part}/") for n in flat)]
        if not wanted:
            raise UserError(
                f"config key 'init_from' names {folder}, which holds none of the model's parts"
            )
        for part in wanted:
            new = _levels_before(source, config) if part == "denoiser" else 0
            own = _fitting(part, found, source, config, new)
            grows = part == "latent_decoder" and _gets_vokens(source, config, folder)
            _take(flat, part, own, new, grows, folder, say)
    return traverse.unflatten_dict(flat, sep="/")


def _levels_before(source: Any, config: Any) -> int:
    """How many finer levels a plain UNet has before those of the one that it starts from."""
    ours, theirs = config.model.denoiser, source.model.denoiser
    if (ours.name, theirs.name) != ("unet", "unet"):
        return 0
    fine, coarse = tuple(ours.resolution_channels), tuple(theirs.resolution_channels)
    new = len(fine) - len(coarse)
    return new if new > 0 and fine[new:] == coarse else 0


def _fitting(
    part: str, found: Mapping[str, Any], source: Any, config: Any, new: int
) -> dict[str, Any]:
    """The tensors of one part under the names of the model that is to be trained."""
    own = {name: tensor for name, tensor in found.items() if name.startswith(f"{part}/")}
    if new:
        return {
            LEVEL.sub(lambda level: f"{level[1]}{int(level[2]) + new}/", name): tensor
            for name, tensor in own.items()
        }
    if part == "denoiser":
        ratios = [len(KaleidoConfig.from_config(c).ratios) for c in (source, config)]
        prefix = f"{part}/" + "inner/" * max(0, ratios[1] - ratios[0])
        return {prefix + name.removeprefix(f"{part}/"): t for name, t in own.items()}
    scanned = [c.model[part].get("scan_layers", False) for c in (source, config)]
    if scanned[0] == scanned[1]:
        return own
    arrays = {name.removeprefix(f"{part}/"): np.asarray(t) for name, t in own.items()}
    tree = traverse.unflatten_dict(arrays, sep="/")
    tree = stack_layers(tree) if scanned[1] else unstack_layers(tree)
    return traverse.flatten_dict({part: tree}, sep="/")


def _may_be_anew(name: str, found: bool, new: int) -> bool:
    """Whether a parameter that is not found, or in another shape, is no mistake."""
    if CONDITION.search(name) or (not found and NEW.match(name)):
        return True
    level = LEVEL.match(name)  # that after the `new` finer ones borders on them
    return new > 0 and bool(ENDS.match(name) or (level and int(level[2]) <= new))


def _take(
    flat: dict[str, Any],
    part: str,
    found: Mapping[str, Any],
    new: int,
    grows: bool,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    names = [name for name in flat if name.startswith(f"{part}/")]
    problems, anew, taken = [], [], []
    grown = False
    for name in names:
        same = name in found and tuple(found[name].shape) == flat[name].shape
        if same and not (new and ENDS.match(name)):
            taken.append(name)
        elif grows and name == EMBEDDING and _is_longer(flat[name], found.get(name)):
            grown = True
        elif _may_be_anew(name, name in found, new):
            anew.append(name)
        elif name not in found:
            problems.append(f"{name} is missing")
        else:
            have, want = list(found[name].shape), list(flat[name].shape)
            problems.append(f"{name} is {have}, should be {want}")
    problems += [
        f"{name} is unknown" for name in found if name not in flat and not CONDITION.search(name)
    ]
    if problems:
        hint = ""
        if any("token_embedder" in problem for problem in problems):
            hint = " (import it with --vokens and --tokenizer as the config has them)"
        raise UserError(f"{folder} does not fit the config{hint}: {'; '.join(problems)}")
    for name in taken:
        old = flat[name]
        value = np.asarray(found[name]).astype(old.dtype, copy=False)
        # A copy of its own: training reuses the memory of its state, and a file is not to write to.
        flat[name] = jax.device_put(value, old.sharding, may_alias=False)
    if grown:
        flat[EMBEDDING] = _with_first_rows(flat[EMBEDDING], np.asarray(found[EMBEDDING]))
        say(f"{part}: tokens after the first {found[EMBEDDING].shape[0]} start anew, for vokens")
    say(f"{part}: {len(taken)} parameters from {folder}")
    if anew:
        listed = ", ".join(anew[:4]) + (", ..." if len(anew) > 4 else "")
        say(f"{part}: {len(anew)} parameters start anew: {listed}")


def _gets_vokens(source: Any, config: Any, folder: pathlib.Path) -> bool:
    """Whether the decoder's tokens are the other's with more vokens after them, and can be learned.

    Only where head and embedding are one table: a separate head's new columns have to be drawn as
    `kaleido import t5 --vokens` does it.
    """
    decoder = ("latent_decoder", *EMBEDDING.split("/")[1:])
    return (
        config.vocabulary.num_vokens > source.vocabulary.num_vokens
        and config.model.latent_decoder.logits_via_embedding
        and Trainable.from_config(config).trains(decoder)
        and bundle.tokenizer_of(folder) == bundle.make_vocabulary(config).model
    )


def _is_longer(ours: Any, theirs: Any) -> bool:
    if theirs is None or len(theirs.shape) != 2:
        return False
    return ours.shape[0] > theirs.shape[0] and ours.shape[1] == theirs.shape[1]


def _with_first_rows(ours: jax.Array, theirs: np.ndarray) -> jax.Array:
    """Our table of tokens whose first rows are theirs, as it lies on devices."""
    put = jax.jit(lambda table, rows: table.at[: len(rows)].set(rows.astype(table.dtype)))
    return jax.device_put(put(ours, theirs), ours.sharding)
