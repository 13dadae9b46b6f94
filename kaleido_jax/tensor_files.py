"""Safetensors files, one tensor at a time: written as they come, read where they lie on disk.

The package `safetensors` holds every tensor of a file in memory when it writes; a T5-XL is 11 GB.
Here a writer knows all shapes beforehand and holds one tensor, and a reader maps the file, so that
a tensor takes memory when it is used. Tensors start at multiples of 64 bytes where their sizes
allow it: what is aligned, jax uses on a CPU without a copy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from kaleido_jax.errors import UserError

# Names of the format -> numpy types.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64
CHUNK = 64 << 20  # bytes that are converted and written at once


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for: `np.asarray(tensor)` reads it, each time anew.

    Attributes:
      shape: of the array. dtype: of the array, as numpy names it.
      read: gives the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Shaped[np.ndarray, "..."]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=bool(copy))

    def changed(
        self, shape: tuple[int, ...], change: Callable[[np.ndarray], Shaped[np.ndarray, "..."]]
    ) -> Tensor:
        """The tensor that `change` makes of this one's array, when it is read."""
        return Tensor(shape, self.dtype, lambda: change(self.read()))


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, an array as one that is read already."""
    if isinstance(value, Tensor):
        return value
    return Tensor(tuple(value.shape), np.dtype(value.dtype), lambda: np.asarray(value))


Tensors = Mapping[str, Any]  # name -> Tensor, or an array of numpy or jax


def write(
    path: pathlib.Path,
    tensors: Tensors,
    dtype: str | None = None,
    tick: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes a safetensors file, holding one tensor at a time.

    Args:
      path: a new file; a failure leaves an incomplete one, so write where nobody looks.
      tensors: by name; read once each, in their order, what cannot be aligned last.
      dtype: of floating-point tensors in the file; their own by default.
      tick: called with the bytes of each tensor that is written.

    Raises:
      UserError: a type that the format does not have; a tensor that is not what it announced.
    """
    kinds = {name: _kind(name, value, dtype) for name, value in tensors.items()}
    sizes = sizes_of(tensors, dtype)
    # Whole multiples of the alignment first: then each of them starts at one. Else as they come.
    order = sorted(tensors, key=lambda name: sizes[name] % ALIGNMENT > 0)
    # Some readers insist on a format; it names the library whose conventions the names follow.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        header[name] = {
            "dtype": CODES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.asarray(tensors[name])
            if array.shape != tuple(tensors[name].shape):
                raise UserError(f"{name} has shape {array.shape}, not {tensors[name].shape}")
            _write_array(file, array, kinds[name])
            tick(sizes[name])
        file.flush()
        os.fsync(file.fileno())


def sizes_of(tensors: Tensors, dtype: str | None = None) -> dict[str, int]:
    """Bytes of each tensor in a file, its floating-point numbers as `dtype`; errors as `write`."""
    return {
        name: _kind(name, value, dtype).itemsize * math.prod(value.shape)
        for name, value in tensors.items()
    }


def _kind(name: str, value: Any, dtype: str | None) -> np.dtype:
    kind = np.dtype(value.dtype)
    if dtype is not None and is_floating(kind):
        kind = DTYPES["BF16"] if dtype == "bfloat16" else np.dtype(dtype)
    if kind not in CODES:
        raise UserError(f"{name} is of type {kind}; safetensors holds {', '.join(map(str, CODES))}")
    return kind


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers of a type have fractions, bfloat16 included."""
    return np.issubdtype(dtype, np.floating) or dtype == DTYPES["BF16"]


def _write_array(file: Any, array: np.ndarray, kind: np.dtype) -> None:
    """By rows, so that a conversion or a transposition never makes a second whole tensor."""
    array = array[None] if array.ndim == 0 else array
    rows = max(1, CHUNK * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        file.write(array[start : start + rows].astype(kind, copy=False).tobytes())


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, none of them read yet.

    Raises:
      UserError: a file that is missing, damaged or no safetensors file, or a type unknown here.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path)
    try:
        # The package checks that the header is whole, without holes and within the file.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, struct.error, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is not a safetensors file: {reason}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}


def _tensor(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} is of type {entry['dtype']}; one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    offset = start + entry["data_offsets"][0]

    def read_array() -> np.ndarray:
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        # A plain view of the map: subclasses of ndarray are copied in many places.
        return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)

    return Tensor(shape, dtype, read_array)
