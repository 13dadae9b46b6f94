"""ml-mdm's UNet and NestedUNet: our predictions beside the reference's."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax import compiling
from kaleido_jax.interop.mdm import from_mdm, to_mdm
from kaleido_jax.interop.mdm_config import config_from_mdm
from kaleido_jax.models import nested_unet
from kaleido_jax.types import Params
from tests.carried import carry
from tests.reference_rule import shapes_of, weights_of

Outputs = dict[str, tuple[np.ndarray, np.ndarray]]


def load_network(file: Mapping[str, np.ndarray]) -> tuple[nn.Module, Params]:
    """The network of a reference file and its parameters."""
    config = config_from_mdm(json.loads(str(file["config_json"])), shapes_of(file))
    params = carry(from_mdm(weights_of(file), config))
    return nested_unet.build(config), from_mdm(to_mdm(params, config), config)


def nhwc(image: np.ndarray) -> np.ndarray:
    """PyTorch's [B, C, H, W] as [B, H, W, C]."""
    return np.ascontiguousarray(np.transpose(image, (0, 2, 3, 1)))


def nchw(image: jax.Array) -> np.ndarray:
    """The inverse of `nhwc`."""
    return np.transpose(np.asarray(image), (0, 3, 1, 2))


def numbered(file: Mapping[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    """Arrays `prefix0`, `prefix1`, .. as far as they go."""
    arrays = []
    while f"{prefix}{len(arrays)}" in file:
        arrays.append(file[f"{prefix}{len(arrays)}"])
    return arrays


def check_network(path: pathlib.Path) -> Outputs:
    """Predictions at every resolution of an `mdm_unet*` or `mdm_nested*` file."""
    with np.load(path) as archive:
        file = dict(archive)
    model, params = load_network(file)

    @compiling.jit
    def predict(pyramid, times, states, mask):
        return model.apply({"params": params}, pyramid, times, states, mask)

    pyramid = tuple(nhwc(image) for image in numbered(file, "input/x_t_"))
    times = jnp.asarray(file["input/times"], jnp.float32)
    states, mask = file["input/conditioning"], file["input/mask"].astype(bool)
    pairs = zip(predict(pyramid, times, states, mask), numbered(file, "output/pred_"), strict=True)
    return {f"pred_{i}": (nchw(got), want) for i, (got, want) in enumerate(pairs)}


check_unet = check_network
check_nested = check_network
