"""torch-fidelity's Inception weights as a folder of ours, and that folder as variables.

The file is `weights-inception-2015-12-05-6d7a9d5b.pth` of torch-fidelity's releases.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax import bundle, checkpoint, tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.interop import sources
from kaleido_jax.models.inception import Inception
from kaleido_jax.tensor_files import Tensor, Tensors, as_tensor

WEIGHTS, MANIFEST = "inception.safetensors", "manifest.json"
_LEAF = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTERS = ".num_batches_tracked"  # of training; some files have them
Path = tuple[str, ...]


@functools.cache
def shapes() -> dict[Path, tuple[int, ...]]:
    """Shapes of the network's variables by path, the collection first."""
    image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), image)
    return {path: leaf.shape for path, leaf in traverse.flatten_dict(variables).items()}


def torch_name(path: Path) -> str:
    """PyTorch's name of a variable: ('params', 'fc', 'kernel') is 'fc.weight'."""
    *names, leaf = path[1:]
    return ".".join((*names, _LEAF.get(leaf, leaf)))


def inception_tensors(state: Tensors) -> dict[Path, Tensor]:
    """The network's variables of a PyTorch state, none of them read yet.

    Raises:
      UserError: one line with every name that is missing, unknown or of another shape.
    """
    found, problems, known = {}, [], set()
    for path, shape in shapes().items():
        name = torch_name(path)
        known.add(name)
        theirs = _torch_shape(shape)
        if name not in state:
            problems.append(f"{name} {list(theirs)} is missing")
        elif tuple(state[name].shape) != theirs:
            problems.append(f"{name} is {list(state[name].shape)}, should be {list(theirs)}")
        else:
            found[path] = as_tensor(state[name]).changed(shape, _to_ours)
    problems += [
        f"{name} is unknown" for name in sorted(set(state) - known) if not name.endswith(_COUNTERS)
    ]
    if problems:
        raise UserError(f"not torch-fidelity's Inception: {'; '.join(problems)}")
    return found


def _to_ours(array: np.ndarray) -> np.ndarray:
    """[out, in, height, width] as [height, width, in, out], [out, in] as [in, out], in float32."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    array = array if axes is None else array.transpose(axes)
    return np.ascontiguousarray(array, np.float32)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2])
    return tuple(shape[::-1])  # a matrix turned, a vector as it is


def import_inception(
    source: pathlib.Path, folder: pathlib.Path, tick: Callable[[int], None] = lambda size: None
) -> pathlib.Path:
    """Writes a folder of inception.safetensors and manifest.json; it must not exist.

    Args:
      source: torch-fidelity's .pth (read with weights_only); its tensors as .safetensors or .npz.
      tick: called with the bytes of each tensor that is written.

    Raises:
      UserError: weights that cannot be read safely or do not fit, the folder exists.
    """
    tensors = inception_tensors(sources.open_state(source))
    with bundle.new_folder(folder) as temporary:
        named = {"/".join(path): tensor for path, tensor in tensors.items()}
        tensor_files.write(temporary / WEIGHTS, named, "float32", tick)
        manifest = {"version": 1, "made_from": source.name}
        manifest["files"] = checkpoint.hash_files(temporary)
        checkpoint.write_json(temporary / MANIFEST, manifest)
    return folder


def load_inception(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """The variables of an imported folder, and a hash of its weights.

    Raises:
      UserError: no such folder, a damaged one, another network.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS}; make it with `kaleido import inception SOURCE DIR`"
        )
    problem = checkpoint.manifest_problem(folder, (WEIGHTS,))
    if problem:
        raise UserError(f"{folder} is damaged: {problem}")
    tensors = {tuple(name.split("/")): t for name, t in tensor_files.read(path).items()}
    wrong = [
        "/".join(name)
        for name in sorted(tensors.keys() | shapes().keys())
        if name not in tensors or tensors[name].shape != tuple(shapes().get(name, ()))
    ]
    if wrong:
        raise UserError(f"{path} is no Inception network of ours: {'; '.join(wrong[:5])}")
    digest = checkpoint.hash_files(folder, (WEIGHTS,))[WEIGHTS]["sha256"][:16]
    return traverse.unflatten_dict({name: np.asarray(t) for name, t in tensors.items()}), digest
