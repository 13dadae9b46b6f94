"""What a training run will take, found without allocating a parameter: shapes, operations, memory.

Everything comes from shapes: parameters and their place on the mesh from the abstract state,
operations from the step's jaxpr, memory from the compiler, which lays out the whole step for one
device of the mesh.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kaleido_jax import flops, memory_plan
from kaleido_jax.errors import UserError
from kaleido_jax.train import Trainer


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of parameters.

    Attributes:
      name: 'denoiser/outer/..'. part: of the model, as `flops.PARTS` names it.
      shape, dtype: of the whole array.
      sharding: axes of the mesh that divide each of its axes, such as 'fsdp,-', or 'whole'.
      trained: whether it has a gradient, optimizer slots and an average.
      local_bytes: of the array on one device.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    trained: bool
    local_bytes: int

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


def simulate_devices(count: int) -> None:
    """Makes the CPU pose as `count` devices; before jax has looked for devices.

    Raises:
      UserError: jax already runs with other devices.
    """
    before = dict(os.environ), jax.config.jax_platforms
    os.environ.update(memory_plan.simulated(count))
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) != count or jax.devices()[0].platform != "cpu":
        # Nothing came of it, so other processes that start from here shall not see it either.
        os.environ.clear()
        os.environ.update(before[0])
        jax.config.update("jax_platforms", before[1])
        raise UserError(
            f"--simulate-devices {count}: jax already runs on {len(jax.devices())} devices here; "
            "it needs a process of its own"
        )


def local_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a `ShapeDtypeStruct` with a sharding, on each device."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def parameters(trainer: Trainer) -> list[Leaf]:
    """Every array of parameters, by name."""
    state = trainer.abstract_state()
    found = []
    for tree, trained in ((state.params, True), (state.frozen, False)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = [_axis(axis, trainer.mesh.shape) for axis in leaf.sharding.spec]
            sharding = ",".join(axes) if any(axis != "-" for axis in axes) else "whole"
            dtype = np.dtype(leaf.dtype).name
            part = flops.part(name)
            found.append(Leaf(name, part, leaf.shape, dtype, sharding, trained, local_bytes(leaf)))
    return sorted(found, key=lambda leaf: (leaf.name, not leaf.trained))


def _axis(axis: Any, sizes: Mapping[str, int]) -> str:
    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
    return "+".join(name for name in names if sizes[name] > 1) or "-"


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes on each device of every part of the state, of a gradient and of a batch."""
    state = trainer.abstract_state()

    def total(tree: Any) -> int:
        return sum(local_bytes(leaf) for leaf in jax.tree.leaves(tree))

    trees = state.as_dict() | {
        "gradients": state.params,
        "batch": memory_plan.abstract_batch(trainer),
    }
    return {name: total(tree) for name, tree in trees.items()}


def operations(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Floating point operations for each image, by part: of the loss, and of loss and gradient.

    Returns:
      {'forward': counts, 'training': counts}, as `flops.count` names them.
    """
    state, batch = trainer.abstract_state(), memory_plan.abstract_batch(trainer)
    args = (state.params, state.frozen, batch, state.step)
    counts = {
        "forward": flops.count(trainer.loss, *args),
        "training": flops.count(jax.grad(trainer.loss, has_aux=True), *args),
    }
    size = trainer.config.train.batch_size
    return {
        kind: {part: number / size for part, number in found.items()}
        for kind, found in counts.items()
    }
