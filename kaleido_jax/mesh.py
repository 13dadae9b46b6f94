"""Device mesh and logical axis rules: names of axes in the models, axes of the mesh here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

from kaleido_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis (t5x's names, then the denoiser's) -> mesh axes. Unnamed axes are replicated.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("time_embed", "fsdp"),
)


# Sizes of (data, fsdp, tensor) for machines. Parameters are divided where devices are joined
# closely and copied beyond: within 8 GPUs, within a slice of TPUs (a v4 or v5p name counts cores,
# two to a chip). Small chips divide T5's heads too.
PRESETS: dict[str, tuple[int, int, int]] = {
    "gpu-1": (1, 1, 1),
    "gpu-8": (1, 8, 1),
    "a100-64": (8, 8, 1),
    "tpu-v4-8": (1, 4, 1),
    "tpu-v4-64": (1, 32, 1),
    "tpu-v4-256": (2, 64, 1),
    "tpu-v5e-8": (1, 4, 2),
    "tpu-v5e-64": (1, 32, 2),
    "tpu-v5e-256": (2, 64, 2),
    "tpu-v5p-64": (1, 32, 1),
    "tpu-v5p-256": (2, 64, 1),
}

# Arrays of fewer elements stay as the rules have them: to gather one costs more than it saves.
LARGE = 2**14
# Axes that are never divided instead of another: nn.scan takes one layer after the other.
WHOLE = ("layers",)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, preset: str = "", devices: Any = None
) -> Mesh:
    """A mesh over all devices with axes data, fsdp and tensor.

    Args:
      data, fsdp, tensor: sizes; one of them may be -1 for what the others leave.
      preset: a name in PRESETS, whose sizes then stand for the three.
      devices: defaults to `jax.devices()`.

    Raises:
      UserError: an unknown preset, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if preset and preset not in PRESETS:
        raise UserError(f"config key 'mesh.preset' is {preset!r}; one of {', '.join(PRESETS)}")
    sizes = list(PRESETS[preset]) if preset else [data, fsdp, tensor]
    asked = " x ".join(map(str, sizes))
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0 and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
    if any(size < 1 for size in sizes) or math.prod(sizes) != len(devices):
        where = f"config key 'mesh.preset' {preset!r}" if preset else "config key 'mesh'"
        raise UserError(
            f"{where} asks for data x fsdp x tensor = {asked}; "
            f"the product must be the number of devices, {len(devices)}"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes logical constraints effective: flax ignores them under a bare `with mesh:`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the leading axis of every batch array."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(mesh: Mesh, batch_size: int) -> Int64[np.ndarray, " rows"]:
    """Numbers of the rows of a global batch that the devices of this process hold, ascending.

    Processes that hold the same rows (a tensor axis over both) all read them.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for (part,) in held for row in range(batch_size)[part]}
    return np.array(sorted(rows), np.int64)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of abstract parameters as `Module.init` boxes them.

    Any mesh serves any size: an axis that its mesh axes do not divide stays whole, and where a
    large array would then lie whole on every device along fsdp or tensor, another of its axes is
    divided instead, the longest that can be.
    """
    specs = nn.get_partition_spec(boxed)
    abstract = nn.meta.unbox(boxed)

    def sharding(spec: PartitionSpec, leaf: Any) -> NamedSharding:
        if not isinstance(spec, PartitionSpec):
            spec = PartitionSpec(*(None for _ in leaf.shape))
        return NamedSharding(mesh, _divide(tuple(spec), leaf.shape, mesh))

    return jax.tree.map(
        sharding, specs, abstract, is_leaf=lambda x: isinstance(x, PartitionSpec) or x is None
    )


def _divide(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of an array with these logical axis names, as `param_shardings` says."""
    logical = nn.logical_to_mesh_axes(names, RULES)
    parts: list[tuple[str, ...]] = []
    for size, axis in zip(shape, logical, strict=True):
        wanted = (axis,) if isinstance(axis, str) else tuple(axis or ())
        divides = size % math.prod(mesh.shape[name] for name in wanted) == 0
        parts.append(wanted if divides else ())
    if math.prod(shape) >= LARGE:
        for axis in ("fsdp", "tensor"):
            if mesh.shape[axis] == 1 or any(axis in part for part in parts):
                continue
            per_device = [
                size // math.prod(mesh.shape[name] for name in part)
                for size, part in zip(shape, parts, strict=True)
            ]
            able = [
                i
                for i, size in enumerate(per_device)
                if size % mesh.shape[axis] == 0 and names[i] not in WHOLE
            ]
            if able:
                best = max(able, key=lambda i: per_device[i])
                parts[best] += (axis,)
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))
