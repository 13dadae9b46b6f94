"""ml-mdm weights: state dictionaries (name to array) to our parameters and back, and configs.

Every one of our parameters has one name in ml-mdm, so a dictionary is read by translating the
names of an abstract initialisation; whatever is missing, extra or of another shape is listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from kaleido_jax.errors import UserError
from kaleido_jax.interop.mdm_config import config_from_mdm
from kaleido_jax.models import nested_unet, unet
from kaleido_jax.tensor_files import Tensor, Tensors, as_tensor
from kaleido_jax.types import Params

__all__ = ["config_from_mdm", "from_mdm", "leaves", "mdm_name", "mdm_tensors", "to_mdm"]

Config = unet.Config | nested_unet.Config
State = Mapping[str, Shaped[np.ndarray, "..."]]  # or tensors that are not read yet

# Our name of a layer, by the kind of block that it is in, to ml-mdm's.
RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "film": "time_layer",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv3",
}
ATTENTION = {
    "norm": "norm",
    "qkv": "qkv",
    "cross_norm": "norm_cond",
    "cross_kv": "kv_cond",
    "out": "proj_out",
    "mlp_norm": "ffn.0",
    "mlp_in": "ffn.1",
    "mlp_out": "ffn.3",
}
TOKENS = {
    "norm": "attn.norm",
    "qkv": "attn.qkv",
    "out": "attn.proj_out",
    "mlp_norm": "mlp.main.0",
    "mlp_in": "mlp.main.1",
    "mlp_out": "mlp.main.3",
}
SINGLE = {
    "stem": "conv_in",
    "head_norm": "norm_out",
    "head_conv": "conv_out",
    "to_inner": "in_adapter",
    "from_inner": "out_adapter",
    "project": "lm_proj",
    "vector": "cond_emb",
}
LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Linear layers of ours that are 1x1 convolutions in ml-mdm.
POINTWISE = re.compile(r"(\.conv3|blocks\.\d+\.attn\.\d+\.(qkv|proj_out|ffn\.[13]))\.weight$")


def from_mdm(state: State, config: Config) -> Params:
    """Parameters of `build(config)` from an ml-mdm state dictionary.

    Args:
      state: PyTorch's names to arrays, convolutions as [out, in, height, width].

    Returns:
      Float32 numpy parameters in our layout.

    Raises:
      UserError: one line with every name that is missing, unknown or of another shape.
    """
    tensors = mdm_tensors(state, config)
    return flax.traverse_util.unflatten_dict({path: np.asarray(t) for path, t in tensors.items()})


def mdm_tensors(state: Tensors, config: Config) -> dict[tuple[str, ...], Tensor]:
    """What `from_mdm` gives by path, none of it read yet; arguments and errors as there."""
    found, problems, known = {}, [], set()
    for path, leaf in leaves(config).items():
        name = mdm_name(path, config)
        known.add(name)
        shape = _mdm_shape(name, leaf.shape)
        if name not in state:
            problems.append(f"{name} {list(shape)} is missing")
        elif tuple(state[name].shape) != shape:
            problems.append(f"{name} is {list(state[name].shape)}, should be {list(shape)}")
        else:
            found[path] = _to_ours(as_tensor(state[name]), leaf.shape)
    problems += [f"{name} is unknown" for name in sorted(set(state) - known)]
    if problems:
        raise UserError(f"ml-mdm weights do not fit the config: {'; '.join(problems)}")
    return found


def to_mdm(params: Params, config: Config) -> dict[str, np.ndarray]:
    """The ml-mdm state dictionary of our parameters, the exact inverse of `from_mdm`."""
    state = {}
    for path, value in flax.traverse_util.flatten_dict(nn.unbox(params)).items():
        name = mdm_name(path, config)
        value = np.asarray(value, np.float32)
        state[name] = _to_mdm(value, _mdm_shape(name, value.shape))
    return state


def leaves(config: Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes of the parameters by path, from an abstract initialisation."""
    model = nested_unet.build(config)
    side = _lowest(config).shrink
    ratios = config.ratios
    images = [jnp.zeros((1, side * r, side * r, config.channels)) for r in ratios]
    width = max(_lowest(config).conditioning_feature_dim, 1)
    variables = jax.eval_shape(
        model.init,
        jax.random.key(0),
        tuple(images),
        jnp.zeros(1),
        jnp.zeros((1, 1, width)),
        jnp.ones((1, 1), bool),
    )
    return flax.traverse_util.flatten_dict(nn.unbox(variables["params"]))


def _lowest(config: Config) -> unet.Config:
    while isinstance(config, nested_unet.Config):
        config = config.inner
    return config


def mdm_name(path: tuple[str, ...], config: Config) -> str:
    """ml-mdm's name of the parameter at `path` of our tree."""
    prefix = ""
    while path[0] == "inner":
        path, config, prefix = path[1:], config.inner, prefix + "inner_unet."
    if path[0] in ("trunk", "outer", "condition"):
        path = path[1:]
    first, *rest, leaf = path
    suffix = "." + LEAF[leaf]
    if first in SINGLE:
        return prefix + SINGLE[first] + suffix
    if first == "time":
        return prefix + {"hidden": "temb_layer1", "out": "temb_layer2"}[rest[0]] + suffix
    if first.startswith("micro_"):
        layer = {"hidden": "0", "out": "1"}[rest[0]]
        return f"{prefix}cond_layers.{first.removeprefix('micro_')}.{layer}{suffix}"
    kind, number = first.rsplit("_", 1)
    if kind == "layer":
        return f"{prefix}lm_head.{number}.{TOKENS[rest[0]]}{suffix}"
    return prefix + _block_name(kind, int(number), rest, config) + suffix


def _block_name(kind: str, number: int, rest: list[str], config: Config) -> str:
    levels = len(config.resolution_channels)
    if kind == "up":  # ml-mdm counts upwards from the lowest
        block = f"up_blocks.{levels - 1 - number}"
    else:
        block = {"down": "down_blocks", "middle": "mid_blocks"}[kind] + f".{number}"
    if rest[0] == "resample":
        return f"{block}.resample"
    part, *numbers = rest[0].split("_")
    if part == "resnet":
        return f"{block}.resnets.{numbers[0]}.{RESIDUAL[rest[1]]}"
    per_resnet = config.num_attention_layers[number] if kind != "middle" else 1
    index = int(numbers[0]) * per_resnet + int(numbers[1])
    return f"{block}.attn.{index}.{ATTENTION[rest[1]]}"


def _mdm_shape(name: str, ours: tuple[int, ...]) -> tuple[int, ...]:
    if len(ours) == 4:
        return (ours[3], ours[2], ours[0], ours[1])
    if len(ours) == 2:
        return (ours[1], ours[0]) + ((1, 1) if POINTWISE.search(name) else ())
    return tuple(ours)


def _to_ours(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    def change(value: np.ndarray) -> np.ndarray:
        value = value.astype(np.float32, copy=False)
        if len(shape) == 4:
            return np.ascontiguousarray(value.transpose(2, 3, 1, 0))
        return np.ascontiguousarray(value.reshape(value.shape[: len(shape)]).T)

    changed = tensor.changed(shape, change)
    return Tensor(shape, np.dtype(np.float32), changed.read)


def _to_mdm(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.ndim == 4:
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(value.T.reshape(shape))
