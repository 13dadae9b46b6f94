"""How a frozen encoder is kept: in float32, in bfloat16, or with kernels in 8 bits.

Weights alone are rounded, never activations. An 8-bit kernel is {'int8': [in, .., out], 'scale':
[1, .., out]} in the place of its array, one scale for each output channel (and layer, where a scan
stacks them): kernel = int8 * scale, off by at most half a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kaleido_jax.errors import UserError
from kaleido_jax.types import Params

STORAGES = ("float32", "bfloat16", "int8")
INT8, SCALE = "int8", "scale"
_LARGEST = 127


def storage_of(config: ConfigDict) -> str:
    """`config.model.frozen_storage`.

    Raises:
      UserError: it is none of STORAGES, or the encoder is not frozen.
    """
    kind = config.model.get("frozen_storage", "float32")
    if kind not in STORAGES:
        raise UserError(
            f"config key 'model.frozen_storage' is {kind!r}; one of {', '.join(STORAGES)}"
        )
    if kind != "float32" and not config.model.freeze_encoder:
        raise UserError(
            f"config key 'model.frozen_storage' is {kind!r}; it needs model.freeze_encoder=True"
        )
    return kind


def of_encoder(
    function: Callable[[Params, str], dict[str, Any]], frozen: Params, kind: str
) -> dict[str, Any]:
    """`store` or `store_shardings` of the text encoder among the frozen parts."""
    return {
        part: function(tree, kind) if part == "text_encoder" else tree
        for part, tree in frozen.items()
    }


def store(params: Params, kind: str) -> dict[str, Any]:
    """Parameters as `kind` of STORAGES keeps them; with 'int8' all but kernels are bfloat16."""

    def keep(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return {key: keep(key, value) for key, value in leaf.items()}
        if kind == "int8" and name == "kernel":
            return _rounded(leaf)
        return leaf if kind == "float32" else leaf.astype(jnp.bfloat16)

    return keep("", params)


def _rounded(kernel: Float[Array, "in *rest"]) -> dict[str, Array]:
    largest = jnp.abs(kernel).max(axis=0, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1.0) / _LARGEST
    return {INT8: jnp.round(kernel / scale).astype(jnp.int8), SCALE: scale}


def store_shardings(shardings: Params, kind: str) -> dict[str, Any]:
    """Shardings of `store`'s result, from those of the parameters; scales lie as their channels."""

    def keep(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return {key: keep(key, value) for key, value in leaf.items()}
        if kind != "int8" or name != "kernel":
            return leaf
        return {INT8: leaf, SCALE: NamedSharding(leaf.mesh, PartitionSpec(None, *leaf.spec[1:]))}

    return keep("", shardings)


def restore(params: Params, dtype: Any = jnp.float32) -> Any:
    """Arrays for 8-bit kernels, in `dtype`; anything else is left as it is."""
    if not isinstance(params, Mapping):
        return params
    if set(params) == {INT8, SCALE}:
        return (params[INT8] * params[SCALE]).astype(dtype)
    return {key: restore(value, dtype) for key, value in params.items()}


def is_rounded(params: Params) -> bool:
    """Whether a tree has 8-bit kernels."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))
