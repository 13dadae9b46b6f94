"""Which parameters train: the frozen encoder (Sec. 3.3), and training a part of the decoder.

Appendix C names "partial training" as the way to less memory. `config.model.train_decoder` is

- 'all' (the paper);
- 'last:N': the last N layers of the decoder and its final norm;
- 'lora:RANK': low-rank adapters beside the kernels that `config.model.lora_kernels` names.

With a part, the decoder's embedding and head also train where `config.model.train_vocabulary` is
true: vokens are new words, which nothing else can teach.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import lora
from kaleido_jax.errors import UserError
from kaleido_jax.types import Params

SCAN_AXIS = 1  # of a scanned stack's parameters, as models.t5 has it
VOCABULARY = ("token_embedder", "logits_dense")


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What trains.

    Attributes:
      freeze_encoder: the text encoder does not.
      layers: of the decoder only so many last layers, and its final norm; None is no such limit.
      rank: of the decoder's adapters, the only part of its layers that trains; 0 is no adapters.
      vocabulary: whether the decoder's embedding and head train where its layers do not all.
      num_layers: of the decoder.
    """

    freeze_encoder: bool
    layers: int | None = None
    rank: int = 0
    vocabulary: bool = True
    num_layers: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict) -> Trainable:
        """Reads `config.model`; what older configs do not say is as the paper has it.

        Raises:
          UserError: a word that is none of 'all', 'last:N' and 'lora:RANK', or N out of range.
        """
        model = config.model
        word = str(model.get("train_decoder", "all"))
        depth = model.latent_decoder.num_decoder_layers
        found = re.fullmatch(r"(last|lora):([1-9]\d{0,5})", word)
        if word != "all" and not found:
            raise UserError(
                f"config key 'model.train_decoder' is {word!r}; one of 'all', 'last:N' (layers) "
                "and 'lora:RANK'"
            )
        kind, number = (found[1], int(found[2])) if found else ("all", 0)
        if kind == "last" and number > depth:
            raise UserError(
                f"config key 'model.train_decoder' is {word!r}; the decoder has {depth} layers"
            )
        return cls(
            freeze_encoder=model.freeze_encoder,
            layers=number if kind == "last" else None,
            rank=number if kind == "lora" else 0,
            vocabulary=model.get("train_vocabulary", True),
            num_layers=depth,
        )

    def frozen_layers(self, path: tuple[str, ...]) -> int | None:
        """How many leading layers of a parameter are frozen, where it has all layers in one array.

        None for any other parameter; `trains` tells of those.
        """
        if self.layers is None or path[0] != "latent_decoder" or "layers" not in path:
            return None
        return self.num_layers - self.layers

    def trains(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter of this path, such as ('denoiser', 'trunk', ..), trains."""
        if path[0] == "text_encoder":
            return not self.freeze_encoder
        if path[0] != "latent_decoder" or (self.layers is None and not self.rank):
            return True
        if any(name in VOCABULARY for name in path):
            return self.vocabulary
        if self.rank:
            return path[-1] in (lora.A, lora.B)
        layer = next((int(n.removeprefix("layers_")) for n in path if n.startswith("layers_")), -1)
        return "decoder_norm" in path or layer >= self.num_layers - self.layers


def split(params: Params, what: Trainable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree of parameters into (trained, frozen); neither has empty groups.

    A parameter that holds all layers in one array may be split between both along the layers. The
    leaves may also be shardings: a part of an array is sharded as the whole, whose layers no
    device divides.
    """
    trained, frozen = {}, {}
    for path, leaf in _leaves(params):
        cut = what.frozen_layers(path)
        if cut is None:
            _put(trained if what.trains(path) else frozen, path, leaf)
            continue
        _put(trained, path, _layers(leaf, cut, None))
        if cut:
            _put(frozen, path, _layers(leaf, 0, cut))
    return trained, frozen


def merge(trained: Params, frozen: Params) -> dict[str, Any]:
    """Undoes `split`, for any `Trainable`: what both have is joined along the layers."""
    merged: dict[str, Any] = {}
    for path, leaf in _leaves(frozen):
        _put(merged, path, leaf)
    for path, leaf in _leaves(trained):
        first = _get(merged, path)
        _put(merged, path, leaf if first is None else _join(first, leaf))
    return merged


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _get(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = tree
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _layers(leaf: Any, start: int, stop: int | None) -> Any:
    if isinstance(leaf, jax.sharding.Sharding):
        return leaf
    return leaf[:, start:stop]


def _join(first: Any, second: Any) -> Any:
    if isinstance(first, jax.sharding.Sharding):
        return first
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.concatenate([first, second], axis=SCAN_AXIS)
    return jnp.concatenate([first, second], axis=SCAN_AXIS)
