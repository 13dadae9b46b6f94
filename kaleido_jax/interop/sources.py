"""Files of other projects' weights: safetensors, sharded folders, PyTorch's own format, npz.

Everything comes as tensors by name, none of them read before it is asked for. Nothing that a file
holds is ever run: PyTorch files are read with `weights_only=True`, npz without object arrays.
"""

from __future__ import annotations

import json
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from kaleido_jax import tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.tensor_files import Tensor

SAFETENSORS, NPZ = (".safetensors",), (".npz",)
TORCH = (".pth", ".pt", ".bin", ".ckpt")
# Names under which training scripts save the weights beside other things.
STATES = ("state_dict", "model_state_dict", "model")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
MAX_JSON = 64 << 20  # bytes; the index of a model with a million tensors


def open_state(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a Hugging Face folder of one file or of shards.

    Raises:
      UserError: what is there cannot be read safely; the line says what would be right.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}")
    if path.suffix in SAFETENSORS:
        return tensor_files.read(path)
    if path.suffix in TORCH:
        return _open_torch(path)
    if path.suffix in NPZ:
        return _open_npz(path)
    known = ", ".join((*SAFETENSORS, *TORCH, *NPZ))
    raise UserError(f"{path}: weights of this kind are not read; a folder or one of {known}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; UserError where it is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is over {MAX_JSON >> 20} MiB; that is no config")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content


def _open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    for name in INDEXES:
        if (folder / name).is_file():
            return _open_shards(folder / name)
    for name in SINGLES:
        if (folder / name).is_file():
            return open_state(folder / name)
    names = ", ".join((*INDEXES, *SINGLES))
    raise UserError(f"{folder} holds no weights: none of {names}")


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no weight_map")
    for file in places.values():
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file and "\\" not in file
        if not plain or pathlib.PurePath(file).suffix not in (*SAFETENSORS, *TORCH):
            raise UserError(f"{index}: {str(file)[:200]!r} is not the name of a shard beside it")
    shards = {file: open_state(index.parent / file) for file in sorted(set(places.values()))}
    lacking = [name for name, file in places.items() if name not in shards[file]]
    listed = set(places)
    extra = [name for shard in shards.values() for name in shard if name not in listed]
    if lacking or extra:
        problems = [f"{name} is not in {places[name]}" for name in lacking]
        problems += [f"{name} is in no line of the index" for name in extra]
        raise UserError(f"{index} does not fit its shards: {'; '.join(problems)}")
    return {name: shards[file][name] for name, file in places.items()}


def _open_npz(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path}: not an npz of plain arrays: {_first(error)}") from error
    return {name: tensor_files.as_tensor(array) for name, array in arrays.items()}


def _open_torch(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: PyTorch files need torch (pip install torch), or convert to .safetensors"
        ) from error
    content = _load_torch(torch, path)
    state = next((content[key] for key in STATES if isinstance(content.get(key), Mapping)), content)
    found = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    others = sorted(str(name) for name in state.keys() - found.keys())
    if not found or (others and state is not content):
        what = f"{', '.join(others[:5])} are no tensors" if others else "it holds no tensors"
        raise UserError(f"{path}: not a dictionary of tensors, nor one with state_dict: {what}")
    if all(str(name).startswith("module.") for name in found):  # saved from a parallel wrapper
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return {str(name): _from_torch(torch, f"{path}: {name}", t) for name, t in found.items()}


def _load_torch(torch: Any, path: pathlib.Path) -> Mapping[str, Any]:
    # Only zip archives can be mapped; older files are read whole.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds pickled objects beside tensors, and unpickling them could run code: "
            f"{_reason(error)}; save its state_dict alone, best as .safetensors, where you trust it"
        ) from error
    except Exception as error:  # torch raises what its archive reader and unpickler happen to
        raise UserError(f"{path} is not a PyTorch file of weights: {_first(error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _reason(error: Exception) -> str:
    """The line of torch's long explanation that names the object."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or ["unknown"])[0][:200].rstrip(".")


def _from_torch(torch: Any, where: str, tensor: Any) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UserError(f"{where} is sparse or quantised; only plain tensors are read")
    halves = tensor.dtype is torch.bfloat16  # which numpy has by another package
    try:
        dtype = tensor_files.DTYPES["BF16"] if halves else np.dtype(str(tensor.dtype)[6:])
    except TypeError as error:
        raise UserError(f"{where} is of type {tensor.dtype}, which numpy does not have") from error

    def read() -> np.ndarray:
        if halves:
            return tensor.detach().contiguous().view(torch.int16).numpy().view(dtype)
        return tensor.detach().numpy()

    return Tensor(tuple(tensor.shape), dtype, read)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
