"""What a training run will take, found without allocating a parameter: shapes, operations, memory.

Everything comes from shapes: parameters and their place on the mesh from the abstract state,
operations from the step's jaxpr, memory from the compiler, which lays out the whole step for one
device of the mesh.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kaleido_jax import flops, mesh
from kaleido_jax.errors import UserError
from kaleido_jax.train import Trainer
from kaleido_jax.types import Batch

# The CPU compiler's own work on machine code says nothing of memory, and takes most of its time.
CPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Its search for all-reduces to combine takes minutes on a step with hundreds of them.
CPU_FLAGS = ("--xla_disable_hlo_passes=cpu-all-reduce-combiner",)
_COUNT = re.compile(r"\s*--xla_force_host_platform_device_count=\S*")


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
    kept = _COUNT.sub("", os.environ.get("XLA_FLAGS", ""))
    flags = [kept.strip(), f"--xla_force_host_platform_device_count={count}"]
    flags += [flag for flag in CPU_FLAGS if flag.partition("=")[0] not in kept]
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if flag)
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) != count or jax.devices()[0].platform != "cpu":
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

    trees = state.as_dict() | {"gradients": state.params, "batch": abstract_batch(trainer)}
    return {name: total(tree) for name, tree in trees.items()}


def abstract_batch(trainer: Trainer) -> Batch:
    """Shapes, types and shardings of a global batch."""
    data, rows = trainer.config.data, trainer.config.train.batch_size
    sharding = mesh.batch_sharding(trainer.mesh)
    side = data.image_size

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        caption_tokens=array(np.int32, data.caption_length),
        latent_tokens=array(np.int32, data.latent_length if trainer.config.latents else 0),
        # The points of the toy are no pixels.
        image=array(np.uint8 if data.channels == 3 else np.float32, side, side, data.channels),
        key_hash=array(np.uint32),
    )


def operations(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Floating point operations for each image, by part: of the loss, and of loss and gradient.

    Returns:
      {'forward': counts, 'training': counts}, as `flops.count` names them.
    """
    state, batch = trainer.abstract_state(), abstract_batch(trainer)
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


def memory(trainer: Trainer) -> dict[str, Any]:
    """What the compiler lays out for one device, in bytes, and how long it took.

    'total' is the arguments (state and batch), results that do not take an argument's place, and
    temporaries. It is what this machine's compiler plans: the CPU's keeps some bfloat16 values in
    float32 and does not fuse as a GPU's does, so it rather plans too much.
    """
    platform = trainer.mesh.devices.flat[0].platform
    started = time.monotonic()
    with mesh.use_mesh(trainer.mesh):
        lowered = trainer.compiled_update.lower(trainer.abstract_state(), abstract_batch(trainer))
        compiled = lowered.compile(CPU_OPTIONS if platform == "cpu" else None)
    found = compiled.memory_analysis()
    result = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    result["total"] = sum(result.values())
    return result | {"compiler": platform, "seconds": round(time.monotonic() - started, 1)}
