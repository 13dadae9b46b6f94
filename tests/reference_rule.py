"""Weights that nobody trained: a function of a parameter's name, shape and a seed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def rule_array(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """The float32 weight `name` of the reference numbers.

    Matrices and kernels (output dimension first) are normal with deviation 0.8 / sqrt(fan in),
    running variances log-normal, other `weight`s about 1, the rest (biases) about 0.
    """
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = generator.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) > 1:
        fan_in = np.prod(shape[1:])
        return (np.float32(0.8 / np.sqrt(fan_in)) * normal).astype(np.float32)
    small = np.float32(0.1) * normal
    if name.endswith("running_var"):
        return np.exp(small)
    return small + 1 if name.endswith("weight") else small


def shapes_of(file: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a reference file was computed with."""
    shapes = json.loads(str(file["weights_json"]))["shapes"]
    return {name: tuple(shape) for name, shape in shapes.items()}


def weights_of(file: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights themselves, by PyTorch name."""
    seed = json.loads(str(file["weights_json"]))["seed"]
    return {name: rule_array(name, shape, seed) for name, shape in shapes_of(file).items()}
