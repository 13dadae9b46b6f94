"""Device mesh and logical axis rules: names of axes in the models, axes of the mesh here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over all devices with axes data, fsdp and tensor.

    Args:
      data, fsdp, tensor: sizes; one of them may be -1 for what the others leave.
      devices: defaults to `jax.devices()`.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0 and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
    if any(size < 1 for size in sizes) or math.prod(sizes) != len(devices):
        raise UserError(
            f"config key 'mesh' asks for data x fsdp x tensor = {data} x {fsdp} x {tensor}; "
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


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of abstract parameters as `Module.init` boxes them.

    An axis that its mesh axes do not divide is replicated, so any mesh serves any size.
    """
    specs = nn.get_partition_spec(boxed)
    abstract = nn.meta.unbox(boxed)

    def sharding(spec: PartitionSpec, leaf: Any) -> NamedSharding:
        if not isinstance(spec, PartitionSpec):
            return replicated(mesh)
        logical = nn.logical_to_mesh_axes(tuple(spec), RULES)
        axes = []
        for size, axis in zip(leaf.shape, logical, strict=True):
            names = (axis,) if isinstance(axis, str) else tuple(axis or ())
            divides = size % math.prod(mesh.shape[name] for name in names) == 0
            axes.append(axis if names and divides else None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(
        sharding, specs, abstract, is_leaf=lambda x: isinstance(x, PartitionSpec) or x is None
    )
